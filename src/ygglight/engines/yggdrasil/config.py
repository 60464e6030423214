"""What a user can say about tree speculative decoding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

WIDTHS = (1, 2, 4, 8)
BUCKETS = (2, 4, 6, 8, 12, 16, 24, 32, 48, 64)
MAX_DEPTH = 8


@dataclass(frozen=True)
class StagePlan:
    """What of an iteration is done before it is known to be needed (brief A.4).

    Args:
        tail: also run the draft over the last nodes that it drafted, so that whichever path is accepted, its keys and
            values are there; else the next head pass takes one token more when they are not.
        head: run the draft over the bonus token before the host has read what was accepted. Needs ``tail``.
        prune: "tree" chooses how much of each very tree to verify, which costs a host read between draft and
            verification; "fixed" verifies as many nodes as paid off on average.
    """

    tail: bool = False
    head: bool = False
    prune: str = "tree"

    def __post_init__(self) -> None:
        if self.head and not self.tail:
            raise ValueError("a stage plan with head=True needs tail=True: the head pass builds on the tail's keys")
        if self.prune not in ("tree", "fixed"):
            raise ValueError(f"prune={self.prune!r} is neither 'tree' nor 'fixed'")

    def __str__(self) -> str:
        parts = [name for name, on in (("tail", self.tail), ("head", self.head)) if on]
        return "+".join([*parts, self.prune])


PLANS = tuple(
    StagePlan(tail, head, prune)
    for tail, head in ((False, False), (True, False), (True, True))
    for prune in ("tree", "fixed")
)


@dataclass(frozen=True)
class Config:
    """Tree speculative decoding.

    Args:
        tree: "auto" measures this machine and chooses depth, width and verified nodes as it goes; or fixed numbers,
            ``{"width": 4, "depth": 4, "verify": 12}`` (``verify`` may be left out: all nodes).
        plan: "auto" tries the stage plans on a GPU and freezes the fastest (on a CPU nothing overlaps, and the
            plainest is taken); or one :class:`StagePlan` as a mapping.
        max_depth: deepest tree that "auto" tries. max_width: its widest. max_verify: most nodes that it verifies at
            once.
        predictor: directory of a depth predictor (recipe ``yggdrasil/fit_depth_predictor.yaml``).
        log: directory to which every iteration is written, to fit a depth predictor from.
        max_tokens: longest text, prompt and answer together; None: whatever is asked for.
        compile: run target and draft through ``torch.compile``.
        profile_seconds: most time spent on measuring latencies, once a machine and model.
    """

    tree: Any = "auto"
    plan: Any = "auto"
    max_depth: int = MAX_DEPTH
    max_width: int = WIDTHS[-1]
    max_verify: int = BUCKETS[-1]
    predictor: str | None = None
    log: str | None = None
    max_tokens: int | None = None
    compile: bool = False
    profile_seconds: float = 20.0

    def __post_init__(self) -> None:
        for name, most in (("max_depth", 64), ("max_width", 64), ("max_verify", 128)):
            value = getattr(self, name)
            if not isinstance(value, int) or not 1 <= value <= most:
                raise ValueError(f"{name}={value!r} must be a whole number from 1 to {most}")
        if self.max_tokens is not None and self.max_tokens < 2:
            raise ValueError(f"max_tokens={self.max_tokens} leaves no room for a prompt and a token")
        self.fixed_tree()
        self.fixed_plan()

    def fixed_tree(self) -> tuple[int, int, int] | None:
        """(width, depth, verified nodes), or None for "auto".

        Raises:
            ValueError: ``tree`` is neither.
        """
        if self.tree == "auto":
            return None
        if not isinstance(self.tree, Mapping) or not {"width", "depth"} <= set(self.tree) <= {
            "width",
            "depth",
            "verify",
        }:
            raise ValueError(
                f"tree={self.tree!r} is neither 'auto' nor numbers like {{'width': 4, 'depth': 4, 'verify': 12}}"
            )
        width, depth = self.tree["width"], self.tree["depth"]
        verify = self.tree.get("verify") or 1 + width * depth
        for name, value, least, most in (("width", width, 1, 64), ("depth", depth, 1, 64), ("verify", verify, 2, 4097)):
            if not isinstance(value, int) or not least <= value <= most:
                raise ValueError(f"tree: {name}={value!r} must be a whole number from {least} to {most}")
        return width, depth, min(verify, 1 + width * depth)

    def fixed_plan(self) -> StagePlan | None:
        """The plan that was asked for, or None for "auto".

        Raises:
            ValueError: ``plan`` is neither.
        """
        if self.plan == "auto":
            return None
        if isinstance(self.plan, StagePlan):
            return self.plan
        if not isinstance(self.plan, Mapping) or not set(self.plan) <= {"tail", "head", "prune"}:
            raise ValueError(f"plan={self.plan!r} is neither 'auto' nor a mapping of tail, head and prune")
        return StagePlan(**self.plan)
