"""Measuring this machine before anybody waits: decoding alone, and decoding beside the finetuning that really runs.

The pages are real ones of the arena, the tokens are not: what they say is thrown away.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ygglight.engines.decode.paged import PagedDecoder
from ygglight.engines.harli.executors import Executor
from ygglight.engines.harli.gate import Gate
from ygglight.engines.harli.partitions import Partition, alone
from ygglight.engines.harli.predictor import LatencyPredictor
from ygglight.engines.harli.scheduler import Decision

ROUNDS = 3
BESIDE_STEPS = 3
"""Steps seen of each size and phase beside each rung; more come by themselves while requests are served."""
LONG = 512
"""Tokens of the long context; latencies are linear in tokens, so two contexts fix the line."""
PHASES = ("forward", "loss", "backward")


@dataclass(frozen=True)
class _Size:
    """A forward to time: ``batch`` sequences of ``context`` tokens each; ``prompt`` tokens of one if not 0."""

    batch: int
    context: int
    prompt: int = 0


class Measurements:
    """Times forwards of the decoder and tells the predictor.

    Args:
        decoder: Whose. executor: Sets partitions. predictor: Is told. max_batch: Largest batch. prefill_chunk: Largest
            prompt chunk. max_context: Longest text in tokens. clock: Seconds.
    """

    def __init__(
        self,
        decoder: PagedDecoder,
        executor: Executor,
        predictor: LatencyPredictor,
        *,
        max_batch: int,
        prefill_chunk: int,
        max_context: int,
        clock: Callable[[], float],
    ) -> None:
        self._decoder, self._executor, self._predictor, self._clock = decoder, executor, predictor, clock
        room = decoder.arena.chunks // 2 // max_batch * decoder.page
        long = max(1, min(LONG, max_context - 1, room - 1))
        batches = sorted({1, -(-max_batch // 2), max_batch})
        self._sizes = [_Size(batch, context) for batch in batches for context in sorted({min(15, long), long})]
        chunks = sorted({min(16, prefill_chunk, long), min(prefill_chunk, long)})
        self._sizes += [_Size(1, 0, tokens) for tokens in chunks]
        self._seen: Counter[tuple[Partition, str]] = Counter()

    def alone(self, gate: Gate) -> None:
        """Every size on every number of units that a rung decodes on, in rounds, so that drift hits all alike."""
        rungs = [alone(units) for units in sorted({rung.decode for rung in self._executor.ladder if rung.decode})]
        for turn, rung in itertools.product(range(-1, ROUNDS), rungs):
            self._executor.begin(Decision(rung, 0, 0.0, "measuring"), gate)
            for size in self._sizes:
                seconds = self._time(size)
                if seconds is not None and turn >= 0:  # the first round warms up
                    self._tell(size, rung, seconds, None)

    @property
    def beside_left(self) -> bool:
        """Whether there is a rung and a phase of which too little was seen."""
        return any(self._seen[rung, phase] < BESIDE_STEPS * len(self._sizes) for rung, phase in self._wanted())

    def beside(self, gate: Gate, stop: Callable[[], bool]) -> None:
        """One round beside the quantum that runs now, on the rung that was seen least beside its phase.

        Args:
            gate: Of the finetuning. stop: Whether somebody waits for something better.
        """
        current = gate.current
        if current is None or current.phase not in PHASES:
            return
        rungs = [rung for rung, phase in self._wanted() if phase == current.phase]
        if not rungs:
            return
        rung = min(rungs, key=lambda rung: self._seen[rung, current.phase])
        self._executor.begin(Decision(rung, None, 0.0, "measuring"), gate)
        for size in self._sizes:
            if stop():
                return
            before = gate.current if gate.running else None
            with gate.decoding():
                seconds = self._time(size)
            after = gate.current if gate.running else None
            phase = before.phase if before is not None else None
            if seconds is None or phase is None or after is None or phase not in PHASES:
                continue
            self._seen[rung, phase] += 1
            self._tell(size, rung, seconds, phase)

    def _wanted(self) -> list[tuple[Partition, str]]:
        # The loss is over in moments in most models: it is seen or it is not, and nobody waits for it.
        rungs = [rung for rung in self._executor.ladder if rung.concurrent]
        return [(rung, phase) for rung in rungs for phase in ("forward", "backward")]

    def _tell(self, size: _Size, rung: Partition, seconds: float, phase: str | None) -> None:
        if size.prompt:
            self._predictor.observe_prefill(size.prompt, 0, rung, seconds, phase)
        else:
            page = self._decoder.page
            tokens = size.batch * self._decoder.pages_for(size.context + 1) * page
            self._predictor.observe_decode(size.batch, tokens, rung, seconds, phase)

    def _time(self, size: _Size) -> float | None:
        """Seconds of one forward, its result on the host; None if the arena has no room for it now."""
        decoder = self._decoder
        with self._pages(size) as tables:
            if tables is None:
                return None
            start = self._clock()
            if size.prompt:
                step = decoder.prefill(tables[0], 0, torch.ones(size.prompt, dtype=torch.long))
            else:
                tokens = torch.ones(size.batch, dtype=torch.long)
                step = decoder.decode(tables, [size.context] * size.batch, tokens)
            step.logits.argmax(-1).tolist()
            return self._clock() - start

    @contextmanager
    def _pages(self, size: _Size) -> Iterator[list[list[int]] | None]:
        decoder = self._decoder
        each = decoder.pages_for(size.prompt or size.context + 1)
        if decoder.arena.counts().free < each * size.batch:  # asking would press the finetune side for nothing
            yield None
            return
        pages = decoder.arena.allocate_kv(each * size.batch)
        if pages is None:
            decoder.arena.withdraw()
            yield None
            return
        try:
            yield [pages[i * each : (i + 1) * each] for i in range(size.batch)]
        finally:
            decoder.arena.free_kv(pages)
