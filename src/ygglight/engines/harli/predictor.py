"""How long a decode step, a prefill chunk and a quantum of finetuning take on a partition, alone and beside each other.

Two stages (brief A.4): what the job takes alone, linear in its load, and by how much what runs beside it slows it.
Learnt from measurements of this machine only, while it runs; careful where nothing was measured yet. Times in seconds.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from ygglight.engines.harli.corun import Key, TwoStage
from ygglight.engines.harli.partitions import Partition, alone, idle, slices
from ygglight.engines.harli.solo import MIN_SAMPLES

__all__ = ["LatencyPredictor", "Partition", "alone", "idle", "slices"]

DRIFT, RECENT, LEAST = 1.05, 256, 64
"""A refit comes when the 99 % quantile of actual / upper bound passes DRIFT, over LEAST to RECENT steps."""
WORTH = 64
"""Quanta between two looks at what a quantum is worth: means move slowly, and the question is asked at every step."""
BESIDE_DECODE = "decode"


class LatencyPredictor:
    """Learns and predicts.

    Args:
        units: threads or SMs of the whole machine. batch_edges: batch sizes that a decode step is padded to (CUDA
            graphs): a batch costs as much as the next edge. Empty: no padding.
    """

    def __init__(self, units: int, batch_edges: Sequence[int] = ()) -> None:
        if units < 1:
            raise ValueError(f"units is {units}: a machine has at least one thread or SM")
        self.units, self.batch_edges = units, tuple(sorted(batch_edges))
        self.decode, self.prefills = TwoStage(3), TwoStage(3)
        self.quanta: dict[str, TwoStage] = {}
        """Finetune phase -> its quanta."""
        self.refits = 0
        """How often drift was seen."""
        self._now = 0
        self._over: deque[float] = deque(maxlen=RECENT)  # actual / upper bound
        self._shift: deque[float] = deque(maxlen=RECENT)  # actual / expected
        self._mix: Counter[str] = Counter()  # quanta seen, by phase
        self._micro_batches, self._phase = 0, ""
        self._tried: Counter[Partition] = Counter()
        self._work: dict[tuple[str, int], float] = {}

    def bucket(self, batch: int) -> int:
        """The batch size that a step of this batch costs as much as."""
        return next((edge for edge in self.batch_edges if edge >= batch), batch)

    # What was measured

    def observe_decode(
        self, batch: int, context_tokens: int, partition: Partition, seconds: float, phase: str | None
    ) -> None:
        """A decode step was measured.

        Args:
            batch: sequences. context_tokens: cached tokens of all of them. partition: it ran on. seconds: it took.
            phase: of the finetune quantum that ran beside it; None: it ran alone.
        """
        if not _measured(seconds):
            return
        key, at, features = self._decode_load(batch, context_tokens, partition, phase)
        expected, upper = self.decode.predict(key, at, features, self._now)
        self._now += 1
        self._tried[partition] += partition.concurrent and phase is not None
        self.decode.observe(key, at, features, seconds, self._now)
        if math.isfinite(upper):
            self._over.append(seconds / upper)
            self._shift.append(seconds / expected)
            self._watch()

    def observe_prefill(
        self, tokens: int, context: int, partition: Partition, seconds: float, phase: str | None
    ) -> None:
        """A prefill chunk was measured.

        Args:
            tokens: in the chunk. context: tokens of the sequence before it. partition, seconds, phase: as for decoding.
        """
        if _measured(seconds):
            self._now += 1
            self.prefills.observe(*self._prefill_load(tokens, context, partition, phase), seconds, self._now)

    def observe_quantum(
        self, quantum_phase: str, tokens: int, threads: int | None, seconds: float, concurrent: bool
    ) -> None:
        """A quantum of finetuning was measured.

        Args:
            quantum_phase: what it did. tokens: loss-bearing ones of its micro-batch. threads: or SMs, that it ran on;
                None: all. seconds: it took. concurrent: whether decoding ran beside it.
        """
        if not _measured(seconds):
            return
        self._now += 1
        if quantum_phase == "forward" and self._phase != "forward":
            self._micro_batches += 1
        self._mix[quantum_phase] += 1
        self._phase = quantum_phase
        if (total := self._mix.total()) < WORTH or total % WORTH == 0:
            self._work.clear()
        stage = self.quanta.setdefault(quantum_phase, TwoStage(2))
        stage.observe(*self._quantum_load(tokens, threads or self.units, concurrent), seconds, self._now)

    # What is to be expected

    def solo(self, batch: int, context_tokens: int, partition: Partition) -> float:
        """Expected seconds of a decode step that runs alone on its part of the machine. Never falls with the load."""
        _, _, features = self._decode_load(batch, context_tokens, partition, None)
        return self.decode.solo.predict(partition.decode, features)

    def decode_step(
        self, batch: int, context_tokens: int, partition: Partition, phase: str | None
    ) -> tuple[float, float]:
        """(expected seconds, upper bound) of a decode step with a finetune phase beside it."""
        return self.decode.predict(*self._decode_load(batch, context_tokens, partition, phase), self._now)

    def corun(self, batch: int, context_tokens: int, partition: Partition, phase: str | None) -> float:
        """Upper bound of the seconds of a decode step; infinite when none was ever seen.

        Args:
            batch: sequences. context_tokens: of all of them. partition: it would run on.
            phase: of the quantum beside it, if the partition is concurrent; None: alone.
        """
        return self.decode_step(batch, context_tokens, partition, phase)[1]

    def tried(self, partition: Partition) -> bool:
        """Whether decode steps beside finetuning were measured on this partition: before, its bounds are wide."""
        return self._tried[partition] >= MIN_SAMPLES

    def prefill(self, tokens: int, context: int, partition: Partition, phase: str | None = None) -> tuple[float, float]:
        """(expected seconds, upper bound) of a prefill chunk. tokens: in it. context: before it."""
        if tokens <= 0:
            return 0.0, 0.0
        return self.prefills.predict(*self._prefill_load(tokens, context, partition, phase), self._now)

    def quantum(self, phase: str, tokens: int, partition: Partition) -> tuple[float, float]:
        """(expected seconds, upper bound) of a quantum on its part of the machine; infinite for a phase never seen."""
        stage = self.quanta.get(phase)
        if stage is None:
            return math.inf, math.inf
        return stage.predict(*self._quantum_load(tokens, partition.finetune, partition.concurrent), self._now)

    def work(self, phase: str, tokens: int) -> float:
        """What a quantum is worth, in finetune tokens.

        Its share of the seconds that a whole micro-batch takes on the whole machine, times the tokens of the
        micro-batch: so half a micro-batch counts half, whichever quanta it is made of. How many quanta of a phase
        make a micro-batch is counted from those seen.
        """
        if (phase, tokens) in self._work:
            return self._work[phase, tokens]
        whole = idle(self.units)
        mean = self.quantum(phase, tokens, whole)[0]
        total = sum(
            seen / max(self._micro_batches, 1) * self.quantum(other, tokens, whole)[0]
            for other, seen in self._mix.items()
        )
        # A phase that was never seen is worth something, or it would never be tried.
        known = math.isfinite(mean) and 0 < total < math.inf
        self._work[phase, tokens] = tokens * mean / total if known else float(tokens)
        return self._work[phase, tokens]

    def state_dict(self) -> dict[str, Any]:
        """All that was learnt, as primitives."""
        return {
            "units": self.units,
            "batch_edges": list(self.batch_edges),
            "now": self._now,
            "micro_batches": self._micro_batches,
            "mix": dict(self._mix),
            "tried": [[p.decode, p.finetune, count] for p, count in self._tried.items() if count],
            "decode": self.decode.state_dict(),
            "prefill": self.prefills.state_dict(),
            "quanta": {phase: stage.state_dict() for phase, stage in self.quanta.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave.

        Raises:
            ValueError: it was learnt on another machine.
        """
        if state["units"] != self.units or tuple(state["batch_edges"]) != self.batch_edges:
            raise ValueError(
                f"these latencies were measured with {state['units']} units and batch edges {state['batch_edges']}, "
                f"this machine has {self.units} and {list(self.batch_edges)}: measure again instead of loading them"
            )
        self._now, self._micro_batches, self._mix = state["now"], state["micro_batches"], Counter(state["mix"])
        self._tried = Counter({Partition(d, f, True): count for d, f, count in state["tried"]})
        self.decode.load_state_dict(state["decode"])
        self.prefills.load_state_dict(state["prefill"])
        self.quanta = {phase: TwoStage(2) for phase in state["quanta"]}
        for phase, stage in self.quanta.items():
            stage.load_state_dict(state["quanta"][phase])

    def _watch(self) -> None:
        if len(self._over) < LEAST or self._now % 16 or np.quantile(np.array(self._over), 0.99) <= DRIFT:
            return
        self.refits += 1
        # A tail that grew is the guard's business. When the middle moved too, the machine is another one than before.
        if abs(float(np.median(np.array(self._shift))) - 1) > DRIFT - 1:
            self.decode.forget(self._now - len(self._over))
        else:
            self.decode.refit()
        self._over.clear()
        self._shift.clear()

    def _decode_load(
        self, batch: int, context: int, partition: Partition, phase: str | None
    ) -> tuple[Key, tuple[int, ...], tuple[float, ...]]:
        key = (partition.decode, partition.beside if phase else 0, phase or "" if partition.concurrent else "")
        return key, (_bin(batch), _bin(context)), (1.0, float(self.bucket(batch)), float(context))

    def _prefill_load(
        self, tokens: int, context: int, partition: Partition, phase: str | None
    ) -> tuple[Key, tuple[int, ...], tuple[float, ...]]:
        key = (partition.decode, partition.beside if phase else 0, phase or "" if partition.concurrent else "")
        # Attention: every token to all before it, on average half of the chunk.
        return key, (_bin(tokens), _bin(context)), (1.0, float(tokens), tokens * (context + tokens / 2))

    def _quantum_load(
        self, tokens: int, threads: int, concurrent: bool
    ) -> tuple[Key, tuple[int, ...], tuple[float, ...]]:
        key = (threads, int(concurrent), BESIDE_DECODE if concurrent else "")
        return key, (_bin(tokens),), (1.0, float(tokens))


def _bin(value: int) -> int:
    """Cells double in size: 1, 2, 3-4, 5-8, ..."""
    return max(value - 1, 0).bit_length()


def _measured(seconds: float) -> bool:
    """Whether this is a time; a clock that did not move or broke says nothing."""
    return math.isfinite(seconds) and seconds > 0
