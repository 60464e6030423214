"""The truth of what the kernels compute: each expert's own rows through two linear layers, as transformers does it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional

from ygglight.kernels.expert_gemm.int4 import Int4Weight

Activation = str | Callable[[Tensor], Tensor]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": functional.silu, "gelu": functional.gelu}
"""Those that the kernel knows, by the names that transformers has for them; gelu is the exact one."""


def activation_of(activation: Activation) -> Callable[[Tensor], Tensor]:
    """What lies between the two products, ``[S, 2I]`` to ``[S, I]``.

    Args:
        activation: a key of ``ACTIVATIONS``, for gate and up in one row, gate first; or a function, which is returned.
    """
    if not isinstance(activation, str):
        return activation
    curve = ACTIVATIONS[activation]

    def activate(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return curve(gate) * up

    return activate


def grouped_mlp(x: Tensor, experts: Tensor, run: Callable[[int, Tensor], Tensor], size: int) -> Tensor:
    """Each expert with all of its rows at once, in the order they came in.

    Args:
        x: ``[S, K]``. experts: ``[S]``, -1 for none. run: of an expert and its rows. size: H, of the rows it returns.

    Returns:
        ``[S, H]``; zeros where there is no expert.
    """
    order = experts.argsort(stable=True)
    sorted_x, out = x[order], x.new_zeros(len(x), size)
    start = 0
    for expert, group in groupby(experts[order].tolist()):
        stop = start + len(list(group))
        if expert >= 0:
            out[start:stop] = run(expert, sorted_x[start:stop])
        start = stop
    return torch.empty_like(out).index_copy_(0, order.long(), out)


def expert_mlp_reference(
    x: Tensor,
    experts: Tensor,
    gate_up: Tensor,
    down: Tensor,
    activation: Activation,
    biases: tuple[Tensor, Tensor] | None = None,
    transposed: bool = False,
) -> Tensor:
    """See :func:`ygglight.kernels.expert_gemm.expert_mlp`. Reads the experts' numbers on the host."""
    activate = activation_of(activation)

    def run(expert: int, rows: Tensor) -> Tensor:
        first, second = gate_up[expert], down[expert]
        if transposed:
            first, second = first.mT, second.mT
        b_first, b_second = (None, None) if biases is None else (bias[expert] for bias in biases)
        return functional.linear(activate(functional.linear(rows, first, b_first)), second, b_second)

    return grouped_mlp(x, experts, run, down.shape[2 if transposed else 1])


def expert_mlp_int4_reference(
    x: Tensor,
    experts: Tensor,
    gate_up: Int4Weight,
    down: Int4Weight,
    activation: Activation,
    biases: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """See :func:`ygglight.kernels.expert_gemm.expert_mlp_int4`. Makes an expert's weights anew at each call: slow."""
    activate = activation_of(activation)

    def run(expert: int, rows: Tensor) -> Tensor:
        first, second = (weight.dequantize(expert, rows.dtype) for weight in (gate_up, down))
        b_first, b_second = (None, None) if biases is None else (bias[expert].to(rows.dtype) for bias in biases)
        return functional.linear(activate(functional.linear(rows, first, b_first)), second, b_second)

    return grouped_mlp(x, experts, run, down.shape[1])
