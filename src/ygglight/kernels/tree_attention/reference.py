"""Decode attention under any mask in plain torch: the truth, and what runs on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor


def tree_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """See :func:`ygglight.kernels.tree_attention.tree_attention`.

    The query heads of a group are folded into the rows of one product with their key head, so keys and values are read
    once and never repeated. Everything is in float32 (float64 for float64): scores rounded to bfloat16 are not enough
    for models with large ones (Qwen2.5: logits 38 % off).
    """
    batch, heads, width, size = query.shape
    groups, slots = key.shape[1], key.shape[2]
    work = torch.promote_types(query.dtype, torch.float32)
    folded = query.reshape(batch, groups, heads // groups * width, size).to(work)
    scores = torch.matmul(folded, key.to(work).transpose(-1, -2)).mul_(scale)
    if softcap is not None:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    scores = scores.view(batch, groups, heads // groups, width, slots)
    hidden = ~mask[:, :, None]  # [B, 1, 1, W, C]
    scores = scores.masked_fill_(hidden, -torch.inf)
    if sinks is None:
        weights = torch.softmax(scores, dim=-1)
    else:
        extra = sinks.to(scores.dtype).view(1, groups, heads // groups, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.softmax(torch.cat([scores, extra], dim=-1), dim=-1)[..., :-1]
    # A row that sees nothing is softmax(-inf, ...) = NaN, which would spread through the layers.
    weights = weights.masked_fill_(hidden, 0.0) if sinks is None else weights.masked_fill(hidden, 0.0)
    weights = weights.view(batch, groups, heads // groups * width, slots)
    return torch.matmul(weights, value.to(work)).view(batch, heads, width, value.shape[-1]).to(query.dtype)
