"""What the planner knows of a model: plain numbers, no tensors.

A *region* is a stretch of the forward pass that is planned as one: one call of a repeated block, or the code between
two of them. Regions of one shape share a :class:`RegionGraph`; a training step is a sequence of region *instances*.

Vocabulary (used by planner, simulator and runtime alike):

* an *operator* is one dispatched ATen call that was traced in the region;
* a *value* is one storage as one operator wrote it (views share their base's; an in-place write makes a new one);
* a *leaf* is a value that the region did not compute: its input, a parameter, a tensor from outside;
* a value is *saved* when autograd asked to keep it for backward; every saved value that is no leaf gets an action.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class Action(StrEnum):
    """What happens to one saved value between forward and backward."""

    KEEP = "keep"
    COMPRESS = "compress"
    RECOMPUTE = "recompute"


@dataclass(frozen=True)
class CodecOption:
    """One way to compress one value.

    Args:
        name: codec name, e.g. ``"int4"``, ``"int8"``, ``"mask"``.
        nbytes: bytes stored instead of ``Value.nbytes``, metadata included.
        seconds: pack + unpack time.
        error: squared relative perturbation of the whole gradient (additive over values); 0 for lossless codecs.
        workspace: transient bytes while packing or unpacking, beyond code and value.
    """

    name: str
    nbytes: int
    seconds: float
    error: float = 0.0
    workspace: int = 0


@dataclass(frozen=True)
class Value:
    """One storage of the region (see module docstring).

    Args:
        id: position in ``RegionGraph.values``.
        nbytes: bytes of the storage; 0 for parameters, buffers and tensors that outlive the step anyway.
        producer: operator index, or None for a leaf.
        saved: autograd keeps it for backward.
        pinned: saved, but only "keep" is possible (it escapes the region, say: someone else holds it).
        birth: forward tick (operator index) after which it exists; -1 for leaves.
        death: forward tick after which nobody but us would hold it (``n_ops`` when it outlives the region's forward).
        codecs: the ways in which it may be compressed; empty when it must not be.
        name: slot name relative to the region, e.g. ``"mlp/aten.mm:1"``.
    """

    id: int
    nbytes: int
    producer: int | None
    saved: bool = False
    pinned: bool = False
    birth: int = -1
    death: int = 0
    codecs: tuple[CodecOption, ...] = ()
    name: str = ""


@dataclass(frozen=True)
class Operator:
    """One traced operator.

    Args:
        index: forward tick.
        name: e.g. ``"aten.mm"``.
        inputs: ids of the values that it reads.
        outputs: ids of the values that it writes.
        seconds: time to run it again.
        replayable: False for random, collective, side-effecting or unverifiable operators: never run again.
        workspace: transient bytes while it runs, beyond inputs and outputs.
    """

    index: int
    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    seconds: float
    replayable: bool = True
    workspace: int = 0


@dataclass(frozen=True)
class RegionGraph:
    """All that is known of one region type.

    Args:
        name: a readable name of the type, e.g. ``"LlamaDecoderLayer"``.
        operators: in forward order; ``operators[i].index == i``.
        values: ``values[i].id == i``.
        uses: ids of saved values in the order in which backward reads them (a value may occur several times; leaves
            and pinned values too). ``uses[m]`` is *backward tick* ``m``.
        forward_workspace: per forward tick, live bytes above state that are none of the values (and none of other
            regions' values), max over instances. ``len == max(1, len(operators))``.
        backward_workspace: per backward tick, likewise, from that read until just before the next one; entry
            ``len(uses)`` is the stretch before the first read. ``len == len(uses) + 1``.
        use_nodes: per backward tick, which backward node reads; what one node reads lives until the node has run, so
            reads of one node are let go of together. Empty: each read is a node of its own.
        tape_seconds: added cost of an instance in which anything is recomputed (tracing the forward).
        hook_seconds: added cost of an instance in which anything at all is not kept.
    """

    name: str
    operators: tuple[Operator, ...]
    values: tuple[Value, ...]
    uses: tuple[int, ...]
    forward_workspace: tuple[int, ...]
    backward_workspace: tuple[int, ...]
    use_nodes: tuple[int, ...] = ()
    tape_seconds: float = 0.0
    hook_seconds: float = 0.0

    @property
    def actionable(self) -> tuple[Value, ...]:
        """Saved values that were computed in the region: each gets an action of its own."""
        return tuple(v for v in self.values if v.saved and v.producer is not None)


@dataclass(frozen=True)
class StepGraph:
    """One training step: region types, and the order in which their instances run forward (backward is the reverse).

    Args:
        types: the distinct regions.
        sequence: index into ``types`` per instance, in forward order.
        names: one name per instance, e.g. ``"model.layers.3"``; unique.
        floor_workspace: largest live bytes above state outside every region's ticks (optimizer step, say).
    """

    types: tuple[RegionGraph, ...]
    sequence: tuple[int, ...]
    names: tuple[str, ...]
    floor_workspace: int = 0

    def instance(self, position: int) -> RegionGraph:
        """The graph of the instance at ``position``."""
        return self.types[self.sequence[position]]


@dataclass(frozen=True)
class Policy:
    """Actions for one region: value id -> action, and value id -> codec name for the compressed ones."""

    actions: dict[int, Action] = field(default_factory=dict)
    codecs: dict[int, str] = field(default_factory=dict)

    @property
    def all_keep(self) -> bool:
        """True when nothing but plain autograd is needed."""
        return all(a is Action.KEEP for a in self.actions.values())
