"""What else could decide how much finetuning goes with a decode step: the baselines of ``benchmarks harli``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from ygglight.engines.harli.partitions import Partition, alone, idle, slices
from ygglight.engines.harli.predictor import LatencyPredictor
from ygglight.engines.harli.scheduler import Decision, Scheduler, Situation

FOREVER = 600.0
"""Seconds that a baseline waits for its quanta: it has no bound on them."""


class Fixed:
    """Base: nothing is predicted.

    Args:
        ladder, predictor: As of :class:`Scheduler`.
    """

    def __init__(self, ladder: Sequence[Partition], predictor: LatencyPredictor) -> None:
        self.ladder, self.units = ladder, predictor.units

    def decide(self, situation: Situation) -> Decision:
        """The same in every situation; finetuning has the machine when nothing is decoded."""
        if not situation.batch and not situation.prefill_tokens:
            return self.rest()
        return self.beside(situation)

    def rest(self) -> Decision:
        """Nothing to decode."""
        return Decision(idle(self.units), None, 0.0, "nothing to decode")

    def beside(self, situation: Situation) -> Decision:
        """A decode step or a prompt chunk comes."""
        raise NotImplementedError


class InferenceOnly(Fixed):
    """Finetuning never runs."""

    def rest(self) -> Decision:
        """See base."""
        return Decision(alone(self.units), 0, 0.0, "never")

    def beside(self, situation: Situation) -> Decision:
        """See base."""
        return Decision(alone(self.units), 0, 0.0, "never")


class Halves(Fixed):
    """Each has half of the machine for itself, all the time, as two machines would."""

    def rest(self) -> Decision:
        """Its half stays its half."""
        half = max(1, self.units // 2)
        return Decision(Partition(half, half, True), None, 0.0, "its half")

    def beside(self, situation: Situation) -> Decision:
        """See base."""
        return self.rest()


class Split(Halves):
    """Each has half of the machine while something is decoded; else finetuning has all of it."""

    def rest(self) -> Decision:
        """Nothing to decode."""
        return Fixed.rest(self)

    def beside(self, situation: Situation) -> Decision:
        """Its half, as long as something is decoded."""
        return Halves.rest(self)


class Naive(Fixed):
    """A second stream: both on the whole machine at once, and nobody waits."""

    def beside(self, situation: Situation) -> Decision:
        """See base."""
        return Decision(Partition(self.units, self.units, True), None, 0.0, "naive")


class WholeStep(Fixed):
    """In turn: a decode step, a whole training step."""

    def beside(self, situation: Situation) -> Decision:
        """See base."""
        count = max(1, len(situation.next_quanta))
        return Decision(slices(self.units), count, 0.0, "whole step", FOREVER)


class Capped(Fixed):
    """In turn, with a fixed number of quanta after each step.

    Args:
        quanta: How many.
    """

    def __init__(self, ladder: Sequence[Partition], predictor: LatencyPredictor, quanta: int) -> None:
        super().__init__(ladder, predictor)
        self.quanta = quanta

    def beside(self, situation: Situation) -> Decision:
        """See base."""
        return Decision(slices(self.units), self.quanta, 0.0, "capped", FOREVER)


POLICIES: dict[str, Callable[..., Any]] = {
    "inference-only": InferenceOnly,
    "halves": Halves,
    "split": Split,
    "whole-step": WholeStep,
    "naive": Naive,
    "capped-1": functools.partial(Capped, quanta=1),
    "capped-2": functools.partial(Capped, quanta=2),
    "capped-3": functools.partial(Capped, quanta=3),
    "harli": Scheduler,
}
"""In the order of the table. The cap is swept, and the best one that attains stands for it."""
