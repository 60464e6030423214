"""A model's experts where the model itself keeps them, read slab by slab; and pointing the model at slabs instead."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict

import torch
from torch import Tensor, nn

from ygglight.engines.moe_speq.layout import Site

__all__ = ["ParameterStore"]


class ParameterStore:
    """The experts in a model's own parameters, as a store.

    It keeps the parameters, not their modules: a module has none while it is attached.

    Args:
        sites: Of the model.

    Raises:
        ValueError: the parameters hold no values.
    """

    kind = "host"

    def __init__(self, sites: list[Site]) -> None:
        self._layouts = [site.layout for site in sites]
        self._parameters = [{name: getattr(site.module, name) for name in site.layout.names} for site in sites]
        if any(parameter.is_meta for parameters in self._parameters for parameter in parameters.values()):
            raise ValueError(
                "the experts of this model hold no values (meta device): take the store that load_without_experts "
                "returned with it, or load the model whole and without a device_map"
            )
        self._devices = [{name: p.device for name, p in layer.items()} for layer in self._parameters]
        self.names = [site.name for site in sites]
        self.experts = [site.experts for site in sites]
        self.layers, self.nbytes = len(sites), sites[0].layout.nbytes
        self.bytes_total = sum(self.experts) * self.nbytes

    def slab(self, layer: int, expert: int) -> None:
        """None: a parameter holds one kind of matrix of all experts."""

    def read_into(self, layer: int, expert: int, out: Tensor) -> None:
        """Gather the tensors of one expert."""
        with torch.no_grad():
            for name, view in self._layouts[layer].views(out).items():
                view.copy_(self._parameters[layer][name][expert])

    def close(self) -> None:
        """Nothing to do."""

    def point_at(self, layer: int, slabs: Tensor) -> None:
        """Let the parameters of a layer be views of slabs that hold the same values; their own memory is freed.

        Args:
            layer: Index of the site. slabs: uint8 ``[experts, nbytes]``.
        """
        views = self._layouts[layer].views(slabs)
        for name, parameter in self._parameters[layer].items():
            parameter.data = views[name]

    def own_memory(self, layer: int, read: Callable[[int, Tensor], None]) -> None:
        """Undo :meth:`point_at`: parameters have memory of their own again, where they had it.

        Args:
            layer: Index of the site. read: Fills a slab with an expert. Not the views: to touch pages of a mapped file
                that cannot be read kills the process.

        Raises:
            OSError: from ``read``; the layer's parameters hold no values (meta device) then.
        """
        layout = self._layouts[layer]
        shapes = dict(zip(layout.names, layout.shapes, strict=True))
        with torch.inference_mode(False), torch.no_grad():  # or they could not be trained afterwards
            slab = torch.empty(self.nbytes, dtype=torch.uint8)
            for name, parameter in self._parameters[layer].items():
                whole = (self.experts[layer], *shapes[name])
                parameter.data = torch.empty(whole, dtype=layout.dtype, device=self._devices[layer][name])
            try:
                for expert in range(self.experts[layer]):
                    read(expert, slab)
                    for name, view in layout.views(slab).items():
                        self._parameters[layer][name][expert].copy_(view)
            except BaseException:
                for parameter in self._parameters[layer].values():
                    lost = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
                    torch.utils.swap_tensors(parameter, lost)
                raise

    def fingerprint(self) -> str:
        """A hash of every byte, so that a file found in the cache cannot be that of another fine-tune."""
        digest = hashlib.sha256()
        for name, layout, parameters in zip(self.names, self._layouts, self._parameters, strict=True):
            digest.update(json.dumps([name, asdict(layout) | {"dtype": str(layout.dtype)}]).encode())
            for parameter in parameters.values():
                for expert in parameter.detach():  # one at a time: it may be strided, or on a GPU
                    digest.update(expert.contiguous().cpu().view(torch.uint8).numpy())
        return digest.hexdigest()
