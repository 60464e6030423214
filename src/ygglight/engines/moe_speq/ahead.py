"""How much to send ahead of a pass, and when to plan again."""

from __future__ import annotations

from collections.abc import Mapping

from ygglight.engines.memory.sizes import parse_bytes
from ygglight.engines.moe_speq.budget import Split
from ygglight.engines.moe_speq.config import Config
from ygglight.engines.moe_speq.lookahead import steps_until_sent
from ygglight.engines.moe_speq.speed import Speed

WASTE = 0.15
"""Part of the bytes sent to slots that may turn out to be for nothing before less is sent."""
LEAST = 0.05
"""Share of all slots that may be sent to in any case: or nothing would be learnt any more."""


class Ahead:
    """Bounds on prefetches, learnt from what became of earlier ones.

    Args:
        config: What the user said. split: Of the memory. experts: Over all layers. speed: Of the link.
    """

    def __init__(self, config: Config, split: Split, experts: int, speed: Speed) -> None:
        self._config, self._split, self._experts, self._speed = config, split, experts, speed
        self._share = 1.0
        self.draft_token = 0.0
        """Seconds a drafted token; 0: not known yet."""

    @property
    def cap(self) -> int:
        """Bytes that may be sent ahead in a cycle."""
        if not self._config.prefetch:
            return 0
        if self._config.prefetch_cap is not None:
            return parse_bytes(self._config.prefetch_cap)
        return self._experts * self._split.slab

    @property
    def to_slots(self) -> int:
        """Of these, bytes that may go to slots, and evict somebody."""
        return min(self.cap, max(1, int(self._share * self._split.slots * self._split.layers)) * self._split.slab)

    def pause(self, sent: int) -> int:
        """Drafted tokens until it makes sense to plan again.

        Args:
            sent: Bytes that were just queued.
        """
        return steps_until_sent(self._speed.seconds(sent, sent / self._split.slab), self.draft_token)

    def hides(self, steps: int) -> float:
        """Copies that end while so many tokens are drafted."""
        return steps * self.draft_token / self._speed.seconds(self._split.slab)

    def drafted(self, k: int, seconds: float) -> None:
        """So many tokens took so long to draft."""
        self.draft_token += (0.25 if self.draft_token else 1.0) * (seconds / k - self.draft_token)

    def learn(self, new: Mapping[str, int]) -> None:
        """Send less where much was for nothing.

        Args:
            new: Counts of a cycle: "prefetched", of them "streamed" through staging; "unused", of them "in_vain"
                streamed; "evicted"; and "displaced", see :class:`~ygglight.engines.moe_speq.stats.Stats`.
        """
        sent = new["prefetched"] - new["streamed"]
        if sent > 0:
            wasted = (new["unused"] - new["in_vain"] + new["evicted"] + new["displaced"]) / sent
            self._share = min(1.0, max(LEAST, self._share * (0.8 if wasted > WASTE else 1.1)))
