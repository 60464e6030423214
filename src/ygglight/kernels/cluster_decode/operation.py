"""`decode_block` as one operation of `torch.library`, so that graphs of `torch.compile` hold it whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from ygglight.kernels.cluster_decode.spec import BlockSpec, BlockWeights

_KINDS = {
    "Tensor": "Tensor", "Tensor | None": "Tensor?", "bool": "bool", "int": "int", "int | None": "int?",
    "float": "float", "float | None": "float?",
}  # fmt: skip
_WEIGHTS, _SPEC = ([field.name for field in fields(kind)] for kind in (BlockWeights, BlockSpec))
_SCHEMA = ", ".join([
    "Tensor x",
    *(f"{_KINDS[str(field.type)]} {field.name}" for kind in (BlockWeights, BlockSpec) for field in fields(kind)),
    "Tensor cos, Tensor sin, Tensor keys, Tensor values, Tensor lengths, Tensor(a!) new_keys, Tensor(b!) new_values",
    "Tensor? mask, Tensor? slots, int? blocks",
])  # fmt: skip


class Operation:
    """`decode_block` with its arguments flat, as a schema needs them; what it writes is declared.

    Args:
        block: Runs it outside of a graph.
    """

    def __init__(self, block: Callable[..., Tensor]) -> None:
        def run(x: Tensor, *flat: Any) -> Tensor:
            weights, spec = flat[: len(_WEIGHTS)], flat[len(_WEIGHTS) : len(_WEIGHTS) + len(_SPEC)]
            *inputs, mask, slots, blocks = flat[len(_WEIGHTS) + len(_SPEC) :]
            return block(
                x, BlockWeights(*weights), BlockSpec(*spec), *inputs, mask=mask, slots=slots, blocks=blocks
            )  # fmt: skip

        def shape(x: Tensor, *flat: Any) -> Tensor:
            return x.new_empty(len(x), flat[_WEIGHTS.index("o")].shape[0])

        self._run: Any = torch.library.custom_op(
            "ygglight::decode_block", run, mutates_args=("new_keys", "new_values"), schema=f"({_SCHEMA}) -> Tensor"
        )
        self._run.register_fake(shape)

    def __call__(self, x: Tensor, weights: BlockWeights, spec: BlockSpec, *inputs: Any) -> Tensor:
        """Put the operation into the graph.

        Args:
            x: See `decode_block`, as for weights and spec. *inputs: all other arguments of it, in their order.
        """
        flat = [getattr(weights, name) for name in _WEIGHTS] + [getattr(spec, name) for name in _SPEC]
        return self._run(x, *flat, *inputs)  # type: ignore[no-any-return]
