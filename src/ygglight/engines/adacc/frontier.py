"""The policies worth choosing between for one region type: none is worse than another in every respect.

Few saved values: all policies are tried. Otherwise the program of :mod:`~ygglight.engines.adacc.milp` is solved for a
ladder of limits, and what it finds is improved by changing one value's action at a time. Both are judged by the
simulator, never by the program's own (conservative) figures. Nothing here depends on a clock, so the same graph gives
the same policies on every rank, unless the time limit of a whole plan cuts it short. Our design.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from itertools import product

import numpy as np

from ygglight.engines.adacc.allocate import Candidate
from ygglight.engines.adacc.graph import Action, Policy, RegionGraph
from ygglight.engines.adacc.linear import LinearModel, linear_memory, recomputable
from ygglight.engines.adacc.milp import RegionSolver, small_values
from ygglight.engines.adacc.schedule import executable
from ygglight.engines.adacc.simulate import simulate_region

EXHAUSTIVE = 600
"""Up to this many policies, try them all."""
EVALUATIONS = 1000
"""Simulated policies per type in the search (about 0.4 ms each for a transformer block)."""
GREEDY = 32
"""Policies that simply recompute the cheapest values."""
GRID = 128
"""Policies closer than 1/GRID of the plain region in bytes count as alike; the faster one stays."""
ERROR_GRID = 12
Choice = tuple[Action, str | None]


class Clock:
    """Counts down seconds of computing: this thread's, and the solver's.

    Args:
        limit: seconds to begin with.
    """

    def __init__(self, limit: float = float("inf")) -> None:
        self._limit, self._began, self._solving = limit, time.thread_time(), 0.0

    @property
    def left(self) -> float:
        """Seconds left; not positive when none are."""
        return self._limit - (time.thread_time() - self._began) - self._solving

    def charge(self, seconds: float) -> None:
        """Count ``seconds`` that another process worked for us."""
        self._solving += seconds


def keep_all(graph: RegionGraph) -> Policy:
    """Plain autograd."""
    return Policy({value.id: Action.KEEP for value in graph.actionable})


class Frontier:
    """Candidates of one region type, and how to find more.

    Args:
        graph: the region.
        allow: actions to consider; "keep" always is.
        error_budget: of the whole step.
        instances: how many instances share the type.
        clock: when it has run down, no further search is begun.
    """

    def __init__(
        self,
        graph: RegionGraph,
        allow: Iterable[Action],
        error_budget: float,
        instances: int,
        clock: Clock | None = None,
    ) -> None:
        self.graph, self.allow, self.error_budget = graph, frozenset(allow), error_budget
        self.instances, self.clock = instances, clock or Clock()
        self.model = LinearModel(graph)
        self.choices = self._choices()
        self.evaluated = self.solves = 0
        self._seen: set[tuple[Choice, ...]] = set()
        self._boxes: dict[tuple[int, int, int], Candidate] = {}
        self._expanded: dict[int, Candidate] = {}
        self.plain = Candidate(keep_all(graph), simulate_region(graph, keep_all(graph)))
        self._grain = max(1, self.plain.peak // GRID)
        self._add(self.plain.policy)
        total = 1
        for options in self.choices.values():
            total = min(total * len(options), EXHAUSTIVE + 1)
        self.exhaustive = total <= EXHAUSTIVE
        if self.exhaustive:
            self._grain = 1
            self._boxes.clear()
            self._seen.clear()
            for combination in product(*self.choices.values()):
                self._add(self._policy(combination))
            return
        self._greedy()
        self._solver = RegionSolver(graph, self.allow, small_values(graph))
        self._reserve = self.clock.left / 2  # half of the time is the search's
        self._ladder()
        self._reserve = 0.0
        self._search(EVALUATIONS)

    def candidates(self) -> list[Candidate]:
        """What is not worse than another in everything; plain autograd first."""
        ranked = sorted(
            (c.profile.added_seconds, c.peak, c.profile.stored_bytes, c.profile.error, index, c)
            for index, c in enumerate(self._boxes.values())
        )
        best: list[tuple[int, int, float]] = []
        chosen: list[Candidate] = []
        for _, peak, stored, error, _, candidate in ranked:
            if not any(p <= peak and s <= stored and e <= error for p, s, e in best):
                best.append((peak, stored, error))
                chosen.append(candidate)
        return chosen

    def refine(self, around: Iterable[Candidate], spare: int) -> None:
        """Look for faster policies that need up to ``spare`` bytes more than those in ``around``."""
        if self.exhaustive:
            return
        self._grain = max(1, self._grain // 2)
        for candidate in around:
            error = self.error_budget / self.instances if self.error_budget else 0.0
            for share in (1, 2, 4, self.instances):
                limit = candidate.profile.stored_bytes + spare // share
                linear = linear_memory(self.model, candidate.policy)
                bound = None if linear is None else linear.backward + spare // share
                self._solve(limit, bound, max(error, candidate.profile.error))
            for policy in self._neighbours(candidate.policy):
                self._add(policy)
        self._search(EVALUATIONS // 3)

    # -- search ----------------------------------------------------------------------------------------------------
    def _choices(self) -> dict[int, list[Choice]]:
        again = recomputable(self.model)
        choices: dict[int, list[Choice]] = {}
        for value in self.graph.actionable:
            options: list[Choice] = [(Action.KEEP, None)]
            if Action.COMPRESS in self.allow and not value.pinned:
                options += [(Action.COMPRESS, c.name) for c in value.codecs if c.error <= self.error_budget]
            if Action.RECOMPUTE in self.allow and value.id in again:
                options.append((Action.RECOMPUTE, None))
            choices[value.id] = options
        return choices

    def _policy(self, combination: Iterable[Choice]) -> Policy:
        actions: dict[int, Action] = {}
        codecs: dict[int, str] = {}
        for value, (action, codec) in zip(self.choices, combination, strict=True):
            actions[value] = action
            if codec is not None:
                codecs[value] = codec
        return Policy(actions, codecs)

    def _add(self, policy: Policy | None) -> Candidate | None:
        """Simulate ``policy``; the candidate if it is new and better than what was known at its place."""
        if policy is None:
            return None
        key = tuple((policy.actions[v], policy.codecs.get(v)) for v in self.choices)
        if key in self._seen or not executable(self.graph, policy):
            return None
        self._seen.add(key)
        self.evaluated += 1
        candidate = Candidate(policy, simulate_region(self.graph, policy))
        profile = candidate.profile
        if profile.error > self.error_budget:
            return None
        error = 0 if not profile.error else 1 + int(ERROR_GRID * self.instances * profile.error / self.error_budget)
        box = (profile.stored_bytes // self._grain, candidate.peak // self._grain, error)
        known = self._boxes.get(box)
        rank = (profile.added_seconds, profile.stored_bytes + candidate.peak)
        if known and rank >= (known.profile.added_seconds, known.profile.stored_bytes + known.peak):
            return None
        self._boxes[box] = candidate
        return candidate

    def _solve(self, stored: float | None, backward: float | None, error: float, objective: str = "seconds") -> bool:
        if self.clock.left <= self._reserve:
            return False
        self.solves += 1
        began = time.perf_counter()
        limit = min(5.0, 1.0 + self.clock.left)
        policy = self._solver.solve(stored, backward, error, objective=objective, time_limit=limit)
        self.clock.charge(time.perf_counter() - began)
        self._last = None if policy is None else linear_memory(self.model, policy)
        self._add(policy)
        return self._last is not None

    def _greedy(self) -> None:
        """Recompute more and more values, cheapest per byte first. Poor policies, but there without delay."""
        operators, policy = self.graph.operators, self.plain.policy
        values = [v for v in self.graph.actionable if (Action.RECOMPUTE, None) in self.choices[v.id] and v.nbytes]
        values.sort(key=lambda v: operators[v.producer or 0].seconds / v.nbytes)
        for count, value in enumerate(values, start=1):
            policy = Policy({**policy.actions, value.id: Action.RECOMPUTE})
            if count % (1 + len(values) // GREEDY) == 0 or count == len(values):
                self._add(policy)

    def _ladder(self) -> None:
        lossy = any(c.error for v in self.graph.actionable for c in v.codecs) and Action.COMPRESS in self.allow
        levels = {0.0}
        if lossy and self.error_budget:
            levels.add(self.error_budget / self.instances)
        plain = self.plain.profile.stored_bytes
        for error in sorted(levels):
            self._solve(None, None, error, "backward")
            if not self._solve(None, None, error, "stored") or self._last is None:
                continue
            low = self._last.stored
            for rung in range(6):
                limit = low + (plain - low) * (rung / 6) ** 1.5
                tight = None
                for _ in range(3):
                    if not self._solve(limit, tight, error) or self._last is None:
                        break
                    tight = 0.93 * self._last.backward

    def _search(self, evaluations: int) -> None:
        """Change one action at a time in the candidates that are best at some price of bytes and errors, until no
        such candidate is new. With many instances only those matter; their neighbours serve when there are few."""
        stop = self.evaluated + evaluations
        while self.evaluated < stop:
            fresh = [c for c in self._best_at_prices() if id(c) not in self._expanded]
            if not fresh:
                return
            for candidate in fresh:
                if self.evaluated >= stop or self.clock.left <= 0:
                    return
                self._expanded[id(candidate)] = candidate
                for policy in self._neighbours(candidate.policy):
                    self._add(policy)

    def _best_at_prices(self) -> list[Candidate]:
        pool = list(self._boxes.values())
        stored = np.array([c.profile.stored_bytes for c in pool], float) / max(1, self.plain.profile.stored_bytes)
        peak = np.array([c.peak for c in pool], float) / max(1, self.plain.profile.stored_bytes)
        seconds = np.array([c.profile.added_seconds for c in pool])
        error = np.array([c.profile.error for c in pool]) * self.instances / max(self.error_budget, 1e-300)
        unit = float(seconds.max()) or 1.0
        best: dict[int, None] = {}
        shares = ((1.0, 0.0), (1.0, 0.3), (1.0, 1.0), (1.0, 4.0), (0.0, 1.0))  # of a price, in stored bytes and peak
        errors = (0.0, 0.3, 3.0) if error.any() else (0.0,)
        for price, (of_stored, of_peak), of_error in product(np.geomspace(1 / 32, 32, 11), shares, errors):
            total = seconds / unit + price * (of_stored * stored + of_peak * peak + of_error * error)
            best[int(total.argmin())] = None
        for of_stored, of_peak in shares:  # for the smallest budgets
            best[int((1e-6 * seconds / unit + of_stored * stored + of_peak * peak).argmin())] = None
        return [pool[i] for i in best]

    def _neighbours(self, policy: Policy) -> Iterator[Policy]:
        for value, options in self.choices.items():
            for action, codec in options:
                if (action, codec) == (policy.actions[value], policy.codecs.get(value)):
                    continue
                actions, codecs = dict(policy.actions), dict(policy.codecs)
                actions[value] = action
                codecs.pop(value, None)
                if codec is not None:
                    codecs[value] = codec
                yield Policy(actions, codecs)
