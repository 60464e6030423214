"""What a batcher has to do, and the one forward of it that goes next."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ygglight.engines.harli.requests import Request
from ygglight.engines.harli.steps import Sequence


@dataclass(frozen=True)
class Load:
    """What there is to do, in numbers.

    Args:
        batch: Sequences that a decode step would run. context_tokens: Their tokens, in whole pages.
        waiting: Requests that were not admitted yet. prefill_tokens: Prompt tokens of admitted requests still to run.
    """

    batch: int
    context_tokens: int
    waiting: int
    prefill_tokens: int


@dataclass(frozen=True)
class Work:
    """One forward to run.

    Args:
        kind: "prefill", a chunk of one request; or "decode", a token of each.
        requests: Whose. tokens: That the forward runs. context_tokens: That it attends to, in whole pages, over all.
    """

    kind: Literal["prefill", "decode"]
    requests: tuple[Request, ...]
    tokens: int
    context_tokens: int
    sequences: tuple[Sequence, ...] = field(repr=False)
