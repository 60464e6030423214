"""From what the profiler saw to what the planner reads: region types, their graphs, and the names of their tensors."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ygglight.engines.adacc.codecs import (
    MIN_BYTES,
    UNMEASURED_ERROR,
    codec_bytes,
    codec_seconds,
    codecs_for,
)
from ygglight.engines.adacc.graph import CodecOption, Operator, RegionGraph, StepGraph, Value
from ygglight.engines.adacc.profiler import Profiler, Trace, exclusive_user, pinned_values
from ygglight.engines.adacc.regions import ROOT

# Seconds added per operator that runs again (building its arguments from the tape, about 8 us measured on one core),
# per traced operator in forward (12 us), and per saved tensor that passes our hooks (4 us).
REPLAY_OVERHEAD = 8e-6
TRACE_OVERHEAD = 12e-6
HOOK_OVERHEAD = 4e-6


@dataclass(frozen=True)
class Kind:
    """One region type: its graph, and how to recognise its calls.

    Args:
        graph: for the planner.
        slots: value id per saved tensor. reads: slot per backward read. signature: of the tape.
        readers: per saved value, names of the autograd nodes that read it.
        traces: indices of its instances in the profile.
        consumers_measured: whether codec errors come from a measurement.
    """

    graph: RegionGraph
    slots: tuple[int, ...]
    reads: tuple[int, ...]
    signature: list[object]
    readers: dict[int, tuple[str, ...]]
    traces: tuple[int, ...]


@dataclass(frozen=True)
class BuiltStep:
    """The planner's input and what the runtime needs beside it."""

    step: StepGraph
    kinds: tuple[Kind, ...]


def kind_keys(profiler: Profiler) -> list[tuple[object, ...]]:
    """Per trace, what makes two region instances one type."""
    keys: list[tuple[object, ...]] = []
    for index, trace in enumerate(profiler.traces):
        signature = tuple((str(f), i, o) for f, i, o in trace.signature)
        sizes = tuple(v.nbytes for v in trace.values)
        leaves = tuple(sorted(_leaf_bytes(profiler, [index]).items()))
        keys.append((signature, sizes, tuple(trace.saves), tuple(trace.reads), pinned_values(trace), leaves))
    return keys


def build_step(
    profiler: Profiler,
    device: torch.device,
    *,
    compress: bool,
    errors: Mapping[tuple[int, int, str], float] | None = None,
    floor_workspace: int = 0,
) -> BuiltStep:
    """Group the instances into types and fill in their graphs.

    Args:
        compress: offer codecs at all.
        errors: (type index, value id, codec) -> squared relative gradient error; missing ones take a stated default.
        floor_workspace: see :class:`~ygglight.engines.adacc.graph.StepGraph`.
    """
    members: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for index, key in enumerate(kind_keys(profiler)):
        members[key].append(index)
    workspace = _workspace(profiler)
    kinds, order = [], {}
    for position, indices in enumerate(members.values()):
        kinds.append(_kind(profiler, position, indices, workspace, device, compress, errors or {}))
        order.update(dict.fromkeys(indices, position))
    traces = profiler.traces
    step = StepGraph(
        types=tuple(kind.graph for kind in kinds),
        sequence=tuple(order[i] for i in range(len(traces))),
        names=tuple(trace.name for trace in traces),
        floor_workspace=floor_workspace,
    )
    return BuiltStep(step, tuple(kinds))


def _workspace(profiler: Profiler) -> dict[tuple[int, str, int], int]:
    """Largest unmanaged live bytes per (trace, phase, tick)."""
    found: dict[tuple[int, str, int], int] = {}
    for (live, index, phase, tick), managed in zip(profiler.samples, profiler.managed_bytes(), strict=True):
        key = (index, phase, tick)
        found[key] = max(found.get(key, 0), live - managed)
    return found


def _kind(
    profiler: Profiler,
    position: int,
    indices: list[int],
    workspace: Mapping[tuple[int, str, int], int],
    device: torch.device,
    compress: bool,
    errors: Mapping[tuple[int, int, str], float],
) -> Kind:
    traces = [profiler.traces[i] for i in indices]
    first = traces[0]
    count = len(first.steps)
    readers: dict[int, list[str]] = defaultdict(list)
    for slot, (_, node) in zip(first.reads, first.nodes, strict=True):
        readers[first.saves[slot]].append(node)
    names = value_names(first)
    held_by_others = pinned_values(first)
    births, deaths = _lives(traces)
    leaf_bytes = _leaf_bytes(profiler, indices)
    values = []
    for vid, traced in enumerate(first.values):
        leaf = traced.producer is None
        saved = vid in set(first.saves)
        nbytes = leaf_bytes.get(vid, 0) if leaf else 0 if traced.state else traced.nbytes
        pinned = saved and not leaf and (vid in held_by_others or traced.state)
        options: tuple[CodecOption, ...] = ()
        if compress and saved and not leaf and not pinned and nbytes >= MIN_BYTES:
            noise = _is_dropout_noise(first, vid)
            options = _options(position, vid, traced, readers[vid], noise, device, errors)
        values.append(
            Value(
                id=vid, nbytes=nbytes, producer=traced.producer, saved=saved, pinned=pinned,
                birth=-1 if leaf else births[vid], death=count if leaf else deaths[vid],
                codecs=options, name=names[vid],
            )
        )  # fmt: skip
    operators = []
    # What is stored of them is no longer what their readers read.
    overwritten = {v for v in first.saves if first.values[v].superseded}
    for index, step in enumerate(first.steps):
        seconds = [t.again_seconds.get(index, t.seconds[index] if index < len(t.seconds) else 0.0) for t in traces]
        operators.append(
            Operator(
                index=index, name=op_name(step.func), inputs=tuple(dict.fromkeys(step.inputs)), outputs=step.outputs,
                # The least of the instances: whatever else the machine does only ever adds.
                seconds=min(seconds) + REPLAY_OVERHEAD,
                replayable=overwritten.isdisjoint(step.inputs)
                and all(t.steps[index].replayable and index not in t.lost for t in traces),
            )
        )  # fmt: skip
    uses = tuple(first.saves[slot] for slot in first.reads)
    forward = [max(workspace.get((i, "F", tick), 0) for i in indices) for tick in range(max(1, count))]
    backward = [max(workspace.get((i, "B", tick), 0) for i in indices) for tick in range(len(uses))]
    backward.append(max(workspace.get((i, "B", -1), 0) for i in indices))
    graph = RegionGraph(
        name=type(first.module).__name__ if first.module is not None else first.name,
        operators=tuple(operators),
        values=tuple(values),
        uses=uses,
        use_nodes=tuple(sequence for sequence, _ in first.nodes),
        forward_workspace=tuple(forward),
        backward_workspace=tuple(backward),
        tape_seconds=TRACE_OVERHEAD * count,
        hook_seconds=HOOK_OVERHEAD * len(first.saves),
    )
    kept = {v: tuple(r) for v, r in readers.items()}
    return Kind(graph, tuple(first.saves), tuple(first.reads), first.signature, kept, tuple(indices))


def _options(
    position: int,
    vid: int,
    traced: object,
    readers: list[str],
    noise: bool,
    device: torch.device,
    errors: Mapping[tuple[int, int, str], float],
) -> tuple[CodecOption, ...]:
    dtype: torch.dtype = traced.dtype  # type: ignore[attr-defined]
    numel = traced.nbytes // dtype.itemsize  # type: ignore[attr-defined]
    options = []
    for name in codecs_for(readers, dtype, two_valued=noise):
        error = errors.get((position, vid, name), UNMEASURED_ERROR[name])
        stored, workspace = codec_bytes(name, numel, dtype, str(device))
        seconds = codec_seconds(name, numel, dtype, str(device))
        options.append(CodecOption(name, stored, seconds, error, workspace))
    return tuple(options)


def _is_dropout_noise(trace: Trace, value: int) -> bool:
    """Whether ``value`` is Bernoulli draws, scaled in place: what CPU dropout saves."""
    drawn = False
    producer = trace.values[value].producer
    while producer is not None:
        step = trace.steps[producer]
        name = op_name(step.func)
        drawn |= "bernoulli" in name
        if drawn:
            return True
        if name not in ("aten.div_", "aten.mul_") or not step.writes:
            return False
        producer = trace.values[step.writes[0][0]].producer
    return False


def _lives(traces: list[Trace]) -> tuple[dict[int, int], dict[int, int]]:
    """Per computed value, the ticks of its birth and of its natural death (the latest over the instances)."""
    first = traces[0]
    count = len(first.steps)
    births: dict[int, int] = {}
    deaths: dict[int, int] = {}
    last_read = [-1] * len(first.values)
    overwritten: dict[int, int] = {}
    origin = first.origins()
    pinned = {id(trace): pinned_values(trace) for trace in traces}
    for index, step in enumerate(first.steps):
        for value in step.inputs:
            last_read[value] = index
        for value in step.outputs:
            births[value] = index
        for old, _ in step.writes:
            overwritten[old] = index
    for value in births:
        death = 0
        for trace in traces:
            lifetime = trace.lifetimes.get(origin[value])
            if lifetime is None or value in pinned[id(trace)]:
                death = count
            elif lifetime.held:  # we hold it, so nobody can tell: its last reader
                death = max(death, last_read[value], births[value])
            else:
                death = max(death, count if lifetime.death_tick is None else lifetime.death_tick)
        deaths[value] = min(death, overwritten.get(value, count))
    return births, deaths


def _leaf_bytes(profiler: Profiler, indices: list[int]) -> dict[int, int]:
    """Per leaf that this region alone takes over from another one: its bytes (the most over the instances)."""
    found: dict[int, int] = {}
    members = {id(profiler.traces[i]) for i in indices}
    for trace in profiler.traces:
        for lifetime in trace.lifetimes.values():
            user = exclusive_user(lifetime)
            if user is not None and id(user) in members:
                for _, value in lifetime.users:
                    found[value] = max(found.get(value, 0), lifetime.nbytes)
    return found


def op_name(func: object) -> str:
    """``"aten.mm"`` for ``aten::mm.default``."""
    return func._schema.name.replace("::", ".")  # type: ignore[attr-defined]


def value_names(trace: Trace) -> dict[int, str]:
    """Names per value: submodule path, operator and its turn in that submodule."""
    turn: Counter[str] = Counter()
    names: dict[int, str] = {}
    prefix = f"{trace.name.partition('@')[0]}."
    for index, step in enumerate(trace.steps):
        path = trace.paths[index] if index < len(trace.paths) else ""
        path = path.removeprefix(prefix) if trace.module is not None else path
        if path == trace.name.partition("@")[0]:
            path = ""
        stem = f"{path}/{op_name(step.func)}" if path else op_name(step.func)
        number = turn[stem]
        turn[stem] += 1
        for position, value in enumerate(step.outputs):
            names[value] = f"{stem}:{number}" + (f".{position}" if position else "")
    for value, traced in enumerate(trace.values):
        names.setdefault(value, "parameter" if traced.state else f"input:{value}")
    return names


def slot_name(instance: str, value_name: str) -> str:
    """The name of a saved tensor in ``plan.actions``: ``"model.layers.3.mlp/aten.mm:1"``."""
    if instance.startswith(ROOT):
        return f"{instance}/{value_name}"
    return f"{instance}.{value_name}" if "/" in value_name else f"{instance}/{value_name}"
