"""A static KV cache whose tokens are written to given slots, for trees and batches alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer: ``[batch, kv heads, capacity, head size]``, allocated at the first write.

    Sliding-window layers are kept whole like all others: a rolling buffer overwrites tokens that a tree still needs.

    Args:
        cache: whose ``slots`` and ``visible`` say where to write and how much to read.
    """

    is_compileable = True
    is_sliding = False

    def __init__(self, cache: SlotCache) -> None:
        super().__init__()
        self._cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for the shapes, dtype and device of the first keys and values."""
        batch, heads = key_states.shape[:2]
        shape = (batch, heads, self._cache.capacity)
        self.dtype, self.device = key_states.dtype, key_states.device
        # Zeros and not empty: a masked slot is multiplied by zero, and zero times NaN would be NaN. And no inference
        # tensors, which could not be written once a later run is outside of inference mode.
        with torch.inference_mode(False):
            self.keys = torch.zeros(*shape, key_states.shape[-1], dtype=self.dtype, device=self.device)
            self.values = torch.zeros(*shape, value_states.shape[-1], dtype=self.dtype, device=self.device)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write ``[batch, heads, tokens, size]`` to the cache's slots; return the part that masks speak of."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        slots, visible = self._cache.slots, self._cache.visible
        # Under autocast rotated keys come in float32 and values in bfloat16, and a later run may be without it.
        key_states, value_states = key_states.to(self.keys.dtype), value_states.to(self.values.dtype)
        if slots.shape[0] == 1:
            self.keys.index_copy_(2, slots[0], key_states)
            self.values.index_copy_(2, slots[0], value_states)
        else:
            rows = torch.arange(slots.shape[0], device=slots.device)[:, None]
            self.keys[rows, :, slots] = key_states.transpose(1, 2)
            self.values[rows, :, slots] = value_states.transpose(1, 2)
        return self.keys[:, :, :visible], self.values[:, :, :visible]

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy slots ``source [n]`` to slots ``target [n]`` of row 0, as if all were read before any is written."""
        if self.keys is not None and self.values is not None:
            for states in (self.keys, self.values):
                states.index_copy_(2, target, states.index_select(2, source))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, offset) of the keys that attention sees."""
        return self._cache.visible, 0

    def get_seq_length(self) -> int:
        """Not known here: whoever runs the model gives every token its position."""
        return 0

    def get_max_length(self) -> int:
        """Slots."""
        return self._cache.capacity


class SlotCache(Cache):
    """One :class:`SlotLayer` a layer. Set ``slots`` and ``visible``, then run the model.

    Args:
        layers: number of decoder layers. capacity: slots a sequence.
    """

    def __init__(self, layers: int, capacity: int) -> None:
        self.capacity = capacity
        self.slots = torch.empty(1, 0, dtype=torch.long)
        self.visible = capacity
        super().__init__(layers=[SlotLayer(self) for _ in range(layers)])

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy slots of sequence 0 in every layer; see :meth:`SlotLayer.move`."""
        for layer in self.layers:
            layer.move(source, target)  # type: ignore[union-attr]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        held = [t for layer in self.layers for t in (layer.keys, layer.values) if t is not None]
        return sum(t.numel() * t.element_size() for t in held)
