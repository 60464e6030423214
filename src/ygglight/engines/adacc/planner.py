"""Adacc's decision: keep, compress or recompute every saved tensor of a training step, within a budget of bytes.

Two levels, as Lynx (2406.08756) does for identical blocks and the brief sketches (its section 3: "our design", the
Adacc paper's own formulas are not known to us): a mixed-integer program per region type finds policies worth choosing
between (:mod:`~ygglight.engines.adacc.milp`, :mod:`~ygglight.engines.adacc.frontier`), and an exact choice over the
region instances picks one for each (:mod:`~ygglight.engines.adacc.allocate`). What is returned was checked by
:func:`~ygglight.engines.adacc.simulate.simulate_step`; plain autograd costs nothing, so it is chosen when it fits.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ygglight.engines.adacc.allocate import Allocation, Candidate, allocate, floor_peak
from ygglight.engines.adacc.explain import live_items
from ygglight.engines.adacc.frontier import Clock, Frontier, keep_all
from ygglight.engines.adacc.graph import Action, Policy, StepGraph
from ygglight.engines.adacc.simulate import RegionProfile, StepProfile, simulate_step
from ygglight.engines.memory.sizes import format_bytes

SPARE, IDLE = 0.03, 0.005
"""Unused shares of the budget above which more policies are looked for, and an equally fast plan with less memory."""
FLOOR_ITEMS_NAMED = 5


class InfeasibleBudget(ValueError):
    """No policy fits the budget.

    Attributes:
        budget_bytes: what was asked for.
        floor_bytes: the smallest budget that a plan was found for.
        floor_items: ("instance/slot", bytes) that are live at the peak of that plan, largest first.
    """

    def __init__(
        self, budget_bytes: int, floor_bytes: int, floor_items: tuple[tuple[str, int], ...], where: str
    ) -> None:
        self.budget_bytes, self.floor_bytes, self.floor_items = budget_bytes, floor_bytes, floor_items
        named = ", ".join(f"{name} {format_bytes(nbytes)}" for name, nbytes in floor_items[:FLOOR_ITEMS_NAMED])
        more = len(floor_items) - FLOOR_ITEMS_NAMED
        super().__init__(
            f"the activation budget of {format_bytes(budget_bytes)} is too small: the smallest that works is "
            f"{format_bytes(floor_bytes)} ({floor_bytes} bytes), reached in {where}, where these are alive at once: "
            f"{named}{f' and {more} more' if more > 0 else ''}. Raise the budget, or make the batch or the sequence "
            "smaller"
        )


@dataclass(frozen=True)
class Solution:
    """A plan for one training step.

    Args:
        policies: one per region instance, in forward order; equal ones are the same object.
        profile: the step under them.
        plain: the step under plain autograd.
        added_seconds: time beyond plain autograd per step.
        optimal: proved: every policy of every type was tried, and the choice over instances is exact.
        solve_seconds: time that planning took.
        log: what was done, for a reader.
        budget_bytes, error_budget, allow: what was asked for.
    """

    policies: tuple[Policy, ...]
    profile: StepProfile
    plain: StepProfile
    added_seconds: float
    optimal: bool
    solve_seconds: float
    log: tuple[str, ...]
    budget_bytes: int | None
    error_budget: float
    allow: frozenset[Action]


def plan(
    step: StepGraph,
    budget_bytes: int | None,
    *,
    error_budget: float = 0.0,
    allow: Iterable[Action] = frozenset(Action),
    time_limit: float = 5.0,
) -> Solution:
    """The fastest plan whose simulated peak stays within the budget.

    Args:
        step: what was profiled.
        budget_bytes: live bytes above state; None: no limit, plain autograd.
        error_budget: summed squared relative gradient perturbation that lossy codecs may cost, over the whole step.
        allow: actions to consider; "keep" always is.
        time_limit: seconds of our own computing (a busy machine's waits are not counted) after which no further
            search is begun: what was found until then is used. It is there for huge graphs; where it bites, plans may
            differ between machines.

    Raises:
        InfeasibleBudget: when nothing fits; carries the smallest budget that would do.
    """
    return _Planner(step, budget_bytes, error_budget, frozenset(allow), time_limit).plan()


def smallest_peak(
    step: StepGraph, *, error_budget: float = 0.0, allow: Iterable[Action] = frozenset(Action), time_limit: float = 5.0
) -> int:
    """The smallest budget in bytes for which :func:`plan` finds a plan (as far as its search sees)."""
    planner = _Planner(step, None, error_budget, frozenset(allow), time_limit)
    planner._search()
    return max(step.floor_workspace, planner._floor_of_regions()[0])


class _Planner:
    def __init__(
        self, step: StepGraph, budget: int | None, error_budget: float, allow: frozenset[Action], time_limit: float
    ) -> None:
        self.step, self.budget, self.error_budget, self.allow = step, budget, error_budget, allow
        self.started = time.perf_counter()
        self.clock = Clock(time_limit)
        self.log: list[str] = []
        self.profiles: dict[tuple[int, int], RegionProfile] = {}
        plain = [keep_all(graph) for graph in step.types]
        self.plain_policies = [plain[kind] for kind in step.sequence]
        self.plain = simulate_step(step, self.plain_policies, self.profiles)

    def plan(self) -> Solution:
        budget = self.budget
        self.log.append(f"plain autograd peaks at {format_bytes(self.plain.peak_bytes)} ({self.plain.peak_at})")
        if budget is None or self.plain.peak_bytes <= budget:
            self.log.append("it fits: everything is kept")
            return self._solution(self.plain_policies, optimal=True)
        if self.step.floor_workspace > budget:
            self._search()
            raise InfeasibleBudget(
                budget,
                self._floor_of_regions()[0],
                (("outside the regions (optimizer step)", self.step.floor_workspace),),
                "the part of the step outside the regions",
            )
        self._search()
        choice = self._allocate(budget)
        if choice is None:
            floor, policies = self._floor_of_regions()
            if floor > budget:
                profile = simulate_step(self.step, policies, self.profiles)
                raise InfeasibleBudget(budget, floor, live_items(self.step, policies, profile), profile.peak_at)
            return self._solution(policies, optimal=False)
        choice = self._use_spare(choice, budget)
        choice = self._lower_peak(choice)
        solution = self._solution(self._policies(choice), choice.exact and all(f.exhaustive for f in self.frontiers))
        if solution.profile.peak_bytes > budget:  # the allocation adds up the very same numbers
            raise AssertionError(f"planned {solution.profile.peak_bytes} bytes for a budget of {budget}")
        return solution

    # -- policies per type -----------------------------------------------------------------------------------------
    def _search(self) -> None:
        step = self.step
        # Types with more to decide last: what the others leave of the time is theirs.
        order = sorted(range(len(step.types)), key=lambda kind: len(step.types[kind].actionable))
        found: dict[int, Frontier] = {}
        for kind in order:
            count = step.sequence.count(kind)
            began = time.perf_counter()
            found[kind] = frontier = Frontier(
                step.types[kind], self.allow, self.error_budget, max(1, count), self.clock
            )
            self.log.append(
                f"{step.types[kind].name} x{count}: {len(step.types[kind].actionable)} saved values, "
                f"{frontier.evaluated} policies simulated, {frontier.solves} programs solved, "
                f"{len(frontier.candidates())} kept, {time.perf_counter() - began:.2f} s"
            )
        self.frontiers: list[Frontier] = [found[kind] for kind in range(len(step.types))]
        self._update()

    def _update(self) -> None:
        self.candidates: list[list[Candidate]] = [frontier.candidates() for frontier in self.frontiers]

    # -- choice over instances -------------------------------------------------------------------------------------
    def _allocate(self, budget: int) -> Allocation | None:
        return allocate(self.candidates, self.step.sequence, budget, self.error_budget)

    def _chosen(self, choice: Allocation) -> list[Candidate]:
        return [self.candidates[kind][c] for kind, c in zip(self.step.sequence, choice.choice, strict=True)]

    def _policies(self, choice: Allocation) -> list[Policy]:
        return [candidate.policy for candidate in self._chosen(choice)]

    def _simulate(self, choice: Allocation) -> StepProfile:
        return simulate_step(self.step, self._policies(choice), self.profiles)

    def _use_spare(self, choice: Allocation, budget: int) -> Allocation:
        """Look for faster policies between the candidates while much of the budget is not used."""
        for _ in range(2):
            profile = self._simulate(choice)
            spare = budget - profile.peak_bytes
            if spare <= SPARE * budget or not profile.added_seconds or self.clock.left <= 0:
                break
            if all(frontier.exhaustive for frontier in self.frontiers):
                break
            chosen = self._chosen(choice)
            for kind, frontier in enumerate(self.frontiers):
                around = {id(c): c for c, k in zip(chosen, self.step.sequence, strict=True) if k == kind}
                frontier.refine(around.values(), spare)
            self._update()
            better = self._allocate(budget)
            if better is None:
                break
            gained = profile.added_seconds - self._simulate(better).added_seconds
            self.log.append(f"{format_bytes(spare)} were spare: searched again, {gained * 1e3:.3f} ms gained")
            choice = better
            if gained <= 0.002 * profile.added_seconds:
                break
        return choice

    def _lower_peak(self, choice: Allocation) -> Allocation:
        """Of equally fast plans, one with (nearly) the lowest peak: so a smaller budget never gives a higher one."""
        best = self._simulate(choice)
        if self.budget is not None and best.peak_bytes >= (1 - IDLE) * self.budget:
            return choice
        low = floor_peak(self.candidates, self.step.sequence)[0]
        for _ in range(8):
            if best.peak_bytes - low <= 0.002 * best.peak_bytes or self.clock.left <= 0:
                break
            middle = (best.peak_bytes + low) // 2
            other = self._allocate(middle)
            profile = None if other is None else self._simulate(other)
            if other is None or profile is None or profile.added_seconds > best.added_seconds * (1 + 1e-9):
                low = middle
            else:
                choice, best = other, profile
        return choice

    def _solution(self, policies: Sequence[Policy], optimal: bool) -> Solution:
        profile = simulate_step(self.step, policies, self.profiles)
        seconds, distinct = time.perf_counter() - self.started, len({id(policy) for policy in policies})
        self.log.append(
            f"planned peak {format_bytes(profile.peak_bytes)} ({profile.peak_at}), "
            f"{profile.added_seconds * 1e3:.3f} ms added per step, {distinct} policies over {len(policies)} instances, "
            f"{seconds:.2f} s"
        )
        return Solution(
            policies=tuple(policies),
            profile=profile,
            plain=self.plain,
            added_seconds=profile.added_seconds,
            optimal=optimal,
            solve_seconds=seconds,
            log=tuple(self.log),
            budget_bytes=self.budget,
            error_budget=self.error_budget,
            allow=self.allow,
        )

    # -- the floor -------------------------------------------------------------------------------------------------
    def _floor_of_regions(self) -> tuple[int, list[Policy]]:
        """The smallest budget that is feasible, and policies for it."""
        floor, option = floor_peak(self.candidates, self.step.sequence)
        best = Allocation(option, True)
        if sum(c.profile.error for c in self._chosen(best)) > self.error_budget * (1 + 1e-9):
            lossless = [[c for c in options if not c.profile.error] for options in self.candidates]
            high = floor_peak(lossless, self.step.sequence)[0]
            low = floor
            while high - low > max(1, high // 1000):
                middle = (low + high) // 2
                low, high = (low, middle) if self._allocate(middle) else (middle, high)
            found = self._allocate(high)
            assert found is not None, "what keeps within the error budget was feasible a moment ago"
            best = found
        return self._simulate(best).peak_bytes, self._policies(best)
