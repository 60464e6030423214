"""The decode block of multi-head latent attention: one function that picks what runs."""

from __future__ import annotations

import torch
from torch import Tensor

from ygglight.kernels.cluster_decode.checks import check_latent_inputs
from ygglight.kernels.cluster_decode.choose import choose_path
from ygglight.kernels.cluster_decode.mla import LatentSpec, LatentWeights
from ygglight.kernels.cluster_decode.mla_torch import latent_block_torch


def latent_block(
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
    blocks: int | None = None,
) -> Tensor:
    """Runs one new token of each sequence through the block; forward only.

    A token attends to itself and to every committed slot that is below its length, allowed by the mask and not the slot
    that ``slots`` writes. All slots of the view must hold finite numbers: those that are not attended to may be
    multiplied by zero. Nothing is read from the device and all sizes follow from shapes, so calls can be recorded in a
    CUDA graph. In a graph of `torch.compile` it is the operations of the torch path.

    Args:
        x: ``[B, hidden]``, the residual stream before the norm; float16, bfloat16, float32 or float64.
        weights: In the dtype of ``x``. spec: Sizes, and the rotary embedding.
        cos: ``[B, rope_dim / 2]`` of the new token's position, one number a pair; any floating dtype. sin: the same.
        latents: ``[B, C, latent]``, normed latents of the committed tokens: a view of any cache, whose vectors are in
            one piece; C may be 0. rotated: ``[B, C, rope_dim]``, their rotated key parts, likewise.
        lengths: int32 ``[B]`` on the device, committed tokens.
        new_latents: ``[B, latent]``, where the new token's go: fresh memory, or a slot of the cache. new_rotated:
            ``[B, rope_dim]``.
        mask: ``[B or 1, C]``: bool, True where the new token attends; or floating, added to the scores.
        slots: int32 or int64 ``[B]`` on the device. Then ``new_latents`` and ``new_rotated`` are whole caches
            ``[B, C', latent]`` and ``[B, C', rope_dim]``, and the token goes to this slot.
        blocks: Of a cluster, where the cluster block runs; 0 leaves it to plain torch; by default the size that fills
            the device.

    Returns:
        ``[B, output size]`` in the dtype of ``x``, before the residual is added.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or a gradient would be needed.
        RuntimeError: an environment variable asks for what cannot run here.
    """
    inputs = (x, weights, spec, cos, sin, latents, rotated, lengths, new_latents, new_rotated)
    if torch.compiler.is_compiling():
        return latent_block_torch(*inputs, mask=mask, slots=slots)
    check_latent_inputs(*inputs, mask, slots)
    path = choose_path(spec, x.dtype, x.device, batch=len(x), mask=None if mask is None else mask.dtype).path
    if path == "torch" or blocks == 0:
        return latent_block_torch(*inputs, mask=mask, slots=slots)
    from ygglight.kernels.cluster_decode import cluster_mla

    return cluster_mla.launch(*inputs, mask=mask, slots=slots, blocks=blocks)
