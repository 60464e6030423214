"""What the scheduler is asked: what there is to decode, what finetuning would do next, and how much time there is."""

from __future__ import annotations

from collections import deque

import numpy as np

from ygglight.engines.harli.batcher import Batcher, Work
from ygglight.engines.harli.executors import Executor
from ygglight.engines.harli.gate import Gate
from ygglight.engines.harli.partitions import alone
from ygglight.engines.harli.predictor import LatencyPredictor
from ygglight.engines.harli.scheduler import Situation, prefill_chunk
from ygglight.engines.harli.slack import Slack
from ygglight.engines.harli.upcoming import Upcoming

LEAST_CHUNK, WORTH_CHUNK, HELD_MOST = 16, 48, 8
"""A forward of few prompt tokens costs hardly less than one of many. So a prompt is held back until so many of its
tokens (WORTH_CHUNK) are expected to fit into a step, for so many decode steps at most: it must end some day."""
BLIND = 16
"""Quanta that are thought to follow while nothing is known but the one at hand; where they cannot be cut off: none."""
PROMPTS, USUAL = 32, 0.9
"""Time is kept for prompts as long as this quantile of so many late ones,"""
RESERVED, RESERVE_MOST = 2, 0.5
"""for so many of them, and for a share of the longest gap at most. What is kept is not lost: with more in the bank,
finetuning has to pause less often when prompts come."""


class Foresight:
    """Decode thread only.

    Args:
        gate: Of finetuning. batcher: What is decoded. executor: Of decisions. predictor: Of latencies; it is told what
            quanta took. chunk: Most prompt tokens between two steps. units: Of the machine. cuda: Whether finetuning is
            bound to SMs for a whole micro-batch. holds: Whether prompts may be held back.
    """

    def __init__(
        self,
        gate: Gate,
        batcher: Batcher,
        executor: Executor,
        predictor: LatencyPredictor,
        *,
        chunk: int,
        units: int,
        cuda: bool,
        holds: bool = True,
    ) -> None:
        self._gate, self._batcher, self._executor, self._predictor = gate, batcher, executor, predictor
        self._chunk, self._units, self._cuda = chunk, units, cuda
        self._holds = holds
        self._upcoming = Upcoming()
        self._bound: int | None = None
        self._prompts: deque[int] = deque(maxlen=PROMPTS)
        self._held_back = 0

    def situation(self, work: Work, slack: Slack, now: float) -> Situation:
        """Before a step; also says how much memory decoding may need meanwhile.

        Args:
            work: The step. slack: Of the running requests. now: Seconds.
        """
        batcher, prefill = self._batcher, work.kind == "prefill"
        # Enough for the running batch to grow while a quantum runs, and for one more prompt chunk (brief A.3).
        batcher.arena.kv_watermark = min(
            len(work.requests) + batcher.decoder.pages_for(self._chunk), batcher.arena.chunks // 2
        )
        allowed = slack.allowance(now)
        running = self._gate.current if self._gate.running else None
        queue = self._upcoming.after(running or self._gate.waiting_for)
        if len(queue) == 1 and self._executor.afterwards:  # the first training step: what it does, it does again
            queue *= BLIND
        if prefill:
            if not work.sequences[0].cached:
                self._prompts.append(len(work.requests[0].prompt))
            load = batcher.load()
            if load.batch:  # the decode step of those who run comes right after it
                allowed -= self._predictor.corun(load.batch, load.context_tokens, alone(self._units), None)
        return Situation(
            batch=0 if prefill else len(work.requests),
            context_tokens=0 if prefill else work.context_tokens,
            allowed_seconds=allowed,
            prefill_tokens=work.tokens if prefill else 0,
            prefill_context=max(0, work.context_tokens - work.tokens) if prefill else 0,
            next_quanta=queue[1:] if running is not None else queue,
            running=running,
            held=self._held(running is not None),
            afterwards=self._executor.afterwards,
            reserve_seconds=self._reserve(slack),
        )

    def prefill_chunk(self, slack: Slack, now: float) -> int:
        """The largest prompt chunk that the running requests can bear; all that is allowed while none run. 0: none yet.

        Args:
            slack: Of the running requests. now: Seconds.
        """
        load, waiting = self._batcher.load(), min(self._batcher.next_prompt, self._chunk)
        if not load.batch or not len(slack) or not waiting:
            self._held_back = 0
            return self._chunk
        whole, allowed = alone(self._units), slack.allowance(now)
        # By the mean, for who is held back loses: a bound that one slow moment left behind would do it at every prompt.
        decode = self._predictor.decode_step(load.batch, load.context_tokens, whole, None)[0]
        prompt = self._predictor.prefill(min(waiting, WORTH_CHUNK), 0, whole)[0]
        if self._holds and decode + prompt > allowed and self._held_back < HELD_MOST:
            self._held_back += 1
            return 0
        self._held_back = 0
        return prefill_chunk(
            self._predictor, whole, waiting_tokens=waiting, prefill_context=0, batch=load.batch,
            context_tokens=load.context_tokens, allowed_seconds=allowed, limit=waiting, minimum=LEAST_CHUNK,
        )  # fmt: skip

    def learn(self) -> None:
        """Take the spans of the quanta that ended."""
        spans = self._gate.spans()
        for quantum, seconds, threads, concurrent in spans:
            units = self._bound if self._cuda else threads
            self._predictor.observe_quantum(quantum.phase, quantum.tokens, units, seconds, concurrent)
        self._upcoming.done([span[0] for span in spans])

    def _reserve(self, slack: Slack) -> float:
        """Seconds for a prompt that may come next: its chunk stands between two tokens of those who run."""
        if not self._prompts:
            return 0.0
        usual = int(np.quantile(np.array(self._prompts), USUAL))
        seconds = self._predictor.prefill(min(usual, self._chunk), 0, alone(self._units))[1]
        return min(RESERVED * seconds, RESERVE_MOST * slack.max_gap)

    def _held(self, running: bool) -> int | None:
        """Units that finetuning is bound to: threads of the quantum in flight, SMs of the micro-batch's stream."""
        if self._cuda:
            held: int | None = getattr(self._executor, "held", None)
            self._bound = held or self._bound  # spans are read when their micro-batch may be over
            return held
        return self._gate.threads if running else None
