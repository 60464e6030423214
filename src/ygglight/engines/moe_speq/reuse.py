"""Reuse distances: how many requests an LRU cache of any size would have missed, from one pass over the requests."""

from __future__ import annotations

from collections.abc import Sequence


class ReuseDistances:
    """Mattson's stack algorithm (1970) for requests that come in groups, one stack a layer.

    The members of a group are wanted at once: a cache that holds some of them keeps these and evicts others, as
    :class:`~ygglight.engines.moe_speq.cache.LayerCache` does. So a request is a hit in M slots exactly if it is among
    the first M of the stack before its group. A request for what the stack does not hold is a miss in any cache.

    Args:
        layers: How many stacks.
        experts: The most experts of a layer.
    """

    def __init__(self, layers: int, experts: int) -> None:
        self.experts = experts
        self._stacks: list[list[int]] = [[] for _ in range(layers)]  # the most recent first
        self._counts = [[0] * experts for _ in range(layers)]  # by distance
        self._requests = [0] * layers
        self.groups = [0] * layers

    def observe(self, layer: int, ranked: Sequence[int]) -> None:
        """Count one group.

        Args:
            layer: Whose. ranked: Unique experts, the one to keep longest first.
        """
        wanted, counts, below = set(ranked), self._counts[layer], []
        for distance, expert in enumerate(self._stacks[layer]):
            if expert in wanted:
                counts[distance] += 1
            else:
                below.append(expert)
        self._stacks[layer] = [*ranked, *below]
        self._requests[layer] += len(wanted)
        self.groups[layer] += 1

    def warm(self, layer: int, ranked: Sequence[int]) -> None:
        """A prompt fills slots that are empty, and moves nothing: not counted, but remembered below all else.

        Args:
            layer: Whose. ranked: Unique experts, the one to keep longest first.
        """
        stack = self._stacks[layer]
        held = set(stack)
        stack.extend(expert for expert in ranked if expert not in held)

    def requests(self, layer: int | None = None) -> int:
        """Requests of a layer, or of all."""
        return sum(self._requests) if layer is None else self._requests[layer]

    def misses(self, slots: int, layer: int | None = None) -> int:
        """Requests that LRU with this many slots a layer would have missed.

        Args:
            slots: 0 or more. layer: One layer, or None: all.
        """
        if layer is None:
            return sum(self.misses(slots, each) for each in range(len(self._counts)))
        return self._requests[layer] - sum(self._counts[layer][:slots])

    def miss_rate(self, slots: int, layer: int | None = None) -> float:
        """Share of the requests that LRU would have missed; 1.0 before any request, for a cache begins empty.

        Args:
            slots: See :meth:`misses`. layer: See :meth:`misses`.
        """
        requests = self.requests(layer)
        return self.misses(slots, layer) / requests if requests else 1.0
