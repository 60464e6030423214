"""Keep / compress / recompute per saved tensor of one region, as a mixed-integer linear program (PuLP, CBC).

Minimise replay, codec and machinery seconds over the variables of :mod:`~ygglight.engines.adacc.linear`, such that (the
brief's section 3, "our design", not the Adacc paper's formulas)

1. a saved value has exactly one action (what must not be dropped, or not be compressed, has no such variable);
2. a recomputed value's operator runs again, and so do those of its inputs that nobody keeps;
3. stored bytes, and live bytes at every forward tick, stay below their limits (both exact);
4. live bytes at *every* backward read stay below a limit (conservative);
5. the summed squared gradient perturbation stays below a limit.

``k`` and ``c`` are binary. ``z`` needs no integrality: cost and memory only grow with it, so its minimum is 0 or 1.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pulp

from ygglight.engines.adacc.graph import Action, Policy, RegionGraph
from ygglight.engines.adacc.linear import HOOK, TAPE, TRANSIENT, LinearModel, Row, Variable

SMALL, SMALL_TOTAL = 0.001, 0.005
"""Values below this share of the region's saved bytes are kept, as long as together they stay below the second."""


def small_values(graph: RegionGraph) -> frozenset[int]:
    """Saved values too small to be worth a decision (see :data:`SMALL`)."""
    values = sorted(graph.actionable, key=lambda v: (v.nbytes, v.id))
    total = sum(v.nbytes for v in values)
    small, spent = set(), 0
    for v in values:
        spent += v.nbytes
        if v.nbytes >= SMALL * total or spent > SMALL_TOTAL * total:
            break
        small.add(v.id)
    return frozenset(small)


def _binding(rows: list[Row]) -> list[Row]:
    """The rows that are not below another one at every point (all variables are non-negative)."""
    columns = {name: i for i, name in enumerate(sorted({n for row in rows for n in row.terms}, key=str), start=1)}
    table = np.zeros((len(rows), len(columns) + 1))
    for i, row in enumerate(rows):
        table[i, 0] = row.constant
        for name, coefficient in row.terms.items():
            table[i, columns[name]] = coefficient
    kept: list[int] = []
    for i in np.argsort(-table.sum(axis=1), kind="stable"):
        if not (table[kept] >= table[i]).all(axis=1).any():
            kept.append(int(i))
    return [rows[i] for i in sorted(kept)]


class RegionSolver:
    """The program of one region, built once and solved for many limits.

    Args:
        graph: the region.
        allow: actions to consider; "keep" always is.
        keep: values that are kept whatever it costs.
    """

    def __init__(self, graph: RegionGraph, allow: Iterable[Action], keep: frozenset[int] = frozenset()) -> None:
        self.model = LinearModel(graph)
        allow = frozenset(allow)
        self._variables: dict[Variable, pulp.LpVariable] = {}
        self._problem = pulp.LpProblem("region", pulp.LpMinimize)
        self._byte = max(1.0, sum(v.nbytes for v in graph.values) / 2**12)
        self._second = max([c for c in self.model.seconds.terms.values() if c > 0], default=1.0) / 100.0
        problem = self._problem
        for value in self.model.actionable:
            free = value.id not in keep and not value.pinned
            problem.addVariable(self._variable(("k", value.id), pulp.LpBinary))
            chosen = [self._variables["k", value.id]]
            if free and Action.COMPRESS in allow:
                for j in range(len(value.codecs)):
                    chosen.append(self._variable(("c", value.id, j), pulp.LpBinary))
            if free and Action.RECOMPUTE in allow and self.model.options[value.id]:
                problem += pulp.lpSum(chosen) <= 1
                assert value.producer is not None, "leaves have no action"
                problem += self._variable(("z", value.producer)) >= 1 - pulp.lpSum(chosen)
                problem += self._variable(TAPE) >= 1 - pulp.lpSum(chosen)
            else:
                problem += pulp.lpSum(chosen) == 1
            if free:
                problem += self._variable(HOOK) >= 1 - chosen[0]
        for op in graph.operators:
            if not op.replayable:
                self._variable(("z", op.index)).upBound = 0
        for result, causes in self.model.implications:
            if all(c[0] != "z" or graph.operators[c[1]].replayable for c in causes):
                total = pulp.lpSum(self._variable(c) for c in causes)
                problem += self._variable(result) >= total - (len(causes) - 1)
        transient = self._variable(TRANSIENT)
        transient.upBound = None
        for variable, nbytes in self.model.transients:
            if variable in self._variables:
                problem += transient >= self._variables[variable] * (nbytes / self._byte)
        self._peaks = {"forward": self._peak("forward"), "backward": self._peak("backward")}
        self._stored = self._expression(self.model.stored, self._byte)
        self._seconds = self._expression(self.model.seconds, self._second)
        self._error = self.model.error
        self._limits: dict[str, pulp.LpConstraint] = {}

    def _variable(self, name: Variable, category: str = pulp.LpContinuous) -> pulp.LpVariable:
        if name not in self._variables:
            label = "_".join(str(part) for part in name)
            self._variables[name] = pulp.LpVariable(label, 0, 1, category)
        return self._variables[name]

    def _expression(self, row: Row, unit: float) -> pulp.LpAffineExpression:
        terms = []
        for name, coefficient in row.terms.items():
            if name == TRANSIENT:  # is in units of bytes already
                terms.append((self._variables[name], coefficient))
            elif name in self._variables:
                terms.append((self._variables[name], coefficient / unit))
        return pulp.LpAffineExpression(terms, row.constant / unit)

    def _peak(self, phase: str) -> pulp.LpVariable:
        """A variable above every row of one phase: limits and objectives then need one bound each."""
        peak = pulp.LpVariable(f"peak_{phase}", 0, None)
        for row in _binding(getattr(self.model, phase)):
            self._problem += peak >= self._expression(row, self._byte)
        return peak

    def solve(
        self,
        stored_limit: float | None = None,
        backward_limit: float | None = None,
        error_limit: float | None = None,
        forward_limit: float | None = None,
        objective: str = "seconds",
        time_limit: float = 5.0,
    ) -> Policy | None:
        """The cheapest policy within limits (bytes; None: no limit), or None when there is none.

        Args:
            objective: what to minimise: ``"seconds"``, ``"stored"`` or ``"backward"`` (bytes).
        """
        problem = self._problem.copy()
        problem.setObjective(
            {"seconds": self._seconds, "stored": self._stored}.get(objective, self._peaks["backward"] + 0)
        )
        if stored_limit is not None:
            problem += self._stored <= stored_limit / self._byte
        for peak, limit in (("backward", backward_limit), ("forward", forward_limit)):
            self._peaks[peak].upBound = None if limit is None else max(0.0, limit / self._byte)
        if error_limit is not None and self._error.terms:
            if error_limit > 0:
                problem += self._expression(self._error, error_limit) <= 1
            else:
                lossy = [n for n, c in self._error.terms.items() if c > 0 and n in self._variables]
                problem += pulp.lpSum(self._variables[n] for n in lossy) <= 0
        # No `threads=1`: that selects CBC's threaded code, which hung until its time limit in 2 of 1500 solves.
        problem.solve(pulp.PULP_CBC_CMD(msg=False, timeLimit=time_limit))
        if problem.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
            return None
        return self._policy()

    def _policy(self) -> Policy:
        actions: dict[int, Action] = {}
        codecs: dict[int, str] = {}
        for value in self.model.actionable:
            actions[value.id] = Action.RECOMPUTE
            if self._variables["k", value.id].value() > 0.5:
                actions[value.id] = Action.KEEP
            for j, codec in enumerate(value.codecs):
                variable = self._variables.get(("c", value.id, j))
                if variable is not None and variable.value() > 0.5:
                    actions[value.id], codecs[value.id] = Action.COMPRESS, codec.name
        return Policy(actions, codecs)


def solve_region(
    graph: RegionGraph,
    *,
    stored_limit: float | None,
    backward_limit: float | None,
    error_limit: float | None,
    allow: Iterable[Action] = frozenset(Action),
    forward_limit: float | None = None,
    keep_small: bool = False,
) -> Policy | None:
    """The fastest policy of one region within the linear model's limits (bytes; None: no limit), or None.

    Args:
        keep_small: force :func:`small_values` to be kept.
    """
    keep = small_values(graph) if keep_small else frozenset[int]()
    return RegionSolver(graph, allow, keep).solve(stored_limit, backward_limit, error_limit, forward_limit)
