"""Attention of a few queries over a static KV cache under any mask: what verifies and grows token trees."""

from __future__ import annotations

from torch import Tensor

from ygglight.kernels._dispatch import register
from ygglight.kernels.tree_attention.reference import tree_attention_reference

__all__ = ["tree_attention", "tree_attention_reference"]

register("tree_attention", has_kernel=False)


def tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Softmax attention with grouped heads and an arbitrary mask; forward only.

    Args:
        query: ``[B, Hq, W, D]``, float16, bfloat16, float32 (float64 in the plain version).
        key: ``[B, Hk, C, D]``, Hq a multiple of Hk; any strides but the last, which must be 1.
        value: ``[B, Hk, C, Dv]``; the same.
        mask: bool ``[B or 1, 1, W, C]``, True where a query attends. A row without any gives zeros.
        scale: of the scores.
        softcap: scores become ``softcap * tanh(scores / softcap)`` (Gemma 2).
        sinks: ``[Hq]``, one more logit a head in the denominator (gpt-oss).

    Returns:
        ``[B, Hq, W, Dv]`` in the dtype of ``query``.

    Raises:
        ValueError: shapes do not fit.
    """
    if query.shape[1] % key.shape[1] or mask.shape[-2:] != (query.shape[2], key.shape[2]):
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and mask {tuple(mask.shape)} do not fit: query heads must "
            "be a multiple of key heads, and the mask [B or 1, 1, queries, keys]"
        )
    return tree_attention_reference(query, key, value, mask, scale, softcap, sinks)
