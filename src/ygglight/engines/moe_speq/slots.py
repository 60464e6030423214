"""The memory that experts are computed from: slots of each layer, and a few staging slabs for all layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ygglight.engines.moe_speq.layout import SlabLayout

Weights = dict[str, Tensor]


class Slab:
    """Room for one expert.

    Args:
        data: uint8 bytes. index: Its row of the stack that it belongs to. staged: That is the staging stack.
    """

    def __init__(self, data: Tensor, index: int, *, staged: bool) -> None:
        self.data, self.index, self.staged = data, index, staged
        self.last_use: Any = None
        """Moment (``Link.mark``) after the last computation that reads it."""
        self._weights: dict[int, Weights] = {}

    def bytes_of(self, layout: SlabLayout) -> Tensor:
        """What an expert of that layout fills.

        Args:
            layout: Of the expert's layer.
        """
        return self.data[: layout.nbytes]

    def weights(self, layer: int, layout: SlabLayout) -> Weights:
        """The expert's tensors by name: views, made once.

        Args:
            layer: Of the expert. layout: Of that layer.
        """
        found = self._weights.get(layer)
        if found is None:
            found = self._weights[layer] = layout.views(self.bytes_of(layout))
        return found


class SlotBank:
    """All slots and staging slabs. One tensor a layer, so that a resize never holds more than a layer twice.

    Args:
        layouts: One a layer. slots: Experts a layer. staging: Slabs beside them, for all layers. device: Where.

    Raises:
        ValueError: fewer than one slot or staging slab.
    """

    def __init__(self, layouts: Sequence[SlabLayout], slots: int, staging: int, device: torch.device) -> None:
        if slots < 1 or staging < 1:
            raise ValueError(f"{slots} slots a layer and {staging} staging slabs: give at least one of each")
        self.layouts, self.device, self.slots = tuple(layouts), device, slots
        self._layers = [self._empty(slots, layout.nbytes) for layout in layouts]
        self._staging = self._empty(staging, max(layout.nbytes for layout in layouts))
        self._slabs = [_slabs(data) for data in self._layers]
        self.staging = _slabs(self._staging, staged=True)
        self._stacks: dict[tuple[int, bool], Weights] = {}

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._staging.numel() + sum(data.numel() for data in self._layers)

    def slab(self, layer: int, slot: int) -> Slab:
        """One slot.

        Args:
            layer: Whose. slot: Which.
        """
        return self._slabs[layer][slot]

    def stack(self, layer: int, *, staged: bool) -> Weights:
        """All slots of a layer, or all staging slabs, as stacked tensors by name: what a grouped kernel reads.

        Args:
            layer: Whose slots, or whose layout of the staging slabs. staged: The latter.
        """
        found = self._stacks.get((layer, staged))
        if found is None:
            layout = self.layouts[layer]
            data = self._staging[:, : layout.nbytes] if staged else self._layers[layer]
            found = self._stacks[layer, staged] = layout.views(data)
        return found

    def resize(self, layer: int, slots: int, moves: Callable[[], Sequence[tuple[int, int]]]) -> None:
        """Give one layer another number of slots; no copy into it may be under way.

        Args:
            layer: Which. slots: How many.
            moves: Gives (old slot, new slot) of what stays; called when there is memory for it, for only then is it so.
        """
        data, old = self._empty(slots, self.layouts[layer].nbytes), self._layers[layer]
        for source, target in moves():
            data[target].copy_(old[source])
        self._layers[layer], self._slabs[layer] = data, _slabs(data)
        self._stacks.pop((layer, False), None)
        self.slots = slots

    def _empty(self, count: int, nbytes: int) -> Tensor:
        with torch.inference_mode(False):  # else the link's thread could not write to it
            return torch.empty(count, nbytes, dtype=torch.uint8, device=self.device)


def _slabs(data: Tensor, *, staged: bool = False) -> list[Slab]:
    with torch.inference_mode(False):
        return [Slab(row, index, staged=staged) for index, row in enumerate(data)]
