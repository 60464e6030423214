"""Private names of PyTorch around autograd and optimizers. Checked on 2.13; imports no Lightning."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._foreach_utils import (
    _device_has_foreach_support,
    _group_tensors_by_device_and_dtype,
    _has_foreach_support,
)
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def in_python_function() -> bool:
    """Whether the autograd node that is being evaluated on this thread is a ``torch.autograd.Function`` in Python."""
    node = torch._C._current_autograd_node()  # type: ignore[attr-defined]
    return isinstance(node, torch.autograd.function.BackwardCFunction)


def is_wrapper(tensor: Tensor) -> bool:
    """Whether a tensor has no storage of its own but wraps other tensors (DTensor, torchao)."""
    return bool(is_traceable_wrapper_subclass(tensor))


def by_device_and_dtype(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Groups of one device and dtype, in the order in which torch's clipping goes through them."""
    groups = _group_tensors_by_device_and_dtype([list(tensors)])  # type: ignore[list-item]
    return [list(group) for (group,), _ in groups.values()]  # type: ignore[arg-type]


def norms(tensors: Sequence[Tensor], order: float, foreach: bool | None = None) -> list[Tensor]:
    """Norm of each of some tensors of one device and dtype, by the very kernels that ``clip_grad_norm_`` takes.

    Raises:
        RuntimeError: ``foreach`` on a device that has no such kernels.
    """
    tensors = list(tensors)
    device = tensors[0].device
    if (foreach is None and _has_foreach_support(tensors, device)) or (foreach and _device_has_foreach_support(device)):
        return list(torch._foreach_norm(tensors, order))
    if foreach:
        raise RuntimeError(f"foreach=True was passed, but can't use the foreach API on {device.type} tensors")
    return [torch.linalg.vector_norm(tensor, order) for tensor in tensors]
