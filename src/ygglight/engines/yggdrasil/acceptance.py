"""How often the draft's first, second, ... candidate is the target's token, learnt as the text is made."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

PRIOR = (0.6, 0.12, 0.05, 0.03, 0.02, 0.015, 0.01, 0.01)


class RankAcceptance:
    """Running shares a_k = P(target's token is the draft's candidate of rank k | the parent was accepted).

    Args:
        ranks: how many are told apart. prior: the shares before anything was seen; the last value goes on halving.
        weight: how many observations the prior counts for. memory: observations after which one counts 1/e: text
            changes.
    """

    def __init__(self, ranks: int, prior: Sequence[float] = PRIOR, weight: float = 12.0, memory: float = 400.0) -> None:
        shares = list(prior[:ranks])
        while len(shares) < ranks:
            shares.append(shares[-1] / 2)
        if sum(shares) > 1:
            raise ValueError(f"the prior shares add up to {sum(shares):.2f}, more than 1")
        self._hits = [share * weight for share in shares]
        self._total = weight
        self._decay = 1 - 1 / memory

    def observe(self, rank: int | None) -> None:
        """At a node the target's token was the draft's candidate of this rank, from 0; None: none of them."""
        self._hits = [hits * self._decay for hits in self._hits]
        self._total = self._total * self._decay + 1
        if rank is not None and rank < len(self._hits):
            self._hits[rank] += 1

    @property
    def rates(self) -> tuple[float, ...]:
        """The shares, made non-increasing (rank k+1 is taken after rank k)."""
        rates: list[float] = []
        for hits in self._hits:
            rates.append(min(hits / self._total, rates[-1] if rates else 1.0))
        return tuple(rates)

    def state_dict(self) -> dict[str, Any]:
        """Primitives."""
        return {"hits": list(self._hits), "total": self._total}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse."""
        self._hits, self._total = list(state["hits"]), float(state["total"])


@lru_cache(maxsize=4096)
def expected_tree(rates: tuple[float, ...], width: int, depth: int) -> tuple[float, ...]:
    """Values of an equal-growth tree in which every node's children have the same chances.

    Positional acceptance as in Sequoia's search; a real tree, grown from the draft's probabilities, adapts to the text
    and does no worse.

    Args:
        rates: a_1, a_2, ... of the children of any accepted node. width: new nodes a step. depth: steps.

    Returns:
        Probability of each of the ``1 + width * depth`` nodes, the largest first, the root's 1 among them: the first k
        add up to the tokens expected when k nodes are verified.
    """
    found, pool, count = [1.0], list[tuple[float, int]](), 0
    frontier = [1.0]
    for _ in range(depth):
        for value in frontier:
            for rate in rates[:width]:
                heapq.heappush(pool, (-value * rate, count))
                count += 1
        frontier = [-heapq.heappop(pool)[0] for _ in range(min(width, len(pool)))]
        found += frontier
    return tuple(sorted(found, reverse=True))
