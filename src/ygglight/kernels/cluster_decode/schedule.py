"""How the blocks of a cluster exchange data, modelled in torch: what each ends with and how much moves between them.

Two schedules of ClusterReduce. The paper's (arXiv:2508.18850) sends whole buffers around a ring with doubling strides.
The compiler's, seen in the PTX of Triton 3.9: each block reduces one stretch of the elements for all, pulling it from
every block, then all pull the stretches. It moves less from 4 blocks on, and since one block decides on an element all
blocks hold the same bits; on the ring each block adds in an order of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Combine = Callable[[Tensor, Tensor], Tensor]


class Exchanged(NamedTuple):
    """What a schedule leaves.

    Args:
        copies: of each block, ``[blocks, ...]``.
        moved: elements that crossed from one block to another, in the whole cluster.
    """

    copies: Tensor
    moved: int


def doubling(blocks: int) -> Iterator[int]:
    """Strides 1, 2, 4, ... below the number of blocks.

    Args:
        blocks: of a cluster, a power of two.

    Raises:
        ValueError: it is not.
    """
    if blocks < 1 or blocks & (blocks - 1):
        raise ValueError(f"a cluster of {blocks} blocks: give a power of two")
    return (1 << bit for bit in range(blocks.bit_length() - 1))


def ring_reduce(parts: Tensor, combine: Combine = torch.add, strides: Sequence[int] | None = None) -> Exchanged:
    """ClusterReduce as in the paper: in each round block b receives the buffer of block b - stride.

    Args:
        parts: ``[blocks, ...]``, one row a block. combine: of own and received. strides: default: `doubling`.
    """
    rounds = list(doubling(len(parts)) if strides is None else strides)
    held = parts
    for stride in rounds:
        # A block keeps what it sends until all have received: a buffer apart, and a barrier a round.
        held = combine(held, held.roll(stride, dims=0))
    return Exchanged(held, len(rounds) * parts.numel())


def ring_gather(parts: Tensor) -> Exchanged:
    """ClusterGather as in the paper: the message doubles each round; block b is left with rows b, b-1, b-2, ...

    Args:
        parts: ``[blocks, size]``, one row a block.

    Returns:
        Copies ``[blocks, blocks, size]`` with rows in the order of their blocks.
    """
    blocks, size = parts.shape
    held, moved = parts[:, None], 0
    for stride in doubling(blocks):
        moved += held.numel()
        held = torch.cat((held, held.roll(stride, dims=0)), dim=1)
    rank = torch.arange(blocks)
    place = (rank[:, None] - rank[None, :]) % blocks  # where block b has row r
    return Exchanged(held.gather(1, place[..., None].expand(-1, -1, size)), moved)


def pulled_reduce(parts: Tensor, combine: Combine = torch.add) -> Exchanged:
    """ClusterReduce as compiled: block b reduces elements b, b + blocks, ... of all, then everyone pulls them.

    Args:
        parts: ``[blocks, size]``, one row a block; size is filled up to a multiple of blocks. combine: commutative.
    """
    blocks, size = parts.shape
    filled = torch.nn.functional.pad(parts, (0, -size % blocks))
    held = filled
    for stride in reversed(list(doubling(blocks))):
        held = combine(
            held, held[torch.arange(blocks) ^ stride]
        )  # between lanes, which changes no bits: a + b is b + a
    # Rows are equal by now, so which one is taken for an element does not matter.
    return Exchanged(held[:1, :size].expand(blocks, -1), 2 * (blocks - 1) * filled.shape[1])


def ring_reduce_traffic(size: int, blocks: int) -> int:
    """Elements that `ring_reduce` moves in the cluster (Eq. 3 of the paper).

    Args:
        size: elements of a block's buffer. blocks: of a cluster.
    """
    return size * (blocks.bit_length() - 1) * blocks


def gather_traffic(size: int, blocks: int) -> int:
    """Elements that a gather moves in the cluster, by any schedule (Eq. 3 of the paper).

    Args:
        size: elements of one part. blocks: of a cluster.
    """
    return size * (blocks - 1) * blocks


def pulled_reduce_traffic(size: int, blocks: int) -> int:
    """Elements that `pulled_reduce` moves in the cluster; never more than on the ring.

    Args:
        size: elements of a block's buffer. blocks: of a cluster.
    """
    return 2 * (blocks - 1) * (size + -size % blocks)


def projection_traffic(rows: int, blocks: int) -> dict[str, int]:
    """Elements between blocks for one group's projections, split over their rows or over the hidden size.

    Args:
        rows: of the weights, all heads of the group together. blocks: of a cluster.
    """
    return {
        "rows": gather_traffic(-(-rows // blocks), blocks),
        "hidden": pulled_reduce_traffic(rows, blocks),
    }
