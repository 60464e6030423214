"""A KV cache of pages in an arena: each page holds some tokens of one sequence, for all layers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from ygglight.engines.memory.arena import Arena

PAGE = 16
"""Tokens a page; any power of two will do."""
ROUND = 512
"""Chunks are rounded up to so many bytes: what the CUDA allocator aligns to."""


def kv_shape(config: Any) -> tuple[int, int, int]:
    """(layers, key heads, head size) of a decoder.

    Args:
        config: Of the language part.
    """
    heads = int(config.num_attention_heads)
    groups = int(getattr(config, "num_key_value_heads", None) or heads)
    size = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    return int(config.num_hidden_layers), groups, size


class PagedLayer(CacheLayerMixin):
    """Keys and values of one layer: views of all pages, ``[chunks, kv heads, PAGE, head size]``.

    Args:
        cache: Whose pages. index: Of the layer.
    """

    is_compileable = True
    is_sliding = False

    def __init__(self, cache: PagedCache, index: int) -> None:
        super().__init__()
        self._cache, self._index = cache, index
        self.keys, self.values = cache.pages_of(index)
        self.dtype, self.device = self.keys.dtype, self.keys.device
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the arena is there before."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write ``[B, heads, W, size]`` to the places that :meth:`PagedCache.begin` said.

        Returns:
            All pages, ``[chunks, heads, PAGE, size]``, if the forward reads pages; else keys and values of the pages
            in the table, one after another, ``[B, heads, N * PAGE, size]``, valid until the next layer's update.

        Raises:
            ValueError: keys or values have another shape than the configuration says, or pages another dtype.
        """
        assert self.keys is not None and self.values is not None
        cache, heads, size = self._cache, self.keys.shape[1], self.keys.shape[3]
        for states in (key_states, value_states):
            if (states.shape[1], states.shape[3]) != (heads, size):
                raise ValueError(
                    f"layer {self._index} has keys or values of {states.shape[1]} heads of {states.shape[3]}, the "
                    f"configuration says {heads} of {size}: this model cannot be decoded over pages"
                )
        written = (cache.pages, slice(None), cache.offsets)  # [B, W, heads, size]
        self.keys[written] = key_states.transpose(1, 2).to(cache.dtype)
        self.values[written] = value_states.transpose(1, 2).to(cache.dtype)
        if cache.dense is not None:
            keys, values = cache.gather(self._index)
            return keys.to(key_states.dtype), values.to(value_states.dtype)
        if key_states.dtype is not cache.dtype:
            raise ValueError(f"keys are {key_states.dtype}, pages {cache.dtype}: make the pages of {key_states.dtype}")
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, offset) of the keys that attention sees."""
        return self._cache.visible, 0

    def get_seq_length(self) -> int:
        """Not known here: whoever runs the model gives every token its position."""
        return 0

    def get_max_length(self) -> int:
        """Tokens that all pages of the arena hold."""
        return self._cache.arena.chunks * self._cache.page


class PagedCache(Cache):
    """One :class:`PagedLayer` a layer, over the chunks of an arena. Say :meth:`begin`, then run the model.

    A chunk in the dtype of the cache is ``[layers, 2, kv heads, PAGE, head size]``, keys before values; what is left at
    its end is not used. So one head's part of a page is contiguous, and a page moves, or is lost, as a whole.

    Args:
        config: Of the language part. arena: Chunks of :meth:`chunk_bytes` or more. dtype: Of keys and values.
        page: Tokens a page.

    Raises:
        ValueError: the arena's chunks are too small, or ``page`` is no power of two.
    """

    def __init__(self, config: Any, arena: Arena, dtype: torch.dtype, page: int = PAGE) -> None:
        need = self.chunk_bytes(config, dtype, page)
        if arena.chunk_bytes < need:
            raise ValueError(
                f"a page of {page} tokens takes {need} bytes, a chunk of the arena has {arena.chunk_bytes}: make it "
                "with PagedCache.chunk_bytes(config, dtype, page)"
            )
        self.arena, self.dtype, self.page = arena, dtype, page
        layers, self._heads, self._size = kv_shape(config)
        self._data = arena.data.view(dtype)  # [chunks, elements]
        self._elements = self._data.shape[1]
        # Rows of the largest size that both chunks and heads of a page are whole multiples of: one gather copies them.
        part = page * self._size
        self._row = math.gcd(self._elements, part)
        self._rows = self._data.view(-1, self._row)
        self._within = torch.arange(part // self._row, device=arena.data.device)
        self._buffer: Tensor | None = None
        self.visible = 0
        self.pages = self.offsets = torch.empty(0, dtype=torch.long, device=arena.data.device)
        self.dense: Tensor | None = None
        super().__init__(layers=[PagedLayer(self, index) for index in range(layers)])

    @classmethod
    def chunk_bytes(cls, config: Any, dtype: torch.dtype, page: int = PAGE) -> int:
        """Bytes that a page takes, rounded up to 512.

        Args:
            config: Of the language part. dtype: Of keys and values. page: Tokens a page.

        Raises:
            ValueError: ``page`` is no power of two, which the attention kernel asks for.
        """
        if page < 1 or page & (page - 1):
            raise ValueError(f"pages of {page} tokens: give a power of two")
        layers, heads, size = kv_shape(config)
        return -(-layers * 2 * heads * page * size * dtype.itemsize // ROUND) * ROUND

    def pages_of(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer in all chunks, each a view ``[chunks, kv heads, PAGE, head size]``."""
        part = self.page * self._size
        shape = (self.arena.chunks, self._heads, self.page, self._size)
        strides = (self._elements, part, self._size, 1)
        first = self._data.storage_offset() + layer * 2 * self._heads * part
        keys, values = (self._data.as_strided(shape, strides, first + side * self._heads * part) for side in (0, 1))
        return keys, values

    def begin(self, positions: Tensor, table: Tensor, *, dense: bool) -> None:
        """Say where the next forward writes and what it reads. Reads nothing from the device.

        Args:
            positions: int64 ``[B, W]``, of the tokens. table: int64 ``[B, N]``, the chunks of each sequence in order.
            dense: Gather keys and values, instead of handing out the pages themselves.
        """
        self.visible = table.shape[1] * self.page
        self.pages = table.gather(1, positions // self.page)
        self.offsets = positions % self.page
        self.dense = None
        if dense:
            parts = len(self._within)
            sides = torch.arange(2 * self._heads, device=table.device).view(2, 1, self._heads, 1, 1) * parts
            chunks = table[:, None, :, None] * (self._elements // self._row)  # [B, 1, N, 1]
            self.dense = chunks + sides + self._within  # [2, B, heads, N, parts]: keys, then values

    def gather(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the table's pages in a layer, ``[B, kv heads, N * PAGE, head size]``, by one copy.

        On a CPU they lie in a buffer that all layers share: fresh memory would be mapped page by page each time.
        """
        assert self.dense is not None
        index = self.dense.add(layer * 2 * self._heads * len(self._within)).view(-1)
        if index.device.type != "cpu":
            rows = self._rows.index_select(0, index)
        else:
            if self._buffer is None or len(self._buffer) < len(index):
                with torch.inference_mode(False):
                    self._buffer = torch.empty(len(index) * 5 // 4, self._row, dtype=self.dtype)
            rows = torch.index_select(self._rows, 0, index, out=self._buffer[: len(index)])
        both = rows.view(2, self.dense.shape[1], self._heads, self.visible, self._size)
        return both[0], both[1]
