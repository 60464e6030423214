"""Whole plans: against brute force on small steps, and their promises on a step of thirty Llama blocks."""

from __future__ import annotations

import random
import time
from itertools import pairwise, product

import pytest

from ygglight.engines.adacc import frontier as frontier_module
from ygglight.engines.adacc.allocate import Candidate, allocate, floor_peak
from ygglight.engines.adacc.explain import explain
from ygglight.engines.adacc.frontier import Clock, Frontier
from ygglight.engines.adacc.graph import Action, CodecOption, Operator, Policy, RegionGraph, StepGraph, Value
from ygglight.engines.adacc.planner import InfeasibleBudget, plan, smallest_peak
from ygglight.engines.adacc.schedule import executable, validate_policy
from ygglight.engines.adacc.simulate import RegionProfile, simulate_region, simulate_step

KEEP, COMPRESS, RECOMPUTE = Action.KEEP, Action.COMPRESS, Action.RECOMPUTE
EXACT = frozenset({KEEP, RECOMPUTE})


def llama_step(graphs, layers: int = 30, **options: object) -> StepGraph:
    block = graphs.llama_block(**options)
    return StepGraph((block,), (0,) * layers, tuple(f"model.layers.{i}" for i in range(layers)))


def every_candidate(graph: RegionGraph) -> list[Candidate]:
    options = []
    for v in graph.actionable:
        free = not v.pinned
        options.append(
            [(KEEP, None), *((COMPRESS, c.name) for c in v.codecs if free), *([(RECOMPUTE, None)] if free else [])]
        )
    found = []
    for combination in product(*options):
        chosen = dict(zip((v.id for v in graph.actionable), combination, strict=True))
        policy = Policy({v: a for v, (a, _) in chosen.items()}, {v: c for v, (_, c) in chosen.items() if c})
        if executable(graph, policy):
            found.append(Candidate(policy, simulate_region(graph, policy)))
    return found


# -- choice over instances ---------------------------------------------------------------------------------------------
def random_candidates(rng: random.Random, count: int, lossy: bool) -> list[Candidate]:
    found = []
    for _ in range(count):
        stored, seconds = rng.randint(0, 30), float(rng.randint(0, 20))
        peak = stored + rng.randint(0, 25)
        error = float(rng.choice((0, 0, 1, 2, 5))) if lossy else 0.0
        found.append(Candidate(Policy(), RegionProfile(stored, peak - 2, peak, seconds, error, (), ())))
    return found


def totals(chosen: list[Candidate]) -> tuple[int, float, float]:
    prefix = peak = 0
    for c in chosen:
        peak, prefix = max(peak, prefix + c.peak), prefix + c.profile.stored_bytes
    return peak, sum(c.profile.added_seconds for c in chosen), sum(c.profile.error for c in chosen)


@pytest.mark.parametrize("lossy", [False, True])
def test_the_choice_over_instances_equals_brute_force(lossy):
    infeasible = 0
    for case in range(150):
        rng = random.Random(case)
        candidates = [random_candidates(rng, rng.randint(1, 5), lossy) for _ in range(2)]
        sequence = [rng.randint(0, 1) for _ in range(rng.randint(1, 5))]
        every = [totals(list(c)) for c in product(*(candidates[kind] for kind in sequence))]
        floor, choice = floor_peak(candidates, sequence)
        assert floor == min(peak for peak, _, _ in every)
        assert floor == totals([candidates[k][c] for k, c in zip(sequence, choice, strict=True)])[0]
        budget, error_budget = floor + rng.randint(-8, 30), float(rng.randint(0, 12))
        expected = min((s for peak, s, e in every if peak <= budget and e <= error_budget), default=None)
        found = allocate(candidates, sequence, budget, error_budget)
        if expected is None:
            infeasible += 1
            assert found is None
            continue
        assert found is not None and found.exact
        chosen = [candidates[k][c] for k, c in zip(sequence, found.choice, strict=True)]
        peak, seconds, error = totals(chosen)
        assert peak <= budget and error <= error_budget and seconds == expected, f"case {case}"
    assert infeasible > 20


def test_plans_of_small_steps_equal_brute_force(graphs):
    feasible = infeasible = 0
    for case in range(60):
        rng = random.Random(case)
        types = tuple(
            graphs.random_graph(rng, rng.randint(2, 6), saved=0.5, n_actionable=2, codecs=0.5) for _ in range(2)
        )
        sequence = tuple(rng.randint(0, 1) for _ in range(3))
        step = StepGraph(types, sequence, ("a", "b", "c"), floor_workspace=rng.choice((0, 40)))
        candidates = [every_candidate(graph) for graph in types]
        every = []
        for chosen in product(*(candidates[kind] for kind in sequence)):
            peak, seconds, error = totals(list(chosen))
            every.append((max(peak, step.floor_workspace), seconds, error))
        error_budget = float(rng.choice((0, 3, 100)))
        low = min(peak for peak, _, error in every if error <= error_budget)
        high = every[0][0]  # plain autograd
        for share in (-0.1, 0.0, 0.5):
            budget = int(low + share * (high - low)) - (share < 0)
            expected = min((s for peak, s, e in every if peak <= budget and e <= error_budget), default=None)
            if expected is None:
                infeasible += 1
                with pytest.raises(InfeasibleBudget) as caught:
                    plan(step, budget, error_budget=error_budget)
                assert caught.value.floor_bytes == low
                continue
            feasible += 1
            solution = plan(step, budget, error_budget=error_budget)
            assert solution.added_seconds == pytest.approx(expected), f"case {case}"
            assert solution.profile.peak_bytes <= budget and solution.profile.error <= error_budget
            assert solution.optimal
    assert feasible > 60 and infeasible > 45


def test_the_search_comes_close_to_trying_everything(graphs, monkeypatch):
    """Where all policies can be tried, how much slower is the best that ladder and search find?"""
    worse, cases = [], 0
    for case in range(12):
        rng = random.Random(case)
        graph = graphs.random_graph(rng, 12, saved=0.7, n_actionable=8, codecs=0.0)
        step = StepGraph((graph,), (0,) * 6, tuple("abcdef"))
        monkeypatch.setattr(frontier_module, "EXHAUSTIVE", 10**6)
        floor = smallest_peak(step, allow=EXACT)
        high = plan(step, None).profile.peak_bytes
        budgets = [int(floor + share * (high - floor)) for share in (0.1, 0.4, 0.7)]
        best = [plan(step, b, allow=EXACT) for b in budgets]
        assert all(solution.optimal for solution in best)
        monkeypatch.setattr(frontier_module, "EXHAUSTIVE", 0)
        assert smallest_peak(step, allow=EXACT) <= 1.03 * floor
        for budget, reference in zip(budgets, best, strict=True):
            found = plan(step, budget, allow=EXACT)
            assert found.profile.peak_bytes <= budget
            if reference.added_seconds:
                cases += 1
                worse.append(found.added_seconds / reference.added_seconds - 1)
    assert cases >= 20
    assert sum(worse) / len(worse) < 0.01 and max(worse) < 0.1, sorted(worse)[-5:]


# -- promises ----------------------------------------------------------------------------------------------------------
def test_what_fits_is_left_alone(graphs):
    step = llama_step(graphs)
    peak = plan(step, None).profile.peak_bytes
    for budget in (None, peak, 2 * peak):
        solution = plan(step, budget, error_budget=1.0)
        assert all(policy.all_keep for policy in solution.policies)
        assert solution.added_seconds == 0 and solution.optimal
    assert not all(policy.all_keep for policy in plan(step, peak - 1, error_budget=1.0).policies)


@pytest.mark.parametrize("lossy", [False, True])
def test_less_budget_never_means_less_time_or_a_higher_peak(graphs, lossy):
    step = llama_step(graphs, layers=12 if lossy else 30, lossy=lossy)
    peak = plan(step, None).profile.peak_bytes
    shares = (0.9, 0.6, 0.4, 0.25) if lossy else (0.9, 0.7, 0.5, 0.3, 0.2, 0.12)
    solutions = [plan(step, int(share * peak), error_budget=1e-3) for share in shares]
    for budget_share, solution in zip(shares, solutions, strict=True):
        assert 0.97 * budget_share * peak <= solution.profile.peak_bytes <= budget_share * peak
        assert solution.profile.error <= 1e-3
        for policy in {id(p): p for p in solution.policies}.values():
            validate_policy(step.types[0], policy)
        assert solution.profile == simulate_step(step, solution.policies)
    for looser, tighter in pairwise(solutions):
        assert tighter.profile.peak_bytes <= looser.profile.peak_bytes
        assert tighter.added_seconds >= looser.added_seconds


def test_more_choices_never_make_it_slower(graphs):
    step = llama_step(graphs, layers=10, lossy=True)
    budget = int(0.4 * plan(step, None).profile.peak_bytes)
    both = plan(step, budget, error_budget=1e-3)
    exact = plan(step, budget, error_budget=0.0)
    again = plan(step, budget, error_budget=1e-3, allow=EXACT)
    assert both.added_seconds < 0.9 * exact.added_seconds
    assert again.added_seconds == pytest.approx(exact.added_seconds)
    assert any(COMPRESS in policy.actions.values() for policy in both.policies)
    assert not any(COMPRESS in policy.actions.values() for policy in (*exact.policies, *again.policies))


def test_a_codec_that_costs_nothing_is_chosen():
    graph = RegionGraph(
        "free",
        tuple(Operator(i, f"aten.op{i}", (i,), (i + 1,), 1.0) for i in range(4)),
        (
            Value(0, 8, None, name="x"),
            *(
                Value(i, 8, i - 1, saved=True, birth=i - 1, death=i, codecs=(CodecOption("bits", 1, 0.0),))
                for i in range(1, 5)
            ),
        ),
        (4, 3, 2, 1),
        (0,) * 4,
        (0,) * 5,
    )
    step = StepGraph((graph,), (0,) * 4, tuple("abcd"))
    solution = plan(step, int(0.5 * plan(step, None).profile.peak_bytes))
    assert solution.added_seconds == 0
    assert any(COMPRESS in policy.actions.values() for policy in solution.policies)
    without = plan(step, solution.budget_bytes, allow=EXACT)
    assert without.added_seconds > 0


def test_an_infeasible_budget_says_what_would_do(graphs):
    step = llama_step(graphs)
    with pytest.raises(InfeasibleBudget) as caught:
        plan(step, 2**30)
    error = caught.value
    assert error.budget_bytes == 2**30 < error.floor_bytes == smallest_peak(step)
    assert sum(nbytes for _, nbytes in error.floor_items) == error.floor_bytes
    sizes = [nbytes for _, nbytes in error.floor_items]
    assert sizes == sorted(sizes, reverse=True)
    text = str(error)
    assert "1.0 GiB is too small" in text and f"({error.floor_bytes} bytes)" in text
    assert error.floor_items[0][0] in text and "model.layers.0/input and" in text
    assert plan(step, error.floor_bytes).profile.peak_bytes == error.floor_bytes
    with pytest.raises(InfeasibleBudget):
        plan(step, error.floor_bytes - 1)


def test_a_budget_below_the_optimizer_step_is_infeasible(graphs):
    step = llama_step(graphs, layers=2)
    step = StepGraph(step.types, step.sequence, step.names, floor_workspace=2**40)
    with pytest.raises(InfeasibleBudget, match="outside the regions") as caught:
        plan(step, 2**39)
    assert caught.value.floor_bytes == 2**40 and caught.value.floor_items[0][1] == 2**40


def test_different_regions_share_one_budget(graphs):
    """Embedding-like, blocks, head-like: the head's transient decides what the blocks may store."""
    block = graphs.llama_block()
    head = RegionGraph(
        "head",
        (Operator(0, "aten.mm", (0,), (1,), 5e-3), Operator(1, "aten.log_softmax", (1,), (2,), 1e-3)),
        (
            Value(0, 2**26, None, saved=True, name="hidden"),
            Value(1, 2**31, 0, birth=0, death=1, name="logits"),
            Value(2, 2**31, 1, saved=True, birth=1, death=2, name="logprobs"),
        ),
        (2, 0),
        (0, 0),
        (0, 2**31, 2**27),
    )
    step = StepGraph((block, head), (0, 0, 0, 0, 1), ("l.0", "l.1", "l.2", "l.3", "head"))
    plain = plan(step, None).profile
    assert plain.peak_at.startswith("head")
    solution = plan(step, int(0.75 * plain.peak_bytes))
    assert solution.profile.peak_bytes <= 0.75 * plain.peak_bytes
    assert solution.policies[4].all_keep, "recomputing logits does not lower the head's own peak"
    assert not all(policy.all_keep for policy in solution.policies[:4])


def test_the_same_step_gives_the_same_plan(graphs):
    step = llama_step(graphs, layers=8, lossy=True)
    budget = int(0.4 * plan(step, None).profile.peak_bytes)
    first, second = (plan(step, budget, error_budget=1e-3) for _ in range(2))
    assert first.policies == second.policies and first.profile == second.profile


def test_time_runs_out_gracefully(graphs):
    step = llama_step(graphs, lossy=True)
    low = smallest_peak(step, time_limit=0.0)
    peak = plan(step, None).profile.peak_bytes
    assert low < 0.3 * peak
    hurried = plan(step, int(0.5 * peak), error_budget=1e-3, time_limit=0.0)
    assert hurried.profile.peak_bytes <= 0.5 * peak and not hurried.optimal
    assert Clock(0.0).left <= 0 < Clock().left


def test_planning_thirty_blocks_takes_seconds(graphs):
    step = llama_step(graphs, lossy=True)
    budget = int(0.5 * plan(step, None).profile.peak_bytes)
    began = time.perf_counter()
    solution = plan(step, budget, error_budget=1e-3)
    assert time.perf_counter() - began < 10 and solution.solve_seconds < 10
    assert any("saved values" in line for line in solution.log)


# -- explanations ------------------------------------------------------------------------------------------------------
def test_every_saved_value_is_explained(graphs):
    step = llama_step(graphs, lossy=True)
    plain = plan(step, None).profile.peak_bytes
    solution = plan(step, int(0.3 * plain), error_budget=3e-4)
    rows = explain(step, solution)
    by_instance: dict[str, int] = {}
    for row in rows:
        for name in row.instances:
            by_instance[name] = by_instance.get(name, 0) + row.stored_bytes
    graph = step.types[0]
    leaves = sum(v.nbytes for v in graph.values if v.producer is None)
    assert by_instance == {n: b - leaves for n, b in zip(step.names, solution.profile.stored_bytes, strict=True)}
    compressible = [row for row in rows if graph.values[_id(graph, row.slot, row.nbytes)].codecs]
    for row in compressible:
        assert (row.why_not_compressed is None) == (row.action is COMPRESS)
    reasons = {row.why_not_compressed for row in compressible}
    assert {"cost", "error", None} <= reasons, reasons
    for row in compressible:
        if row.why_not_compressed == "cost":
            assert "us, recomputing" in row.detail


def test_explanations_know_what_was_not_allowed_or_not_needed(graphs):
    step = llama_step(graphs, layers=2, lossy=True)
    peak = plan(step, None).profile.peak_bytes
    reasons = {row.why_not_compressed for row in explain(step, plan(step, None, error_budget=1.0))}
    assert reasons == {None, "not needed"}
    reasons = {row.why_not_compressed for row in explain(step, plan(step, int(0.8 * peak), allow=EXACT))}
    assert reasons == {None, "not allowed"}


def _id(graph: RegionGraph, name: str, nbytes: int) -> int:
    return next(v.id for v in graph.values if v.name == name and v.nbytes == nbytes)


def test_a_frontier_holds_no_policy_that_another_beats(graphs):
    found = Frontier(graphs.llama_block(lossy=True), frozenset(Action), 1e-3, 30).candidates()
    assert found[0].policy.all_keep and len(found) > 20
    for a in found:
        for b in found:
            if a is not b:
                better = (
                    b.peak <= a.peak,
                    b.profile.stored_bytes <= a.profile.stored_bytes,
                    b.profile.added_seconds <= a.profile.added_seconds,
                    b.profile.error <= a.profile.error,
                )
                assert not all(better)
