"""Live bytes against arithmetic done by hand, against naive re-counting, and of whole steps."""

from __future__ import annotations

import random
import time

import pytest

from ygglight.engines.adacc.graph import Action, CodecOption, Operator, Policy, RegionGraph, StepGraph, Value
from ygglight.engines.adacc.schedule import codec_of
from ygglight.engines.adacc.simulate import items_at_peak, pack_ticks, simulate_region, simulate_step, stored_items

KEEP, COMPRESS, RECOMPUTE = Action.KEEP, Action.COMPRESS, Action.RECOMPUTE

# x (100 B, leaf) -> a (40) -> b (60) -> out (30, dies with the region); a and b are saved, read b, a.
REGION = RegionGraph(
    name="region",
    operators=(
        Operator(0, "aten.mm", (0,), (1,), 2.0, workspace=7),
        Operator(1, "aten.exp", (1,), (2,), 1.0),
        Operator(2, "aten.mm", (2,), (3,), 4.0),
    ),
    values=(
        Value(0, 100, None, name="x"),
        Value(1, 40, 0, saved=True, birth=0, death=1, name="a", codecs=(CodecOption("int8", 10, 0.5, 0.1, 3),)),
        Value(2, 60, 1, saved=True, birth=1, death=2, name="b"),
        Value(3, 30, 2, birth=2, death=3, name="out"),
    ),
    uses=(2, 1),
    forward_workspace=(5, 0, 1),
    backward_workspace=(20, 9, 50),
    tape_seconds=0.25,
    hook_seconds=0.125,
)


@pytest.mark.parametrize(
    ("a", "b", "stored", "forward", "backward", "seconds"),
    [
        # Forward ticks; backward: start, then the peak of a read with work and the stretch after it, per read.
        (KEEP, KEEP, 100, (152, 200, 231), (150, 120, 49), 0.0),
        (COMPRESS, KEEP, 70, (165, 213, 201), (120, 90, 20 + 10 + 40 + 3, 9 + 10 + 40), 0.5 + 0.125),
        (KEEP, RECOMPUTE, 40, (152, 200, 231), (90, 50 + 40 + 60, 20 + 40 + 60, 49), 1.0 + 0.25 + 0.125),
        (RECOMPUTE, KEEP, 160, (152, 200, 191), (210, 180, 20 + 100 + 7 + 40, 9 + 100 + 40), 2.0 + 0.25 + 0.125),
        (RECOMPUTE, RECOMPUTE, 100, (152, 200, 191), (150, 50 + 100 + 40 + 60, 20 + 200, 9 + 40), 3.0 + 0.25 + 0.125),
    ],
)
def test_bytes_by_hand(a, b, stored, forward, backward, seconds):
    policy = Policy({1: a, 2: b}, {1: "int8"} if a is COMPRESS else {})
    profile = simulate_region(REGION, policy)
    assert profile.stored_bytes == stored
    assert [live for live, _ in profile.backward_timeline] == list(backward)
    assert profile.backward_peak == max(backward)
    assert profile.added_seconds == seconds
    assert profile.error == (0.1 if a is COMPRESS else 0.0)
    if (a, b) != (KEEP, RECOMPUTE):
        assert profile.forward_timeline == forward
    else:  # b dies after tick 2, so it is alive throughout
        assert profile.forward_timeline == (*forward[:2], 100 + 40 + 60 + 30 + 1)


def test_forward_by_counting_again(graphs):
    for case in range(400):
        rng = random.Random(case)
        graph = graphs.random_graph(rng, rng.randint(1, 12))
        policy = graphs.random_policy(rng, graph)
        expected = []
        for n, workspace in enumerate(graph.forward_workspace):
            live = workspace + graph.operators[n].workspace
            for v in graph.values:
                action = policy.actions.get(v.id)
                if v.producer is None or v.birth <= n <= v.death or (n >= v.birth and action is KEEP):
                    live += v.nbytes
                if action is COMPRESS:
                    codec = codec_of(graph, policy, v.id)
                    live += codec.nbytes * (n >= v.birth) + codec.workspace * (n in pack_ticks(graph, v.id))
            expected.append(live)
        profile = simulate_region(graph, policy)
        assert list(profile.forward_timeline) == expected
        assert profile.forward_peak == max(expected)


def test_what_is_alive_at_the_peak_adds_up_to_it(graphs):
    for case in range(300):
        rng = random.Random(case)
        graph = graphs.random_graph(rng, rng.randint(1, 12))
        policy = graphs.random_policy(rng, graph)
        profile = simulate_region(graph, policy)
        assert sum(b for _, b in items_at_peak(graph, policy, "forward")) == profile.forward_peak
        assert sum(b for _, b in items_at_peak(graph, policy, "backward")) == profile.backward_peak
        assert sum(b for _, b in stored_items(graph, policy)) == profile.stored_bytes


def test_a_step_adds_what_earlier_instances_store():
    keep, again = Policy({1: KEEP, 2: KEEP}), Policy({1: RECOMPUTE, 2: RECOMPUTE})
    step = StepGraph((REGION,), (0, 0, 0), ("l.0", "l.1", "l.2"), floor_workspace=11)
    profile = simulate_step(step, [keep, again, keep])
    assert profile.stored_bytes == (100, 100, 100)
    assert profile.timeline == (
        ("l.0 forward", 231),
        ("l.1 forward", 300),
        ("l.2 forward", 431),
        ("l.2 backward", 350),
        ("l.1 backward", 350),
        ("l.0 backward", 150),
    )
    assert (profile.peak_bytes, profile.peak_at) == (431, "l.2 forward 2 (aten.mm)")
    assert (profile.peak_instance, profile.peak_phase) == (2, "forward")
    assert profile.added_seconds == 3.375


def test_the_peak_may_lie_outside_the_regions_or_in_backward():
    keep, again = Policy({1: KEEP, 2: KEEP}), Policy({1: RECOMPUTE, 2: RECOMPUTE})
    outside = simulate_step(StepGraph((REGION,), (0,), ("l",), floor_workspace=1000), [keep])
    assert (outside.peak_bytes, outside.peak_at, outside.peak_instance) == (1000, "outside the regions", -1)
    backward = simulate_step(StepGraph((REGION,), (0,), ("l",)), [again])
    assert (backward.peak_bytes, backward.peak_at) == (250, "l backward 0 (b)")


def test_one_policy_per_instance_is_asked_for():
    with pytest.raises(ValueError, match="1 policies for 2 region instances"):
        simulate_step(StepGraph((REGION,), (0, 0), ("a", "b")), [Policy({1: KEEP, 2: KEEP})])


def test_a_region_that_computes_nothing():
    empty = RegionGraph("empty", (), (Value(0, 12, None, saved=True, name="x"),), (), (3,), (4,))
    profile = simulate_region(empty, Policy())
    assert (profile.stored_bytes, profile.forward_peak, profile.backward_peak) == (12, 15, 16)


def test_a_step_of_thirty_blocks_is_quick(graphs):
    graph = graphs.llama_block()
    policies = [Policy({v.id: RECOMPUTE if v.id % (2 + i) else KEEP for v in graph.actionable}) for i in range(3)]
    step = StepGraph((graph,), (0,) * 30, tuple(f"l.{i}" for i in range(30)))
    quickest = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        simulate_step(step, [policies[i % 3] for i in range(30)])
        quickest = min(quickest, time.perf_counter() - began)
    assert quickest < 0.05  # about 2 ms on an idle core
