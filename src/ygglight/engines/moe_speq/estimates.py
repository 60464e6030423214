"""What is learnt from the text so far: how often drafts are accepted, and which experts passes will miss."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from ygglight.engines.moe_speq.machine import between

DECAY = 0.9
"""What a cycle leaves of the weight of those before: some ten cycles count."""
STALE = 0.8
"""As ``DECAY``, of positions that the cycle did not come to."""
COMMON = 0.95
"""As ``DECAY``, by tested token and over all positions."""
PRIOR = 2.0
"""Cycles' worth of belief in what is thought before a thing was seen."""
HOPE = 0.9
"""Chance of acceptance that a draft is given before it was tried: what the paper reports for experts in four bits."""


@dataclass(frozen=True)
class Outlook:
    """What the text so far would have asked for, pass by pass, if it came in passes of other widths.

    Args:
        unique: Tokens of a pass -> experts of a layer that they take.
        missing: Tokens of a pass -> of these, those missing in the slots beside a draft.
        alone: Experts of a layer missing for one token where all memory is slots.
    """

    unique: Mapping[int, float]
    missing: Mapping[int, float]
    alone: float


class Acceptance:
    """Chances of acceptance by position, from tested positions alone: the first refused token ends what is known.

    What a position was like fades sooner where it is not tested any more, and then it is thought to be like the tokens
    that were tested last, whatever their position.
    """

    def __init__(self) -> None:
        self._tested: defaultdict[int, float] = defaultdict(float)
        self._kept: defaultdict[int, float] = defaultdict(float)
        self._common = HOPE

    def observe(self, k: int, accepted: int) -> None:
        """Take a cycle in that drafted k tokens, of which so many were accepted."""
        if not k:
            return
        last = min(k, accepted + 1)
        for position in self._tested:
            fade = DECAY if position <= last else STALE
            self._tested[position] *= fade
            self._kept[position] *= fade
        for position in range(1, last + 1):
            kept = position <= accepted
            self._tested[position] += 1
            self._kept[position] += kept
            self._common += (1 - COMMON) * (kept - self._common)

    def chances(self, k: int) -> list[float]:
        """Of the first k positions."""
        return [
            (self._kept[j] + PRIOR * self._common) / (self._tested[j] + PRIOR) if j in self._tested else self._common
            for j in range(1, k + 1)
        ]


class Demand:
    """Experts that passes after a draft take and miss, beside what the outlook says of them.

    An outlook knows the tokens of the text; a pass also has those that are then refused, and finds what was sent ahead.
    """

    def __init__(self) -> None:
        self._unique = self._missing = 1.0

    def observe(self, tokens: int, unique: float, missing: float, outlook: Outlook) -> None:
        """Take a pass in.

        Args:
            tokens: Of the pass. unique: Experts of a layer that it took. missing: Of them, those that were not there.
            outlook: Before it.
        """
        self._unique = _nearer(self._unique, unique, between(outlook.unique, tokens))
        self._missing = _nearer(self._missing, missing, between(outlook.missing, tokens))

    def unique(self, tokens: int, outlook: Outlook) -> float:
        """Experts of a layer that a pass takes."""
        return max(0.0, self._unique * between(outlook.unique, tokens))

    def missing(self, tokens: int, outlook: Outlook) -> float:
        """Of them, those that are not there when the cycle begins."""
        return min(self.unique(tokens, outlook), max(0.0, self._missing * between(outlook.missing, tokens)))


def _nearer(ratio: float, seen: float, thought: float) -> float:
    if thought <= 0:
        return ratio
    return DECAY * ratio + (1 - DECAY) * min(4.0, max(0.25, seen / thought))
