"""A load that steps up and down (check S4 of the brief), in a discrete-event simulation of one machine.

Scheduler, predictor and slack are the real ones; machine and clock are made up. The predictor starts knowing nothing.
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from ygglight.engines.harli.gate import Quantum
from ygglight.engines.harli.partitions import Partition, alone, slices
from ygglight.engines.harli.predictor import LatencyPredictor
from ygglight.engines.harli.scheduler import Decision, Scheduler, Situation
from ygglight.engines.harli.slack import Slack

UNITS, LAYERS, TOKENS = 8, 12, 256
TPOT, GAP = 0.030, 0.120
MICRO_BATCH = [
    *(Quantum("forward", i, TOKENS) for i in range(LAYERS)),
    *(Quantum("loss", i, TOKENS) for i in range(4)),
    *(Quantum("backward", i, TOKENS) for i in reversed(range(LAYERS))),
    Quantum("clip", 0, TOKENS),
    *(Quantum("optimizer", i, TOKENS) for i in range(3)),
]
SPANS = {"forward": 6e-3, "loss": 3e-3, "backward": 13e-3, "clip": 1e-3, "optimizer": 2e-3}
LADDER = [alone(UNITS), slices(UNITS), *(Partition(d, UNITS - d, True) for d in (2, 4, 6))]
PEAK, QUIET, END = 4.0, 14.0, 20.0  # seconds at which the load steps up, down, and the run ends


@dataclass
class Client:
    """A request under way."""

    left: int
    context: int = 200
    times: list[float] = field(default_factory=list)


class Simulation:
    """One machine: decode steps, quanta beside them or in turn, requests that arrive and end.

    Args:
        naive: whole training steps between two decode steps, whatever they take. tpot, gap: targets, in seconds.
        noise: relative. scaling: share of a decode step that needs the units; the rest waits for the memory.
    """

    def __init__(
        self,
        *,
        naive: bool = False,
        tpot: float = TPOT,
        gap: float = GAP,
        noise: float = 0.04,
        scaling: float = 0.6,
        ladder: Sequence[Partition] = LADDER,
    ) -> None:
        self.random, self.noise, self.naive = random.Random(0), noise, naive
        self.tpot, self.gap, self.scaling = tpot, gap, scaling
        self.now, self.at, self.left = 0.0, 0, 1.0  # clock, next or current quantum, share of it that is left
        self.predictor = LatencyPredictor(UNITS)
        self.scheduler = Scheduler(ladder, self.predictor)
        self.slack = Slack(tpot, gap)
        self.running: list[Client] = []
        self.finished: list[Client] = []
        self.done: list[tuple[float, float]] = []  # (time, finetune tokens)
        self.decisions: list[tuple[float, Situation, Decision]] = []
        self.held: int | None = None
        self.started, self.beside = 0.0, False
        self.free = sum(SPANS[q.phase] for q in MICRO_BATCH)  # seconds of a micro-batch that runs alone

    # The machine

    def spread(self) -> float:
        return math.exp(self.random.gauss(0, self.noise))

    def decode_seconds(self, partition: Partition, phase: str | None) -> float:
        batch, context = len(self.running), sum(c.context for c in self.running)
        share = 1 - self.scaling + self.scaling * UNITS / partition.decode
        alone_ = (6e-3 + 4e-4 * batch) * share + 4e-7 * context
        beside = {"forward": 0.15, "loss": 0.1, "backward": 0.25}.get(phase or "", 0.05) if phase else 0.0
        return alone_ * (1 + beside) * self.spread()

    def quantum(self) -> Quantum:
        return MICRO_BATCH[self.at % len(MICRO_BATCH)]

    def train(self, seconds: float, units: int, quanta: float, concurrent: bool) -> float:
        """Run finetuning for so long or so many quanta; the seconds that it used."""
        used = 0.0
        while quanta >= 1 or self.left < 1:
            if self.left == 1:
                quanta -= 1
                self.started, self.beside, self.held = self.now + used, concurrent, units
                self.span = SPANS[self.quantum().phase] * UNITS / units * self.spread()
            self.beside |= concurrent
            need = self.left * self.span
            if used + need > seconds:
                self.left -= (seconds - used) / self.span
                return seconds
            used += need
            if self.held is not None:
                spent = self.now + used - self.started
                if concurrent or not self.beside:  # a span with a pause of its own inside is no measurement
                    self.predictor.observe_quantum(self.quantum().phase, TOKENS, self.held, spent, self.beside)
            self.done.append((self.now + used, TOKENS * SPANS[self.quantum().phase] / self.free))
            self.at, self.left, self.held = self.at + 1, 1.0, None
        return used

    # One step

    def step(self) -> None:
        if not self.running:
            self.now += self.train(5e-3, self.held or UNITS, math.inf, False)
            return
        context = sum(c.context for c in self.running)
        queue = [MICRO_BATCH[(self.at + i) % len(MICRO_BATCH)] for i in range(24)]
        flying = self.left < 1
        situation = Situation(
            batch=len(self.running),
            context_tokens=context,
            allowed_seconds=self.slack.allowance(self.now),
            next_quanta=queue[1:] if flying else queue,
            running=queue[0] if flying else None,
            held=self.held if flying else None,
        )
        decision = self.scheduler.decide(situation)
        self.decisions.append((self.now, situation, decision))
        if self.naive:
            decision = Decision(slices(UNITS), len(MICRO_BATCH), 0.0, "naive", 10.0)
        partition, quanta = decision.partition, decision.quanta or 0
        phase = queue[0].phase if flying or (partition.concurrent and quanta) else None
        seconds = self.decode_seconds(partition, phase)
        if partition.concurrent or flying:
            self.train(seconds, partition.finetune or UNITS, quanta, True)
        key = partition if partition.concurrent or not phase else Partition(UNITS, UNITS, True)
        self.predictor.observe_decode(len(self.running), context, key, seconds, phase)
        self.now += seconds
        for client in list(self.running):
            client.times.append(self.now)
            client.context, client.left = client.context + 1, client.left - 1
            self.slack.token(id(client), self.now)
            if not client.left:
                self.running.remove(client)
                self.finished.append(client)
                self.slack.finish(id(client))
        if not partition.concurrent and quanta:
            self.now += self.train(decision.wait_seconds, UNITS, quanta, False)

    def run(self, clients: int = 12) -> Simulation:
        while self.now < END:
            wanted = clients if PEAK <= self.now < QUIET else 0
            if len(self.running) < wanted:
                self.running.append(Client(left=self.random.randint(30, 150)))
            self.step()
        return self

    # What came out

    def attainment(self) -> float:
        """Share of the requests that kept both targets."""
        kept = 0
        for client in self.finished:
            gaps = [b - a for a, b in itertools.pairwise(client.times)]
            kept += statistics.fmean(gaps) <= self.tpot and max(gaps) <= self.gap
        return kept / len(self.finished)

    def tokens_per_second(self, start: float, end: float) -> float:
        return sum(tokens for time, tokens in self.done if start <= time < end) / (end - start)


ALONE = TOKENS / sum(SPANS[q.phase] for q in MICRO_BATCH)
"""Finetune tokens a second of the machine without requests."""


@pytest.fixture(scope="module")
def held() -> Simulation:
    return Simulation().run()


def test_the_target_holds_across_the_step(held: Simulation) -> None:
    assert len(held.finished) > 20
    assert held.attainment() >= 0.99


def test_finetuning_goes_on_at_the_peak_and_recovers_after_it(held: Simulation) -> None:
    before, peak = held.tokens_per_second(1.0, PEAK), held.tokens_per_second(PEAK + 1, QUIET)
    assert before == pytest.approx(ALONE, rel=0.05)
    assert 0.25 * ALONE < peak < 0.95 * ALONE
    # The last requests leave within their 150 tokens; ten quanta later it is as it was.
    drained = max(client.times[-1] for client in held.finished)
    assert drained - QUIET < 150 * TPOT
    assert held.tokens_per_second(drained + 0.1, drained + 1.1) == pytest.approx(ALONE, rel=0.08)


def test_no_step_was_planned_over_what_was_allowed(held: Simulation) -> None:
    granted = [(s, d) for _, s, d in held.decisions if d.quanta]
    assert len(granted) > 100
    assert all(d.predicted_seconds <= s.allowed_seconds for s, d in granted)
    assert {d.partition.concurrent for _, d in granted} == {True, False}  # both ways were used


def test_whole_training_steps_between_decode_steps_violate_it() -> None:
    """Negative control: the same machine, load and targets, temporal co-location of whole steps."""
    assert Simulation(naive=True).run().attainment() < 0.05


def test_more_slack_gives_no_less_finetuning() -> None:
    rates = []
    for factor in (0.4, 0.6, 0.8, 1.0, 1.5, 2.0, 3.0):
        run = Simulation(tpot=factor * TPOT, gap=4 * factor * TPOT, noise=0.0).run()
        rates.append(run.tokens_per_second(PEAK + 1, QUIET))
        if factor >= 0.6:
            assert run.attainment() >= 0.99, factor
    assert all(b >= 0.98 * a for a, b in itertools.pairwise(rates)), rates
    assert rates[0] < 0.5 * rates[-1]


def test_a_lighter_load_leaves_more(held: Simulation) -> None:
    light = Simulation().run(clients=3)
    assert light.attainment() >= 0.99
    assert light.tokens_per_second(PEAK + 1, QUIET) > held.tokens_per_second(PEAK + 1, QUIET)


def test_partitions_are_found_and_used_where_decoding_waits_for_the_memory() -> None:
    """As on a GPU: most of a decode step is traffic, so most units are free beside it. Nothing is known beforehand."""
    parts, turns = Simulation(scaling=0.1).run(), Simulation(scaling=0.1, ladder=LADDER[:2]).run()
    assert min(parts.attainment(), turns.attainment()) >= 0.99
    late = PEAK + 4  # it takes some seconds to try them
    assert parts.tokens_per_second(late, QUIET) > 1.25 * turns.tokens_per_second(late, QUIET)
    assert any(d.reason.startswith("tries") for _, _, d in parts.decisions)
