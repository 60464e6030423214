"""What a cycle of drafting and verifying takes on this machine.

    T(k) = k T_draft + max(T_verify(k + 1) + unforeseen T_copy, (missing - ahead) T_copy)

Of the experts that are missing when the cycle begins, ``ahead`` are copied while tokens are drafted, as many as there
are places for. The draft has named nearly all others, and they come while the target computes; the few that it has not
named are known when their layer's router has run, and the layer waits. Without a draft that is true of all: then the
larger of computing and copying would be too good a promise, and what counts is the sum.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ygglight.engines.moe_speq.lookahead import observed_steps
from ygglight.engines.moe_speq.stream import SPARED

_WIDTHS = (1, 2, 3, 5, 9, 13, 17, 25, 33, 65)


@dataclass(frozen=True)
class Machine:
    """Costs of the parts of a cycle, measured while copies run.

    Args:
        draft_token: Seconds a drafted token.
        verify: Tokens of a target pass -> its seconds where all of them take the same experts and wait for none.
        expert: Seconds more for each other expert that a layer computes.
        copy: Seconds a copy of one expert.
        layers: Sparse layers. top_k: Experts a token and layer.
        slots: Of a layer, beside a draft. staging: Slabs beside those.
        ahead: Most copies a cycle that may be sent ahead; 0: none is.
    """

    draft_token: float
    verify: Mapping[int, float]
    expert: float
    copy: float
    layers: int
    top_k: int
    slots: int
    staging: int
    ahead: float = math.inf

    def at(self, copy: float, draft_token: float) -> Machine:
        """The same machine with other times for a copy and for a drafted token."""
        return replace(self, copy=copy, draft_token=draft_token)

    def verifying(self, tokens: int, unique: float) -> float:
        """Seconds of a target pass that waits for no expert.

        Args:
            tokens: Of the pass. unique: Experts of a layer that they take.
        """
        more = self.layers * self.expert * max(0.0, unique - self.top_k)
        return max(0.0, between(self.verify, tokens)) + more

    def cycle(self, k: int, unique: float, missing: float, foreseen: float = 1.0) -> float:
        """Seconds of a cycle.

        Args:
            k: Drafted tokens. unique: Experts of a layer that the pass over k + 1 tokens takes.
            missing: Of them, those that are not there when the cycle begins.
            foreseen: Part of the missing ones that the draft's routes name.
        """
        total = self.layers * missing
        known = min(self.ahead, foreseen * total) if k else 0.0
        window = (k - observed_steps(k)) * self.draft_token if k else 0.0
        places = self.layers * max(0.0, self.slots - (unique - missing)) + self.staging - SPARED
        early = min(known, places, window / self.copy if self.copy else math.inf)
        if self.staging <= SPARED:  # nothing comes while the target computes
            known = early
        computing, copying = self.verifying(k + 1, unique), (total - early) * self.copy
        return k * self.draft_token + max(computing + (total - known) * self.copy, copying)


def between(table: Mapping[int, float], n: int) -> float:
    """A table's value: between two entries on the line through them, beyond the last on that of the last two.

    Args:
        table: Not empty. n: Where.
    """
    known = sorted(table)
    if n in table or len(known) == 1:
        return table.get(n, table[known[0]])
    right = min(max(1, next((i for i, m in enumerate(known) if m > n), len(known))), len(known) - 1)
    low, high = known[right - 1], known[right]
    return table[low] + (table[high] - table[low]) / (high - low) * (n - low)


def tokens_expected(chances: list[float]) -> float:
    """Tokens of a cycle: the accepted ones and the target's own.

    Args:
        chances: Of each drafted token to be accepted if those before it were.
    """
    total, survival = 1.0, 1.0
    for chance in chances:
        survival *= chance
        total += survival
    return total


def candidates(k_max: int) -> tuple[int, ...]:
    """The choices from 0 to ``k_max``; far ones in larger steps, where one token more changes little."""
    return (*(k for k in (*range(9), 12, 16, 24, 32, 48, 64) if k < k_max), k_max)


def widths(k_max: int) -> tuple[int, ...]:
    """Tokens of the passes that are looked at closely; what lies between is taken from their neighbours.

    Args:
        k_max: Most tokens that are drafted.
    """
    return (*(n for n in _WIDTHS if n <= k_max), k_max + 1)
