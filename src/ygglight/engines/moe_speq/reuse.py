"""Reuse distances: how many requests an LRU cache of any size would have missed, from one pass over the requests."""

from __future__ import annotations

from collections.abc import Sequence

REMEMBERED = 512
"""Tokens of a text after which the older ones count half: texts change."""


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
        self._counts: list[list[float]] = [[0] * experts for _ in range(layers)]  # by distance
        self._requests: list[float] = [0] * layers
        self.groups: list[float] = [0] * layers

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

    def requests(self, layer: int | None = None) -> float:
        """Requests of a layer, or of all."""
        return sum(self._requests) if layer is None else self._requests[layer]

    def misses(self, slots: int, layer: int | None = None) -> float:
        """Requests that LRU with this many slots a layer would have missed.

        Args:
            slots: 0 or more. layer: One layer, or None: all.
        """
        if layer is None:
            return sum(self.misses(slots, each) for each in range(len(self._counts)))
        return self._requests[layer] - sum(self._counts[layer][:slots])

    def fade(self, layer: int) -> None:
        """Let what was counted weigh half as much; the stack stays.

        Args:
            layer: Whose.
        """
        self._counts[layer] = [count / 2 for count in self._counts[layer]]
        self._requests[layer] /= 2
        self.groups[layer] /= 2


class WindowReuse:
    """What a text asks for if it is taken in passes of n tokens, for several n at once.

    Args:
        layers: Sparse layers. experts: Most experts of a layer. widths: The n, ascending.
    """

    def __init__(self, layers: int, experts: int, widths: Sequence[int]) -> None:
        self.widths = tuple(widths)
        self._layers, self._experts = layers, experts
        self._by_width = {n: ReuseDistances(layers, experts) for n in self.widths}
        self._pending: list[dict[int, list[Sequence[int]]]] = [{n: [] for n in self.widths} for _ in range(layers)]

    def observe(self, layer: int, row: Sequence[int]) -> None:
        """The next token of the text.

        Args:
            layer: Which. row: Its experts.
        """
        for n, rows in self._pending[layer].items():
            rows.append(row)
            if len(rows) == n:
                ranked = row if n == 1 else [expert for each in reversed(rows) for expert in each]
                reuse = self._by_width[n]
                reuse.observe(layer, tuple(dict.fromkeys(ranked)))
                rows.clear()
                if n * reuse.groups[layer] >= REMEMBERED:
                    reuse.fade(layer)

    def warm(self, layer: int, ranked: Sequence[int]) -> None:
        """A prompt; see :meth:`ReuseDistances.warm`. Another text begins: tokens of two share no window."""
        for n, reuse in self._by_width.items():
            reuse.warm(layer, ranked)
            self._pending[layer][n].clear()

    def unique(self, n: int, top_k: int) -> float:
        """Experts of a layer that n tokens take, in the mean; before any were seen, as many as they can.

        Args:
            n: One of the widths. top_k: Experts a token.
        """
        reuse = self._by_width[n]
        groups = sum(reuse.groups)
        return reuse.requests() / groups if groups else float(min(self._experts, n * top_k))

    def missing(self, n: int, slots: int, top_k: int) -> float:
        """Of these, those that LRU with so many slots a layer would miss; before any were seen, all.

        Args:
            n: See :meth:`unique`. slots: A layer. top_k: See :meth:`unique`.
        """
        reuse = self._by_width[n]
        groups = sum(reuse.groups)
        return reuse.misses(slots) / groups if groups else self.unique(n, top_k)
