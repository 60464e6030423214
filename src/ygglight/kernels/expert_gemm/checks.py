"""What the expert products take; each wrong input is one error that names the mend."""

from __future__ import annotations

import torch
from torch import Tensor

from ygglight.kernels.expert_gemm.cpu import CpuInt4Weight
from ygglight.kernels.expert_gemm.int4 import Int4Weight
from ygglight.kernels.expert_gemm.reference import ACTIVATIONS, Activation

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_stacks(
    x: Tensor,
    experts: Tensor,
    gate_up: Tensor,
    down: Tensor,
    activation: Activation,
    biases: tuple[Tensor, Tensor] | None,
    transposed: bool,
) -> None:
    """Checks shapes, dtypes and devices, and reads no data.

    Args:
        x: See :func:`ygglight.kernels.expert_gemm.expert_mlp`, as for all others.

    Raises:
        ValueError: something does not fit.
    """
    for name, stack in (("gate_up", gate_up), ("down", down)):
        if stack.dim() != 3:
            raise ValueError(f"{name} is {_shape(stack)}: give a stack of matrices, [experts, output, input]")
        if stack.dtype is not x.dtype:
            raise ValueError(f"x is {x.dtype}, {name} {stack.dtype}: cast x to the dtype of the weights")
    if transposed:
        gate_up, down = gate_up.mT, down.mT
    _check(x, experts, tuple(gate_up.shape), tuple(down.shape), activation, biases)
    _check_devices(x, experts, gate_up, down, *(biases or ()))


def check_int4(
    x: Tensor,
    experts: Tensor,
    gate_up: Int4Weight | CpuInt4Weight,
    down: Int4Weight | CpuInt4Weight,
    activation: Activation,
    biases: tuple[Tensor, Tensor] | None,
) -> None:
    """Checks shapes, dtypes and devices, and reads no data.

    Args:
        x: See :func:`ygglight.kernels.expert_gemm.expert_mlp_int4`, as for all others.

    Raises:
        ValueError: something does not fit.
    """
    if type(gate_up) is not type(down):
        raise ValueError("gate_up and down are packed for different machines: make both with `allocate`, on one device")
    _check(x, experts, gate_up.shape, down.shape, activation, biases)
    _check_devices(x, experts, gate_up.packed, down.packed, *(biases or ()))


def _check(
    x: Tensor,
    experts: Tensor,
    gate_up: tuple[int, ...],
    down: tuple[int, ...],
    activation: Activation,
    biases: tuple[Tensor, Tensor] | None,
) -> None:
    if x.dim() != 2 or not x.numel() or x.dtype not in DTYPES:
        raise ValueError(f"x is {_shape(x)} {x.dtype}: give floating rows, [token-expert pairs, size], at least one")
    if experts.shape != x.shape[:1] or experts.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"experts are {_shape(experts)} {experts.dtype}: give one int32 or int64 a row, [{len(x)}]")
    if x.shape[1] != gate_up[2] or down[0] != gate_up[0]:
        raise ValueError(f"rows of {x.shape[1]}, gate_up {list(gate_up)}, down {list(down)} (experts, output, input): "
                         "sizes do not fit")  # fmt: skip
    if isinstance(activation, str):
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation {activation!r}: give {', '.join(map(repr, ACTIVATIONS))} or a function")
        if gate_up[1] != 2 * down[2]:
            raise ValueError(f"gate_up has {gate_up[1]} outputs, down {down[2]} inputs: {activation!r} halves them")
    if biases is not None:
        for name, bias, stack in zip(("first", "second"), biases, (gate_up, down), strict=True):
            if bias.shape != stack[:2] or not bias.is_floating_point():
                raise ValueError(f"the {name} bias is {_shape(bias)} {bias.dtype}: give floating {list(stack[:2])}")


def _check_devices(x: Tensor, *others: Tensor) -> None:
    if any(tensor.device != x.device for tensor in others):
        places = ", ".join(str(tensor.device) for tensor in (x, *others))
        raise ValueError(f"tensors are on several devices ({places}): move them to that of the weights")
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *others)):
        raise ValueError("expert products have no backward pass: call them under torch.no_grad(), or detach the inputs")


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))
