"""Clipping and the optimizer's step in slices of parameters, with the results of torch's own, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop

from ygglight.compat.autograd import by_device_and_dtype, norms

ELEMENTS = 4 * 1024 * 1024
"""Elements of a slice, unless one parameter alone has more: 16 MiB of fp32 gradients."""
PER_PARAMETER = (Adam, AdamW, SGD, RMSprop, Adagrad, Adamax, NAdam, RAdam)
"""Optimizers whose step treats every parameter by itself. Subclasses are not meant: what they do is not known."""

Boundary = Callable[[int], None]
"""Called before slice ``index``; may block."""


def slices(tensors: Iterable[Tensor], elements: int = ELEMENTS) -> list[list[Tensor]]:
    """Consecutive tensors that together have at most ``elements`` elements, or are one.

    Args:
        tensors: Any. elements: At least 1.
    """
    parts: list[list[Tensor]] = []
    size = 0
    for tensor in tensors:
        if not parts or size + tensor.numel() > elements:
            parts.append([])
            size = 0
        parts[-1].append(tensor)
        size += tensor.numel()
    return parts


@torch.no_grad()
def clip_grad_norm(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float,
    boundary: Boundary,
    *,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    elements: int = ELEMENTS,
) -> Tensor:
    """``torch.nn.utils.clip_grad_norm_`` with a boundary before every slice, first of the norm and then of the scaling.

    Args:
        parameters: Those whose gradients are clipped. max_norm, norm_type, error_if_nonfinite, foreach: As in torch.
        boundary: See :data:`Boundary`. elements: Of a slice.

    Returns:
        The norm before clipping, a scalar.

    Raises:
        RuntimeError: the norm is not finite and ``error_if_nonfinite``.
    """
    parameters = _with_gradients(parameters)
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not grads:
        return torch.tensor(0.0)
    index = 0
    each: list[Tensor] = []
    for group in by_device_and_dtype(grads):
        for part in slices(group, elements):
            boundary(index)
            each.extend(norms(part, float(norm_type), foreach))
            index += 1
    total = torch.linalg.vector_norm(torch.stack([norm.to(grads[0].device) for norm in each]), float(norm_type))
    if error_if_nonfinite and torch.logical_or(total.isnan(), total.isinf()):
        raise RuntimeError(
            f"The total norm of order {float(norm_type)} for gradients from `parameters` is non-finite, so it "
            "cannot be clipped. To scale by it anyway, set `error_if_nonfinite=False`"
        )
    for part in slices(parameters, elements):
        boundary(index)
        torch.nn.utils.clip_grads_with_norm_(part, max_norm, total, foreach)
        index += 1
    return total


@torch.no_grad()
def clip_grad_value(
    parameters: Tensor | Iterable[Tensor],
    clip_value: float,
    boundary: Boundary,
    *,
    foreach: bool | None = None,
    elements: int = ELEMENTS,
) -> None:
    """``torch.nn.utils.clip_grad_value_`` with a boundary before every slice; see :func:`clip_grad_norm`."""
    for index, part in enumerate(slices(_with_gradients(parameters), elements)):
        boundary(index)
        torch.nn.utils.clip_grad_value_(part, clip_value, foreach)


def can_slice(optimizer: Optimizer) -> bool:
    """Whether :func:`sliced` cuts the step of an optimizer; else its step is one slice."""
    return type(optimizer) in PER_PARAMETER and hasattr(type(optimizer).step, "__wrapped__")


@contextmanager
def sliced(optimizer: Optimizer, boundary: Boundary, *, elements: int = ELEMENTS) -> Iterator[None]:
    """Inside, ``optimizer.step`` does its work in slices, whoever calls it (a precision plugin, a gradient scaler).

    Hooks of the optimizer, the wrapper of a learning rate scheduler and the closure run once, where they would have; a
    slice is the optimizer's own step over a part of ``param_groups``, which are put back. Flags such as ``foreach`` and
    ``fused`` stay as they are.

    Args:
        optimizer: Any; see :func:`can_slice`.
        boundary: See :data:`Boundary`. elements: Of a slice.
    """
    own = optimizer.__dict__.get("step")  # a scheduler's wrapper
    step = optimizer.step

    def whole(closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        if closure is None:
            boundary(0)
            return step(**kwargs)
        return step(closure=_then(closure, lambda: boundary(0)), **kwargs)

    def parts(closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        groups, lists = optimizer.param_groups, [group["params"] for group in optimizer.param_groups]
        raw = type(optimizer).step.__wrapped__  # type: ignore[attr-defined]  # without the hooks

        def run() -> None:
            pieces = [
                (group, part) for group, full in zip(groups, lists, strict=True) for part in slices(full, elements)
            ]
            for index, (group, part) in enumerate(pieces):
                boundary(index)
                group["params"] = part
                optimizer.param_groups = [group]
                if index < len(pieces) - 1:  # the last one is left to the step that called the closure
                    raw(optimizer)

        try:
            return step(closure=_then(closure, run), **kwargs)
        finally:
            optimizer.param_groups = groups
            for group, full in zip(groups, lists, strict=True):
                group["params"] = full

    optimizer.step = parts if can_slice(optimizer) else whole  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        if own is None:
            del optimizer.step
        else:
            optimizer.step = own  # type: ignore[method-assign]


def _then(closure: Callable[[], Any] | None, after: Callable[[], None]) -> Callable[[], Any]:
    """A closure that calls another one, if there is any, and then does something more."""

    def both() -> Any:
        result = None if closure is None else closure()
        after()
        return result

    return both


def _with_gradients(parameters: Tensor | Iterable[Tensor]) -> Sequence[Tensor]:
    parameters = [parameters] if isinstance(parameters, Tensor) else parameters
    return [parameter for parameter in parameters if parameter.grad is not None]
