"""Experts in four bits: symmetric codes along the input size, one bfloat16 scale a group.

A scale of eight bits of precision costs nothing, for the codes are chosen with the rounded scale; it has the range that
float16 lacks, so that one file serves models of every dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

GROUPS = (128, 64, 32)
"""Sizes of a group, the best first: a scale adds 16 / group bits to a weight."""
ZERO = 8
"""The code of zero: codes 0 to 15 are the weights -8 to 7 times the scale."""
SCALE_DTYPE = torch.bfloat16


def pack_codes(codes: Tensor, group: int) -> Tensor:
    """Two codes a byte: the low half of the byte is of the first half of the group, the high half of the second.

    So a kernel reads both inputs and codes in runs, and never has to interleave.

    Args:
        codes: uint8 ``[..., K]`` of 0 to 15. group: divides K.

    Returns:
        uint8 ``[..., K / 2]``.
    """
    halves = codes.unflatten(-1, (-1, 2, group // 2))
    return (halves[..., 0, :] | halves[..., 1, :] << 4).flatten(-2)


def unpack_codes(packed: Tensor, group: int) -> Tensor:
    """Undoes :func:`pack_codes`.

    Args:
        packed: uint8 ``[..., K / 2]``. group: divides K.

    Returns:
        uint8 ``[..., K]``.
    """
    halves = packed.unflatten(-1, (-1, group // 2))
    return torch.stack([halves & 15, halves >> 4], dim=-2).flatten(-3)


def dequantize(packed: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The weights that codes and scales stand for.

    Args:
        packed: uint8 ``[..., K / 2]``. scale: ``[..., K / group]``. dtype: of the result.

    Returns:
        ``[..., K]``; rounded once, to ``dtype``.
    """
    group = 2 * packed.shape[-1] // scale.shape[-1]
    wide = torch.promote_types(dtype, torch.float32)
    codes = unpack_codes(packed, group).to(wide) - ZERO
    return (codes.unflatten(-1, (-1, group)) * scale.to(wide)[..., None]).flatten(-2).to(dtype)


@dataclass(frozen=True)
class Int4Stack:
    """One matrix of each expert of a layer, in whatever order of bytes.

    Args:
        packed: uint8 ``[E, N, K / 2]``. scale: a scale a group, and what belongs to it.
    """

    packed: Tensor
    scale: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        """E, N and K."""
        experts, rows, half = self.packed.shape
        return experts, rows, 2 * half

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and what belongs to them."""
        return self.packed.nbytes + self.scale.nbytes

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.packed.device


class Int4Weight(Int4Stack):
    """This is also how files hold it.

    Args:
        packed: uint8 ``[E, N, K / 2]``, see :func:`pack_codes`. scale: ``[E, N, K / group]``.
    """

    @classmethod
    def allocate(cls, experts: int, rows: int, columns: int, group: int, device: torch.device | str) -> Int4Weight:
        """Memory that nothing is written to yet.

        Args:
            experts: E. rows: N. columns: K. group: divides K. device: where.
        """
        packed = torch.empty(experts, rows, columns // 2, dtype=torch.uint8, device=device)
        return cls(packed, torch.empty(experts, rows, columns // group, dtype=SCALE_DTYPE, device=device))

    @property
    def group(self) -> int:
        """Weights that share a scale."""
        return self.shape[2] // self.scale.shape[2]

    def write(self, expert: int, packed: Tensor, scale: Tensor) -> None:
        """Sets one expert.

        Args:
            expert: which. packed: uint8 ``[N, K / 2]``. scale: ``[N, K / group]``.
        """
        self.packed[expert].copy_(packed)
        self.scale[expert].copy_(scale)

    def read(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Codes and scales of each expert, in order, as :meth:`write` takes them."""
        return zip(self.packed, self.scale, strict=True)

    def dequantize(self, expert: int, dtype: torch.dtype) -> Tensor:
        """The weights of one expert.

        Args:
            expert: which. dtype: of the result.

        Returns:
            ``[N, K]``.
        """
        return dequantize(self.packed[expert], self.scale[expert], dtype)
