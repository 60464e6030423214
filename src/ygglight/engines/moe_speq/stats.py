"""What the cache and the prefetches did. Counted where an expert is wanted, once a layer and pass, prompts apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

from ygglight.engines.moe_speq.link import Cause, Traffic
from ygglight.engines.moe_speq.reuse import WindowReuse


class Stats:
    """Counts of a runtime.

    A *request* is a unique (layer, expert) of one target pass. It is a *hit* if the expert is there when the pass wants
    it, in a slot or in staging, *late* if a prefetch of it is under way then, else a *miss*. A prefetch that only waits
    in the queue is withdrawn and counts as a miss.

    Args:
        layers: Sparse layers. experts: Most experts of a layer. traffic: Of the link, which counts bytes.
        widths: Tokens of passes that the text is taken in, to say what they would ask for; 1 is one of them.
    """

    def __init__(self, layers: int, experts: int, traffic: Traffic, widths: Sequence[int] = (1,)) -> None:
        self._sizes, self.widths = (layers, experts), widths
        self.traffic = traffic
        self.reset()

    def reset(self) -> None:
        """Count from zero, reuse distances too; what lies in the slots stays."""
        layers, experts = self._sizes
        self.traffic.clear()
        self.requests = [0] * layers
        self.hits = [0] * layers
        self.late = [0] * layers
        self.unused = [0] * layers
        """Prefetched into a slot for a pass that then did not want it."""
        self.streamed = [0] * layers
        """Brought through staging for a pass, as far as the copy had begun when the layer ran."""
        self.in_vain = [0] * layers
        """Of those, what the pass did not want."""
        self.evicted = [0] * layers
        """Prefetched and thrown out before any pass wanted it."""
        self.ahead = [0] * layers
        """Wanted by a pass, and there or under way for it because it was sent ahead."""
        self.displaced = [0] * layers
        """Thrown out by a prefetch for a pass that then wanted it: nothing was gained."""
        self._foreseen = [0] * layers  # of what was wanted after a draft
        self._wanted = [0] * layers  # after a draft
        self._drawn = [0] * layers  # by drafts
        self.text = WindowReuse(layers, experts, self.widths)
        """Reuse along the text: predicts passes of other widths, if the loop says what it kept."""

    def demand(self, layer: int, ranked: Sequence[int], late: int, misses: int) -> None:
        """A pass wants experts of a layer.

        Args:
            layer: Which. ranked: Unique experts, the one to keep longest first. late: Of them, on the way.
            misses: Of them, neither there nor on the way.
        """
        self.requests[layer] += len(ranked)
        self.late[layer] += late
        self.hits[layer] += len(ranked) - late - misses

    def prompt(self, layer: int, ranked: Sequence[int]) -> None:
        """A prompt wants experts of a layer: no request, but they may be there when decoding begins.

        Args:
            layer: See :meth:`demand`. ranked: See :meth:`demand`.
        """
        self.text.warm(layer, ranked)

    def compare(self, layer: int, drawn: Collection[int], wanted: Collection[int]) -> None:
        """How well a draft foresaw the pass after it.

        Args:
            layer: Which. drawn: Experts that the draft's routers chose. wanted: Those that the pass wants.
        """
        self._foreseen[layer] += len(set(drawn) & set(wanted))
        self._wanted[layer] += len(wanted)
        self._drawn[layer] += len(drawn)

    def committed(self, layer: int, routes: Sequence[int], top_k: int) -> None:
        """The tokens of a pass that became text.

        Args:
            layer: Which. routes: Experts of their rows, one row after the other. top_k: Experts a row.
        """
        for start in range(0, len(routes), top_k):
            self.text.observe(layer, tuple(dict.fromkeys(routes[start : start + top_k])))

    @property
    def recall(self) -> list[float]:
        """Of what passes after a draft wanted, the share that the draft had drawn; by layer, 0.0 before any."""
        return [a / b if b else 0.0 for a, b in zip(self._foreseen, self._wanted, strict=True)]

    @property
    def precision(self) -> list[float]:
        """Of what drafts had drawn, the share that the pass wanted; by layer, 0.0 before any."""
        return [a / b if b else 0.0 for a, b in zip(self._foreseen, self._drawn, strict=True)]

    @property
    def experts(self) -> Counter[str]:
        """Counts over all layers: requests = hits + late + misses; prefetched = copied ahead."""
        requests, hits, late = sum(self.requests), sum(self.hits), sum(self.late)
        return Counter(
            requests=requests, hits=hits, late=late, misses=requests - hits - late,
            prefetched=self.traffic.copies[Cause.PREFETCH], unused=sum(self.unused) + sum(self.in_vain),
            evicted=sum(self.evicted),
        )  # fmt: skip

    @property
    def moved(self) -> Counter[str]:
        """Bytes copied to the device, by cause."""
        return Counter({cause.value: self.traffic.nbytes[cause] for cause in Cause})

    def to_dict(self) -> dict[str, Any]:
        """Primitives only."""
        return {
            **self.experts,
            "bytes": dict(self.moved),
            "copies": {cause.value: self.traffic.copies[cause] for cause in Cause},
            "failed": {cause.value: self.traffic.failed[cause] for cause in Cause},
            "withdrawn": {cause.value: self.traffic.cancelled[cause] for cause in Cause},
            "recall": self.recall,
            "precision": self.precision,
        }
