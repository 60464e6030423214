"""The decode block in plain torch: the truth, and what runs where no kernel can."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ygglight.kernels.cluster_decode.spec import BlockSpec, BlockWeights


def decode_block_reference(
    x: Tensor,
    weights: BlockWeights,
    spec: BlockSpec,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    mask: Tensor | None = None,
    slots: Tensor | None = None,
) -> Tensor:
    """See :func:`ygglight.kernels.cluster_decode.decode_block`.

    All arithmetic is in float32 (float64 for float64). Rounded to the dtype of ``x`` is what a cache or a tensor core
    takes: queries, keys and values after the rotary embedding, and what goes into the output projection.
    """
    batch, work = len(x), torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos.to(work), sin.to(work)

    def project(state: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(state, weight.to(work), None if bias is None else bias.to(work))

    normed = _rms_norm(x.to(work), weights.norm, spec)
    query = project(normed, weights.q, weights.q_bias).view(batch, spec.heads, spec.head_dim)
    key = project(normed, weights.k, weights.k_bias).view(batch, spec.kv_heads, spec.head_dim)
    value = project(normed, weights.v, weights.v_bias).view(batch, spec.kv_heads, spec.head_dim).to(x.dtype)
    if weights.q_norm is not None and weights.k_norm is not None:
        query, key = _rms_norm(query, weights.q_norm, spec), _rms_norm(key, weights.k_norm, spec)
    query, key = (_rotate(each, cos, sin, spec).to(x.dtype) for each in (query, key))

    attended = _attend(query, key, value, spec, keys, values, lengths, mask, slots)
    if slots is None:
        new_keys.copy_(key)
        new_values.copy_(value)
    else:
        rows = torch.arange(batch, device=x.device)
        new_keys[rows, :, slots] = key
        new_values[rows, :, slots] = value
    return project(attended.to(x.dtype).to(work), weights.o, weights.o_bias).to(x.dtype)


def _rms_norm(x: Tensor, weight: Tensor, spec: BlockSpec) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + spec.eps) * (weight.to(x.dtype) + spec.norm_offset)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, spec: BlockSpec) -> Tensor:
    """Rotates the first ``rotary_dim`` elements of each head, pair by pair; the others go through."""
    half = spec.rotary_dim // 2
    cos, sin = cos[:, None, :half], sin[:, None, :half]
    turned = x[..., : spec.rotary_dim]
    shape = (half, 2) if spec.interleaved_rope else (2, half)
    first, second = turned.unflatten(-1, shape).unbind(-1 if spec.interleaved_rope else -2)
    pair = (first * cos - second * sin, second * cos + first * sin)
    turned = torch.stack(pair, dim=-1 if spec.interleaved_rope else -2).flatten(-2)
    return torch.cat((turned, x[..., spec.rotary_dim :]), dim=-1)


def visible(spec: BlockSpec, count: int, lengths: Tensor, mask: Tensor | None, slots: Tensor | None) -> Tensor:
    """Which of ``count`` slots the new tokens attend to, bool ``[B, count]``; a floating mask hides nothing.

    Args:
        spec: See :func:`ygglight.kernels.cluster_decode.decode_block`, as for all others.
    """
    slot, committed = torch.arange(count, device=lengths.device), lengths[:, None]
    seen = slot < committed
    if spec.window is not None:
        seen = seen & (slot > committed - spec.window)
    if mask is not None and mask.dtype is torch.bool:
        seen = seen & mask
    if slots is not None:
        seen = seen & (slot != slots[:, None])
    return seen


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spec: BlockSpec,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    mask: Tensor | None,
    slots: Tensor | None,
) -> Tensor:
    """``[B, heads * head_dim]`` in the arithmetic's dtype; the new token is the last of the keys."""
    batch, work = len(query), torch.promote_types(query.dtype, torch.float32)
    seen = visible(spec, keys.shape[2], lengths, mask, slots)
    # A weight of zero does not hide a NaN in memory that nobody has written yet.
    all_keys, all_values = (
        torch.cat((cached.masked_fill(~seen[:, None, :, None], 0.0), new[:, :, None]), dim=2).to(work)
        for cached, new in ((keys, key), (values, value))
    )
    grouped = query.view(batch, spec.kv_heads, spec.group, spec.head_dim).to(work)
    scores = grouped @ all_keys.transpose(-1, -2) * spec.scale
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    seen = F.pad(seen, (0, 1), value=True)[:, None, None]
    if mask is not None and mask.dtype is not torch.bool:
        scores = scores + F.pad(mask.to(work), (0, 1))[:, None, None]
    weights = torch.softmax(scores.masked_fill(~seen, -torch.inf), dim=-1)
    return (weights @ all_values).flatten(1)
