"""What autograd holds instead of a saved tensor, and what a frame is told to do with it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ygglight.engines.adacc.graph import Action, Policy
from ygglight.engines.adacc.schedule import Schedule
from ygglight.engines.adacc.tape import Ref
from ygglight.kernels.act_codec import CodecSpec

if TYPE_CHECKING:
    from ygglight.engines.adacc.frame import Frame

OVERWRITTEN = (
    "adacc: a tensor from outside of {region}, {shape} {dtype}, was overwritten in place after the region read it, and "
    "is needed to run an operator again. Write `x = x + ...` instead of `x += ...` there, or pass enabled=False"
)
MUTATED = (
    "one of the variables needed for gradient computation has been modified by an inplace operation: {shape} {dtype}, "
    "saved in {region}, is no longer what it was when it was saved (raised by ygglight's adacc in autograd's stead)"
)


@dataclass(frozen=True)
class RegionPlan:
    """What a frame needs to carry out a policy.

    Args:
        policy: action per value id.
        schedule: what each backward read does.
        slots: value id per saved tensor, in the order in which forward saves them.
        reads: index into ``slots`` per backward read, in the planned order.
        signature: (operator, inputs, outputs) per traced operator: the tape must match it for the ids to mean the same.
        specs: codec per compressed value.
        bases: stored value ids that recomputed ones are rebuilt from and that nothing else could make again.
    """

    policy: Policy
    schedule: Schedule
    slots: tuple[int, ...]
    reads: tuple[int, ...]
    signature: list[Any]
    specs: dict[int, CodecSpec] = field(default_factory=dict)
    bases: frozenset[int] = frozenset()

    @property
    def needs_tape(self) -> bool:
        return Action.RECOMPUTE in self.policy.actions.values()


class Handle:
    """What autograd holds instead of a saved tensor."""

    __slots__ = ("frame", "ref", "slot", "value", "version", "watched")

    def __init__(self, frame: Frame, slot: int, value: int, ref: Ref, watched: Tensor) -> None:
        self.frame, self.slot, self.value, self.ref = frame, slot, value, ref
        self.watched = watched
        """Shares its version counter with what was saved, so that a later in-place write shows."""
        self.version = watched._version

    def __del__(self) -> None:
        self.frame._dropped(self)


class Opaque:
    """A saved tensor that is not ours to manage (a DTensor, a sparse tensor): kept as it is."""

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.version = tensor, tensor._version


def whole_storage(tensor: Tensor) -> Tensor:
    """The whole storage of ``tensor``, flat."""
    count = tensor.untyped_storage().nbytes() // tensor.element_size()
    return torch.as_strided(tensor, (count,), (1,), 0)


def version_sentinel(tensor: Tensor) -> Tensor:
    """Shares the version counter of ``tensor``, but none of its bytes."""
    kind = (tensor.dtype, tensor.device)
    empty = _EMPTY.get(kind)
    if empty is None:
        empty = _EMPTY[kind] = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    watched = tensor.detach()
    watched.data = empty
    return watched


_EMPTY: dict[tuple[torch.dtype, torch.device], Tensor] = {}
