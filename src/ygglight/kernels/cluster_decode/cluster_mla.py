"""Launches the decode block of multi-head latent attention on clusters."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
from torch import Tensor

from ygglight.kernels.cluster_decode.choose import why_no_latent_tiles
from ygglight.kernels.cluster_decode.cluster import BLOCKS, EMULATED_PROCESSORS, LOADS, NUM_WARPS, ROWS, SUM_BLOCK
from ygglight.kernels.cluster_decode.cluster_kernels import sum_kernel
from ygglight.kernels.cluster_decode.cluster_mla_kernels import latent_kernel, query_latent_kernel
from ygglight.kernels.cluster_decode.mla import LatentSpec, LatentWeights
from ygglight.kernels.tree_attention.triton import LOG2E

QUERY_ROWS = 4
QUERY_BLOCK = 2048


def launch(
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
    """Runs the block on the current stream, in two kernels, or three with a query latent.

    Args:
        x: See :func:`ygglight.kernels.cluster_decode.latent.latent_block`, as for all others; in float16 or
            bfloat16. The mask is of bool. The last dimension of weights and caches is contiguous.
        blocks: of a cluster, 1, 2, 4 or 8; by default as many as fit the device in one wave.

    Raises:
        ValueError: sizes do not fit the kernel's tiles.
    """
    batch, out_size, device = len(x), len(weights.o), x.device
    processors = torch.cuda.get_device_properties(device).multi_processor_count if x.is_cuda else EMULATED_PROCESSORS
    fitting = [n for n in BLOCKS if n * batch * spec.heads <= processors]
    blocks = blocks or max(fitting, default=1)
    check_sizes(spec, blocks)
    x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
    parts = torch.empty(batch, spec.heads, out_size, dtype=torch.float32, device=device)
    out = torch.empty(batch, out_size, dtype=x.dtype, device=device)
    seen = None if mask is None else mask.view(torch.uint8)
    mask_strides = (0, 0) if seen is None else (seen.stride(0) if len(seen) > 1 else 0, seen.stride(1))
    new_strides = [(each.stride(0), 0 if slots is None else each.stride(1)) for each in (new_latents, new_rotated)]
    on_device = torch.cuda.device(device) if x.is_cuda else contextlib.nullcontext()
    with on_device:  # Triton launches on the current device, whatever its arguments
        query = None
        if weights.q_a is not None:
            size = len(weights.q_a)
            query = torch.empty(batch, size, dtype=torch.float32, device=device)
            query_latent_kernel[(triton.cdiv(size, QUERY_ROWS), batch)](
                x, weights.norm, weights.q_a, weights.q_a_bias, query, x.stride(0), weights.q_a.stride(0), spec.eps,
                HIDDEN=spec.hidden, QUERY=size, ROWS=QUERY_ROWS, BLOCK=QUERY_BLOCK, num_warps=4,
            )  # fmt: skip
        latent_kernel[(spec.heads * batch,)](
            x, weights.norm, query, weights.q_a_norm, weights.q, weights.kv_a, weights.kv_a_norm, weights.kv_b,
            weights.o, weights.kv_a_bias, cos, sin, latents, rotated, lengths, slots, seen, new_latents, new_rotated,
            parts,
            x.stride(0), 0 if query is None else query.stride(0), weights.q.stride(0), weights.kv_a.stride(0),
            weights.kv_b.stride(0), weights.o.stride(0), cos.stride(0), sin.stride(0), *latents.stride()[:2],
            *rotated.stride()[:2], *new_strides[0], *new_strides[1], *mask_strides, batch, spec.heads, spec.eps,
            spec.latent_eps, spec.scale * LOG2E,
            **constants(spec, out_size, 0 if query is None else query.shape[1], blocks),
            num_warps=NUM_WARPS, num_ctas=blocks, enable_fp_fusion=True,
        )  # fmt: skip
        sum_kernel[(batch, triton.cdiv(out_size, SUM_BLOCK))](
            parts, weights.o_bias, out, PARTS=spec.heads, OUT=out_size, BLOCK=SUM_BLOCK, num_warps=4
        )
    return out


def constants(spec: LatentSpec, out_size: int, query: int, blocks: int) -> dict[str, Any]:
    """The kernel's compile-time arguments.

    Args:
        spec: Of the block. out_size: rows of the output projection. query: size of the query latent, or 0.
        blocks: of a cluster.
    """
    rows = spec.rope_dim // blocks
    warps = min(NUM_WARPS, rows)
    repeats = max(1, LOADS * warps // rows)
    strips = 32 * 8 // spec.value_dim  # of the output's rows, in a warp
    return {
        "HIDDEN": spec.hidden, "QUERY": query, "OUT": out_size, "NOPE": spec.nope_dim, "ROPE": spec.rope_dim,
        "VALUE": spec.value_dim, "LATENT": spec.latent, "INTERLEAVED": spec.rotary != "halves",
        "UNZIPPED": spec.rotary == "unzipped", "LANES": 1, "WARPS": warps, "ROWS": ROWS,
        "BLOCK_K": min(8 * 32 * (NUM_WARPS // warps) * repeats, triton.next_power_of_2(spec.hidden)),
        "BLOCK_B": min(16 * blocks, spec.nope_dim, spec.value_dim),
        "BLOCK_O": blocks * NUM_WARPS * strips * LOADS,
    }  # fmt: skip


def check_sizes(spec: LatentSpec, blocks: int) -> None:
    """Refuses sizes that the tiles do not fit.

    Args:
        spec: Of the block. blocks: of a cluster.

    Raises:
        ValueError: they do not fit.
    """
    obstacle = why_no_latent_tiles(spec)
    if obstacle is not None:
        raise ValueError(f"{obstacle}; call latent_block_torch for others")
    if blocks not in BLOCKS:
        raise ValueError(f"blocks={blocks}: give one of {BLOCKS}")
