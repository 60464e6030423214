# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""ClusterReduce and ClusterGather on the shared memory of a thread-block cluster, from Gluon's layouts (Triton >= 3.8).

A program is a cluster. Which block holds what is a matter of `cga_layout`: a tensor whose first axis is spread over the
blocks is one slice a block, and a reduction over that axis, or a conversion to a layout that every block holds whole,
becomes `mapa`, `ld.shared::cluster` and cluster barriers, the one before the program's end among them, so that no
block leaves while another still reads its memory. Blocks pull: `schedule.py` has the compiler's schedule, what it moves
and the paper's. Orders are fixed when the kernel is compiled, so a sum has the same bits in each run.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

NUM_WARPS = 4


@gluon.constexpr_function
def spread(rank: int, axis: int, blocks: int) -> list[list[int]]:
    """`cga_layout` that gives each block one stretch of an axis."""
    return [[1 << bit if at == axis else 0 for at in range(rank)] for bit in range(blocks.bit_length() - 1)]


@gluon.constexpr_function
def repeated(rank: int, blocks: int) -> list[list[int]]:
    """`cga_layout` that gives each block everything."""
    return [[0] * rank for _ in range(blocks.bit_length() - 1)]


@gluon.jit
def cluster_sum(parts):
    """ClusterReduce(sum): of `parts` [blocks, ...], one row a block, every block gets the sum."""
    return gl.sum(parts, 0)


@gluon.jit
def cluster_max(parts):
    """ClusterReduce(max), as `cluster_sum`."""
    return gl.max(parts, 0)


@gluon.jit
def cluster_gather(part, layout: gl.constexpr):
    """ClusterGather: of a tensor spread over the blocks every block gets the whole, in a `repeated` layout."""
    return gl.convert_layout(part, layout)


@gluon.jit
def reduce_kernel(x_ptr, y_ptr, SIZE: gl.constexpr, BLOCK: gl.constexpr, MAXIMUM: gl.constexpr):
    """Reduces rows of [blocks, SIZE], one a block; y [blocks, SIZE] is what each block got. Grid: independent runs."""
    blocks: gl.constexpr = gl.num_ctas()
    layout: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [1, gl.num_warps()], [1, 0], spread(2, 0, blocks))
    rank = gl.arange(0, blocks, gl.SliceLayout(1, layout))
    at = gl.arange(0, BLOCK, gl.SliceLayout(0, layout))
    offset = gl.program_id(0).to(gl.int64) * (blocks * SIZE) + rank[:, None] * SIZE + at[None, :]
    live = (at < SIZE)[None, :] & (rank < blocks)[:, None]
    if MAXIMUM:
        got = cluster_max(gl.load(x_ptr + offset, mask=live, other=float("-inf")).to(gl.float32))
    else:
        got = cluster_sum(gl.load(x_ptr + offset, mask=live, other=0.0).to(gl.float32))
    copies = gl.expand_dims(got, 0) + gl.zeros([blocks, BLOCK], gl.float32, layout)
    gl.store(y_ptr + offset, copies.to(y_ptr.dtype.element_ty), mask=live)


@gluon.jit
def gather_kernel(x_ptr, y_ptr, SIZE: gl.constexpr, BLOCK: gl.constexpr):
    """Gathers rows of [blocks, SIZE]; y [blocks, blocks, SIZE] is what each block got. Grid: independent runs."""
    blocks: gl.constexpr = gl.num_ctas()
    part: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [1, gl.num_warps()], [1, 0], spread(2, 0, blocks))
    whole: gl.constexpr = gl.BlockedLayout(
        [1, 1, 1], [1, 1, 32], [1, 1, gl.num_warps()], [2, 1, 0], spread(3, 0, blocks)
    )
    run = gl.program_id(0).to(gl.int64)
    rank = gl.arange(0, blocks, gl.SliceLayout(1, part))
    at = gl.arange(0, BLOCK, gl.SliceLayout(0, part))
    live = (at < SIZE)[None, :] & (rank < blocks)[:, None]
    x = gl.load(x_ptr + run * (blocks * SIZE) + rank[:, None] * SIZE + at[None, :], mask=live, other=0.0)
    got = cluster_gather(x, gl.SliceLayout(0, whole))
    copies = gl.expand_dims(got, 0) + gl.zeros([blocks, blocks, BLOCK], got.dtype, whole)
    block = gl.arange(0, blocks, gl.SliceLayout(1, gl.SliceLayout(2, whole)))
    row = gl.arange(0, blocks, gl.SliceLayout(0, gl.SliceLayout(2, whole)))
    column = gl.arange(0, BLOCK, gl.SliceLayout(0, gl.SliceLayout(1, whole)))
    offset = (block[:, None] * blocks + row[None, :])[:, :, None] * SIZE + column[None, None, :]
    live_copy = (column < SIZE)[None, None, :] & ((block[:, None] + row[None, :]) < 2 * blocks)[:, :, None]
    gl.store(y_ptr + run * (blocks * blocks * SIZE) + offset, copies, mask=live_copy)


def cluster_reduce_rows(x: Tensor, maximum: bool = False) -> Tensor:
    """Runs ClusterReduce alone, to check it on a device.

    Args:
        x: ``[runs, blocks, size]``, contiguous on CUDA; blocks 1, 2, 4 or 8.
        maximum: the maximum in place of the sum.

    Returns:
        Same shape and dtype: what each block got, summed in float32.
    """
    runs, blocks, size = x.shape
    out = torch.empty_like(x)
    reduce_kernel[(runs,)](
        x, out, SIZE=size, BLOCK=_filled_up(size), MAXIMUM=maximum, num_warps=NUM_WARPS, num_ctas=blocks
    )
    return out


def cluster_gather_rows(x: Tensor) -> Tensor:
    """Runs ClusterGather alone, to check it on a device.

    Args:
        x: ``[runs, blocks, size]``, contiguous on CUDA; blocks 1, 2, 4 or 8.

    Returns:
        ``[runs, blocks, blocks, size]``: what each block got.
    """
    runs, blocks, size = x.shape
    out = torch.empty(runs, blocks, blocks, size, dtype=x.dtype, device=x.device)
    gather_kernel[(runs,)](x, out, SIZE=size, BLOCK=_filled_up(size), num_warps=NUM_WARPS, num_ctas=blocks)
    return out


def _filled_up(size: int) -> int:
    return max(32 * NUM_WARPS, 1 << (size - 1).bit_length())
