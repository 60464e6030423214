"""Offloaded experts as accelerate does it, on the same link: all experts of a layer travel whenever the layer runs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ygglight.engines.moe_speq.layout import Site, find_sites
from ygglight.engines.moe_speq.stores import ExpertStore


class Carrier:
    """Brings whole layers of experts into one buffer, in the time that the link takes.

    Args:
        store: Where they are. experts: Of a layer. bandwidth: Bytes a second, or None. latency: Seconds more a tensor.
        device: Of the buffer.
    """

    def __init__(
        self, store: ExpertStore, experts: int, bandwidth: float | None, latency: float, device: torch.device
    ) -> None:
        self._store, self._bandwidth, self._latency = store, bandwidth, latency
        self.buffer = torch.empty(experts, store.nbytes, dtype=torch.uint8, device=device)
        self.moved = 0
        self.seconds = 0.0

    def bring(self, layer: int, tensors: int) -> None:
        """Fill the buffer.

        Args:
            layer: With whose experts. tensors: As which they are copied.
        """
        start = time.perf_counter()
        for expert, out in enumerate(self.buffer):
            slab = self._store.slab(layer, expert)
            if slab is None:
                self._store.read_into(layer, expert, out)
            else:
                out.copy_(slab)  # blocks, as accelerate's copies do
        due = 0.0
        if self._bandwidth is not None:
            due = self.buffer.nbytes / self._bandwidth + tensors * self._latency
        time.sleep(max(0.0, due - (time.perf_counter() - start)))
        self.moved += self.buffer.nbytes
        self.seconds += time.perf_counter() - start


class Weights(Mapping[str, Tensor]):
    """The tensors of one layer's experts as accelerate's hooks ask for them: by name, each once a forward.

    Args:
        site: The layer. carrier: Brings them.
    """

    def __init__(self, site: Site, carrier: Carrier) -> None:
        self._site, self._carrier = site, carrier
        self._here: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._here:
            self._carrier.bring(self._site.index, len(self))
            self._here = self._site.layout.views(self._carrier.buffer)
        return self._here.pop(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._site.layout.names)

    def __len__(self) -> int:
        return len(self._site.layout.names)


def hook_experts(model: Any, store: ExpertStore, bandwidth: float | None, latency: float) -> Carrier:
    """Offload a model's experts with the hooks that ``dispatch_model`` and ``cpu_offload`` set.

    Only where the weights come from is ours: accelerate reads host memory or a mapped file, and neither is the link of
    another machine.

    Args:
        model: Loses its experts. store: Where they are. bandwidth: See :class:`Carrier`. latency: As there.

    Returns:
        What brings them, which counts.
    """
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    sites = find_sites(model)
    carrier = Carrier(store, max(site.experts for site in sites), bandwidth, latency, model.device)
    for site in sites:
        hook = AlignDevicesHook(execution_device=model.device, offload=True, weights_map=Weights(site, carrier))
        add_hook_to_module(site.module, hook)
    return carrier
