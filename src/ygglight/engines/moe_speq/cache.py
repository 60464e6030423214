"""Which experts of one layer stay in its slots: decisions on numbers, no tensors and no waiting."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

TRUST = 0.5
"""Share of a layer's prefetches that has to prove right before they may evict what the last window used."""
_KEPT = 0.75  # of the running mean of that share, a window


class Taken(NamedTuple):
    """A slot for an expert.

    Args:
        slot: Its index. evicted: Who was there, or None. wasted: It had been prefetched and was never wanted.
    """

    slot: int
    evicted: int | None
    wasted: bool


class Split(NamedTuple):
    """How the experts of a window that are not resident come in.

    Args:
        slots: Those that stay. passing: Those that are used once, out of staging.
    """

    slots: list[int]
    passing: list[int]


class Sent(NamedTuple):
    """What was sent ahead for a window.

    Args:
        used: Experts that it wants. unused: Others.
    """

    used: int
    unused: int


class LayerCache:
    """Least recently used first, with two rules of its own.

    Demand: what a window wants and finds is used before it can be evicted, so each of its other experts is copied once
    and no more. After it the slots hold the first M of its experts as ranked, then the most recently used others: LRU
    by groups, which :class:`~ygglight.engines.moe_speq.reuse.ReuseDistances` predicts exactly as long as nothing is
    sent ahead. What comes through staging takes no slot.

    Prefetch: it evicts nothing that the draft asked for in the same window. The bound against churn: it evicts nothing
    that the last window used either, unless the layer's prefetches have mostly (:data:`TRUST`) been right of late: what
    was just used is wanted again about every second time, and a worse guess than that would only move bytes. What was
    sent ahead and not wanted is the first to go.

    Args:
        slots: How many, 1 or more.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.precision = 1.0
        """Running mean of the share of prefetched experts that the next window wanted."""
        self._where: OrderedDict[int, int] = OrderedDict()  # expert -> slot, the coldest first
        self._free = list(range(slots - 1, -1, -1))
        self._last: frozenset[int] = frozenset()  # what the last window wanted
        self._fresh: set[int] = set()  # prefetched since the last window
        self._unproved: set[int] = set()  # prefetched and never wanted since

    def __contains__(self, expert: int) -> bool:
        return expert in self._where

    def __getitem__(self, expert: int) -> int:
        return self._where[expert]

    @property
    def residents(self) -> list[int]:
        """Experts in slots, being copied there included, the coldest first."""
        return list(self._where)

    @property
    def free(self) -> int:
        """Slots that hold nothing."""
        return len(self._free)

    def staying(self, ranked: Sequence[int], coming: Collection[int] = ()) -> set[int]:
        """Of the experts of a window those that the slots hold after it.

        Args:
            ranked: See :meth:`split`. coming: See there.
        """
        return set([expert for expert in ranked if expert not in coming][: self.slots])

    def split(self, ranked: Sequence[int], coming: Collection[int] = (), *, prefill: bool) -> Split:
        """Where the missing experts of a window go.

        Args:
            ranked: All that it wants, the one to keep longest first. coming: Of them, those that staging brings.
            prefill: A prompt wants nearly all experts: it may fill empty slots, and evicts nothing.
        """
        missing = [expert for expert in ranked if expert not in self._where and expert not in coming]
        if prefill:
            return Split(missing[: self.free], missing[self.free :])
        stay = self.staying(ranked, coming)
        return Split([e for e in missing if e in stay], [e for e in missing if e not in stay])

    def take(self, expert: int, spared: Collection[int], *, prefetch: bool = False) -> Taken | None:
        """Give an expert a slot: an empty one, else the coldest resident's.

        Args:
            expert: Not resident. spared: Who must not be evicted. prefetch: Nobody has wanted it yet.

        Returns:
            None if all slots are spared.
        """
        evicted, wasted = None, False
        if not self._free:
            evicted = next((each for each in self._where if each not in spared), None)
            if evicted is None:
                return None
            wasted = evicted in self._unproved
            self.drop(evicted)
        slot = self._where[expert] = self._free.pop()
        if prefetch:
            self._fresh.add(expert)
            self._unproved.add(expert)
        return Taken(slot, evicted, wasted)

    def drop(self, expert: int) -> None:
        """Its slot is free again: the copy failed, or was given up.

        Args:
            expert: A resident.
        """
        self._free.append(self._where.pop(expert))
        self._fresh.discard(expert)
        self._unproved.discard(expert)

    def spared(self, wanted: Iterable[int]) -> set[int]:
        """Whom a prefetch leaves alone.

        Args:
            wanted: All that the draft has asked for in this window.
        """
        return {*wanted, *self._last} if self.precision < TRUST else set(wanted)

    def room(self, spared: Collection[int]) -> int:
        """How many experts could be taken in.

        Args:
            spared: Who must not be evicted.
        """
        return self.free + sum(expert not in spared for expert in self._where)

    def demand(self, ranked: Sequence[int]) -> Sent:
        """A window wants these; call it before they are taken in.

        Args:
            ranked: See :meth:`split`.

        Returns:
            What was prefetched into slots for it.
        """
        self._last = frozenset(ranked)
        unused, sent = self._fresh - self._last, len(self._fresh)
        if self._fresh:
            right = 1 - len(unused) / len(self._fresh)
            self.precision = _KEPT * self.precision + (1 - _KEPT) * right
        for expert in unused:
            self._where.move_to_end(expert, last=False)
        self._fresh.clear()
        self._unproved -= self._last
        return Sent(sent - len(unused), len(unused))

    def touch(self, ranked: Sequence[int]) -> None:
        """Make these the most recently used, the first of them most of all.

        Args:
            ranked: See :meth:`split`; those that are not resident are passed over.
        """
        for expert in reversed(ranked):
            if expert in self._where:
                self._where.move_to_end(expert)

    def cool(self, ranked: Sequence[int]) -> None:
        """Make these the least recently used, the last of them most of all: a prompt brought them into empty slots.

        Args:
            ranked: See :meth:`split`; those that are not resident are passed over.
        """
        for expert in ranked:
            if expert in self._where:
                self._where.move_to_end(expert, last=False)

    def resize(self, slots: int) -> list[tuple[int, int]]:
        """Change the number of slots; the most recently used stay.

        Args:
            slots: How many, 1 or more.

        Returns:
            (old slot, new slot) of those that stay.
        """
        stay = self.residents[-slots:]
        moves = [(self._where[expert], new) for new, expert in enumerate(stay)]
        self._where = OrderedDict((expert, new) for new, expert in enumerate(stay))
        self._free = list(range(slots - 1, len(stay) - 1, -1))
        self._fresh &= set(stay)
        self._unproved &= set(stay)
        self.slots = slots
        return moves
