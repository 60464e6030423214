"""The decode block of multi-head latent attention in plain torch, made to be fast: what runs where no cluster can.

As `latent_block_reference`, but products are in the dtype of the weights (which add up in float32 inside and round
once), and weights are neither copied nor widened. Norms, rotary embedding, scores and softmax are in float32. A model
expands every latent of the text to keys and values of all heads at each step: ``heads * (nope_dim + value_dim) *
latent`` multiplications a token of text. Here it is ``2 * heads * latent``, and a small product with each half of
``kv_b`` a step.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ygglight.kernels.cluster_decode.mla import (
    LatentSpec,
    LatentWeights,
    append,
    attended_slots,
    rms_norm,
    split_kv_b,
    turn,
)

_PIECE = 512
"""Tokens whose latents are widened at once: 1 MiB in DeepSeek's sizes."""


def latent_block_torch(
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
    """Runs one new token of each sequence through the block. Reads nothing on the host.

    Args:
        x: See :func:`ygglight.kernels.cluster_decode.latent.latent_block`, as for all others. All slots must hold
            finite numbers: what is not attended to is multiplied by zero.
    """
    batch, work = len(x), torch.promote_types(x.dtype, torch.float32)
    normed = rms_norm(x, weights.norm, spec.eps)
    query = normed
    if weights.q_a is not None and weights.q_a_norm is not None:
        query = rms_norm(F.linear(normed, weights.q_a, weights.q_a_bias), weights.q_a_norm, spec.latent_eps)
    query = F.linear(query, weights.q).view(batch, spec.heads, spec.nope_dim + spec.rope_dim)
    query_nope, query_rope = query.split([spec.nope_dim, spec.rope_dim], dim=-1)
    latent, key_rope = F.linear(normed, weights.kv_a, weights.kv_a_bias).split([spec.latent, spec.rope_dim], dim=-1)
    latent = rms_norm(latent, weights.kv_a_norm, spec.latent_eps)
    cos, sin = cos.to(work)[:, None], sin.to(work)[:, None]
    query_rope = turn(query_rope.to(work), cos, sin, spec.rotary).to(x.dtype)
    key_rope = turn(key_rope.to(work)[:, None], cos, sin, spec.rotary).to(x.dtype)[:, 0]

    up, down = split_kv_b(weights.kv_b, spec)
    absorbed = torch.bmm(query_nope.transpose(0, 1), up).transpose(0, 1)  # [B, heads, latent]
    # `bmm` and not `@`: of a batch of one `@` takes a path that is 15 times slower in bfloat16 (torch 2.13, Zen 5).
    scores = _products(absorbed, latents, work) + _products(query_rope, rotated, work)
    own = (absorbed.to(work) * latent[:, None].to(work)).sum(-1) + (query_rope.to(work) * key_rope[:, None]).sum(-1)
    scores = torch.cat((scores, own[..., None]), dim=-1) * spec.scale
    if mask is not None and mask.dtype is not torch.bool:
        scores = scores + F.pad(mask.to(work), (0, 1))[:, None]
    seen = F.pad(attended_slots(latents.shape[1], lengths, mask, slots), (0, 1), value=True)
    chances = torch.softmax(scores.masked_fill(~seen[:, None], -torch.inf), dim=-1)
    attended = torch.bmm(chances[..., :-1].to(x.dtype), latents).to(work) + chances[..., -1:] * latent[:, None]
    # Rows of `kv_b` first: the other way round is 6 times slower in bfloat16.
    values = torch.bmm(down, attended.to(x.dtype).permute(1, 2, 0)).permute(2, 0, 1)  # [B, heads, value_dim]
    append(latent, key_rope, new_latents, new_rotated, slots)
    return F.linear(values.reshape(batch, -1), weights.o, weights.o_bias)


def _products(query: Tensor, states: Tensor, work: torch.dtype) -> Tensor:
    """``query [B, heads, D]`` times ``states [B, C, D]``: ``[B, heads, C]`` in the dtype of arithmetic.

    Scores that are rounded to 16 bits triple the error of what is attended to (1K tokens, bfloat16).
    """
    if query.dtype is work:
        return torch.bmm(query, states.mT)
    if query.is_cuda and torch.version.hip is None:
        return torch.bmm(query, states.mT, out_dtype=work)
    # No such product on a CPU (torch 2.13): the cache is widened in pieces that stay in the processor's cache.
    wide = query.to(work)
    return torch.cat([torch.bmm(wide, part.to(work).mT) for part in states.split(_PIECE, dim=1)], dim=-1)
