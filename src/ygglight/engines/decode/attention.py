"""The attention function that decoding models use: any mask over a static cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ygglight.compat.attention import register_attention
from ygglight.kernels.tree_attention import tree_attention

NAME = "ygglight_tree"
MAX_TREE = 128
"""Most queries that the decode kernel is for; more are a prompt, and sdpa's work."""


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
    if attention_mask is None or attention_mask.dtype is not torch.bool:
        raise RuntimeError(f"{type(module).__name__} did not pass the tree mask on")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if query.shape[2] > MAX_TREE and softcap is None and s_aux is None:
        output = _wide(query, key, value, attention_mask, scale)
    else:
        with torch.autocast(query.device.type, enabled=False):  # it would round the scores
            output = tree_attention(query, key, value, attention_mask, scale, softcap=softcap, sinks=s_aux)
    return output.transpose(1, 2), None


def _wide(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    return nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )


def register() -> None:
    """Make the function known to transformers."""
    register_attention(NAME, attend)
