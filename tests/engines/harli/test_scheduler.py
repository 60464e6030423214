"""The scheduler against brute force (check S1 of the brief), its hysteresis, exploration, and prefill chunks."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from ygglight.engines.harli.gate import Quantum
from ygglight.engines.harli.partitions import Partition, alone, idle, slices
from ygglight.engines.harli.predictor import LatencyPredictor
from ygglight.engines.harli.scheduler import Decision, Scheduler, Situation, prefill_chunk

PHASES = ("forward", "loss", "backward", "clip", "optimizer")


class Numbers(LatencyPredictor):
    """A predictor whose answers are random numbers: nothing that the scheduler might rely on holds."""

    def __init__(self, units: int, seed: int) -> None:
        super().__init__(units)
        self.seed = seed

    def draw(self, low: float, high: float, *what: object) -> float:
        return random.Random(repr((self.seed, *what))).uniform(low, high)

    def decode_step(self, batch: int, context: int, partition: Partition, phase: str | None) -> tuple[float, float]:
        mean = self.draw(5, 15, "decode", batch, partition.decode)
        if partition.concurrent and phase:
            mean *= self.draw(1, 1.6, "slower", partition, phase)
        return mean, mean * self.draw(1.05, 1.3, "bound", partition, phase)

    def prefill(self, tokens: int, context: int, partition: Partition, phase: str | None = None) -> tuple[float, float]:
        mean = tokens * self.draw(0.05, 0.1, "prefill", partition, phase)
        return mean, mean * 1.2

    def quantum(self, phase: str, tokens: int, partition: Partition) -> tuple[float, float]:
        mean = self.draw(1, 6, "quantum", phase, tokens) * self.units / max(partition.finetune, 1)
        return mean, mean * self.draw(1.05, 1.5, "span", phase, partition)

    def work(self, phase: str, tokens: int) -> float:
        return self.draw(1, 9, "work", phase, tokens)


def instance(seed: int) -> tuple[Scheduler, Situation]:
    rng = random.Random(seed)
    units = rng.choice([1, 2, 4, 8])
    pairs = [(d, f) for d in range(1, units) for f in range(1, units - d + 1)]
    ladder = [alone(units), slices(units)]
    ladder += [Partition(d, f, True) for d, f in rng.sample(pairs, min(len(pairs), rng.randint(0, 5)))]
    queue = [Quantum(rng.choice(PHASES), i, rng.choice([64, 128])) for i in range(rng.randint(1, 8))]
    running = Quantum(rng.choice(PHASES), 0, 64) if rng.random() < 0.2 else None
    return Scheduler(ladder, Numbers(units, seed), hysteresis=0.0, explore_every=0), Situation(
        batch=rng.randint(1, 4),
        context_tokens=100,
        allowed_seconds=rng.uniform(5, 60),
        prefill_tokens=rng.choice([0, 0, 32]),
        next_quanta=queue,
        running=running,
    )


def evaluate(scheduler: Scheduler, s: Situation, rung: Partition, count: int) -> tuple[float, float, float] | None:
    """(finetune tokens a second, upper bound, expected seconds) of a choice written out; None: it cannot be."""
    p = scheduler.predictor

    def step(phase: str | None) -> tuple[float, float]:
        decode = p.decode_step(s.batch, s.context_tokens, rung, phase)
        more = p.prefill(s.prefill_tokens, s.prefill_context, rung, phase) if s.prefill_tokens else (0.0, 0.0)
        return decode[0] + more[0], decode[1] + more[1]

    chosen = list(s.next_quanta[:count])
    if not rung.concurrent:
        if s.running or not chosen:
            return None
        spans = [p.quantum(q.phase, q.tokens, rung) for q in chosen]
        seconds = step(None)[0] + sum(mean for mean, _ in spans)
        upper = step(None)[1] + sum(most for _, most in spans)
        return sum(p.work(q.phase, q.tokens) for q in chosen) / seconds, upper, seconds
    chosen = [*([s.running] if s.running else []), *chosen]
    if not chosen:
        return None
    seconds = max(step(q.phase)[0] for q in chosen)
    upper = max(step(q.phase)[1] for q in chosen)
    work = at = 0.0
    for number, q in enumerate(chosen):
        span = p.quantum(q.phase, q.tokens, rung)[0]
        # The part of its span that lies inside the step as it is when only these and those before it are granted.
        work += p.work(q.phase, q.tokens) * max(0.0, min(span, seconds - at)) / span
        if number and at >= seconds:
            return None  # it would not even start
        at += span
    return work / seconds, upper, seconds


def test_the_decision_is_the_best_of_all() -> None:
    paused = turns = beside = 0
    for seed in range(600):
        scheduler, situation = instance(seed)
        decision = scheduler.decide(situation)
        choices = {}
        for rung in scheduler.ladder:
            if not rung.finetune:
                continue
            for count in range(len(situation.next_quanta) + 1):
                found = evaluate(scheduler, situation, rung, count)
                if found is not None and found[1] <= situation.allowed_seconds:
                    choices[rung, count] = found
        if not choices:
            paused += 1
            assert decision.quanta == 0 and decision.tokens_per_second == 0
            continue
        best = max(value for value, _, _ in choices.values())
        assert decision.tokens_per_second == pytest.approx(best), seed
        assert decision.quanta is not None
        value, upper, _ = choices[decision.partition, decision.quanta]
        assert value == pytest.approx(best)
        assert decision.predicted_seconds == pytest.approx(upper)
        assert decision.predicted_seconds <= situation.allowed_seconds + 1e-9
        beside += decision.partition.concurrent
        turns += not decision.partition.concurrent
    assert min(paused, turns, beside) > 50  # all three kinds were met


def with_quanta_in_turn(scheduler: Scheduler, s: Situation, rung: Partition) -> tuple[float, float]:
    """(finetune tokens a second, upper bound) of the best step beside on a rung, and the best that may follow it."""
    p = scheduler.predictor
    kept = [
        (*found, count)
        for count in range(len(s.next_quanta) + 1)
        if (found := evaluate(scheduler, s, rung, count)) is not None and found[1] <= s.allowed_seconds
    ]
    if not kept:
        return 0.0, 0.0
    best, upper, seconds, count = max(kept, key=lambda k: k[0])
    begun = [*([s.running] if s.running else []), *s.next_quanta[:count]]
    work = sum(p.work(q.phase, q.tokens) for q in begun)
    over = max(0.0, sum(p.quantum(q.phase, q.tokens, rung)[0] for q in begun) - seconds)
    for quantum in s.next_quanta[count:]:
        over += p.quantum(quantum.phase, quantum.tokens, Partition(rung.decode, s.afterwards, False))[0]
        work += p.work(quantum.phase, quantum.tokens)
        if upper + over <= s.allowed_seconds - s.reserve_seconds:
            best = max(best, work / (seconds + over))
    return best, upper


def test_quanta_in_turn_follow_a_step_beside_where_that_gives_most() -> None:
    followed = kept_for_prompts = 0
    for seed in range(600):
        scheduler, situation = instance(seed)
        units = scheduler.units
        situation = replace(situation, afterwards=units, reserve_seconds=random.Random(seed).uniform(0, 20))
        decision = scheduler.decide(situation)
        best = 0.0
        for rung in scheduler.ladder:
            if rung.concurrent:
                best = max(best, with_quanta_in_turn(scheduler, situation, rung)[0])
            elif rung.finetune:
                for count in range(len(situation.next_quanta) + 1):
                    found = evaluate(scheduler, situation, rung, count)
                    if found and found[1] <= situation.allowed_seconds - situation.reserve_seconds:
                        best = max(best, found[0])
        assert decision.tokens_per_second == pytest.approx(best), seed
        if decision.after:
            followed += 1
            assert decision.partition.concurrent and decision.wait_seconds > 0
            assert decision.predicted_seconds <= situation.allowed_seconds - situation.reserve_seconds + 1e-9
        elif decision.quanta:
            free = scheduler.decide(replace(situation, reserve_seconds=0.0))
            kept_for_prompts += free.after > 0
    assert followed > 50 and kept_for_prompts > 20


def test_units_that_change_between_quanta_hold_nobody() -> None:
    scheduler = Scheduler(LADDER, known())
    flying = replace(CALM, running=QUEUE[0], held=4)  # more than any rung has: left over from quanta in turn
    assert scheduler.decide(flying).quanta == 0
    assert scheduler.decide(replace(flying, afterwards=4)).partition.concurrent


def test_the_greedy_choice_of_the_brief_is_the_same_where_it_applies() -> None:
    """Bounds that fall with the units, quanta of one kind: the smallest feasible part for decoding is best."""
    checked = 0
    for seed in range(150):
        rng = random.Random(seed)
        units = rng.choice([3, 4, 8])
        predictor = LatencyPredictor(units)
        cost, fixed = rng.uniform(5, 20), rng.uniform(0, 5)
        for d in range(1, units + 1):
            for batch in (1, 2, 3, 4, 6, 8):
                predictor.observe_decode(batch, 100, Partition(d, 0, False), fixed + cost / d * batch, None)
        for d in range(1, units):
            for _ in range(9):
                seconds = (fixed + 4 * cost / d) * 1.2
                predictor.observe_decode(4, 100, Partition(d, units - d, True), seconds, "forward")
        for f in range(1, units + 1):
            for _ in range(9):
                predictor.observe_quantum("forward", 64, f, 0.5 * units / f, False)
                predictor.observe_quantum("forward", 64, f, 0.5 * units / f, True)
        ladder = [alone(units), *(Partition(d, units - d, True) for d in range(1, units))]
        allowed = rng.uniform(5, 60)
        queue = [Quantum("forward", i, 64) for i in range(400)]
        decision = Scheduler(ladder, predictor, 0.0).decide(Situation(4, 100, allowed, next_quanta=queue))
        feasible = [r for r in ladder[1:] if predictor.corun(4, 100, r, "forward") <= allowed]
        if not feasible:
            assert decision.quanta == 0
            continue
        smallest = min(feasible, key=lambda r: r.decode)
        checked += 1
        assert decision.partition == smallest
    assert checked > 50


@pytest.mark.parametrize("hysteresis", [0.0, 0.1, 0.3])
def test_hysteresis_costs_no_more_than_its_share_and_saves_switches(hysteresis: float) -> None:
    units = 8
    ladder = [alone(units), slices(units), *(Partition(d, units - d, True) for d in (2, 4, 6))]
    queue = [Quantum(PHASES[i % 3], i, 64) for i in range(8)]
    kept, free = (Scheduler(ladder, Numbers(units, 3), h, 0) for h in (hysteresis, 0.0))
    for step in range(400):
        situation = Situation(1 + step % 5, 100, random.Random(step).uniform(10, 60), next_quanta=queue[step % 3 :])
        got, best = kept.decide(situation), free.decide(situation)
        assert got.tokens_per_second >= (1 - hysteresis) * best.tokens_per_second - 1e-12
        assert got.quanta == 0 or got.predicted_seconds <= situation.allowed_seconds
    assert kept.switches == free.switches if hysteresis == 0 else kept.switches < free.switches


def known(units: int = 4) -> LatencyPredictor:
    """Decode 10 + batch ms on the whole machine, in proportion on parts; quanta of 4 ms; prefill 0.1 ms a token."""
    predictor = LatencyPredictor(units)
    for _ in range(8):
        for batch in (1, 2, 4, 8):
            for d in range(1, units + 1):
                predictor.observe_decode(batch, 100, Partition(d, 0, False), (10 + batch) * units / d * 1e-3, None)
        for phase in ("forward", "backward"):
            predictor.observe_quantum(phase, 64, units, 4e-3, False)
    for tokens in range(16, 272, 16):
        for _ in range(2):
            predictor.observe_prefill(tokens, 0, alone(units), tokens * 1e-4, None)
    return predictor


LADDER = [alone(4), slices(4), Partition(2, 2, True), Partition(3, 1, True)]
QUEUE = [Quantum("forward", i, 64) for i in range(6)]
CALM = Situation(batch=4, context_tokens=100, allowed_seconds=0.1, next_quanta=QUEUE)


def test_nothing_to_decode_gives_all_to_finetuning() -> None:
    scheduler = Scheduler(LADDER, known())
    decision = scheduler.decide(replace(CALM, batch=0))
    assert (decision.partition, decision.quanta) == (idle(4), None)
    assert scheduler.decide(replace(CALM, batch=0, fits_memory=False)).quanta == 0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"fits_memory": False}, "memory"),
        ({"next_quanta": ()}, "nothing to do"),
        ({"allowed_seconds": 0.015}, "not even one"),
        ({"allowed_seconds": -1.0}, "not even one"),
    ],
)
def test_pauses_say_why_and_give_decoding_the_machine(change: dict[str, object], reason: str) -> None:
    decision = Scheduler(LADDER, known()).decide(replace(CALM, **change))  # type: ignore[arg-type]
    assert (decision.partition, decision.quanta) == (alone(4), 0)
    assert reason in decision.reason
    assert decision.predicted_seconds == known().corun(4, 100, alone(4), None)


def test_decoding_alone_takes_fewer_threads_where_all_of_them_are_slower() -> None:
    predictor, late = known(), replace(CALM, allowed_seconds=0.0, afterwards=4)
    assert Scheduler(LADDER, predictor).decide(late).partition == alone(4)
    for _ in range(16):  # a third process has come: all four threads wait for the one without a core
        predictor.observe_decode(4, 100, alone(4), 0.5, None)
        predictor.observe_decode(4, 100, Partition(3, 0, False), 0.02, None)
    assert Scheduler(LADDER, predictor).decide(late).partition == Partition(3, 0, False)
    assert Scheduler(LADDER, predictor).decide(replace(late, afterwards=0)).partition == alone(4)


def test_more_may_be_done_where_more_is_allowed() -> None:
    rates = []
    for allowed in (0.01, 0.02, 0.03, 0.05, 0.1, 0.2):
        decision = Scheduler(LADDER, known(), 0.0).decide(replace(CALM, allowed_seconds=allowed))
        rates.append(decision.tokens_per_second)
    assert rates == sorted(rates)
    assert rates[0] == 0 < rates[-1]


def test_an_unknown_phase_is_tried_once_and_not_waited_for_beyond_what_is_allowed() -> None:
    unknown = [Quantum("optimizer", i, 64) for i in range(6)]
    decision = Scheduler(LADDER, known()).decide(replace(CALM, next_quanta=unknown))
    bound = known().corun(4, 100, slices(4), None)
    assert (decision.partition, decision.quanta) == (slices(4), 1)
    assert decision.wait_seconds == pytest.approx(0.1 - bound)
    assert decision.predicted_seconds <= 0.1
    tight = Scheduler(LADDER, known()).decide(replace(CALM, next_quanta=unknown, allowed_seconds=bound * 1.1))
    assert tight.quanta == 0
    # Known ones before it are granted, it is not.
    mixed = Scheduler(LADDER[:2], known()).decide(replace(CALM, next_quanta=[*QUEUE[:2], *unknown]))
    assert mixed.quanta == 2


def test_before_anything_was_measured_decoding_runs_alone() -> None:
    decision = Scheduler(LADDER, LatencyPredictor(4)).decide(CALM)
    assert (decision.partition, decision.quanta, decision.predicted_seconds) == (alone(4), 0, math.inf)


def test_an_unknown_phase_is_tried_beside_where_there_are_no_slices() -> None:
    decision = Scheduler([alone(4), Partition(2, 2, True)], known()).decide(
        replace(CALM, next_quanta=[Quantum("clip", 0, 64)])
    )
    assert (decision.partition, decision.quanta) == (Partition(2, 2, True), 1)


def test_a_quantum_in_flight_keeps_its_units() -> None:
    scheduler = Scheduler(LADDER, known())
    for held, partition in ((1, Partition(3, 1, True)), (2, Partition(2, 2, True))):
        decision = scheduler.decide(replace(CALM, running=QUEUE[0], held=held))
        assert decision.partition == partition
        paused = scheduler.decide(replace(CALM, running=QUEUE[0], held=held, allowed_seconds=0.0))
        assert (paused.partition, paused.quanta, paused.phase) == (partition, 0, "forward")
    # Left over from a slice: decoding goes on beside it on the whole machine.
    overrun = Scheduler(LADDER[:2], known()).decide(replace(CALM, running=QUEUE[0]))
    assert (overrun.partition, overrun.quanta, overrun.phase) == (alone(4), 0, "forward")
    assert overrun.predicted_seconds > known().corun(4, 100, alone(4), None)


def test_a_micro_batch_bound_to_fewer_units_takes_longer_in_turn() -> None:
    free = Scheduler(LADDER[:2], known(), 0.0).decide(CALM)
    bound = Scheduler(LADDER[:2], known(), 0.0).decide(replace(CALM, held=1))
    assert 0 < bound.tokens_per_second < free.tokens_per_second


def test_prefill_chunk_is_the_largest_that_fits() -> None:
    predictor = known()
    arguments = {"waiting_tokens": 250, "prefill_context": 0, "batch": 4, "context_tokens": 100}
    decode = predictor.corun(4, 100, alone(4), None)
    for allowed in (0.0, 0.014, 0.018, 0.025, 0.035, 1.0):
        chunk = prefill_chunk(predictor, alone(4), allowed_seconds=allowed, **arguments)  # type: ignore[arg-type]
        fitting = [n for n in (*range(16, 256, 16), 250) if decode + predictor.prefill(n, 0, alone(4))[1] <= allowed]
        assert chunk == max(fitting, default=0)
    assert prefill_chunk(predictor, alone(4), allowed_seconds=0.0, minimum=32, **arguments) == 32  # type: ignore[arg-type]
    few = {**arguments, "waiting_tokens": 7}
    assert prefill_chunk(predictor, alone(4), allowed_seconds=1.0, minimum=32, **few) == 7  # type: ignore[arg-type]
    limited = prefill_chunk(predictor, alone(4), allowed_seconds=1.0, limit=64, **arguments)  # type: ignore[arg-type]
    assert limited == 64


def test_a_prefill_chunk_counts_in_the_step() -> None:
    plain = Scheduler(LADDER[:2], known()).decide(replace(CALM, allowed_seconds=0.03))
    chunk = Scheduler(LADDER[:2], known()).decide(replace(CALM, allowed_seconds=0.03, prefill_tokens=64))
    assert isinstance(chunk, Decision)
    assert plain.quanta is not None and chunk.quanta is not None
    assert chunk.quanta < plain.quanta


def test_ladders_and_shares_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="ladder"):
        Scheduler([], known())
    with pytest.raises(ValueError, match="hysteresis"):
        Scheduler(LADDER, known(), hysteresis=1.0)
