"""Schedules are executed on symbolic values: nothing may be missing, nothing may be used after it was let go of."""

from __future__ import annotations

import random

import pytest

from ygglight.engines.adacc.graph import Action, Policy, RegionGraph
from ygglight.engines.adacc.schedule import Schedule, build_schedule, closure, codec_of, validate_policy
from ygglight.engines.adacc.simulate import simulate_region

KEEP, COMPRESS, RECOMPUTE = Action.KEEP, Action.COMPRESS, Action.RECOMPUTE


class Unavailable(AssertionError):
    """A schedule asked for something that is not there."""


def forward(graph: RegionGraph) -> dict[int, object]:
    """What every value holds, as a term over the leaves."""
    terms: dict[int, object] = {v.id: ("leaf", v.id) for v in graph.values if v.producer is None}
    for op in graph.operators:
        for position, out in enumerate(op.outputs):
            terms[out] = hash((op.index, position, tuple(terms[i] for i in op.inputs)))
    return terms


def execute(graph: RegionGraph, policy: Policy, schedule: Schedule) -> tuple[list[int], float, list[int]]:
    """Run the backward of one instance as the runtime does.

    Keeps its own books, one entry per tensor that is alive, and shares no code with the simulator.

    Returns:
        Live bytes after each read, seconds spent on replay, and the largest live bytes during each read.
    """
    truth, nbytes = forward(graph), {v.id: v.nbytes for v in graph.values}
    store = {v: truth[v] for v in schedule.stored if policy.actions.get(v) in (None, KEEP)}
    codes = {v: truth[v] for v in schedule.stored if policy.actions.get(v) is COMPRESS}
    assert set(store) | set(codes) == set(schedule.stored)
    assert {v.id for v in graph.values if v.saved and v.producer is None} <= set(schedule.leaves) <= set(store)
    memo: dict[int, object] = {}
    seconds, after, during, ran = 0.0, [], [], []

    def live(extra: int = 0) -> int:
        packed = sum(codec_of(graph, policy, v).nbytes for v in codes)
        return packed + sum(nbytes[v] for v in store) + sum(nbytes[v] for v in memo) + extra

    def get(v: int) -> object:
        for place in (store, memo):
            if v in place:
                return place[v]
        raise Unavailable(f"value {v}")

    assert [tick.value for tick in schedule.ticks] == list(graph.uses)
    for m, tick in enumerate(schedule.ticks):
        peak = live()
        for v in tick.unpack:
            assert v not in memo
            if v not in codes:
                raise Unavailable(f"code {v}")
            memo[v] = codes[v]
            peak = max(peak, live(codec_of(graph, policy, v).workspace))
        ran_before = -1
        for step in tick.replay:
            op = graph.operators[step.op]
            assert op.replayable and step.op not in ran and step.op > ran_before
            ran.append(step.op)
            ran_before = step.op
            arguments = tuple(get(i) for i in op.inputs)
            peak = max(peak, live(op.workspace + sum(nbytes[o] for o in op.outputs)))
            seconds += op.seconds
            for position, out in enumerate(op.outputs):
                if out in step.bind:
                    assert out not in store and out not in memo and out not in codes
                    memo[out] = hash((op.index, position, arguments))
            assert set(step.bind) <= set(op.outputs)
            for v in step.free_after:
                del memo[v]
        assert get(tick.value) == truth[tick.value]
        for earlier in range(m):  # what the running backward node read before is still in its hands
            if graph.use_nodes and graph.use_nodes[earlier] == graph.use_nodes[m]:
                get(graph.uses[earlier])
        during.append(peak)
        after.append(live())
        for v in tick.release:
            found = [place.pop(v) for place in (store, codes, memo) if v in place]
            assert found, f"released {v}, which was not there"
    assert not graph.uses or not (store or codes or memo), "something outlives the last read"
    return after, seconds, during


def cases(graphs, count: int, seed: int):
    for index in range(count):
        rng = random.Random(seed * 100_000 + index)
        graph = graphs.random_graph(rng, rng.randint(1, 14), saved=rng.choice((0.3, 0.6, 0.9)))
        yield rng, graph, graphs.random_policy(rng, graph)


def test_schedules_run_and_never_miss_a_parent(graphs):
    seen = dict.fromkeys((*Action, "multi", "unpacked for replay", "kept sibling", "never read"), 0)
    for _, graph, policy in cases(graphs, 1500, seed=1):
        validate_policy(graph, policy)
        schedule = build_schedule(graph, policy)
        after, seconds, during = execute(graph, policy, schedule)
        profile = simulate_region(graph, policy, schedule)
        # The simulator's own books agree, read by read.
        expected = [graph.backward_workspace[len(graph.uses)] + profile.stored_bytes]
        before = graph.backward_workspace[len(graph.uses)]
        for tick, (rest, peak) in enumerate(zip(after, during, strict=True)):
            expected += [before + peak, graph.backward_workspace[tick] + rest]
            before = graph.backward_workspace[tick]
        assert profile.backward_peak == max(expected)
        packed = sum(codec_of(graph, policy, v).seconds for v in policy.codecs)
        machinery = graph.tape_seconds * (RECOMPUTE in policy.actions.values())
        machinery += graph.hook_seconds * (not policy.all_keep)
        assert schedule.added_seconds == pytest.approx(seconds + packed + machinery)
        for action in policy.actions.values():
            seen[action] += 1
        steps = [(step, graph.operators[step.op]) for tick in schedule.ticks for step in tick.replay]
        seen["multi"] += any(len(op.outputs) > 1 for _, op in steps)
        seen["kept sibling"] += any(policy.actions.get(o) is KEEP for _, op in steps for o in op.outputs)
        seen["unpacked for replay"] += any(v != tick.value for tick in schedule.ticks for v in tick.unpack)
        seen["never read"] += any(v.id not in graph.uses for v in graph.actionable)
    assert min(seen.values()) > 50, f"the random graphs do not exercise everything: {seen}"


def test_the_interpreter_notices_a_broken_schedule(graphs):
    """Negative control: schedules that release one thing too early, or skip one replayed operator."""
    caught = tried = 0
    for rng, graph, policy in cases(graphs, 300, seed=2):
        schedule = build_schedule(graph, policy)
        ticks = list(schedule.ticks)
        replays = [i for i, tick in enumerate(ticks) if tick.replay]
        if not replays:
            continue
        tried += 1
        where = rng.choice(replays)
        ticks[where] = ticks[where]._replace(replay=ticks[where].replay[:-1])
        try:
            execute(graph, policy, Schedule(tuple(ticks), schedule.stored, schedule.leaves, 0.0))
        except (AssertionError, KeyError):
            caught += 1
    assert tried > 100 and caught == tried


def chain(graphs, n: int = 4) -> RegionGraph:
    """leaf 0 -> 2 -> 3 -> ..., every value saved, 10 bytes each, read in reverse."""
    from ygglight.engines.adacc.graph import Operator, Value

    values = [Value(0, 10, None, name="x"), Value(1, 0, None, name="w")]
    operators = []
    for i in range(n):
        source = 0 if i == 0 else i + 1
        operators.append(Operator(i, f"op{i}", (source, 1), (i + 2,), seconds=1.0))
        values.append(Value(i + 2, 10, i, saved=True, birth=i, death=min(i + 1, n - 1), name=f"v{i}"))
    uses = tuple(range(n + 1, 1, -1))
    return RegionGraph("chain", tuple(operators), tuple(values), uses, (0,) * n, (0,) * (n + 1))


def test_a_chain_is_made_again_once_and_held_as_long_as_needed(graphs):
    graph = chain(graphs)
    schedule = build_schedule(graph, Policy({2: RECOMPUTE, 3: RECOMPUTE, 4: RECOMPUTE, 5: RECOMPUTE}))
    assert schedule.leaves == {0, 1} and schedule.stored == {0, 1}
    assert [step.op for step in schedule.ticks[0].replay] == [0, 1, 2, 3]
    assert all(not tick.replay for tick in schedule.ticks[1:])
    assert [set(tick.release) for tick in schedule.ticks] == [{0, 1, 5}, {4}, {3}, {2}]
    assert schedule.added_seconds == 4


def test_the_closure_ends_at_what_is_kept(graphs):
    graph = chain(graphs)
    schedule = build_schedule(graph, Policy({2: RECOMPUTE, 3: KEEP, 4: RECOMPUTE, 5: RECOMPUTE}))
    assert [[step.op for step in tick.replay] for tick in schedule.ticks] == [[2, 3], [], [], [0]]
    assert schedule.stored == {0, 1, 3}
    keep = build_schedule(graph, Policy(dict.fromkeys((2, 3, 4, 5), KEEP)))
    assert keep.leaves == frozenset() and keep.added_seconds == 0


def test_closure_for_reads_in_another_order(graphs):
    graph = chain(graphs)
    policy = Policy({2: RECOMPUTE, 3: RECOMPUTE, 4: KEEP, 5: RECOMPUTE})
    assert closure(graph, policy, 3, frozenset()) == ((), (0, 1))
    assert closure(graph, policy, 3, {2}) == ((), (1,))
    assert closure(graph, policy, 4, frozenset()) == ((), ())
    assert closure(graph, policy, 5, frozenset()) == ((), (3,))
    assert closure(graph, policy, 5, frozenset(), released={4}) == ((), (0, 1, 2, 3))
    with pytest.raises(ValueError, match=r"chain/v1: needs chain/x, which was let go of"):
        closure(graph, policy, 3, frozenset(), released={0})


def test_closure_agrees_with_the_schedule_when_reads_come_as_planned(graphs):
    checked = 0
    for _, graph, policy in cases(graphs, 300, seed=3):
        first = next(iter(build_schedule(graph, policy).ticks), None)
        if first is None:
            continue
        unpack, ops = closure(graph, policy, first.value, frozenset())
        assert unpack == first.unpack and ops == tuple(step.op for step in first.replay)
        checked += bool(ops)
    assert checked > 40


@pytest.mark.parametrize(
    ("actions", "codecs", "message"),
    [
        ({}, {}, r"region/a: the policy gives no action"),
        ({2: KEEP, 3: RECOMPUTE, 4: KEEP}, {}, r"region/b: cannot be recomputed, operator 1 \(aten.dropout\)"),
        ({2: KEEP, 3: KEEP, 4: RECOMPUTE}, {}, r"region/c: can only be kept"),
        ({2: COMPRESS, 3: KEEP, 4: KEEP}, {2: "int3"}, r"region/a: no codec 'int3' \(this value has: int4\)"),
        ({2: COMPRESS, 3: KEEP, 4: KEEP}, {}, r"region/a: no codec None"),
        ({2: KEEP, 3: KEEP, 4: KEEP}, {2: "int4"}, r"region/a: has a codec but is not compressed"),
        ({0: KEEP, 2: KEEP, 3: KEEP, 4: KEEP}, {}, r"region/x: has an action but is not a saved value"),
        ({2: KEEP, 3: KEEP, 4: KEEP, 9: KEEP}, {}, r"region/value 9: has an action"),
    ],
)
def test_bad_policies_name_the_slot(actions, codecs, message):
    from ygglight.engines.adacc.graph import CodecOption, Operator, Value

    graph = RegionGraph(
        "region",
        (
            Operator(0, "aten.mm", (0,), (2,), 1.0),
            Operator(1, "aten.dropout", (2,), (3,), 1.0, replayable=False),
            Operator(2, "aten.add", (0,), (4,), 1.0),
        ),
        (
            Value(0, 8, None, saved=True, name="x"),
            Value(1, 0, None, name="w"),
            Value(2, 8, 0, saved=True, birth=0, death=1, codecs=(CodecOption("int4", 2, 1.0),), name="a"),
            Value(3, 8, 1, saved=True, birth=1, death=1, name="b"),
            Value(4, 8, 2, saved=True, pinned=True, birth=2, death=2, name="c"),
        ),
        (4, 3, 2, 0),
        (0, 0, 0),
        (0, 0, 0, 0, 0),
    )
    validate_policy(graph, Policy({2: COMPRESS, 3: KEEP, 4: KEEP}, {2: "int4"}))
    with pytest.raises(ValueError, match=message):
        validate_policy(graph, Policy(actions, codecs))
