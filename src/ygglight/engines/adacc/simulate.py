"""Live bytes of a region, and of a step, under given policies: the exact counterpart of the runtime, in plain numbers.

Semantics are those of :mod:`~ygglight.engines.adacc.schedule` (our design, not the Adacc paper's). Bytes are above
state (parameters, gradients, optimizer), counted by unique storage; fragmentation is not modelled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from ygglight.engines.adacc.graph import Action, Policy, RegionGraph, StepGraph
from ygglight.engines.adacc.schedule import Schedule, build_schedule, codec_of, masks_of


@dataclass(frozen=True)
class RegionProfile:
    """One instance of a region under a policy, as if it ran alone (no earlier instance stores anything).

    Args:
        stored_bytes: what it holds between its forward and its backward.
        forward_peak: largest live bytes during its forward.
        backward_peak: likewise during its backward.
        added_seconds: time beyond plain autograd.
        error: summed ``CodecOption.error``.
        forward_timeline: live bytes per forward tick.
        backward_timeline: (bytes, tick) at every change of backward: tick ``-1`` before the first read; at a read with
            work to do its transient peak comes first.
    """

    stored_bytes: int
    forward_peak: int
    backward_peak: int
    added_seconds: float
    error: float
    forward_timeline: tuple[int, ...]
    backward_timeline: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class StepProfile:
    """One training step.

    Args:
        peak_bytes: largest live bytes above state.
        peak_at: where, e.g. ``"model.layers.3 backward 12 (mlp/aten.mm)"``.
        peak_instance: position of that instance, -1 when the peak lies outside the regions.
        peak_phase: ``"forward"``, ``"backward"`` or ``""``.
        timeline: (label, bytes), in order of time: forward and backward of every instance.
        stored_bytes: per instance, in forward order.
        added_seconds: time beyond plain autograd.
        error: summed over instances.
    """

    peak_bytes: int
    peak_at: str
    peak_instance: int
    peak_phase: str
    timeline: tuple[tuple[str, int], ...]
    stored_bytes: tuple[int, ...]
    added_seconds: float
    error: float


def simulate_region(graph: RegionGraph, policy: Policy, schedule: Schedule | None = None) -> RegionProfile:
    """Bytes and seconds of one instance of ``graph`` under ``policy`` (assumed valid).

    Args:
        schedule: what :func:`build_schedule` gave for both, if at hand.
    """
    schedule = schedule or build_schedule(graph, policy)
    forward = _forward(graph, policy)
    backward, stored = _backward(graph, policy, schedule)
    return RegionProfile(
        stored_bytes=stored,
        forward_peak=max(forward),
        backward_peak=max(live for live, _ in backward),
        added_seconds=schedule.added_seconds,
        error=sum(codec_of(graph, policy, v).error for v, a in policy.actions.items() if a is Action.COMPRESS),
        forward_timeline=forward,
        backward_timeline=tuple(backward),
    )


def _forward(graph: RegionGraph, policy: Policy) -> tuple[int, ...]:
    ticks = len(graph.forward_workspace)
    steps = [0] * (ticks + 1)  # change of live bytes on entering a tick
    transient = list(graph.forward_workspace)
    for op in graph.operators:
        transient[op.index] += op.workspace
    for value in graph.values:
        if not value.nbytes:
            continue
        if value.producer is None:
            steps[0] += value.nbytes
            continue
        action = policy.actions.get(value.id)
        steps[value.birth] += value.nbytes
        if action is not Action.KEEP:
            steps[min(value.death + 1, ticks)] -= value.nbytes
        if action is Action.COMPRESS:
            codec = codec_of(graph, policy, value.id)
            steps[value.birth] += codec.nbytes
            if codec.workspace:
                for tick in pack_ticks(graph, value.id):
                    transient[tick] += codec.workspace
    return tuple(live + extra for live, extra in zip(accumulate(steps[:ticks]), transient, strict=True))


def pack_ticks(graph: RegionGraph, value_id: int) -> tuple[int, ...]:
    """Forward ticks at which a value may be packed: autograd saves it when it is made or when an operator reads it
    (which of them is not in the graph), and the pack may overlap what follows."""
    birth = graph.values[value_id].birth
    ticks = {birth, birth + 1, *masks_of(graph).readers[value_id]}
    return tuple(sorted(t for t in ticks if t < len(graph.forward_workspace)))


Items = list[tuple[str, int]]


def items_at_peak(graph: RegionGraph, policy: Policy, phase: str) -> Items:
    """What is alive at the peak of one phase of one instance: (name, bytes), the bytes add up to the peak."""
    profile = simulate_region(graph, policy)
    items: Items = []
    if phase == "backward":
        _backward(graph, policy, build_schedule(graph, policy), (profile.backward_peak, items))
        return [item for item in items if item[1]]
    tick = profile.forward_timeline.index(profile.forward_peak)
    for value in graph.values:
        action, codec = policy.actions.get(value.id), 0
        if action is Action.COMPRESS and value.birth <= tick:
            option = codec_of(graph, policy, value.id)
            codec = option.nbytes + (option.workspace if tick in pack_ticks(graph, value.id) else 0)
        alive = value.producer is None or (value.birth <= tick and (tick <= value.death or action is Action.KEEP))
        items.append((value.name or f"value {value.id}", codec + value.nbytes * alive))
    operator = graph.operators[tick].workspace if graph.operators else 0
    items.append(("workspace", graph.forward_workspace[tick] + operator))
    return [item for item in items if item[1]]


def stored_items(graph: RegionGraph, policy: Policy) -> Items:
    """What one instance holds between forward and backward: (name, bytes)."""
    items: Items = []
    for v in sorted(build_schedule(graph, policy).stored):
        packed = policy.actions.get(v) is Action.COMPRESS
        nbytes = codec_of(graph, policy, v).nbytes if packed else graph.values[v].nbytes
        if nbytes:
            items.append((graph.values[v].name or f"value {v}", nbytes))
    return items


def _backward(
    graph: RegionGraph, policy: Policy, schedule: Schedule, snapshot: tuple[int, Items] | None = None
) -> tuple[list[tuple[int, int]], int]:
    """(Live bytes, tick) at every change, and what is stored before; ``snapshot`` is filled at that many live bytes."""

    def look(extra: int, name: str) -> None:
        if snapshot is not None and not snapshot[1] and before + live + extra == snapshot[0]:
            snapshot[1].extend((values[v].name or f"value {v}", nbytes) for v, nbytes in held.items())
            snapshot[1].extend([(name, extra), ("workspace", before)])

    values, workspace = graph.values, graph.backward_workspace
    compressed = {v for v, a in policy.actions.items() if a is Action.COMPRESS}
    # Bytes that each held value has in use: its code (or the stored tensor), and what was unpacked or made again.
    held = {v: codec_of(graph, policy, v).nbytes if v in compressed else values[v].nbytes for v in schedule.stored}
    live = stored = sum(held.values())
    before = workspace[len(graph.uses)]
    timeline = [(before + live, -1)]
    look(0, "")
    for tick, step in enumerate(schedule.ticks):
        if step.unpack or step.replay:
            peak = live
            for v in step.unpack:
                live += values[v].nbytes
                held[v] += values[v].nbytes
                extra = codec_of(graph, policy, v).workspace
                peak = max(peak, live + extra)
                look(extra, "codec workspace")
            for op_index, bind, free_after in step.replay:
                op = graph.operators[op_index]
                extra = op.workspace + sum(values[v].nbytes for v in op.outputs)
                peak = max(peak, live + extra)
                look(extra, f"replay of {op.name}")
                for v in bind:
                    live += values[v].nbytes
                    held[v] = values[v].nbytes
                for v in free_after:
                    live -= held.pop(v)
            timeline.append((before + peak, tick))
        before = workspace[tick]
        timeline.append((before + live, tick))
        look(0, "")
        for v in step.release:
            live -= held.pop(v)
    return timeline, stored


def simulate_step(
    step: StepGraph, policies: Sequence[Policy], profiles: dict[tuple[int, int], RegionProfile] | None = None
) -> StepProfile:
    """Peak and time of one step; ``policies`` holds one per instance.

    Args:
        profiles: a cache, (region type, ``id(policy)``) -> profile; keep the policies alive as long as you keep it.

    Raises:
        ValueError: when there is not one policy per instance.
    """
    if len(policies) != len(step.sequence):
        raise ValueError(f"{len(policies)} policies for {len(step.sequence)} region instances")
    cache: dict[tuple[int, int], RegionProfile] = {} if profiles is None else profiles
    chosen: list[RegionProfile] = []
    for type_index, policy in zip(step.sequence, policies, strict=True):
        key = (type_index, id(policy))
        if key not in cache:
            cache[key] = simulate_region(step.types[type_index], policy)
        chosen.append(cache[key])

    prefixes = list(accumulate((p.stored_bytes for p in chosen), initial=0))
    peak, peak_at, peak_instance, peak_phase = step.floor_workspace, "outside the regions", -1, ""
    timeline: list[tuple[str, int]] = []
    order = range(len(chosen))
    for phase, positions in (("forward", order), ("backward", reversed(order))):
        for position in positions:
            profile = chosen[position]
            top = prefixes[position] + (profile.forward_peak if phase == "forward" else profile.backward_peak)
            timeline.append((f"{step.names[position]} {phase}", top))
            if top > peak:
                tick = _tick_of(step.instance(position), profile, phase)
                peak, peak_at = top, f"{step.names[position]} {phase} {tick}"
                peak_instance, peak_phase = position, phase
    return StepProfile(
        peak_bytes=peak,
        peak_at=peak_at,
        peak_instance=peak_instance,
        peak_phase=peak_phase,
        timeline=tuple(timeline),
        stored_bytes=tuple(p.stored_bytes for p in chosen),
        added_seconds=sum(p.added_seconds for p in chosen),
        error=sum(p.error for p in chosen),
    )


def _tick_of(graph: RegionGraph, profile: RegionProfile, phase: str) -> str:
    if phase == "forward":
        tick = profile.forward_timeline.index(profile.forward_peak)
        return f"{tick} ({graph.operators[tick].name})" if graph.operators else f"{tick}"
    tick = next(tick for live, tick in profile.backward_timeline if live == profile.backward_peak)
    return "start" if tick < 0 else f"{tick} ({graph.values[graph.uses[tick]].name or 'unnamed'})"
