"""The decode block of multi-head latent attention (DeepSeek-V2, arXiv:2405.04434), with absorbed weights, in torch.

A token's keys and values are one latent vector for all heads, and one rotated key part. Expanding the latents of the
whole context to keys and values at each step would cost heads times as much as reading them. So the two halves of
``kv_b`` are moved to the other side of the products: queries are projected down to the latent space, where they meet
the cache as it is, and so are outputs projected up after the weighted sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Rotary = Literal["pairs", "unzipped", "halves"]
"""How a rotary embedding takes the elements of a vector, and where it leaves them."""


@dataclass(frozen=True)
class LatentSpec:
    """Sizes of the block.

    Args:
        hidden: size of the residual stream. heads: query heads.
        nope_dim: elements of a query head that are not rotated. rope_dim: those that are.
        value_dim: of a value head. latent: of the compressed keys and values.
        eps: of the norm in front. latent_eps: of the norms of latents. scale: of the scores.
        rotary: "pairs": elements 2i and 2i + 1 are rotated together and stay where they are (DeepSeek-V2). "unzipped":
            the same, and then first elements make the first half and second ones the second (DeepSeek-V3, as
            transformers has it). "halves": elements i and i + rope_dim / 2 (V3 with ``rope_interleave=False``).
    """

    hidden: int
    heads: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    latent: int
    eps: float
    latent_eps: float
    scale: float
    rotary: Rotary = "pairs"


@dataclass(frozen=True)
class LatentWeights:
    """The model's own tensors.

    Args:
        norm: ``[hidden]``.
        q: ``[heads * (nope_dim + rope_dim), hidden]``, or over the query latent where ``q_a`` is given.
        kv_a: ``[latent + rope_dim, hidden]``. kv_a_norm: ``[latent]``.
        kv_b: ``[heads * (nope_dim + value_dim), latent]``. o: ``[output size, heads * value_dim]``.
        q_a: ``[query latent, hidden]`` or None. q_a_norm: ``[query latent]``, with ``q_a``.
        q_a_bias: Of ``q_a``, or None; so are kv_a_bias and o_bias.
    """

    norm: Tensor
    q: Tensor
    kv_a: Tensor
    kv_a_norm: Tensor
    kv_b: Tensor
    o: Tensor
    q_a: Tensor | None = None
    q_a_norm: Tensor | None = None
    q_a_bias: Tensor | None = None
    kv_a_bias: Tensor | None = None
    o_bias: Tensor | None = None


def split_kv_b(kv_b: Tensor, spec: LatentSpec) -> tuple[Tensor, Tensor]:
    """The two halves of ``kv_b``: ``[heads, nope_dim, latent]`` for queries, ``[heads, value_dim, latent]``; views.

    Args:
        kv_b: See :class:`LatentWeights`. spec: Of the block.
    """
    up, down = kv_b.view(spec.heads, spec.nope_dim + spec.value_dim, spec.latent).split(
        [spec.nope_dim, spec.value_dim], dim=1
    )
    return up, down


def latent_block_reference(
    x: Tensor,
    weights: LatentWeights,
    spec: LatentSpec,
    cos: Tensor,
    sin: Tensor,
    latents: Tensor,
    rotated: Tensor,
    lengths: Tensor,
    new_latents: Tensor,
    new_rotated: Tensor,
    *,
    mask: Tensor | None = None,
    slots: Tensor | None = None,
) -> Tensor:
    """Runs one new token of each sequence through the block; arithmetic in float32 (float64 for float64).

    Slots that are not attended to may hold anything, also NaN.

    Args:
        x: See :func:`ygglight.kernels.cluster_decode.latent.latent_block`, as for all others.
    """
    batch, work = len(x), torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos.to(work)[:, None], sin.to(work)[:, None]

    def project(state: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(state, weight.to(work), None if bias is None else bias.to(work))

    normed = rms_norm(x.to(work), weights.norm, spec.eps)
    query = normed
    if weights.q_a is not None and weights.q_a_norm is not None:
        query = rms_norm(project(normed, weights.q_a, weights.q_a_bias), weights.q_a_norm, spec.latent_eps)
    query = project(query, weights.q).view(batch, spec.heads, spec.nope_dim + spec.rope_dim)
    query_nope, query_rope = query.split([spec.nope_dim, spec.rope_dim], dim=-1)
    latent, key_rope = project(normed, weights.kv_a, weights.kv_a_bias).split([spec.latent, spec.rope_dim], dim=-1)
    latent = rms_norm(latent, weights.kv_a_norm, spec.latent_eps).to(x.dtype)
    key_rope = turn(key_rope[:, None], cos, sin, spec.rotary)[:, 0].to(x.dtype)
    query_rope = turn(query_rope, cos, sin, spec.rotary)

    seen = attended_slots(latents.shape[1], lengths, mask, slots)
    # A weight of zero does not hide a NaN in memory that nobody has written yet.
    all_latents, all_rotated = (
        torch.cat((cached.masked_fill(~seen[..., None], 0.0), new[:, None]), dim=1).to(work)
        for cached, new in ((latents, latent), (rotated, key_rope))
    )
    up, down = (half.to(work) for half in split_kv_b(weights.kv_b, spec))
    absorbed = torch.einsum("bhn,hnl->bhl", query_nope, up)
    scores = (absorbed @ all_latents.mT + query_rope @ all_rotated.mT) * spec.scale
    if mask is not None and mask.dtype is not torch.bool:
        scores = scores + F.pad(mask.to(work), (0, 1))[:, None]
    scores = scores.masked_fill(~F.pad(seen, (0, 1), value=True)[:, None], -torch.inf)
    attended = torch.einsum("bhl,hvl->bhv", torch.softmax(scores, dim=-1) @ all_latents, down)
    append(latent, key_rope, new_latents, new_rotated, slots)
    return project(attended.flatten(1).to(x.dtype).to(work), weights.o, weights.o_bias).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The norm over the last dimension in float32 (float64 for float64), rounded once, to the dtype of ``x``.

    Args:
        x: ``[..., size]``. weight: ``[size]``. eps: added to the mean square.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def turn(x: Tensor, cos: Tensor, sin: Tensor, rotary: Rotary) -> Tensor:
    """The rotary embedding of the last dimension.

    Args:
        x: ``[..., rope_dim]``. cos: ``[..., rope_dim / 2]``, of each pair; any shape that broadcasts. sin: the same.
        rotary: See :class:`LatentSpec`.
    """
    if rotary == "halves":
        first, second = x.chunk(2, dim=-1)
    else:
        first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    pair = (first * cos - second * sin, second * cos + first * sin)
    return torch.stack(pair, dim=-1).flatten(-2) if rotary == "pairs" else torch.cat(pair, dim=-1)


def attended_slots(count: int, lengths: Tensor, mask: Tensor | None, slots: Tensor | None) -> Tensor:
    """Which of ``count`` cached slots the new tokens attend to, bool ``[B, count]``; a floating mask hides nothing.

    Args:
        count: See :func:`ygglight.kernels.cluster_decode.latent.latent_block`, as for all others.
    """
    slot = torch.arange(count, device=lengths.device)
    seen = slot < lengths[:, None]
    if mask is not None and mask.dtype is torch.bool:
        seen = seen & mask
    if slots is not None:
        seen = seen & (slot != slots[:, None])
    return seen


def append(
    latent: Tensor, key_rope: Tensor, new_latents: Tensor, new_rotated: Tensor, slots: Tensor | None
) -> None:  # fmt: skip
    """Writes the new tokens' part of the cache.

    Args:
        latent: ``[B, latent]``. key_rope: ``[B, rope_dim]``. new_latents: where it goes, or with ``slots`` the whole
            cache. new_rotated: the same. slots: int32 or int64 ``[B]``, or None.
    """
    if slots is None:
        new_latents.copy_(latent)
        new_rotated.copy_(key_rope)
        return
    rows, slots = torch.arange(len(latent), device=latent.device), slots.long()
    new_latents[rows, slots] = latent
    new_rotated[rows, slots] = key_rope
