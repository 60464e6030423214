"""Where all the experts lie that do not fit on the device: in host memory, or in a file."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ygglight.engines.moe_speq.disk import DiskStore
from ygglight.engines.moe_speq.layout import Site, SlabLayout
from ygglight.engines.moe_speq.parameters import ParameterStore

__all__ = ["DiskStore", "ExpertStore", "HostStore", "store_for"]


@runtime_checkable
class ExpertStore(Protocol):
    """All experts of a model, one slab each; read only, and readable from any thread.

    Args:
        kind: "host", "pinned" or "disk". layout: Of one expert. layers: Sparse layers. nbytes: Of one slab.
        bytes_total: Of all.
    """

    kind: str
    layout: SlabLayout
    layers: int
    nbytes: int
    bytes_total: int

    def slab(self, layer: int, expert: int) -> Tensor | None:
        """The slab itself, uint8 ``[nbytes]`` in host memory, or None where it must be read."""
        ...

    def read_into(self, layer: int, expert: int, out: Tensor) -> None:
        """Copy a slab. Other threads run meanwhile.

        Args:
            layer: Index of the site. expert: Index in the layer. out: uint8 ``[nbytes]`` in host memory.
        """
        ...

    def close(self) -> None:
        """Let go of files and pins; the model's parameters get memory of their own again."""
        ...


class HostStore:
    """Experts in host memory, pinned if wanted.

    The model's parameters become strided views of the slabs: their old memory is free, layer by layer, and the model
    goes on giving the same numbers. Most memory in use at once: all experts and one layer.

    Args:
        sites: Of the model. pin: Lock the slabs in memory, so that a GPU's copy engine can read them by itself.
    """

    def __init__(self, sites: list[Site], *, pin: bool = False) -> None:
        self._source = source = ParameterStore(sites)
        self.layout, self.layers = sites[0].layout, source.layers
        self.nbytes, self.bytes_total = source.nbytes, source.bytes_total
        self.kind = "host"
        self._slabs: list[Tensor] = []
        for layer, experts in enumerate(source.experts):
            slabs = torch.empty(experts, self.nbytes, dtype=torch.uint8)
            for expert in range(experts):
                source.read_into(layer, expert, slabs[expert])
            source.point_at(layer, slabs)
            self._slabs.append(slabs)
        if pin and torch.cuda.is_available():
            self._pin()

    def slab(self, layer: int, expert: int) -> Tensor:
        """The slab itself."""
        return self._slabs[layer][expert]

    def read_into(self, layer: int, expert: int, out: Tensor) -> None:
        """Copy a slab."""
        out.copy_(self._slabs[layer][expert])

    def close(self) -> None:
        """Unpin; the model's parameters get memory of their own again. Again: nothing."""
        self._unpin()
        while self._slabs:
            slabs, layer = self._slabs.pop(), len(self._slabs)
            self._source.own_memory(layer, lambda expert, out, slabs=slabs: out.copy_(slabs[expert]))  # type: ignore[misc]

    def _pin(self) -> None:
        # cudaHostRegister pins memory as it is. torch's pinned allocator rounds each request up to a power of two.
        for done, slabs in enumerate(self._slabs):
            code = torch.cuda.cudart().cudaHostRegister(slabs.data_ptr(), slabs.numel(), 0)
            if int(code) != 0:
                for earlier in self._slabs[:done]:
                    torch.cuda.cudart().cudaHostUnregister(earlier.data_ptr())
                warnings.warn(
                    f"the {self.bytes_total / 2**30:.1f} GiB of experts cannot be pinned (CUDA error {int(code)}): "
                    "copies to the GPU are slower; raise the limit of locked memory (ulimit -l)"
                )
                return
        self.kind = "pinned"

    def _unpin(self) -> None:
        if self.kind == "pinned":
            for slabs in self._slabs:
                torch.cuda.cudart().cudaHostUnregister(slabs.data_ptr())
            self.kind = "host"


def store_for(
    model: nn.Module,
    sites: list[Site],
    *,
    where: str = "auto",
    device: torch.device | str,
    path: Path | str | None = None,
    drop_cache: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> HostStore | DiskStore:
    """Move a model's experts to where they are read from.

    Args:
        model: Whose experts. sites: Its sites.
        where: "host", "disk", or "auto": host memory beside a GPU; a file where the device is itself the host.
        device: Where the model runs.
        path: Of the file, for "disk"; by default in ygglight's cache folder, under a name made from the weights.
        drop_cache: See :class:`DiskStore`.
        progress: Called with (bytes done, bytes in all) while a file is written.
    """
    if where not in ("auto", "host", "disk"):
        raise ValueError(f"experts are kept on 'host' or 'disk' ('auto' chooses), not {where!r}")
    if not {id(site.module) for site in sites} <= {id(module) for module in model.modules()}:
        raise ValueError("these are the sites of another model: take find_sites(model)")
    on_host = torch.device(device).type == "cpu"
    if where == "host" or (where == "auto" and not on_host):
        if path is not None:
            raise ValueError("a path is for experts on disk: leave it out, or set where='disk'")
        return HostStore(sites, pin=not on_host)
    return DiskStore.from_sites(sites, path=path, drop_cache=drop_cache, progress=progress)
