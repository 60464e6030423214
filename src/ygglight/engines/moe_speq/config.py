"""What a user can say about experts in host memory and speculation over them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ygglight.engines.memory.sizes import parse_bytes

MOST = 64
"""Most tokens that may be drafted at once."""
BITS = 4
"""Of the draft's experts."""
STAGING = 4
"""Buffers of one expert: with fewer the link stands still while layers compute."""


@dataclass(frozen=True)
class Config:
    """Experts on demand, and a draft that says which.

    Args:
        expert_budget: Device memory that routed experts may take, in bytes or as "8GiB": the draft's copies, the slots
            of the cache and the staging buffers together. Everything else (attention, shared experts, KV cache) comes
            on top.
        k: Tokens to draft a cycle: "auto" measures this machine and chooses as it goes, and has a draft only while that
            is better than a larger cache; or a fixed number, with a draft from the beginning.
        k_max: Most tokens that "auto" drafts.
        max_cycle_seconds: "auto" drafts so few tokens that a cycle is thought to take no longer; None: any time.
        draft_bits: 4: a copy of the experts in four bits drafts; None: no draft, and all memory is cache.
        prefetch: Send experts ahead that the draft chose.
        prefetch_cap: Most bytes a cycle to send ahead; None: to slots as many as prove to be used, through staging all.
        staging: Buffers of one expert each, for experts that find no slot: those that the draft has named come through
            all but one of them while it drafts and while earlier layers compute.
        link: ``{"bandwidth": bytes a second, "latency": seconds a copy}``: slow copies down to what another machine's
            link would do; None: as fast as they go.
        experts: Where all experts are kept: "host", "disk", or "auto": host memory beside a GPU; a file where the
            device is itself the host.
        path: Of that file; None: in ygglight's cache folder. drop_cache: Read it past the page cache, as from a disk
            that is larger than the memory.
        draft: File of a draft that was made before; None: one is made when it is wanted, by rounding.
        device: Where the model runs; all of it but the experts is moved there. None: where it is.
        max_tokens: Longest text, prompt and answer together; None: whatever is asked for.
        profile_seconds: Most time spent on measuring what drafting and verifying take, once a machine and model.
    """

    expert_budget: int | str
    k: Any = "auto"
    k_max: int = 8
    max_cycle_seconds: float | None = None
    draft_bits: int | None = BITS
    prefetch: bool = True
    prefetch_cap: int | str | None = None
    staging: int = STAGING
    link: Mapping[str, float] | None = None
    experts: str = "auto"
    path: str | None = None
    drop_cache: bool = False
    draft: str | None = None
    device: str | None = None
    max_tokens: int | None = None
    profile_seconds: float = 10.0

    def __post_init__(self) -> None:
        parse_bytes(self.expert_budget)
        if self.prefetch_cap is not None:
            parse_bytes(self.prefetch_cap)
        if self.k != "auto" and not _whole(self.k, 0, MOST):
            raise ValueError(f"k={self.k!r} is neither 'auto' nor a whole number from 0 to {MOST}")
        for name, least, most in (("k_max", 0, MOST), ("staging", 1, 64)):
            if not _whole(getattr(self, name), least, most):
                raise ValueError(f"{name}={getattr(self, name)!r} must be a whole number from {least} to {most}")
        if self.draft_bits not in (None, BITS):
            raise ValueError(f"draft_bits={self.draft_bits!r}: give {BITS}, or None for no draft")
        if self.experts not in ("auto", "host", "disk"):
            raise ValueError(f"experts={self.experts!r}: they are kept on 'host' or 'disk' ('auto' chooses)")
        if self.max_cycle_seconds is not None and not self.max_cycle_seconds > 0:
            raise ValueError(f"max_cycle_seconds={self.max_cycle_seconds!r} must be more than 0")
        if self.max_tokens is not None and not _whole(self.max_tokens, 2, 2**31):
            raise ValueError(f"max_tokens={self.max_tokens!r} leaves no room for a prompt and a token")
        if self.link is not None:
            known = {"bandwidth", "latency"}
            if not isinstance(self.link, Mapping) or not set(self.link) <= known:
                raise ValueError(f"link={self.link!r} is not a mapping of bandwidth (bytes a second) and latency")
            numbers = all(isinstance(value, (int, float)) for value in self.link.values())
            if not numbers or self.link.get("bandwidth", 1) <= 0 or self.link.get("latency", 0) < 0:
                raise ValueError(f"link={dict(self.link)!r}: bandwidth must be a positive number, latency not negative")

    @property
    def budget(self) -> int:
        """``expert_budget`` in bytes."""
        return parse_bytes(self.expert_budget)

    @property
    def most(self) -> int:
        """The most tokens that a cycle may draft."""
        if self.draft_bits is None:
            return 0
        return self.k_max if self.k == "auto" else int(self.k)


def _whole(value: object, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
