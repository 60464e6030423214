"""Turns a policy into a schedule: what to unpack, replay and let go of at every read of backward. Pure integers.

The semantics ("lazy rematerialisation from a tape", our design, not the Adacc paper's): a kept value is there; a
compressed one is unpacked when it is first wanted; a recomputed one is made when autograd first reads it, by running
again the operators of its *closure*, which ends at whatever is available then (kept, compressed, leaf, or made
before). What later reads build on is held, the rest is let go of at once. Every operator runs again at most once:
nothing is let go of while a later read builds on it.

Sets of values are bit masks here (bit ``v`` is value ``v``): the planner builds thousands of schedules.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import NamedTuple

from ygglight.engines.adacc.graph import Action, CodecOption, Policy, RegionGraph


class ReplayStep(NamedTuple):
    """Run one operator again.

    Args:
        op: operator index.
        bind: its outputs to remember; what else it returns (nobody needs it, or an original is there) is dropped.
        free_after: remembered values to forget once it ran (never ones that are stored).
    """

    op: int
    bind: tuple[int, ...]
    free_after: tuple[int, ...]


class Tick(NamedTuple):
    """One read of backward: in this order unpack, replay, hand ``value`` out; ``release`` just before the next read.

    Args:
        value: the value that autograd reads (``graph.uses[m]``).
        unpack: compressed values to unpack first.
        replay: operators to run again, in forward order.
        release: values to let go of (stored tensor, code, leaf and remembered tensor alike) when this read's backward
            node ran, i.e. just before the next read.
    """

    value: int
    unpack: tuple[int, ...]
    replay: tuple[ReplayStep, ...]
    release: tuple[int, ...]


@dataclass(frozen=True)
class Schedule:
    """What the runtime does for one region under one policy.

    Args:
        ticks: one per ``graph.uses``.
        stored: what an instance holds after its forward: kept values, values whose code is held, and ``leaves``.
        leaves: leaves that are saved or that a replay needs (parameters, of 0 bytes, included).
        added_seconds: replays, codecs and machinery per instance.
    """

    ticks: tuple[Tick, ...]
    stored: frozenset[int]
    leaves: frozenset[int]
    added_seconds: float


def slot(graph: RegionGraph, value_id: int) -> str:
    """The name of a value in messages."""
    return f"{graph.name}/{graph.values[value_id].name or f'value {value_id}'}"


def codec_of(graph: RegionGraph, policy: Policy, value_id: int) -> CodecOption:
    """The codec of a compressed value. Raises ``ValueError`` when the value has no such codec."""
    name = policy.codecs.get(value_id)
    for option in graph.values[value_id].codecs:
        if option.name == name:
            return option
    known = ", ".join(option.name for option in graph.values[value_id].codecs) or "none"
    raise ValueError(f"{slot(graph, value_id)}: no codec {name!r} (this value has: {known})")


def validate_policy(graph: RegionGraph, policy: Policy) -> None:
    """Raise ``ValueError``, naming the slot, unless ``policy`` can be executed on ``graph``."""
    actionable = {value.id for value in graph.actionable}
    for value_id in sorted(policy.actions.keys() - actionable):
        known = 0 <= value_id < len(graph.values)
        name = slot(graph, value_id) if known else f"{graph.name}/value {value_id}"
        raise ValueError(f"{name}: has an action but is not a saved value that the region computes")
    for value_id in sorted(actionable):
        action = policy.actions.get(value_id)
        if action is None:
            raise ValueError(f"{slot(graph, value_id)}: the policy gives no action")
        if graph.values[value_id].pinned and action is not Action.KEEP:
            raise ValueError(f"{slot(graph, value_id)}: can only be kept (somebody else holds it), not {action.value}")
        if action is Action.COMPRESS:
            codec_of(graph, policy, value_id)
    for value_id in sorted(policy.codecs):
        if policy.actions.get(value_id) is not Action.COMPRESS:
            name = slot(graph, value_id) if 0 <= value_id < len(graph.values) else f"value {value_id}"
            raise ValueError(f"{name}: has a codec but is not compressed")
    masks = masks_of(graph)
    held = masks.leaf | action_mask(policy, Action.KEEP) | action_mask(policy, Action.COMPRESS)
    for value_id in bits(action_mask(policy, Action.RECOMPUTE)):
        for op in masks.cut(1 << value_id, held)[0]:
            if not graph.operators[op].replayable:
                raise ValueError(
                    f"{slot(graph, value_id)}: cannot be recomputed, operator {op} ({graph.operators[op].name}) must "
                    "not run twice; keep or compress what it makes"
                )


def executable(graph: RegionGraph, policy: Policy) -> bool:
    """Whether a complete policy recomputes nothing that needs an operator that must not run twice."""
    masks = masks_of(graph)
    again = action_mask(policy, Action.RECOMPUTE)
    return all(graph.operators[op].replayable for op in masks.cut(again, masks.leaf | masks.saved & ~again)[0])


def closure(
    graph: RegionGraph,
    policy: Policy,
    value_id: int,
    materialised: AbstractSet[int],
    released: AbstractSet[int] = frozenset(),
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What it takes to have ``value_id`` now; for reads that come in another order than ``graph.uses``.

    Args:
        materialised: values unpacked or made again that are still remembered.
        released: stored values, codes and leaves that were let go of.

    Returns:
        Compressed values to unpack, and operators to run again in forward order.

    Raises:
        ValueError: when that needs a released leaf, or an operator that must not run twice.
    """
    masks = masks_of(graph)
    memo, gone = mask_of(materialised), mask_of(released)
    codes = action_mask(policy, Action.COMPRESS) & ~gone
    held = (masks.leaf | action_mask(policy, Action.KEEP)) & ~gone | codes | memo
    if (held >> value_id) & 1:
        return ((value_id,) if (codes & ~memo) >> value_id & 1 else ()), ()
    ops, boundary, missing = masks.cut(1 << value_id, held)
    if missing:
        raise ValueError(f"{slot(graph, value_id)}: needs {slot(graph, next(bits(missing)))}, which was let go of")
    for op in ops:
        if not graph.operators[op].replayable:
            raise ValueError(f"{slot(graph, value_id)}: operator {op} ({graph.operators[op].name}) must not run twice")
    return tuple(bits(boundary & codes & ~memo)), tuple(ops)


def build_schedule(graph: RegionGraph, policy: Policy) -> Schedule:
    """The schedule of ``policy`` (assumed valid, see :func:`validate_policy`) for reads in the order ``graph.uses``.

    A saved value that backward never reads is treated as read after everything else: it, or what it takes to make
    it, is held to the end.
    """
    masks = masks_of(graph)
    codes, again = action_mask(policy, Action.COMPRESS), action_mask(policy, Action.RECOMPUTE)
    kept = action_mask(policy, Action.KEEP)
    leaves = (masks.cut(again, kept | codes | masks.leaf)[1] | masks.saved) & masks.leaf
    stored = kept | codes | leaves
    alive, memo = stored, 0
    ticks: list[Tick] = []
    seconds = sum(codec_of(graph, policy, v).seconds for v in bits(codes))
    last = len(graph.uses) - 1
    for tick, value in enumerate(graph.uses):
        bit = 1 << value
        wanted = masks.future[tick]
        unpack = 0
        ops: list[int] = []
        if not alive & bit:
            ops, boundary, _ = masks.cut(bit, alive)
            unpack = boundary & codes & ~memo
        elif codes & bit and not memo & bit:
            unpack = bit
        memo |= unpack
        made = 0
        for op in ops:
            made |= masks.outputs[op]
        made &= ~alive
        later = 0 if tick == last else wanted & (alive | made) | masks.cut(wanted, alive | made)[1]
        replay = _replay(graph, masks, ops, made, later | bit) if ops else ()
        for op in ops:
            seconds += graph.operators[op].seconds
        fresh = made & (later | bit)
        memo |= fresh
        alive |= fresh
        release = alive & ~later
        alive &= later
        memo &= later
        ticks.append(Tick(value, tuple(bits(unpack)), replay, tuple(bits(release))))
    if again:
        seconds += graph.tape_seconds
    if again | codes:
        seconds += graph.hook_seconds
    return Schedule(tuple(ticks), frozenset(bits(stored)), frozenset(bits(leaves)), seconds)


def _replay(graph: RegionGraph, masks: Masks, ops: list[int], made: int, lasting: int) -> tuple[ReplayStep, ...]:
    """The steps of one replay; of what is ``made``, only ``lasting`` outlives it."""
    steps: list[ReplayStep] = []
    wanted_after = 0  # by the operators that come later in this replay
    for op in reversed(ops):
        bind = masks.outputs[op] & made & (wanted_after | lasting)
        done = masks.inputs[op] & made & ~lasting & ~wanted_after
        wanted_after |= masks.inputs[op]
        steps.append(ReplayStep(op, tuple(bits(bind)), tuple(bits(done))))
    return tuple(reversed(steps))


# -- sets of values as bit masks -----------------------------------------------------------------------------------
def mask_of(values: Iterable[int]) -> int:
    """The mask of a set of value ids."""
    mask = 0
    for value in values:
        mask |= 1 << value
    return mask


def bits(mask: int) -> Iterator[int]:
    """The value ids in ``mask``, ascending."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


def action_mask(policy: Policy, action: Action) -> int:
    """The values to which ``policy`` gives ``action``."""
    mask = 0
    for value, chosen in policy.actions.items():
        if chosen is action:
            mask |= 1 << value
    return mask


class Masks:
    """One graph as masks: ``inputs`` and ``outputs`` per operator, ``leaf`` and ``saved`` values, and ``future``:
    per tick the values read after it (never-read ones included). ``readers``: operators per value, not a mask."""

    def __init__(self, graph: RegionGraph) -> None:
        self.inputs = [mask_of(op.inputs) for op in graph.operators]
        self.outputs = [mask_of(op.outputs) for op in graph.operators]
        self.readers: list[list[int]] = [[] for _ in graph.values]
        for op in graph.operators:
            for value in set(op.inputs):
                self.readers[value].append(op.index)
        self.leaf = mask_of(v.id for v in graph.values if v.producer is None)
        reads = mask_of(graph.uses)
        self.saved = mask_of(v.id for v in graph.values if v.saved) | (reads & self.leaf)
        later = self.saved & ~reads
        self.future: list[int] = []
        for value in reversed(graph.uses):
            self.future.append(later)
            later |= 1 << value
        self.future.reverse()
        # What one backward node reads stays until the node has run, so until the last of its reads.
        group = 0
        for tick in range(len(graph.uses) - 1, -1, -1):
            nodes = graph.use_nodes
            if nodes and tick + 1 < len(nodes) and nodes[tick] == nodes[tick + 1]:
                self.future[tick] |= group
            else:
                first = tick
                while nodes and first > 0 and nodes[first - 1] == nodes[tick]:
                    first -= 1
                group = mask_of(graph.uses[first : tick + 1])

    def cut(self, wanted: int, held: int) -> tuple[list[int], int, int]:
        """The operators that make ``wanted`` from ``held`` in forward order, the part of ``held`` that they read, and
        leaves that they read although not held."""
        need = wanted & ~held
        ops: list[int] = []
        if not need & ~self.leaf:
            return ops, 0, need & self.leaf
        read = 0
        inputs, outputs = self.inputs, self.outputs
        for op in range(len(outputs) - 1, -1, -1):  # forward order is topological: one sweep is enough
            if outputs[op] & need:
                ops.append(op)
                read |= inputs[op]
                need |= inputs[op] & ~held
        ops.reverse()
        return ops, read & held, need & self.leaf


_MASKS: dict[int, tuple[RegionGraph, Masks]] = {}
_MASKS_HELD = 64


def masks_of(graph: RegionGraph) -> Masks:
    """The masks of ``graph``, made once (hashing a whole graph would cost more than making them)."""
    entry = _MASKS.get(id(graph))
    if entry is None or entry[0] is not graph:
        while len(_MASKS) >= _MASKS_HELD:
            _MASKS.pop(next(iter(_MASKS)))
        entry = _MASKS[id(graph)] = (graph, Masks(graph))
    return entry[1]
