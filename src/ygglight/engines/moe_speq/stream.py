"""Experts that a draft has named, brought through staging while it drafts on and while earlier layers compute.

Slots hold what was used last, and a window of several tokens wants more than a layer has slots. A router that has just
run is the last to say what to copy; the draft said it before. So the link goes on working while layers compute.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable
from typing import TYPE_CHECKING

from ygglight.engines.moe_speq.link import Cause, Link, State, Ticket
from ygglight.engines.moe_speq.slots import Slab

if TYPE_CHECKING:
    from ygglight.engines.moe_speq.layout import SlabLayout

Copy = tuple[int, Slab, Ticket]
"""An expert on its way into a slab."""
SPARED = 1
"""Staging slabs that the stream leaves to the pass: with none left, neither could go on."""


class Staging:
    """The staging slabs that nobody uses.

    Args:
        slabs: All of them.
    """

    def __init__(self, slabs: Iterable[Slab]) -> None:
        self._free = deque(slabs)

    def take(self, spared: int = 0) -> Slab | None:
        """One that is free, if more than ``spared`` are."""
        return self._free.popleft() if len(self._free) > spared else None

    def give(self, slab: Slab) -> None:
        """It is free again; a copy into it may still be under way, for copies end in order."""
        self._free.append(slab)


class Stream:
    """What was planned for one target pass, layer by layer. For one thread.

    Args:
        layouts: One a layer. link: Brings the experts. staging: Where they go.
        resident: Whether an expert of a layer lies in a slot by now, or is on its way there.
    """

    def __init__(
        self,
        layouts: Iterable[SlabLayout],
        link: Link,
        staging: Staging,
        resident: Callable[[int, int], bool],
    ) -> None:
        self._layouts, self._link, self._staging, self._resident = tuple(layouts), link, staging, resident
        self._plan: deque[tuple[int, int]] = deque()
        self._coming: dict[tuple[int, int], Copy] = {}

    def coming(self, layer: int) -> list[int]:
        """Experts of a layer that are queued, under way, or there."""
        return [expert for number, expert in self._coming if number == layer]

    def plan(self, wanted: Iterable[tuple[int, int]]) -> int:
        """What is to come from now on, in the place of what was planned before and has not been queued.

        Args:
            wanted: (layer, expert), in the order of the layers, none of which is coming.

        Returns:
            Copies queued.
        """
        self._plan = deque(wanted)
        before = len(self._coming)
        self.fill()
        return len(self._coming) - before

    def fill(self) -> None:
        """Queue the copies that there is room for."""
        while self._plan:
            layer, expert = self._plan[0]
            if self._resident(layer, expert):
                self._plan.popleft()
                continue
            slab = self._staging.take(SPARED)
            if slab is None:
                return
            self._plan.popleft()
            out = slab.bytes_of(self._layouts[layer])
            try:
                ticket = self._link.submit(layer, expert, out, Cause.PREFETCH, slab.last_use)
            except BaseException:
                self._staging.give(slab)
                raise
            self._coming[layer, expert] = expert, slab, ticket

    def take(self, layer: int, wanted: Collection[int]) -> tuple[list[Copy], int]:
        """A layer's router has run: what has begun to come for it, and who came for nothing.

        What only waits is withdrawn: the pass asks for it itself, with priority. Whoever is taken gives the slab back.

        Args:
            layer: Which. wanted: Its experts.

        Returns:
            Copies of wanted experts, done or under way; how many others had begun.
        """
        while self._plan and self._plan[0][0] <= layer:
            self._plan.popleft()
        taken, unused = [], 0
        for number, expert in [each for each in self._coming if each[0] <= layer]:
            copy = self._coming.pop((number, expert))
            _, slab, ticket = copy
            begun = not self._link.cancel(ticket)
            if begun and number == layer and expert in wanted and ticket.state is not State.FAILED:
                taken.append(copy)
                continue
            unused += begun
            self._staging.give(slab)
        self.fill()
        return taken, unused

    def end(self) -> None:
        """The pass is over, or failed: nothing more is to come."""
        self._plan.clear()
        for _, slab, ticket in self._coming.values():
            self._link.cancel(ticket)
            self._staging.give(slab)
        self._coming.clear()
