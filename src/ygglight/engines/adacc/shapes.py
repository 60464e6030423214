"""Which batches may share a plan: their shapes, rounded up."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from ygglight.engines.memory.meter import tensors_in

Shapes = tuple[tuple[int, ...], ...]
_DEPTH = 6


def shapes_of(batch: Any) -> Shapes:
    """The shapes of all tensors in a batch (dicts in the order of their keys)."""
    return tuple(tuple(t.shape) for t in tensors_in(_plain_containers(batch)))


def _plain_containers(batch: Any, depth: int = 0) -> Any:
    """Nested lists of what ``batch`` holds; objects of the user's are looked into, but not the program behind them."""
    if isinstance(batch, Tensor):
        return batch
    if depth > _DEPTH:
        return ()
    if isinstance(batch, Mapping):
        items = sorted(batch.items(), key=lambda item: str(item[0]))
        return [_plain_containers(v, depth + 1) for _, v in items]
    if isinstance(batch, (list, tuple)):
        return [_plain_containers(v, depth + 1) for v in batch]
    if isinstance(batch, (type, Enum, nn.Module, ModuleType)) or callable(batch) or not hasattr(batch, "__dict__"):
        return ()
    return [_plain_containers(v, depth + 2) for v in vars(batch).values()]


def bucket_of(shapes: Shapes) -> Shapes:
    """Shapes rounded up so that eight buckets span a doubling: batches of one bucket share a plan."""
    return tuple(tuple(_round_up(n) for n in shape) for shape in shapes)


def _round_up(n: int) -> int:
    step = max(1, 1 << max(0, n.bit_length() - 4))
    return -(-n // step) * step


def covers(profiled: Shapes, shapes: Shapes) -> bool:
    """Whether a plan made for ``profiled`` is safe for ``shapes``: no dimension is larger."""
    return len(profiled) == len(shapes) and all(
        len(a) == len(b) and all(x >= y for x, y in zip(a, b, strict=True))
        for a, b in zip(profiled, shapes, strict=True)
    )
