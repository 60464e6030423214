"""One sparse layer with its experts elsewhere: what is there is computed while the rest is on its way."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ygglight.engines.moe_speq.cache import LayerCache
from ygglight.engines.moe_speq.compute import Batch, Compute, GroupedCompute, Grouping, LoopCompute, combine, group
from ygglight.engines.moe_speq.link import Cause, Link, State, Ticket
from ygglight.engines.moe_speq.slots import Slab, SlotBank
from ygglight.engines.moe_speq.stats import Stats
from ygglight.engines.moe_speq.stream import Copy, Staging, Stream

if TYPE_CHECKING:
    from ygglight.engines.moe_speq.layout import Site


class SparseLayer:
    """Slots, copies and computation of one layer. For one thread.

    Args:
        index: Number of the layer. site: The layer. bank: Its slots. link: Brings the experts. stats: What happened.
        staging: Everybody's. stream: What comes through it for the present pass.
    """

    def __init__(
        self,
        index: int,
        site: Site,
        bank: SlotBank,
        link: Link,
        stats: Stats,
        staging: Staging,
        stream: Stream,
    ) -> None:
        self.index, self.layout = index, site.layout
        self.cache = LayerCache(bank.slots)
        self.staging, self.stream = staging, stream
        self._bank, self._link, self._stats = bank, link, stats
        grouped = bank.device.type == "cuda"
        self._compute: Compute = GroupedCompute(index, site, bank) if grouped else LoopCompute(index, site)
        self._loading: dict[int, Ticket] = {}  # residents whose copy had not ended when last seen
        self._routes: tuple[list[int], int] = [], 1
        self._displaced: set[int] = set()  # by prefetches, since the last pass

    # -- the target pass ---------------------------------------------------------------------------------------------
    def forward(
        self, hidden: Tensor, index: Tensor, weights: Tensor, *, prefill: bool, drawn: Collection[int] | None = None
    ) -> Tensor:
        """The routed experts' part of the layer.

        Args:
            hidden: ``[T, H]``. index: int64 ``[T, k]``. weights: ``[T, k]``.
            prefill: A prompt: it is no request, and evicts nothing. drawn: What the draft before it chose here.

        Returns:
            ``[T, H]``, the same to the bit whatever the slots hold.

        Raises:
            OSError: an expert could not be read. The cache is as usable as before.
        """
        grouping = group(index)
        x = hidden.index_select(0, grouping.order // index.shape[1])
        out = torch.empty_like(x)
        ranked = grouping.ranked
        self.withdraw()
        self.settle()
        self._routes = ([], 1) if prefill else (grouping.routes, index.shape[1])
        streamed, in_vain = self.stream.take(self.index, ranked)
        coming = {expert for expert, _, _ in streamed}
        slots, passing = self.cache.split(ranked, coming, prefill=prefill)
        if prefill:
            self._stats.prompt(self.index, ranked)
        else:
            fresh = self.cache.demand(ranked)
            self._stats.ahead[self.index] += fresh.used + len(streamed)
            self._stats.unused[self.index] += fresh.unused
            self._stats.streamed[self.index] += len(streamed) + in_vain
            self._stats.in_vain[self.index] += in_vain
            self._stats.displaced[self.index] += len(self._displaced.intersection(ranked))
            self._displaced.clear()
            late = sum(expert in self._loading for expert in ranked)
            late += sum(ticket.state is not State.DONE for _, _, ticket in streamed)
            self._stats.demand(self.index, ranked, late, len(slots) + len(passing))
            if drawn is not None:
                self._stats.compare(self.index, drawn, ranked)
        stay = set(self.cache.residents) if prefill else self.cache.staying(ranked, coming)
        cause = Cause.PREFILL if prefill else Cause.DEMAND
        _Pass(self, grouping, x, out, stay, slots, passing, streamed, cause).run()
        if prefill:
            self.cache.cool(slots)
        else:
            self.cache.touch(ranked)
        return combine(out, grouping, weights)

    def committed(self, rows: int) -> None:
        """The first rows of the last pass became text.

        Args:
            rows: How many.
        """
        routes, top_k = self._routes
        self._stats.committed(self.index, routes[: rows * top_k], top_k)
        self._routes = [], 1

    # -- prefetches --------------------------------------------------------------------------------------------------
    def prefetch(self, expert: int, spared: Collection[int]) -> bool:
        """Queue a copy of an expert that is not resident.

        Args:
            expert: Which. spared: Who must not be evicted for it.

        Returns:
            Whether there was a slot for it.
        """
        return self._fetch(expert, spared, Cause.PREFETCH) is not None

    @property
    def coming(self) -> int:
        """Copies that have not ended, as far as :meth:`settle` saw."""
        return len(self._loading)

    def withdraw(self, wanted: Collection[int] = ()) -> None:
        """Take back the prefetches that have not begun.

        Args:
            wanted: But not of these.
        """
        for expert, ticket in list(self._loading.items()):
            if ticket.cause is Cause.PREFETCH and expert not in wanted and self._link.cancel(ticket):
                self._forget(expert)

    def settle(self) -> None:
        """See which copies have ended. A slot whose copy failed is free: nobody ever sees it half filled."""
        for expert, ticket in list(self._loading.items()):
            if ticket.state is State.DONE:
                del self._loading[expert]
            elif ticket.state in (State.FAILED, State.CANCELLED):
                self._forget(expert)

    # -- other sizes, other contents ---------------------------------------------------------------------------------
    def resize(self, slots: int) -> None:
        """Change the number of slots, with no pass under way; waits for the copies that have begun.

        Args:
            slots: How many, 1 or more.
        """
        self._quiet()
        self._bank.resize(self.index, slots, partial(self.cache.resize, slots))

    def clear(self) -> None:
        """Empty all slots; waits for the copies that have begun."""
        self._quiet()
        self.cache = LayerCache(self._bank.slots)

    def mark(self, slabs: Iterable[Slab]) -> None:
        """Nothing may be copied into these before what was computed so far has ended.

        Args:
            slabs: Which.
        """
        moment = self._link.mark()
        for slab in slabs:
            slab.last_use = moment

    def _quiet(self) -> None:
        self.withdraw()
        for expert, ticket in list(self._loading.items()):
            try:
                self._link.wait(ticket)
            except Exception:  # whoever wants the expert next tries again
                self._forget(expert)
            else:
                del self._loading[expert]

    # -- copies ------------------------------------------------------------------------------------------------------
    def _slab(self, expert: int) -> Slab:
        return self._bank.slab(self.index, self.cache[expert])

    def _fetch(self, expert: int, spared: Collection[int], cause: Cause) -> Copy | None:
        """Queue a copy into a slot. Its resident may still be on its way there: copies end in order."""
        taken = self.cache.take(expert, spared, prefetch=cause is Cause.PREFETCH)
        if taken is None:
            return None
        if taken.evicted is not None:
            stale = self._loading.pop(taken.evicted, None)
            if stale is not None:
                self._link.cancel(stale)
            self._stats.evicted[self.index] += taken.wasted
            if cause is Cause.PREFETCH:
                self._displaced.add(taken.evicted)
        try:
            copy = self._submit(expert, self._slab(expert), cause)
        except BaseException:
            self.cache.drop(expert)
            raise
        self._loading[expert] = copy[2]
        return copy

    def _submit(self, expert: int, slab: Slab, cause: Cause) -> Copy:
        out = slab.bytes_of(self.layout)
        return expert, slab, self._link.submit(self.index, expert, out, cause, slab.last_use)

    def _arrive(self, copy: Copy) -> None:
        """Wait for a copy. A prefetch that failed is tried once more, on demand: then its error counts."""
        expert, slab, ticket = copy
        try:
            self._link.wait(ticket)
        except Exception:
            if ticket.cause is not Cause.PREFETCH:
                raise
            again = self._submit(expert, slab, Cause.DEMAND)
            if not slab.staged:
                self._loading[expert] = again[2]
            self._link.wait(again[2])

    def _forget(self, expert: int) -> None:
        del self._loading[expert]
        self.cache.drop(expert)


class _Pass:
    """The copies and computations of one pass through one layer.

    Args:
        layer: Which. grouping: Its rows. x: As sorted by it. out: To fill. stay: Experts not to be evicted.
        slots: Missing experts that get slots, in order. passing: Missing experts that go through staging.
        streamed: Copies into staging that had begun before. cause: Why the others are copied.
    """

    def __init__(
        self,
        layer: SparseLayer,
        grouping: Grouping,
        x: Tensor,
        out: Tensor,
        stay: set[int],
        slots: Sequence[int],
        passing: Sequence[int],
        streamed: Sequence[Copy],
        cause: Cause,
    ) -> None:
        self._layer, self._spans, self._x, self._out, self._cause = layer, grouping.spans, x, out, cause
        self._ranked, self._stay = grouping.ranked, stay
        self._spared = {*stay, *grouping.ranked}  # what is wanted and leaves is spared until it was computed
        self._slots, self._passing = deque(slots), deque(passing)
        self._pending: deque[Copy] = deque(streamed)

    def run(self) -> None:
        """Everything. Copies queue up first, then what is there is computed, then what arrives, as it arrives."""
        layer = self._layer
        here = [expert for expert in self._ranked if expert in layer.cache and expert not in layer._loading]
        try:
            for expert in self._ranked:
                if expert in layer._loading:
                    self._pending.append((expert, layer._slab(expert), layer._loading[expert]))
            self._launch()
            leaving = [expert for expert in here if expert not in self._stay]
            if leaving:
                self._finish([(expert, layer._slab(expert)) for expert in leaving])
            self._finish([(expert, layer._slab(expert)) for expert in here if expert in self._stay])
            while self._pending:
                layer._arrive(self._pending[0])
                expert, slab, _ = self._pending.popleft()
                self._finish([(expert, slab)])
        except BaseException:
            self._abandon()
            raise
        if self._slots or self._passing:
            raise RuntimeError(f"{len(self._slots) + len(self._passing)} experts found no place: please report this")

    def _launch(self) -> None:
        """Queue the copies that there is room for."""
        layer = self._layer
        while self._passing:
            slab = layer.staging.take()
            if slab is None:
                break
            try:
                self._pending.append(layer._submit(self._passing[0], slab, self._cause))
            except BaseException:
                layer.staging.give(slab)
                raise
            self._passing.popleft()
        while self._slots:
            copy = layer._fetch(self._slots[0], self._spared, self._cause)
            if copy is None:
                break
            self._slots.popleft()
            self._spared.add(copy[0])
            self._pending.append(copy)

    def _finish(self, experts: Sequence[tuple[int, Slab]]) -> None:
        """Compute experts that are there, and give their places on."""
        if not experts:
            return
        layer = self._layer
        try:
            layer._compute.run(self._x, [Batch(slab, *self._spans[expert]) for expert, slab in experts], self._out)
        finally:
            layer.mark(slab for _, slab in experts)
            for _, slab in experts:
                if slab.staged:
                    layer.staging.give(slab)
        leave = {expert for expert, slab in experts if not slab.staged}
        self._spared -= leave - self._stay
        if self._slots or self._passing:
            self._launch()
        layer.stream.fill()

    def _abandon(self) -> None:
        """After an error: withdraw what has not begun. Copies into staging end before the next ones begin, by order."""
        layer = self._layer
        for _, slab, ticket in self._pending:
            layer._link.cancel(ticket)
            if slab.staged:
                layer.staging.give(slab)
        layer.settle()
