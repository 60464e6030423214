"""Attention of a few queries over a static or paged KV cache under any mask: what verifies and grows token trees."""

from __future__ import annotations

import torch
from torch import Tensor

from ygglight.kernels import _dispatch
from ygglight.kernels.tree_attention.checks import check_inputs
from ygglight.kernels.tree_attention.reference import (
    gather_pages,
    prefers_sdpa,
    tree_attention_reference,
    tree_attention_sdpa,
)

__all__ = ["MAX_HEAD_SIZE", "tree_attention", "tree_attention_reference"]

MAX_HEAD_SIZE = 512
"""Largest head size of the Triton kernel: above it one block of keys and values alone fills the shared memory."""

_dispatch.register("tree_attention", has_kernel=True)


@torch.compiler.assume_constant_result  # it reads the environment, which torch.compile need not look into
def _uses_triton(device_type: str) -> bool:
    return _dispatch.implementation("tree_attention", device_type).implementation == "triton"


def tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    table: Tensor | None = None,
) -> Tensor:
    """Softmax attention with grouped heads and an arbitrary mask; forward only.

    CUDA tensors go to the Triton kernel, all others to plain torch, as do float64 and head sizes above
    ``MAX_HEAD_SIZE``. Scores and sums are in float32 everywhere. On CUDA nothing is read from the device and all sizes
    follow from shapes, so calls can be recorded in a CUDA graph; the same input gives the same bits.

    Args:
        query: ``[B, Hq, W, D]``, float16, bfloat16, float32 or float64.
        key: ``[B, Hk, C, D]`` in the dtype of ``query``, Hq a multiple of Hk. Any strides; the kernel is fast with the
            head size contiguous and, at 16 bits, a multiple of 8.
        value: ``[B, Hk, C, Dv]``; the same. Values of masked slots must be finite: they are multiplied by zero.
        mask: bool ``[B or 1, 1, W, C]``, True where a query attends. A row without any gives zeros.
        scale: of the scores.
        softcap: scores become ``softcap * tanh(scores / softcap)`` (Gemma 2, arXiv:2408.00118).
        sinks: floating ``[Hq]``, one more logit a head in the denominator (gpt-oss, arXiv:2508.10925).
        table: int32 or int64 ``[B, N]``, the block table of a paged cache (arXiv:2309.06180). Then ``key`` and
            ``value`` are pages, ``[P, Hk, PAGE, D]`` and ``[P, Hk, PAGE, Dv]`` with PAGE a power of two (views into one
            arena, for one), ``mask`` has N * PAGE slots, and slot s of sequence b is slot s % PAGE of page
            ``table[b, s // PAGE]``. All numbers must be in [0, P), also those of pages that no query attends to: what
            these hold does not matter, nor do the slots before the first and behind the last that a query attends to.

    Returns:
        ``[B, Hq, W, Dv]`` in the dtype of ``query``; its strides are not specified.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or a gradient would be needed.
        RuntimeError: YGGLIGHT_KERNELS=triton where the kernel cannot run.
    """
    check_inputs(query, key, value, mask, softcap, sinks, table)
    fits = query.dtype is not torch.float64 and max(query.shape[-1], value.shape[-1]) <= MAX_HEAD_SIZE
    if _uses_triton(query.device.type) and fits:
        from ygglight.kernels.tree_attention import triton

        # The operator is what torch.compile can take whole; called eagerly it would only cost its dispatch.
        run = triton.operator if torch.compiler.is_compiling() else triton.launch
        return run(query, key, value, mask, scale, softcap, sinks, table)
    if table is not None:
        key, value = gather_pages(key, value, mask, table)
    if prefers_sdpa(query, key, value, softcap, sinks):
        return tree_attention_sdpa(query, key, value, mask, scale)
    return tree_attention_reference(query, key, value, mask, scale, softcap, sinks)
