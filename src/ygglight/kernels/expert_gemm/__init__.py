"""The experts of a mixture-of-experts layer for few tokens: two grouped products, weights in 16 or in 4 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from ygglight.kernels import _dispatch
from ygglight.kernels.expert_gemm.checks import check_int4, check_stacks
from ygglight.kernels.expert_gemm.cpu import CpuInt4Weight, expert_mlp_cpu, fits, has_product
from ygglight.kernels.expert_gemm.int4 import GROUPS, Int4Weight, pack_codes, unpack_codes
from ygglight.kernels.expert_gemm.reference import (
    Activation,
    activation_of,
    expert_mlp_int4_reference,
    expert_mlp_reference,
)

__all__ = [
    "GROUPS",
    "CpuInt4Weight",
    "Int4Weight",
    "allocate",
    "expert_mlp",
    "expert_mlp_int4",
    "expert_mlp_int4_reference",
    "expert_mlp_reference",
    "pack_codes",
    "unpack_codes",
]

_dispatch.register("expert_gemm", has_kernel=True)


@torch.compiler.assume_constant_result  # it reads the environment, which torch.compile need not look into
def _uses_triton(device_type: str) -> bool:
    return _dispatch.implementation("expert_gemm", device_type).implementation == "triton"


def expert_mlp(
    x: Tensor,
    experts: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    activation: Activation,
    biases: tuple[Tensor, Tensor] | None = None,
    transposed: bool = False,
) -> Tensor:
    """Each row through the two matrices of its expert; forward only.

    CUDA tensors go to the Triton kernels, all others and float64 to plain torch. The kernels read nothing on the host
    and all sizes follow from shapes, so calls can be recorded in a CUDA graph, and what comes out for a row depends on
    that row and its expert alone, to the bit. Plain torch reads ``experts`` on the host, and a row's last bits may
    depend on the other rows of its expert.

    Args:
        x: ``[S, H]``, one row a token-expert pair, in any order; float16, bfloat16, float32 or float64.
        experts: int32 or int64 ``[S]``, the place of each row's expert in the stacks; -1: none, the row becomes zeros.
        gate_up: ``[M, 2I, H]`` in the dtype of ``x``. Any strides; the kernels are fast with the innermost contiguous
            and the others multiples of 16 bytes.
        down: ``[M, H, I]``; the same.
        activation: "silu" or "gelu" (the exact one) of gate times up, the two in one row, gate first; or a function of
            ``[S, 2I]`` that returns ``[S, I]``. The names cost no pass of their own.
        biases: ``[M, 2I]`` and ``[M, H]``.
        transposed: the stacks are ``[M, H, 2I]`` and ``[M, I, H]``.

    Returns:
        ``[S, H]`` in the dtype of ``x``, not weighted.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or a gradient would be needed.
        RuntimeError: YGGLIGHT_KERNELS=triton where the kernel cannot run.
    """
    check_stacks(x, experts, gate_up, down, activation, biases, transposed)
    if _uses_triton(x.device.type) and x.dtype is not torch.float64:
        from ygglight.kernels.expert_gemm import triton

        return triton.launch(x, experts, gate_up, down, activation, biases, transposed)
    return expert_mlp_reference(x, experts, gate_up, down, activation, biases, transposed)


def expert_mlp_int4(
    x: Tensor,
    experts: Tensor,
    gate_up: Int4Weight | CpuInt4Weight,
    down: Int4Weight | CpuInt4Weight,
    *,
    activation: Activation,
    biases: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """:func:`expert_mlp` with weights in four bits, which the kernel widens as it reads them.

    ``CpuInt4Weight`` goes to torch's int4 product, where rows are rounded to bfloat16 whatever their dtype is.

    Args:
        x: See :func:`expert_mlp`, as for all but two.
        gate_up: of ``[M, 2I, H]``. down: of ``[M, H, I]``; both as :func:`allocate` makes them.

    Returns:
        ``[S, H]`` in the dtype of ``x``, not weighted.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or a gradient would be needed.
        RuntimeError: YGGLIGHT_KERNELS=triton where the kernel cannot run.
    """
    check_int4(x, experts, gate_up, down, activation, biases)
    if isinstance(gate_up, CpuInt4Weight) and isinstance(down, CpuInt4Weight):
        return expert_mlp_cpu(x, experts, gate_up, down, activation_of(activation), biases)
    assert isinstance(gate_up, Int4Weight) and isinstance(down, Int4Weight)
    if _uses_triton(x.device.type) and x.dtype is not torch.float64:
        from ygglight.kernels.expert_gemm import triton

        return triton.launch_int4(x, experts, gate_up, down, activation, biases)
    return expert_mlp_int4_reference(x, experts, gate_up, down, activation, biases)


def allocate(
    experts: int, shapes: tuple[tuple[int, int], tuple[int, int]], groups: tuple[int, int], device: torch.device | str
) -> tuple[Int4Weight, Int4Weight] | tuple[CpuInt4Weight, CpuInt4Weight]:
    """Memory for the two matrices of each expert of a layer, in the order that is fastest on the device.

    Args:
        experts: M. shapes: outputs and inputs of ``gate_up`` and of ``down``. groups: of each, dividing its inputs.
        device: where.
    """
    forced = _dispatch.implementation("expert_gemm", "cpu").reason.startswith(_dispatch.ENVIRONMENT_VARIABLE)
    sizes = [(experts, *shape, group) for shape, group in zip(shapes, groups, strict=True)]
    if torch.device(device).type == "cpu" and not forced and has_product() and all(fits(*shape) for shape in shapes):
        return CpuInt4Weight.allocate(*sizes[0]), CpuInt4Weight.allocate(*sizes[1])
    return Int4Weight.allocate(*sizes[0], device), Int4Weight.allocate(*sizes[1], device)
