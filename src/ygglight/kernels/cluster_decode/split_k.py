"""The decode block in plain Triton, for any GPU and any Triton: matrix-vector products around split-KV attention.

1. `project_kernel`: norm and the three projections, a few rows of the weights a program. Each program takes the norm's
   factor anew from all of x: a few KiB of L2, where the rows of the weights are a hundred times that of memory.
2. `attend_kernel`: norm of the heads, rotary and KV append in front of Flash-Decoding over (key head, split of the
   slots). Every split repeats that front, which is a few hundred multiplications; the first one appends. The new token
   is the first that split 0 attends to, from registers, so no split waits for another.
3. `merge_kernel` of tree attention, when there are several splits.
4. `output_kernel`: the output projection.

Partial results are float32 and are summed in a fixed order, without atomics: the same input gives the same bits.
Nothing is read from the device, sizes follow from shapes and scratch comes from torch's allocator, so calls can be
recorded in a CUDA graph. Not yet timed on a GPU.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ygglight.kernels.cluster_decode.spec import BlockSpec, BlockWeights
from ygglight.kernels.cluster_decode.split_k_kernels import attend_kernel, output_kernel, project_kernel
from ygglight.kernels.tree_attention.triton import LOG2E, MERGE_SPLITS, choose_blocks, choose_splits, merge_kernel

DOT_BATCH = 16
"""Sequences of a product on tensor cores, which take no fewer; one sequence alone is multiplied without them."""
TILE_BYTES = 16384
"""Weights that a program reads at once: eight loads of 16 bytes a thread."""
PROGRAMS_PER_SM = 2
BOOL, ADDED = 1, 2
INTERPRETED_PROCESSORS = 2


class Tile(NamedTuple):
    """Sizes of a matrix-vector product: rows, columns and sequences of a program."""

    rows: int
    columns: int
    sequences: int


def choose_tile(rows: int, columns: int, batch: int, itemsize: int, processors: int) -> Tile:
    """Tile of a product, from shapes and dtype alone.

    Args:
        rows: of the weights. columns: of the weights. batch: sequences. itemsize: bytes of an element.
        processors: SMs of the device.
    """
    if batch > 1:
        # Products in float32 run without tensor cores, from registers, which larger tiles spill (so says cuobjdump).
        width = 32 if itemsize == 4 else 256
        return Tile(DOT_BATCH, min(width, max(16, triton.next_power_of_2(columns))), DOT_BATCH)
    fair = max(1, rows // (processors * PROGRAMS_PER_SM))
    height = min(16, max(4, 1 << (fair.bit_length() - 1)))
    return Tile(height, min(TILE_BYTES // itemsize // height, max(16, triton.next_power_of_2(columns))), 1)


def launch(
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
    *,
    splits: int | None = None,
) -> Tensor:
    """Runs the block on the current stream, in three kernels (one split) or four; inputs are not checked.

    Args:
        x: See :func:`ygglight.kernels.cluster_decode.decode_block`, as for all others.
        splits: of the slots, at most 128; by default from shapes and the number of SMs.
    """
    batch, device = len(x), x.device
    processors = INTERPRETED_PROCESSORS
    if x.is_cuda:
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    block = choose_blocks(spec.group, spec.head_dim, spec.head_dim, x.element_size())
    blocks = triton.cdiv(max(1, keys.shape[2]), block.slots)
    splits = splits or choose_splits(batch * spec.kv_heads, blocks, processors)
    on_device = torch.cuda.device(device) if x.is_cuda else contextlib.nullcontext()
    with on_device:  # Triton launches on the current device, whatever its arguments
        projected = _project(x.contiguous(), weights, spec, processors)
        attended = _attend(
            projected, weights, spec, cos, sin, keys, values, lengths, new_keys, new_values, mask, slots,
            block.slots, splits,
        )  # fmt: skip
        return _output(attended, weights, processors)


def _project(x: Tensor, weights: BlockWeights, spec: BlockSpec, processors: int) -> Tensor:
    batch = len(x)
    tile = choose_tile(spec.rows, spec.hidden, batch, x.element_size(), processors)
    projected = torch.empty(batch, spec.rows, dtype=torch.float32, device=x.device)
    biases = (weights.q_bias, weights.k_bias, weights.v_bias)
    tiles = sum(triton.cdiv(len(weight), tile.rows) for weight in (weights.q, weights.k, weights.v))
    project_kernel[(tiles, triton.cdiv(batch, tile.sequences))](
        x, weights.norm, weights.q, weights.k, weights.v, *(x if bias is None else bias for bias in biases), projected,
        x.stride(0), weights.q.stride(0), weights.k.stride(0), weights.v.stride(0), batch, spec.eps, spec.norm_offset,
        K=spec.hidden, Q_ROWS=len(weights.q), KV_ROWS=len(weights.k),
        HAS_Q_BIAS=weights.q_bias is not None, HAS_K_BIAS=weights.k_bias is not None,
        HAS_V_BIAS=weights.v_bias is not None,
        BLOCK_R=tile.rows, BLOCK_K=tile.columns, BLOCK_B=tile.sequences, num_warps=4,
    )  # fmt: skip
    return projected


def _attend(
    projected: Tensor,
    weights: BlockWeights,
    spec: BlockSpec,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    mask: Tensor | None,
    slots: Tensor | None,
    block_slots: int,
    splits: int,
) -> Tensor:
    batch, pairs, device = len(projected), len(projected) * spec.kv_heads, projected.device
    attended = torch.empty(batch, spec.heads * spec.head_dim, dtype=keys.dtype, device=device)
    parts = 0 if splits == 1 else pairs * splits * spec.group
    acc = torch.empty(parts * spec.head_dim, dtype=torch.float32, device=device)
    tops, sums = (torch.empty(parts, dtype=torch.float32, device=device) for _ in range(2))
    added = mask is not None and mask.dtype is not torch.bool
    seen = lengths if mask is None else mask if added else mask.view(torch.uint8)
    m_b, m_c = (0, 0) if mask is None else (seen.stride(0) if len(seen) > 1 else 0, seen.stride(1))
    inner, outer = (spec.scale * LOG2E, 1.0)
    if spec.softcap is not None:
        inner, outer = spec.scale / spec.softcap, spec.softcap * LOG2E
    places = [
        (*new.stride()[:2], 0, new.stride(2)) if slots is None else new.stride() for new in (new_keys, new_values)
    ]
    block_d = max(16, triton.next_power_of_2(spec.head_dim))
    attend_kernel[(pairs, splits)](
        projected, projected if weights.q_norm is None else weights.q_norm,
        projected if weights.k_norm is None else weights.k_norm, cos, sin, keys, values, lengths, seen,
        lengths if slots is None else slots, new_keys, new_values, attended, acc, tops, sums,
        cos.stride(0), sin.stride(0), *keys.stride(), *values.stride(), m_b, m_c, *places[0], *places[1],
        keys.shape[2], splits, inner, outer, spec.eps, spec.norm_offset,
        KV_HEADS=spec.kv_heads, GROUP=spec.group, D=spec.head_dim, ROT=spec.rotary_dim, WINDOW=spec.window or 0,
        INTERLEAVED=spec.interleaved_rope, QK_NORM=spec.qk_norm, HAS_SOFTCAP=spec.softcap is not None,
        MASK=0 if mask is None else ADDED if added else BOOL, OWN=slots is not None, ONE_SPLIT=splits == 1,
        BLOCK_G=max(16, triton.next_power_of_2(spec.group)), BLOCK_N=block_slots, BLOCK_D=block_d,
        num_warps=4, num_stages=3,
    )  # fmt: skip
    if splits > 1:
        merge_kernel[(pairs, spec.group)](
            acc, tops, sums, projected, attended, spec.kv_heads, 1, spec.group, splits,
            VALUE=spec.head_dim, BLOCK_V=block_d, SPLITS=triton.next_power_of_2(splits), CHUNK=MERGE_SPLITS,
            HAS_SINKS=False, num_warps=4,
        )  # fmt: skip
    return attended


def _output(attended: Tensor, weights: BlockWeights, processors: int) -> Tensor:
    (rows, columns), batch = weights.o.shape, len(attended)
    tile = choose_tile(rows, columns, batch, attended.element_size(), processors)
    output = torch.empty(batch, rows, dtype=attended.dtype, device=attended.device)
    output_kernel[(triton.cdiv(rows, tile.rows), triton.cdiv(batch, tile.sequences))](
        attended, weights.o, attended if weights.o_bias is None else weights.o_bias, output, weights.o.stride(0), rows,
        batch, K=columns, HAS_BIAS=weights.o_bias is not None,
        BLOCK_R=tile.rows, BLOCK_K=tile.columns, BLOCK_B=tile.sequences, num_warps=4,
    )  # fmt: skip
    return output
