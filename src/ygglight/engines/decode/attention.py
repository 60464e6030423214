"""The attention functions that decoding models use: any mask over a static cache, or over pages of one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ygglight.compat.attention import register_attention
from ygglight.kernels.tree_attention import tree_attention

NAME, PAGED = "ygglight_tree", "ygglight_paged"
MAX_TREE = 128
"""Most queries that the decode kernel is for; more are a prompt, and sdpa's work."""
_reading = threading.local()  # .table; of this thread alone, for another may run another model


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention interface over :func:`ygglight.kernels.tree_attention.tree_attention`.

    Args:
        module: The attention layer. query: ``[B, Hq, W, D]``. key, value: ``[B, Hk, C, D]``, straight from the cache.
        attention_mask: bool ``[B or 1, 1, W, C]``, True where a query attends. scaling: of the scores.
        softcap: Of the scores (Gemma 2). s_aux: One extra logit a head (gpt-oss).
        **kwargs: What other attention functions need.

    Returns:
        ``[B, W, Hq, D]``, and no weights.

    Raises:
        RuntimeError: no boolean mask came: the model makes its own masks, and this function would not be causal.
    """
    mask, scale = _checked(module, query, attention_mask, scaling)
    if query.shape[2] > MAX_TREE and softcap is None and s_aux is None:
        output = _wide(query, key, value, mask, scale)
    else:
        with torch.autocast(query.device.type, enabled=False):  # it would round the scores
            output = tree_attention(query, key, value, mask, scale, softcap=softcap, sinks=s_aux)
    return output.transpose(1, 2), None


@contextmanager
def reading_pages(table: Tensor) -> Iterator[None]:
    """Tells :func:`attend_pages` the table of the pages; a model cannot be made to pass it on.

    Args:
        table: int64 ``[B, N]``, the pages of each sequence in the order of its text.
    """
    _reading.table = table
    try:
        yield
    finally:
        del _reading.table


def attend_pages(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """:func:`attend` where keys and values are pages; to be run inside of :func:`reading_pages`.

    Args:
        module: See :func:`attend`. query: ``[B, Hq, W, D]``. key, value: ``[P, Hk, PAGE, D]``, all pages there are.
        attention_mask: bool ``[B, 1, W, N * PAGE]``, over the pages of the table. scaling: of the scores.
        softcap: See :func:`attend`. s_aux: See :func:`attend`. **kwargs: What other attention functions need.

    Returns:
        ``[B, W, Hq, D]``, and no weights.

    Raises:
        RuntimeError: no boolean mask came.
    """
    mask, scale = _checked(module, query, attention_mask, scaling)
    with torch.autocast(query.device.type, enabled=False):
        output = tree_attention(query, key, value, mask, scale, softcap=softcap, sinks=s_aux, table=_reading.table)
    return output.transpose(1, 2), None


def _checked(module: nn.Module, query: Tensor, mask: Tensor | None, scaling: float | None) -> tuple[Tensor, float]:
    if mask is None or mask.dtype is not torch.bool:
        raise RuntimeError(f"{type(module).__name__} did not pass the tree mask on")
    return mask, query.shape[-1] ** -0.5 if scaling is None else scaling


def _wide(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    return nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )


def register() -> None:
    """Make the functions known to transformers."""
    register_attention(NAME, attend)
    register_attention(PAGED, attend_pages)
