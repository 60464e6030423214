"""Where the keys and values of committed tokens lie in each kind of cache, and where those of the next token go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from ygglight.engines.decode.cache import SlotLayer

_KEPT = 8
"""Lengths that are kept for a cache that grows: a model has layers of one or two lengths."""


@dataclass(frozen=True)
class Place:
    """One layer's cache as a decode block takes it.

    Args:
        keys: ``[B, kv_heads, C, D]``, a view. values: the same; of latent attention ``[B, 1, C, latent]`` are keys and
            ``[B, 1, C, rope_dim]``, the rotated key parts, values.
        mask: ``[B or 1, C]`` or None.
        store: The whole keys and values to write to, at ``slots``; None where ``finish`` takes new tensors.
        slots: int64 ``[B]`` on the device, or None.
        finish: To be called with the new keys and values, ``[B, kv_heads, 1, D]`` (or as above), once the block
            has run.
    """

    keys: Tensor
    values: Tensor
    mask: Tensor | None
    store: tuple[Tensor, Tensor] | None
    slots: Tensor | None
    finish: Callable[[Tensor, Tensor], object]


def place(cache: Any, index: int, mask: Tensor | None, batch: int) -> Place | None:
    """Finds the place of one more token in a layer's cache; reads nothing from the device.

    Args:
        cache: Of transformers or ours. index: of the layer. mask: ``[B or 1, 1, 1, slots]`` as the model gives it to
            its attention, or None. batch: sequences.

    Returns:
        None where the cache is of another kind or the mask does not fit it: then the model's own code has to run.
    """
    if not isinstance(cache, Cache) or getattr(cache, "offloading", False) or index >= len(cache.layers):
        return None
    if mask is not None:
        if mask.dim() != 4 or mask.shape[0] not in (1, batch) or mask.shape[1:3] != (1, 1):
            return None
        mask = mask[:, 0, 0]
    layer: Any = cache.layers[index]
    find = _FINDERS.get(type(layer))
    if find is None or not layer.is_initialized or layer.keys.dim() != 4 or len(layer.keys) != batch:
        return None
    return find(cache, index, layer, mask, batch)


def _dynamic(cache: Any, index: int, layer: Any, mask: Tensor | None, batch: int) -> Place | None:
    count = layer.keys.shape[2]
    if getattr(layer, "record_past", False) or (mask is not None and mask.shape[1] != count + 1):
        return None
    mask = None if mask is None else mask[:, :count]  # the last column is the new token's own
    return Place(layer.keys, layer.values, mask, None, None, lambda k, v: cache.update(k, v, index))


def _static(cache: Any, index: int, layer: Any, mask: Tensor | None, batch: int) -> Place | None:
    if mask is None or mask.shape[1] != layer.keys.shape[2]:
        return None

    def finish(keys: Tensor, values: Tensor) -> None:
        layer.cumulative_length.add_(1)
        if hasattr(layer, "cumulative_length_int"):
            layer.cumulative_length_int += 1

    slots = layer.cumulative_length.reshape(1).expand(batch)
    return Place(layer.keys, layer.values, mask, (layer.keys, layer.values), slots, finish)


def _static_sliding(cache: Any, index: int, layer: Any, mask: Tensor | None, batch: int) -> Place | None:
    if layer.cumulative_length_int < layer.max_cache_len:
        return _static(cache, index, layer, mask, batch)
    if mask is None or mask.shape[1] != layer.keys.shape[2]:
        return None
    # Full: the oldest token makes room, and the cache moves the others down.
    keys, values = layer.keys[:, :, 1:], layer.values[:, :, 1:]
    return Place(keys, values, mask[:, :-1], None, None, lambda k, v: cache.update(k, v, index))


def _slotted(cache: Any, index: int, layer: Any, mask: Tensor | None, batch: int) -> Place | None:
    visible = cache.visible
    if mask is None or mask.shape[1] != visible or cache.slots.shape[1] != 1:
        return None
    keys, values = layer.keys[:, :, :visible], layer.values[:, :, :visible]
    slots = cache.slots[:, 0].expand(batch)
    return Place(keys, values, mask, (layer.keys, layer.values), slots, lambda k, v: None)


_FINDERS: dict[type, Callable[[Any, int, Any, Tensor | None, int], Place | None]] = {
    DynamicLayer: _dynamic,
    DynamicSlidingWindowLayer: _dynamic,
    StaticLayer: _static,
    StaticSlidingWindowLayer: _static_sliding,
    SlotLayer: _slotted,
}


class Lengths:
    """The lengths of blocks that read a whole view: int32 ``[B]``, all the same, made once a cache and size.

    They live as long as the cache does, since a CUDA graph over the cache reads them at each replay.
    """

    def __init__(self) -> None:
        self._of: WeakKeyDictionary[Any, dict[tuple[int, int], Tensor]] = WeakKeyDictionary()

    def __call__(self, cache: Any, batch: int, count: int, device: torch.device, *, fixed: bool) -> Tensor:
        """The lengths of one view.

        Args:
            cache: Whose view it is. batch: sequences. count: slots. device: of the cache. fixed: whether the cache
                keeps its size: then they are kept too.
        """
        known = self._of.setdefault(cache, {})
        if (batch, count) not in known:
            if not fixed and len(known) >= _KEPT:
                known.clear()
            with torch.inference_mode(False):
                known[batch, count] = torch.full((batch,), count, dtype=torch.int32, device=device)
        return known[batch, count]
