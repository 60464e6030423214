"""Launches the cluster block: sizes of its tiles, how many blocks a cluster has, and which heads share one."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ygglight.kernels.cluster_decode.cluster_kernels import block_kernel, sum_kernel
from ygglight.kernels.cluster_decode.spec import BlockSpec, BlockWeights
from ygglight.kernels.tree_attention.triton import LOG2E

BLOCKS = (1, 2, 4, 8)
"""Sizes of a cluster; 8 is the largest that every Hopper GPU and every partition of one takes."""
NUM_WARPS = 8
LOADS = 8
"""Loads of 16 bytes that a thread has on the way: 32 KiB a block, about what an SM must have to use its bandwidth."""
ROWS = 4
"""Slots of a strip's tile: as many bytes of keys as LOADS / 2, and as many of values."""
MAX_GROUP = 8
"""Query heads of a program: each takes 16 registers of a thread, of 255."""
SUM_BLOCK = 512
EMULATED_PROCESSORS = 132
NO_WINDOW = 2**31 - 1


class Tiles(NamedTuple):
    """Sizes of the block kernel's tiles, under the kernel's names."""

    BLOCK_D: int
    BLOCK_G: int
    HEADS: int
    BLOCK_K: int
    LANES: int
    WARPS: int
    ROWS: int
    BLOCK_O: int


def choose_tiles(hidden: int, head_dim: int, group: int, blocks: int) -> Tiles:
    """Tiles of a launch, from shapes alone.

    Args:
        hidden: size of the residual stream. head_dim: size of a head. group: query heads of a program.
        blocks: of a cluster.
    """
    block_d, block_g = max(16, triton.next_power_of_2(head_dim)), triton.next_power_of_2(group)
    # A warp's lanes lie along a row of weights, up to 512 bytes of it, unless a thread would have too many rows.
    rows = block_d // blocks
    warps = min(NUM_WARPS, rows)
    lanes = max(1, rows // (warps * LOADS))
    repeats = max(1, LOADS * warps * lanes // rows)
    vectors = 32 // lanes * (NUM_WARPS // warps) * repeats
    along = 32 * 8 // block_d  # strips of a warp
    return Tiles(
        block_d,
        block_g,
        triton.next_power_of_2(group + 2),
        min(8 * vectors, triton.next_power_of_2(hidden)),
        lanes,
        warps,
        ROWS if block_g < MAX_GROUP else ROWS // 2,  # the rest of the registers, where 4 spill
        blocks * NUM_WARPS * along * max(1, LOADS // block_g),
    )


def choose_cluster(batch: int, kv_heads: int, group: int, processors: int) -> tuple[int, int]:
    """Blocks of a cluster and programs that share a key head, so that one wave of blocks covers the device.

    A guess until measured: ClusterFusion found 4 blocks fastest for 32 heads on an H100 and 2 for 128.

    Args:
        batch: sequences. kv_heads: key heads. group: query heads of a key head. processors: SMs of the device.
    """
    divisors = [n for n in range(1, group + 1) if group % n == 0]
    shares = next(n for n in divisors if group // n <= MAX_GROUP)
    programs, blocks = batch * kv_heads, 4
    while blocks > 1 and programs * shares * blocks > processors:
        blocks //= 2
    if programs * shares * blocks * 2 <= processors:
        blocks = 8
    # More shares project the same keys and values again and read the same cache, from L2.
    shares = max((n for n in divisors if n >= shares and programs * n * blocks <= processors), default=shares)
    return blocks, shares


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
    blocks: int | None = None,
    shares: int | None = None,
) -> Tensor:
    """Runs the block on the current stream, in one kernel and one that sums its parts; inputs are not checked.

    Args:
        x: See :func:`ygglight.kernels.cluster_decode.decode_block`, as for all others.
        blocks: of a cluster: 1, 2, 4 or 8.
        shares: programs that share a key head, a divisor of its query heads. By default both are from `choose_cluster`.

    Raises:
        ValueError: a tensor's elements are not adjacent, or blocks or shares do not fit.
    """
    batch, group = len(x), spec.group
    _check_adjacent(weights, {"keys": keys, "values": values, "new_keys": new_keys, "new_values": new_values})
    properties = torch.cuda.get_device_properties(x.device) if x.is_cuda else None
    processors = EMULATED_PROCESSORS if properties is None else properties.multi_processor_count
    chosen = choose_cluster(batch, spec.kv_heads, group, processors)
    blocks, shares = blocks or chosen[0], shares or chosen[1]
    if blocks not in BLOCKS or group % shares:
        raise ValueError(f"blocks={blocks}, shares={shares}: give one of {BLOCKS}, and a divisor of {group}")
    x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
    out_size, programs = len(weights.o), spec.kv_heads * shares
    parts = torch.empty(batch, programs, out_size, dtype=torch.float32, device=x.device)
    out = torch.empty(batch, out_size, dtype=x.dtype, device=x.device)
    seen = None if mask is None else mask.view(torch.uint8)
    mask_strides = (0, 0) if seen is None else (seen.stride(0) if len(seen) > 1 else 0, seen.stride(1))
    inner, outer = spec.scale * LOG2E, 1.0
    if spec.softcap is not None:
        inner, outer = spec.scale / spec.softcap, spec.softcap * LOG2E
    on_device = torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
    with on_device:  # Triton launches on the current device, whatever its arguments
        block_kernel[(programs * batch,)](
            x, weights.norm, weights.q, weights.k, weights.v, weights.o, weights.q_bias, weights.k_bias, weights.v_bias,
            weights.q_norm, weights.k_norm, cos, sin, keys, values, lengths, slots, seen, new_keys, new_values, parts,
            x.stride(0), *(weight.stride(0) for weight in (weights.q, weights.k, weights.v, weights.o)),
            cos.stride(0), sin.stride(0), *keys.stride()[:3], *values.stride()[:3],
            *_append_strides(new_keys), *_append_strides(new_values), *mask_strides,
            batch, spec.kv_heads, NO_WINDOW if spec.window is None else spec.window,
            spec.eps, spec.norm_offset, inner, outer,
            **constants(spec, out_size, blocks, shares), num_warps=NUM_WARPS, num_ctas=blocks, enable_fp_fusion=True,
        )  # fmt: skip
        sum_kernel[(batch, triton.cdiv(out_size, SUM_BLOCK))](
            parts, weights.o_bias, out, PARTS=programs, OUT=out_size, BLOCK=SUM_BLOCK, num_warps=4
        )
    return out


def constants(spec: BlockSpec, out_size: int, blocks: int, shares: int) -> dict[str, Any]:
    """The block kernel's compile-time arguments.

    Args:
        spec: Of the block. out_size: rows of the output projection. blocks: of a cluster.
        shares: programs that share a key head.
    """
    group = spec.group // shares
    return {
        "HIDDEN": spec.hidden, "OUT": out_size, "HEAD": spec.head_dim, "ROTARY": spec.rotary_dim,
        "INTERLEAVED": spec.interleaved_rope, "HAS_SOFTCAP": spec.softcap is not None, "GROUP": group, "SHARES": shares,
        **choose_tiles(spec.hidden, spec.head_dim, group, blocks)._asdict(),
    }  # fmt: skip


def resident_clusters(compiled: Any) -> int:
    """How many clusters of a compiled and loaded kernel the device holds at once, 0 if none fits.

    The blocks of a cluster share one group of SMs (GPC), so that large ones leave SMs unused where groups are not
    multiples of them, and a MIG partition may hold none. A size of cluster is worth measuring only where this is not 0.

    Args:
        compiled: what a launch of a Triton kernel returns.
    """
    utilities = triton.runtime.driver.active.utils
    return utilities.cuOccupancyMaxActiveClusters(
        compiled.function, compiled.metadata.shared, compiled.metadata.num_ctas
    )


def _append_strides(new: Tensor) -> tuple[int, ...]:
    return (*new.stride()[:2], new.stride(2) if new.dim() == 4 else 0)


def _check_adjacent(weights: BlockWeights, states: dict[str, Tensor]) -> None:
    named = {f"the weights {name}": tensor for name, tensor in vars(weights).items() if tensor is not None} | states
    for name, tensor in named.items():
        if tensor.stride(-1) != 1:
            raise ValueError(
                f"{name} have strides {tensor.stride()}: the cluster block takes adjacent elements in the last "
                "dimension; make them contiguous, or set YGGLIGHT_CLUSTER_DECODE=split_k"
            )
