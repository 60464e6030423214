"""Which partition, and how much finetuning, goes with the next decode step (brief A.5; our design).

Of all rungs of the ladder and all numbers of quanta, the one with the most finetune tokens a second whose upper bound
stays inside what is allowed. The search is exhaustive: ladders are short, and quanta come in a fixed order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ygglight.engines.harli.partitions import Partition, alone, idle
from ygglight.engines.harli.predictor import LatencyPredictor

if TYPE_CHECKING:
    from ygglight.engines.harli.gate import Quantum

EXPLORE_LEAST, EXPLORE_MOST = 0.5, 8.0
"""A quantum of a phase never seen is tried where its wait may take so many decode steps at least; it is waited for so
many at most, and then decoding goes on beside it."""
SPARE = 2
"""Quanta that may begin beside a step besides those expected to, where nothing is held: it may take longer."""
SAVE_MOST, TYPICAL = 16, 64
"""Steps that finetuning pauses at most to save slack for one trial; steps that a typical rate is the mean of."""


@dataclass(frozen=True)
class Situation:
    """What a decision is made of.

    Args:
        batch: sequences that decode. context_tokens: cached tokens of all of them. allowed_seconds: for the whole step.
        prefill_tokens: of the chunk that goes with the step; 0: none. prefill_context: tokens before it.
        next_quanta: what the finetune side would do next, in order. fits_memory: whether it has the memory to go on.
        running: a quantum that is in flight and cannot be called back. held: units that finetuning is bound to
            (threads of the quantum in flight, SMs of the micro-batch's stream); None: free to choose.
        afterwards: units on which quanta can go on in turn once a step beside finetuning is over: the units of
            finetuning may then change from quantum to quantum, whatever is held. 0: they cannot.
        reserve_seconds: what quanta in turn leave of ``allowed_seconds``, for a prompt that may come.
    """

    batch: int
    context_tokens: int
    allowed_seconds: float
    prefill_tokens: int = 0
    prefill_context: int = 0
    next_quanta: Sequence[Quantum] = ()
    fits_memory: bool = True
    running: Quantum | None = None
    held: int | None = None
    afterwards: int = 0
    reserve_seconds: float = 0.0

    def can_have(self, rung: Partition) -> bool:
        """Whether finetuning can have the units of a rung."""
        return bool(self.afterwards) or self.held in (None, rung.finetune)


@dataclass(frozen=True)
class Decision:
    """What to do in the next step.

    Args:
        partition: to run it on. quanta: to grant; None: as many as there are, 0: pause. predicted_seconds: upper bound
            of the step, quanta in turn included. reason: in words, for the report. wait_seconds: how long decoding
            waits for the quanta in turn; then it goes on beside what is left. tokens_per_second: of finetuning,
            expected. phase: of the finetune work beside the decode step (the slowest one); None: it runs alone.
        after: quanta in turn that follow a step beside finetuning.
    """

    partition: Partition
    quanta: int | None
    predicted_seconds: float
    reason: str
    wait_seconds: float = 0.0
    tokens_per_second: float = 0.0
    phase: str | None = None
    after: int = 0


class Scheduler:
    """Decides step by step.

    Args:
        ladder: partitions that the executor can realise. predictor: of their latencies.
        hysteresis: a partition is kept until another promises a gain above this share; so a decision is never further
            than this share below the best. 0: always the best.
        explore_every: decisions between two trials of a partition that was hardly measured and promises more than the
            best. Its bound is wide, so finetuning pauses until there is slack for it, SAVE_MOST steps at most; a trial
            that comes to nothing doubles the interval. 0: never.

    Raises:
        ValueError: an empty ladder, or a share out of range.
    """

    def __init__(
        self,
        ladder: Sequence[Partition],
        predictor: LatencyPredictor,
        hysteresis: float = 0.05,
        explore_every: int = 64,
    ) -> None:
        if not any(rung.decode for rung in ladder):
            raise ValueError("the ladder has no partition on which decoding could run: give it one")
        if not 0 <= hysteresis < 1:
            raise ValueError(f"hysteresis={hysteresis}: a share of the finetune throughput, from 0 to below 1")
        self.ladder, self.predictor, self.hysteresis = tuple(ladder), predictor, hysteresis
        self.units = max(max(rung.decode, rung.finetune) for rung in ladder)
        self.switches = 0
        """Changes of partition between two steps with finetuning."""
        self._last: Partition | None = None
        self._explore_every, self._until_trial, self._saved = explore_every, explore_every, 0
        self._goal: Partition | None = None  # the partition that is being tried
        self._typical = 0.0  # finetune tokens a second of late, pauses included
        self._spans: dict[tuple[str, int, Partition], tuple[float, float]] = {}  # asked for in this decision

    def decide(self, situation: Situation) -> Decision:
        """The best that stays inside ``allowed_seconds`` by its upper bound; a pause when nothing does."""
        self._spans.clear()
        if not situation.batch and not situation.prefill_tokens:
            go = situation.fits_memory
            return Decision(idle(self.units), None if go else 0, 0.0, "nothing to decode" if go else "no memory")
        if not situation.fits_memory:
            return self._pause(situation, "no memory for finetuning")
        if not situation.next_quanta and situation.running is None:
            return self._pause(situation, "finetuning has nothing to do")
        first = situation.running or situation.next_quanta[0]
        never = math.isinf(self.predictor.quantum(first.phase, first.tokens, idle(self.units))[0])
        if never and situation.running is None:
            return self._explore(situation)
        found = [best for rung in self.ladder if (best := self._best(situation, rung)) is not None]
        if not found:
            self._typical -= self._typical / TYPICAL
            return self._pause(situation, "not even one quantum fits into what is allowed")
        best = max(found, key=lambda d: (d.tokens_per_second, -d.predicted_seconds))
        trial = self._trial(situation, found)
        if trial is not None:
            return trial
        self._typical += (best.tokens_per_second - self._typical) / TYPICAL
        for kept in found:
            if (
                kept.partition == self._last
                and kept.tokens_per_second >= (1 - self.hysteresis) * best.tokens_per_second
            ):
                best = kept
        self.switches += self._last not in (None, best.partition)
        self._last = best.partition
        return best

    def _best(self, situation: Situation, rung: Partition) -> Decision | None:
        """The best number of quanta on one rung; None: not even one fits."""
        if not rung.finetune:
            return None
        return self._beside(situation, rung) if rung.concurrent else self._in_turn(situation, rung)

    def _in_turn(self, situation: Situation, rung: Partition) -> Decision | None:
        if situation.running is not None:
            return None  # what is in flight runs beside the step, whether that is wanted or not
        step, upper = self._step(situation, rung, None)
        expected, bound, work, best = step, upper, 0.0, None
        for count, quantum in enumerate(situation.next_quanta, 1):
            mean, most = self._quantum(quantum, rung, situation.held)
            expected, bound, work = expected + mean, bound + most, work + self._work(quantum)
            if not bound <= situation.allowed_seconds - situation.reserve_seconds:
                break
            if best is None or work / expected > best.tokens_per_second:
                best = Decision(rung, count, bound, "quanta after the step", bound - upper, work / expected)
        return best

    def _beside(self, situation: Situation, rung: Partition) -> Decision | None:
        """Quanta that start before the step is expected to end; the last one may go on beside the next step."""
        if not situation.can_have(rung):
            return None
        granted = 0 if situation.running is None else 1
        queue = [situation.running, *situation.next_quanta] if situation.running else situation.next_quanta
        step = upper = begun = work = lasts = 0.0
        slowest, best, phases = "", None, set[str]()
        spans: list[tuple[float, float]] = []
        for count, quantum in enumerate(queue, 1):
            if quantum.phase not in phases:
                phases.add(quantum.phase)
                mean, most = self._step(situation, rung, quantum.phase)
                step, upper, slowest = max(step, mean), max(upper, most), slowest if upper >= most else quantum.phase
            if not upper <= situation.allowed_seconds or (spans and begun >= step):
                break
            spans.append((self._quantum(quantum, rung, None)[0], self._work(quantum)))
            begun += spans[-1][0]
            if math.isinf(begun):
                break
            work = _done(spans, step)
            if best is None or work / step > best.tokens_per_second:
                lasts = step
                best = Decision(rung, count - granted, upper, "beside the step", 0.0, work / step, slowest)
        return best if best is None else self._then(situation, best, lasts, spans)

    def _then(
        self, situation: Situation, best: Decision, step: float, spans: Sequence[tuple[float, float]]
    ) -> Decision:
        """The same, and in turn as many quanta as are expected to fit after it; where they take longer, no more begin
        when their time is up."""
        room = situation.allowed_seconds - situation.reserve_seconds - best.predicted_seconds
        if not situation.afterwards or best.quanta is None:
            return best
        rung = Partition(best.partition.decode, situation.afterwards, False)
        begun = spans[: best.quanta + (situation.running is not None)]
        work = sum(worth for _, worth in begun)
        following = situation.next_quanta[best.quanta :]
        taken = most = max(0.0, sum(span for span, _ in begun) - step)  # the one in flight when the step ends
        found = best = replace(best, quanta=best.quanta + SPARE)
        for count, quantum in enumerate(following, 1):
            mean, upper = self._quantum(quantum, rung, None)
            taken, most, work = taken + mean, most + upper, work + self._work(quantum)
            if not taken <= room:
                break
            rate, wait = work / (step + taken), min(most, room)
            if rate > found.tokens_per_second:
                found = replace(
                    best, after=count, wait_seconds=wait, predicted_seconds=best.predicted_seconds + wait,
                    reason="beside the step, then in turn", tokens_per_second=rate,
                )  # fmt: skip
        return found

    def _trial(self, situation: Situation, found: Sequence[Decision]) -> Decision | None:
        """When it is time: a step on a partition that was hardly measured, or a pause that saves slack for it."""
        if not self._explore_every or situation.running is not None:
            return None
        self._until_trial -= 1
        if self._goal is None and self._until_trial <= 0:
            self._until_trial, self._saved = self._explore_every, 0
            first = situation.next_quanta[0]
            worth = [
                rung
                for rung in self.ladder
                if rung.concurrent and situation.can_have(rung) and not self.predictor.tried(rung)
                if self._work(first) > self._typical * self._quantum(first, rung, None)[0]  # the most it could give
            ]
            # The least bound first: what is learnt there narrows that of the next.
            self._goal = min(worth, key=lambda rung: self._step(situation, rung, first.phase)[1], default=None)
        if self._goal is None or self.predictor.tried(self._goal):
            self._goal = None
            return None
        for decision in found:
            if decision.partition == self._goal:
                self._saved = 0
                return replace(decision, reason="tries a partition not yet measured")
        self._saved += 1
        if self._saved <= SAVE_MOST:
            return self._pause(situation, "saves slack for a partition not yet measured")
        self._explore_every, self._goal = 2 * self._explore_every, None
        return None

    def _explore(self, situation: Situation) -> Decision:
        """One quantum of a phase never seen: in turn where that can be, so that its wait can be cut off."""
        for rung in sorted((r for r in self.ladder if r.finetune), key=lambda r: (r.concurrent, -r.decode)):
            if rung.concurrent:
                phase = situation.next_quanta[0].phase
                bound = self._step(situation, rung, phase)[1]
                if bound <= situation.allowed_seconds and situation.can_have(rung):
                    return Decision(rung, 1, bound, "span not known: one quantum beside the step", phase=phase)
                continue
            bound = self._step(situation, rung, None)[1]
            wait = min(situation.allowed_seconds - bound, EXPLORE_MOST * bound)
            if wait >= EXPLORE_LEAST * bound:
                predicted = min(bound + wait, situation.allowed_seconds)
                return Decision(rung, 1, predicted, "span not known: one quantum, its wait cut off", wait)
        return self._pause(situation, "span not known, and no room to try")

    def _pause(self, situation: Situation, reason: str) -> Decision:
        whole = alone(self.units)
        if situation.running is None:
            return self._alone(situation, reason)
        phase = situation.running.phase
        rungs = [r for r in self.ladder if r.concurrent and situation.can_have(r)]
        if not rungs:  # a slice that outlived its wait: both on the whole machine until it ends
            both = Partition(self.units, self.units, True)
            return Decision(whole, 0, self._step(situation, both, phase)[1], reason, phase=phase)
        rung = min(rungs, key=lambda r: self._step(situation, r, phase)[1])
        return Decision(rung, 0, self._step(situation, rung, phase)[1], reason, phase=phase)

    def _alone(self, situation: Situation, reason: str) -> Decision:
        """Nothing beside the step. Fewer threads can be faster: where a third process is on the cores, those of a pool
        wait for each other at every operator."""
        decode = [self.units]
        if situation.afterwards:
            decode += sorted({rung.decode for rung in self.ladder if rung.concurrent}, reverse=True)
        upper = {units: self._step(situation, Partition(units, 0, False), None)[1] for units in decode}
        best = min(decode, key=lambda units: upper[units] / (1.0 if units < self.units else 1 + self.hysteresis))
        return Decision(Partition(best, 0, False), 0, upper[best], reason)

    def _step(self, situation: Situation, rung: Partition, phase: str | None) -> tuple[float, float]:
        mean = upper = 0.0
        if situation.batch:
            mean, upper = self.predictor.decode_step(situation.batch, situation.context_tokens, rung, phase)
        if situation.prefill_tokens:
            more = self.predictor.prefill(situation.prefill_tokens, situation.prefill_context, rung, phase)
            mean, upper = mean + more[0], upper + more[1]
        return mean, upper

    def _quantum(self, quantum: Quantum, rung: Partition, held: int | None) -> tuple[float, float]:
        if held is not None and not rung.concurrent:
            rung = Partition(rung.decode, held, False)
        asked = (quantum.phase, quantum.tokens, rung)
        if asked not in self._spans:
            self._spans[asked] = self.predictor.quantum(*asked)
        return self._spans[asked]

    def _work(self, quantum: Quantum) -> float:
        return self.predictor.work(quantum.phase, quantum.tokens)


def _done(spans: Sequence[tuple[float, float]], seconds: float) -> float:
    """Work done in so many seconds by quanta of (span, work) in a row, the last one in part."""
    total = 0.0
    for span, work in spans:
        if span >= seconds:
            return total + work * seconds / span
        total, seconds = total + work, seconds - span
    return total


def prefill_chunk(
    predictor: LatencyPredictor,
    partition: Partition,
    *,
    waiting_tokens: int,
    prefill_context: int,
    batch: int,
    context_tokens: int,
    allowed_seconds: float,
    limit: int = 256,
    granule: int = 16,
    minimum: int = 0,
    phase: str | None = None,
) -> int:
    """The largest prefill chunk whose upper bound, with that of the decode step it goes with, fits.

    Args:
        predictor: of latencies. partition: that both would run on. waiting_tokens: of the prompt, not yet prefilled.
        prefill_context: of the prompt, already prefilled. batch, context_tokens: of the decode step; batch 0: none.
        allowed_seconds: for both. limit: largest chunk. granule: chunks are a multiple of this, but for the last of a
            prompt. minimum: what is returned at least, so that a prompt does not wait for ever behind a full machine.
        phase: of the quantum beside them, or None.

    Returns:
        Tokens, at most ``waiting_tokens``; 0: none fits.
    """
    largest = min(waiting_tokens, limit)
    least = min(minimum, largest)
    room = allowed_seconds - (predictor.corun(batch, context_tokens, partition, phase) if batch else 0.0)
    sizes = [largest, *range((largest - 1) // granule * granule, 0, -granule)]
    fits = (n for n in sizes if n > least and predictor.prefill(n, prefill_context, partition, phase)[1] <= room)
    return next(fits, least)
