"""Experts in four bits on a CPU: torch's own int4 product, in the order of bytes that it wants on this machine.

The product is fast in bfloat16 alone: one token through two experts of 576 x 1536 on two threads of an AVX-512 EPYC
takes 0.14 ms in bfloat16 and 4.3 ms in float32, where ``functional.linear`` on float32 weights takes 1.3 ms. So rows
are rounded to bfloat16, whatever their dtype is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ygglight.kernels.expert_gemm.int4 import SCALE_DTYPE, Int4Stack, pack_codes, unpack_codes
from ygglight.kernels.expert_gemm.reference import grouped_mlp

_FAST = ("AVX2", "AVX512")
"""CPU capabilities with a vectorised product; elsewhere it is a scalar loop."""


def has_product() -> bool:
    """Whether this torch and this CPU have the int4 product."""
    names = ("_convert_weight_to_int4pack_for_cpu", "_weight_int4pack_mm_for_cpu")
    return torch.backends.cpu.get_cpu_capability() in _FAST and all(hasattr(torch.ops.aten, name) for name in names)


def fits(rows: int, columns: int) -> bool:
    """Whether the int4 product takes a matrix.

    Args:
        rows: N. columns: K.
    """
    return rows % 16 == 0 and columns % 32 == 0


def _convert(codes: Tensor) -> Tensor:
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    return packed


class CpuInt4Weight(Int4Stack):
    """For this machine's CPU only.

    Args:
        packed: uint8 ``[E, N, K / 2]`` in torch's order of bytes. scale: bfloat16 ``[E, K / group, N, 2]``, each scale
            with the zero that torch adds to (code - 8) * scale.
    """

    @classmethod
    def allocate(cls, experts: int, rows: int, columns: int, group: int) -> CpuInt4Weight:
        """Memory that nothing is written to yet.

        Args:
            experts: E. rows: N. columns: K. group: divides K.
        """
        packed = torch.empty(experts, rows, columns // 2, dtype=torch.uint8)
        return cls(packed, torch.zeros(experts, columns // group, rows, 2, dtype=SCALE_DTYPE))

    @property
    def group(self) -> int:
        """Weights that share a scale."""
        return self.shape[2] // self.scale.shape[1]

    def write(self, expert: int, packed: Tensor, scale: Tensor) -> None:
        """Sets one expert.

        Args:
            expert: which. packed: uint8 ``[N, K / 2]`` in our order. scale: ``[N, K / group]``.
        """
        self.packed[expert].copy_(_convert(unpack_codes(packed, self.group)))
        self.scale[expert, :, :, 0].copy_(scale.mT)

    def read(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Codes in our order and scales of each expert, as :meth:`write` takes them."""
        _, rows, columns = self.shape
        places = _places(rows, columns)
        for theirs, scale in zip(self.packed, self.scale, strict=True):
            codes = torch.empty(rows * columns, dtype=torch.uint8)
            codes[places[0]], codes[places[1]] = theirs.flatten() & 15, theirs.flatten() >> 4
            yield pack_codes(codes.view(rows, columns), self.group), scale[..., 0].mT.contiguous()

    def product(self, expert: int, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Rows times the transposed weights of an expert.

        Args:
            expert: which. x: bfloat16 ``[S, K]``. bias: ``[N]``.

        Returns:
            bfloat16 ``[S, N]``.
        """
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.packed[expert], self.group, self.scale[expert])
        return y if bias is None else y + bias.to(y.dtype)


def _places(rows: int, columns: int) -> Tensor:
    """Which weight lies in the low and the high half of each byte: int32 ``[2, N * K / 2]``.

    The order depends on the vector width of the CPU and is documented nowhere, so it is asked for: the number of each
    weight is packed, four bits at a time.
    """
    number = torch.arange(rows * columns, dtype=torch.int32).view(rows, columns)
    places = torch.zeros(2, rows * columns // 2, dtype=torch.int32)
    for shift in range(0, (rows * columns - 1).bit_length(), 4):
        theirs = _convert(number >> shift & 15).flatten().int()
        places |= torch.stack([theirs & 15, theirs >> 4]) << shift
    return places


def expert_mlp_cpu(
    x: Tensor,
    experts: Tensor,
    gate_up: CpuInt4Weight,
    down: CpuInt4Weight,
    activate: Callable[[Tensor], Tensor],
    biases: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """One expert after the other through torch's int4 product; inputs are not checked.

    Args:
        x: See :func:`ygglight.kernels.expert_gemm.expert_mlp_int4`, as for all but one.
        activate: what lies between the two products, ``[S, 2I]`` to ``[S, I]``.
    """

    def run(expert: int, rows: Tensor) -> Tensor:
        first, second = (None, None) if biases is None else (bias[expert] for bias in biases)
        return down.product(expert, activate(gate_up.product(expert, rows, first)), second)

    return grouped_mlp(x.to(torch.bfloat16), experts, run, down.shape[1]).to(x.dtype)
