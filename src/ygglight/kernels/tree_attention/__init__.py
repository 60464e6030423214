"""Attention of a few queries over a static KV cache under any mask: what verifies and grows token trees."""

from __future__ import annotations

import torch
from torch import Tensor

from ygglight.kernels._dispatch import implementation, register
from ygglight.kernels.tree_attention.checks import check_inputs
from ygglight.kernels.tree_attention.reference import prefers_sdpa, tree_attention_reference, tree_attention_sdpa

__all__ = ["tree_attention", "tree_attention_reference"]

register("tree_attention", has_kernel=True)

LARGEST_HEAD = 512
"""Head size above which the plain version runs everywhere: two tiles of it do not fit in shared memory."""


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

    On CUDA a split-KV Triton kernel, elsewhere plain torch or, for many queries, torch's scaled_dot_product_attention.
    Scores and sums are in float32 (float64 for float64) in all of them.

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
        ValueError: shapes, dtypes or devices do not fit, or gradients are asked for; the text names the mend.
    """
    check_inputs(query, key, value, mask, softcap, sinks)
    largest = max(query.shape[-1], value.shape[-1])
    fits = query.dtype is not torch.float64 and largest <= LARGEST_HEAD
    if fits and implementation("tree_attention", query.device.type).implementation == "triton":
        from ygglight.kernels.tree_attention.triton import launch

        return launch(query, key, value, mask, scale, softcap, sinks)
    if prefers_sdpa(query, key, value, softcap, sinks):
        return tree_attention_sdpa(query, key, value, mask, scale)
    return tree_attention_reference(query, key, value, mask, scale, softcap, sinks)
