"""The region program against exhaustive enumeration of the same linear model, and that model against the simulator."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import product

import pytest

from ygglight.engines.adacc.graph import Action, CodecOption, Operator, Policy, RegionGraph, Value
from ygglight.engines.adacc.linear import LinearMemory, LinearModel, linear_memory
from ygglight.engines.adacc.milp import RegionSolver, small_values, solve_region
from ygglight.engines.adacc.simulate import simulate_region

KEEP, COMPRESS, RECOMPUTE = Action.KEEP, Action.COMPRESS, Action.RECOMPUTE


def every_policy(graph: RegionGraph) -> Iterator[Policy]:
    options = []
    for v in graph.actionable:
        names = [] if v.pinned else [c.name for c in v.codecs]
        options.append([(KEEP, None), *((COMPRESS, n) for n in names), *([] if v.pinned else [(RECOMPUTE, None)])])
    for combination in product(*options):
        chosen = dict(zip((v.id for v in graph.actionable), combination, strict=True))
        yield Policy({v: a for v, (a, _) in chosen.items()}, {v: c for v, (_, c) in chosen.items() if c})


def best_by_enumeration(table: list[LinearMemory], stored: float, backward: float, error: float) -> float | None:
    fitting = [m.seconds for m in table if m.stored <= stored and m.backward <= backward and m.error <= error]
    return min(fitting, default=None)


def test_milp_equals_exhaustive_search(graphs):
    infeasible = binding = total = 0
    for case in range(210):
        rng = random.Random(case)
        graph = graphs.random_graph(rng, rng.randint(3, 9), saved=0.6, n_actionable=5, rich=case % 2 == 0, codecs=0.3)
        model = LinearModel(graph)
        table = [m for p in every_policy(graph) if (m := linear_memory(model, p)) is not None]
        plain = table[0]
        share = (0.3, 0.6, 0.85)[case % 3]
        low = min(m.backward for m in table)
        stored = share * plain.stored
        # Around the least that is possible, so that many cases are just feasible and many just not.
        backward = low + (plain.backward - low) * rng.choice((-0.1, 0.0, 0.3, 0.8))
        error = rng.choice((0, 2, 100))
        expected = best_by_enumeration(table, stored, backward, error)
        policy = solve_region(graph, stored_limit=stored, backward_limit=backward, error_limit=error)
        total += 1
        if expected is None:
            infeasible += 1
            assert policy is None, f"case {case}: {policy} for an infeasible program"
            continue
        assert policy is not None, f"case {case}: nothing found, {expected} s is possible"
        found = linear_memory(model, policy)
        assert found is not None
        assert found.stored <= stored and found.backward <= backward + 1e-6 and found.error <= error
        assert found.seconds == pytest.approx(expected), f"case {case}"
        binding += expected > 0
    assert total >= 200 and infeasible >= total / 4, f"only {infeasible} of {total} cases are infeasible"
    assert binding >= total / 4, f"only {binding} of {total} cases cost anything"


def test_the_comparison_notices_a_wrong_program(graphs):
    """Negative control: a solver that forgets that inputs of replays must be there finds 'better' policies."""
    caught = 0
    for case in range(40):
        rng = random.Random(1000 + case)
        graph = graphs.random_graph(rng, 7, saved=0.5, n_actionable=4, rich=False, codecs=0.0)
        model = LinearModel(graph)
        table = [m for p in every_policy(graph) if (m := linear_memory(model, p)) is not None]
        expected = best_by_enumeration(table, 0.5 * table[0].stored, 10**9, 10**9)
        forgetful = RegionGraph(
            graph.name,
            tuple(Operator(o.index, o.name, (), o.outputs, o.seconds) for o in graph.operators),
            *(graph.values, graph.uses, graph.forward_workspace, graph.backward_workspace),
        )
        policy = solve_region(forgetful, stored_limit=0.5 * table[0].stored, backward_limit=None, error_limit=None)
        found = None if policy is None else linear_memory(model, policy)
        fits = found is not None and found.stored <= 0.5 * table[0].stored
        caught += expected is not None and not (fits and found.seconds == pytest.approx(expected))
    assert caught >= 5


def test_the_linear_model_bounds_the_simulator(graphs):
    """Stored bytes, forward and seconds are exact; backward is an upper bound, exact for plain autograd."""
    slack = 0.0
    for case in range(500):
        rng = random.Random(case)
        graph = graphs.random_graph(rng, rng.randint(1, 12), saved=rng.choice((0.3, 0.7)))
        model = LinearModel(graph)
        for policy in (Policy({v.id: KEEP for v in graph.actionable}), graphs.random_policy(rng, graph)):
            linear, exact = linear_memory(model, policy), simulate_region(graph, policy)
            assert linear is not None
            assert linear.stored == exact.stored_bytes
            assert linear.forward == exact.forward_peak
            assert linear.error == pytest.approx(exact.error)
            if policy.all_keep:
                assert linear.backward == exact.backward_peak
            assert linear.backward >= exact.backward_peak
            read = set(graph.uses)
            if all(v.id in read for v in graph.actionable):
                assert linear.seconds == pytest.approx(exact.added_seconds)
            assert linear.seconds >= exact.added_seconds - 1e-9
            slack += linear.backward - exact.backward_peak
    assert slack > 0  # else nothing was recomputed


def small_region(**changes: object) -> RegionGraph:
    """leaf 0 -> a (2) -> b (3), both saved; b costs much, a little."""
    values = [
        Value(0, 10, None, saved=True, name="x"),
        Value(1, 0, None, name="w"),
        Value(2, 40, 0, saved=True, birth=0, death=1, name="a"),
        Value(3, 40, 1, saved=True, birth=1, death=1, codecs=(CodecOption("mask", 5, 2.0),), name="b"),
    ]
    operators = (Operator(0, "aten.add", (0,), (2,), 1.0), Operator(1, "aten.mm", (2, 1), (3,), 9.0))
    return RegionGraph("small", operators, tuple(values), (3, 2, 0), (0, 0), (0, 0, 0, 0), **changes)


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        (90, {2: KEEP, 3: KEEP}),
        (60, {2: RECOMPUTE, 3: KEEP}),
        (49, {2: RECOMPUTE, 3: COMPRESS}),
        (20, {2: RECOMPUTE, 3: COMPRESS}),
        (10, {2: RECOMPUTE, 3: RECOMPUTE}),
        (9, None),
    ],
)
def test_known_answers(stored, expected):
    policy = solve_region(small_region(), stored_limit=stored, backward_limit=None, error_limit=None)
    assert (policy and policy.actions) == expected


def test_machinery_costs_can_make_one_action_dearer():
    graph = small_region(tape_seconds=1.5)
    policy = solve_region(graph, stored_limit=60, backward_limit=None, error_limit=None)
    assert policy is not None and policy.actions == {2: KEEP, 3: COMPRESS}


def test_what_is_not_allowed_is_not_chosen():
    policy = solve_region(
        small_region(), stored_limit=10, backward_limit=None, error_limit=None, allow={KEEP, RECOMPUTE}
    )
    assert policy is not None and policy.actions == {2: RECOMPUTE, 3: RECOMPUTE}
    nothing = solve_region(small_region(), stored_limit=10, backward_limit=None, error_limit=None, allow={COMPRESS})
    assert nothing is None


def test_small_values_are_kept_and_still_reported(graphs):
    graph = graphs.llama_block()
    small = small_values(graph)
    assert small and sum(graph.values[v].nbytes for v in small) < 0.005 * sum(v.nbytes for v in graph.actionable)
    policy = solve_region(graph, stored_limit=2**29, backward_limit=None, error_limit=0, keep_small=True)
    assert policy is not None and set(policy.actions) == {v.id for v in graph.actionable}
    assert all(policy.actions[v] is KEEP for v in small)


def test_one_solver_solves_many_limits(graphs):
    """Limits of one call must not leak into the next."""
    solver = RegionSolver(graphs.llama_block(), Action)
    free = solver.solve()
    tight = solver.solve(stored_limit=2**27, backward_limit=2**33)
    assert free is not None and free.all_keep and tight is not None and not tight.all_keep
    assert solver.solve(backward_limit=1) is None
    again = solver.solve()
    assert again is not None and again.all_keep
