"""The linear model of one region: its cost and live bytes as sums over decisions, without a solver.

Per saved value ``v``: keep ``k_v``, compress ``c_{v,j}`` with codec ``j`` or recompute (the rest); per operator ``o``:
run again ``z_o``. This is the brief's reconstruction (its section 3: "our design"; the Adacc paper's formulas are not
known to us), with the runtime's laziness. Stored bytes, forward and seconds are exact. Backward is an upper bound: a
value that was made again counts from the first read that may want it to the last that may build on it, whatever else
is kept. :mod:`~ygglight.engines.adacc.milp` optimises over these rows, and brute-force tests evaluate the same.
"""

from __future__ import annotations

from dataclasses import dataclass

from ygglight.engines.adacc.graph import Action, Policy, RegionGraph, Value
from ygglight.engines.adacc.schedule import masks_of
from ygglight.engines.adacc.simulate import pack_ticks

# A variable of the model: ("k", value), ("c", value, codec position), ("z", operator), ("leaf", value): an unsaved
# leaf is held, ("late", value): a kept value is held beyond its own last read; "transient", "tape", "hook".
Variable = tuple[str, int] | tuple[str, int, int]
TRANSIENT, TAPE, HOOK = ("transient", 0), ("tape", 0), ("hook", 0)


class Row:
    """A constant plus variables times coefficients."""

    __slots__ = ("constant", "terms")

    def __init__(self, constant: float = 0.0) -> None:
        self.constant, self.terms = constant, dict[Variable, float]()

    def add(self, variable: Variable, coefficient: float) -> None:
        if coefficient:
            self.terms[variable] = self.terms.get(variable, 0.0) + coefficient

    def at(self, point: dict[Variable, float]) -> float:
        """The row's value; variables that ``point`` leaves out are 0."""
        return self.constant + sum(c * point.get(v, 0.0) for v, c in self.terms.items())


class LinearModel:
    """The rows of one region (see module docstring), without a solver.

    Attributes:
        options: per saved value that the region computes, whether it may be recomputed at all.
        seconds, error, stored: rows. forward, backward: rows per tick or read, each an upper bound of live bytes.
        implications: (result, causes): ``result >= sum(causes) - len(causes) + 1``.
        transients: (operator or codec variable, bytes): ``TRANSIENT >= variable * bytes``.
    """

    def __init__(self, graph: RegionGraph) -> None:
        self.graph = graph
        self.actionable = graph.actionable
        masks = masks_of(graph)
        saved = masks.saved & ~masks.leaf
        self.options: dict[int, bool] = {}
        for value in self.actionable:
            ops = masks.cut(1 << value.id, masks.leaf | saved & ~(1 << value.id))[0]
            self.options[value.id] = not value.pinned and all(graph.operators[op].replayable for op in ops)
        self.implications: list[tuple[Variable, tuple[Variable, ...]]] = []
        self.transients: list[tuple[Variable, int]] = []
        self._windows()
        self._costs()
        self._dependencies()
        self._memory()

    # -- when a value can be wanted --------------------------------------------------------------------------------
    def _windows(self) -> None:
        """First and last read that may want a value: its own, and those of what may be made from it."""
        graph, count, last = self.graph, len(self.graph.values), len(self.graph.uses) - 1
        self.first, self.last = [last + 1] * count, [-1] * count
        until = last  # the last read of a backward node: what the node reads lives that long
        for tick in range(last, -1, -1):
            nodes, read = graph.use_nodes, graph.uses[tick]
            if not nodes or tick == last or nodes[tick] != nodes[tick + 1]:
                until = tick
            self.first[read] = tick
            self.last[read] = max(self.last[read], until)
        for value in graph.values:
            if value.saved and self.last[value.id] < 0:  # never read: held to the end
                self.first[value.id] = self.last[value.id] = last
        self.own_last = list(self.last)
        self.op_first, self.op_last = [last + 1] * len(graph.operators), [-1] * len(graph.operators)
        for op in reversed(graph.operators):
            again = [v for v in op.outputs if self.options.get(v, True)]
            if not op.replayable or not again:
                continue
            self.op_first[op.index] = min(self.first[v] for v in again)
            self.op_last[op.index] = max(self.last[v] for v in again)
            for v in op.inputs:
                self.first[v] = min(self.first[v], self.op_first[op.index])
                self.last[v] = max(self.last[v], self.op_last[op.index])

    # -- rows ------------------------------------------------------------------------------------------------------
    def _costs(self) -> None:
        self.seconds, self.error = Row(), Row()
        for op in self.graph.operators:
            self.seconds.add(("z", op.index), op.seconds)
        for value in self.actionable:
            for j, codec in enumerate(value.codecs):
                self.seconds.add(("c", value.id, j), codec.seconds)
                self.error.add(("c", value.id, j), codec.error)
        self.seconds.add(TAPE, self.graph.tape_seconds)
        self.seconds.add(HOOK, self.graph.hook_seconds)

    def _dependencies(self) -> None:
        graph = self.graph
        for op in graph.operators:
            for v in op.inputs:
                producer = graph.values[v].producer
                if producer is None:
                    self.implications.append((("leaf", v), (("z", op.index),)))
                elif v not in self.options:  # what is saved has its own action and, if recomputed, its own row
                    self.implications.append((("z", producer), (("z", op.index),)))
                elif self.op_last[op.index] > self.own_last[v]:
                    self.implications.append((("late", v), (("k", v), ("z", op.index))))
            extra = op.workspace + (sum(graph.values[v].nbytes for v in op.outputs) if len(op.outputs) > 1 else 0)
            if extra:
                self.transients.append((("z", op.index), extra))
        for value in self.actionable:
            for j, codec in enumerate(value.codecs):
                if codec.workspace:
                    self.transients.append((("c", value.id, j), codec.workspace))

    def _memory(self) -> None:
        graph, reads = self.graph, len(self.graph.uses)
        self.stored = Row()
        self.forward = [Row(w) for w in graph.forward_workspace]
        held = [Row() for _ in range(reads)]
        for op in graph.operators:
            self.forward[op.index].constant += op.workspace
        for v in graph.values:
            if v.producer is None:
                self._leaf(v, held)
                continue
            for tick in range(v.birth, min(v.death + 1, len(self.forward))):
                self.forward[tick].constant += v.nbytes
            if v.id in self.options:
                self._saved(v, held)
            if self.options.get(v.id, True):
                for tick in range(max(0, self.op_first[v.producer]), self.last[v.id] + 1):
                    held[tick].add(("z", v.producer), v.nbytes)
        start = Row(graph.backward_workspace[reads] + self.stored.constant)
        start.terms.update(self.stored.terms)
        self.backward = [start]
        for tick, row in enumerate(held):
            before = graph.backward_workspace[tick - 1 if tick else reads]
            for workspace, transient in ((graph.backward_workspace[tick], 0.0), (before, 1.0)):
                full = Row(row.constant + workspace)
                full.terms.update(row.terms)
                full.add(TRANSIENT, transient)
                self.backward.append(full)

    def _leaf(self, v: Value, held: list[Row]) -> None:
        for row in self.forward:
            row.constant += v.nbytes
        own = self.own_last[v.id]
        if v.saved or own >= 0:
            self.stored.constant += v.nbytes
        else:
            self.stored.add(("leaf", v.id), v.nbytes)
        for tick in range(self.last[v.id] + 1):
            if tick <= own:
                held[tick].constant += v.nbytes
            else:
                held[tick].add(("leaf", v.id), v.nbytes)

    def _saved(self, v: Value, held: list[Row]) -> None:
        self.stored.add(("k", v.id), v.nbytes)
        for tick in range(v.death + 1, len(self.forward)):
            self.forward[tick].add(("k", v.id), v.nbytes)
        for tick in range(self.last[v.id] + 1):
            held[tick].add(("k" if tick <= self.own_last[v.id] else "late", v.id), v.nbytes)
        for j, codec in enumerate(v.codecs):
            packed = ("c", v.id, j)
            self.stored.add(packed, codec.nbytes)
            for tick in range(v.birth, len(self.forward)):
                self.forward[tick].add(packed, codec.nbytes)
            for tick in pack_ticks(self.graph, v.id):
                self.forward[tick].add(packed, codec.workspace)
            for tick in range(self.last[v.id] + 1):
                held[tick].add(packed, codec.nbytes + (v.nbytes if tick >= self.first[v.id] else 0))


@dataclass(frozen=True)
class LinearMemory:
    """The linear model's figures for one policy (what :func:`solve_region` bounds and minimises)."""

    stored: float
    forward: float
    backward: float
    seconds: float
    error: float


def linear_memory(model: LinearModel, policy: Policy) -> LinearMemory | None:
    """The linear model at ``policy``, every other variable at its minimum; None when the policy can not be executed.

    Independent of any solver: brute-force tests enumerate policies with it.
    """
    graph = model.graph
    point: dict[Variable, float] = {}
    again = 0
    for value in model.actionable:
        action = policy.actions[value.id]
        if action is Action.KEEP:
            point["k", value.id] = 1.0
            continue
        point[HOOK] = 1.0
        if action is Action.COMPRESS:
            point["c", value.id, [c.name for c in value.codecs].index(policy.codecs[value.id])] = 1.0
        else:
            again |= 1 << value.id
            point[TAPE] = 1.0
    masks = masks_of(graph)
    held = masks.leaf | (masks.saved & ~again)
    ops = masks.cut(again, held)[0]
    if not all(graph.operators[op].replayable for op in ops):
        return None
    for op in ops:
        point["z", op] = 1.0
    for result, causes in model.implications:
        if all(point.get(cause) for cause in causes):
            point[result] = 1.0
    point[TRANSIENT] = max((nbytes for variable, nbytes in model.transients if point.get(variable)), default=0.0)
    return LinearMemory(
        stored=model.stored.at(point),
        forward=max(row.at(point) for row in model.forward),
        backward=max(row.at(point) for row in model.backward),
        seconds=model.seconds.at(point),
        error=model.error.at(point),
    )


def recomputable(model: LinearModel) -> frozenset[int]:
    """Values that some policy may recompute."""
    return frozenset(v for v, possible in model.options.items() if possible)
