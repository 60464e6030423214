"""All sparse layers of a model, their experts elsewhere: drafts, target passes, and what is sent ahead between them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ygglight.engines.moe_speq.config import STAGING
from ygglight.engines.moe_speq.layer import SparseLayer
from ygglight.engines.moe_speq.link import CLOSED, Link, Source, open_link
from ygglight.engines.moe_speq.lookahead import Counts, LayerView, Lookahead, plan_prefetch
from ygglight.engines.moe_speq.slots import SlotBank
from ygglight.engines.moe_speq.stats import Stats
from ygglight.engines.moe_speq.stream import Staging, Stream

if TYPE_CHECKING:
    from ygglight.engines.moe_speq.draft import DraftExperts
    from ygglight.engines.moe_speq.layout import Site


class _Mode(Enum):
    TARGET, PREFILL, DRAFT = range(3)


class Runtime:
    """What the experts modules of an attached model call. Inference only, from one thread.

    Outside of :meth:`drafting` and :meth:`window` a forward is a target pass.

    Args:
        sites: The sparse layers, in order.
        store: Where the experts lie; who made it closes it, after the runtime.
        slots: Experts a layer on the device.
        staging: Slabs beside them for all layers.
        link: Brings the experts, and is closed with the runtime; None: one that fits the device, as fast as it goes.
        draft: What drafts; None: nothing does.
        device: Of the slots, and of the model.
        widths: See :class:`~ygglight.engines.moe_speq.stats.Stats`.

    Raises:
        ValueError: no sites, or fewer than one slot or staging slab.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        store: Source,
        *,
        slots: int,
        staging: int = STAGING,
        link: Link | None = None,
        draft: DraftExperts | None = None,
        device: torch.device | str = "cpu",
        widths: Sequence[int] = (1,),
    ) -> None:
        if not sites:
            raise ValueError("the model has no sparse layers: use it without MoE-SpeQ")
        self.sites, self.draft, self.device = tuple(sites), draft, torch.device(device)
        experts = max(site.experts for site in sites)
        self._bank = SlotBank([site.layout for site in sites], slots, staging, self.device)
        self._link = link = link or open_link(store, self.device)
        self.stats = Stats(len(sites), experts, link.traffic, widths)
        staging_slabs, layers = Staging(self._bank.staging), list[SparseLayer]()
        self._stream = stream = Stream(
            (site.layout for site in sites), link, staging_slabs, lambda layer, expert: expert in layers[layer].cache
        )
        for index, site in enumerate(sites):
            layers.append(SparseLayer(index, site, self._bank, link, self.stats, staging_slabs, stream))
        self._layers = layers
        self._lookahead = Lookahead(len(sites), experts, self.device)
        self._mode = _Mode.TARGET
        self._drawn: Counts | None = None
        self._closed = False
        self._mark_all()

    @property
    def slots(self) -> int:
        """Experts a layer on the device."""
        return self._bank.slots

    @property
    def staging(self) -> int:
        """Slabs for all layers, beside the slots."""
        return len(self._bank.staging)

    @property
    def nbytes(self) -> int:
        """Bytes of slots and staging."""
        return self._bank.nbytes

    @property
    def link(self) -> Link:
        """Its :attr:`~Link.speed` is measured as the model runs."""
        return self._link

    @torch.no_grad()  # a graph would hold views of slots that others are copied into
    def forward(self, site: int, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """The routed experts' part of a sparse layer.

        Args:
            site: Number of the layer. hidden: ``[T, H]``. index: int64 ``[T, k]``. weights: ``[T, k]``.

        Returns:
            ``[T, H]``.

        Raises:
            OSError: an expert could not be read; the next call works. RuntimeError: the runtime is closed.
        """
        x = hidden.to(self.sites[site].layout.dtype)
        with torch.autocast(self.device.type, enabled=False):  # experts compute in their own dtype, as transformers' do
            return self._experts(site, x, index, weights).to(hidden.dtype)

    def _experts(self, site: int, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        if self._mode is _Mode.DRAFT and self.draft is not None:
            self._lookahead.note(site, index)
            return self.draft.forward(self.sites[site], hidden, index, weights)
        if self._closed:
            raise RuntimeError(CLOSED)
        drawn = None if self._drawn is None else self._drawn[site]
        prefill = self._mode is _Mode.PREFILL
        return self._layers[site].forward(hidden, index, weights, prefill=prefill, drawn=drawn)

    @contextmanager
    def drafting(self) -> Iterator[None]:
        """Within: the draft's experts compute, and their routes are noted.

        Raises:
            RuntimeError: there is no draft.
        """
        if self.draft is None:
            raise RuntimeError("there is no draft to draft with: build one, or draft nothing (k=0)")
        before, self._mode = self._mode, _Mode.DRAFT
        self._lookahead.empty = False
        try:
            yield
        finally:
            self._mode = before

    @contextmanager
    def window(self, *, prefill: bool, stream: int = 0) -> Iterator[None]:
        """Within: one target pass. After it, what was noted is forgotten and no prefetch is left in the queue.

        Args:
            prefill: A prompt, which wants nearly all experts: they stream through staging and evict nothing.
            stream: Bytes at most of what the draft has chosen that may still come through staging while the pass runs.
        """
        before, self._mode = self._mode, _Mode.PREFILL if prefill else _Mode.TARGET
        if not (prefill or self._lookahead.empty):
            self._drawn = self._lookahead.read()
        try:
            if self._drawn is not None and stream > 0:
                self._stream.plan(self._to_stream(self._drawn, stream))
            yield
        finally:
            self._mode, self._drawn = before, None
            self._stream.end()
            self._lookahead.clear()
            for layer in self._layers:
                layer.withdraw()

    def _to_stream(self, drawn: Counts, cap: int) -> Iterator[tuple[int, int]]:
        """What was chosen and is not there, in the order of the layers, those that most tokens chose first."""
        for number, (layer, chosen) in enumerate(zip(self._layers, drawn, strict=True)):
            coming = self._stream.coming(number)
            for expert in sorted(chosen, key=chosen.__getitem__, reverse=True):
                if expert not in layer.cache and expert not in coming:
                    cap -= layer.layout.nbytes
                    if cap < 0:
                        return
                    yield number, expert

    def prefetch(self, cap: int, most: float = math.inf, stream: int = 0) -> tuple[int, int]:
        """Send ahead what the draft has chosen since the last window and is missing; take back what it has not.

        Args:
            cap: Bytes at most.
            most: Copies sent ahead and not there yet, earlier ones included, at most. A copy that only waits has thrown
                somebody out already, and is taken back when the window begins.
            stream: Bytes at most of both kinds; what finds no slot begins to come through staging, as far as there is
                any.

        Returns:
            Bytes queued for slots, and for staging.
        """
        counts = self._lookahead.read()
        spared, views = [], []
        for layer, drawn in zip(self._layers, counts, strict=True):
            layer.withdraw(drawn)
            layer.settle()
            spared.append(layer.cache.spared(drawn))
            held = [*layer.cache.residents, *self._stream.coming(layer.index)]
            views.append(LayerView(held, layer.cache.room(spared[-1]), layer.layout.nbytes))
            most -= layer.coming
        sent = 0
        if most < math.inf:
            cap = min(cap, max(0, int(most)) * views[0].nbytes)
        for index, expert in plan_prefetch(counts, views, cap):
            if self._layers[index].prefetch(expert, spared[index]):
                sent += views[index].nbytes
        return sent, self._stream.plan(self._to_stream(counts, stream - sent)) * views[0].nbytes

    def committed(self, rows: int) -> None:
        """Tell the statistics how many rows of the last window became text, for what plain decoding would do.

        Args:
            rows: From the first on: the root and what was accepted.
        """
        for layer in self._layers:
            layer.committed(rows)

    def resize(self, slots: int) -> None:
        """Change the number of slots, between windows; the most recently used experts stay. No draft does.

        Args:
            slots: Experts a layer.

        Raises:
            ValueError: fewer than one slot.
        """
        if slots < 1:
            raise ValueError(f"{slots} slots a layer: give at least one")
        self.draft = None  # before its memory is taken for slots
        self._lookahead.clear()
        for layer in self._layers:
            layer.resize(slots)
        self._mark_all()

    def clear(self) -> None:
        """Empty all slots, between windows."""
        self._lookahead.clear()
        for layer in self._layers:
            layer.clear()

    def close(self) -> None:
        """End the link. Slots stay until the runtime goes. Again: nothing."""
        self._closed = True
        self._link.close()

    def _mark_all(self) -> None:
        """The allocator may have taken slots from memory that the device still works in, for this thread's stream."""
        for index, layer in enumerate(self._layers):
            layer.mark(self._bank.slab(index, slot) for slot in range(self._bank.slots))
        self._layers[0].mark(self._bank.staging)
