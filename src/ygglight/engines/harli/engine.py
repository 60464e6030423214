"""The decode side of a co-located run: a thread that decodes, and says how much finetuning goes with each step."""

from __future__ import annotations

import copy
import itertools
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from ygglight.compat.transformers import unwrap
from ygglight.engines.decode.paged import PagedDecoder
from ygglight.engines.decode.pages import PAGE, PagedCache
from ygglight.engines.harli.adapters import Adapters, serving_twin
from ygglight.engines.harli.batcher import Batcher, Work
from ygglight.engines.harli.config import HarliConfig
from ygglight.engines.harli.executors import choose_executor
from ygglight.engines.harli.foresight import Foresight
from ygglight.engines.harli.gate import Gate
from ygglight.engines.harli.measure import LONG, Measurements
from ygglight.engines.harli.partitions import Partition, alone
from ygglight.engines.harli.predictor import LatencyPredictor
from ygglight.engines.harli.report import Outcome, Report, Sample
from ygglight.engines.harli.requests import Closing, QueueFull, Request, TokenEvent
from ygglight.engines.harli.scheduler import Decision, Scheduler, Situation
from ygglight.engines.harli.slack import Slack
from ygglight.engines.memory.arena import Arena
from ygglight.engines.memory.sizes import format_bytes, parse_bytes

log = logging.getLogger(__name__)

CPU_MEMORY = 1 << 30
CUDA_SHARE = 0.5
CUDA_VERSIONS = 3
IDLE_SECONDS = 0.05
"""How often a decode thread without work looks around."""
GAP_FACTOR = 4.0
"""Longest gap over the target, where the user gives none."""


class Policy(Protocol):
    """What decides how much finetuning goes with a step; :class:`Scheduler` does."""

    def decide(self, situation: Situation) -> Decision:
        """For the next step."""


class Engine:
    """Serves a model while its adapter is trained by another thread.

    Args:
        model: The LoRA model that is trained, on its device. tokenizer: Of transformers. config: What the user said.
        gate: Where the training thread waits. clock: Seconds.
        policy: Makes what decides, of the ladder and the predictor; benchmarks hand in others.

    Attributes:
        arena, predictor, report: What the parts share.

    Raises:
        ValueError: the model cannot be served while it trains, or the arena is too small; the text names the mend.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        config: HarliConfig,
        gate: Gate,
        clock: Callable[[], float] = time.perf_counter,
        policy: Callable[[Sequence[Partition], LatencyPredictor], Policy] = Scheduler,
    ) -> None:
        self.config, self.gate, self.clock = config, gate, clock
        # Its own: a fast tokenizer that two threads set up at once (padding, truncation) raises "Already borrowed".
        self.tokenizer = copy.deepcopy(tokenizer)
        twin = serving_twin(model)
        self.device: torch.device = next(twin.parameters()).device
        # A recorded graph holds the memory of a version: on a GPU few versions, or each would be recorded mid-step.
        self.adapters = Adapters(twin, model, slots=CUDA_VERSIONS if self.device.type == "cuda" else None)
        self.arena, self.max_context = _arena(twin, self.device, config)
        self.decoder = PagedDecoder(twin, self.arena)
        self.batcher = Batcher(
            self.decoder, self.arena, self.tokenizer, max_context=self.max_context, adapters=self.adapters,
            max_batch=config.max_batch, max_queue=config.max_queue, prefill_chunk=config.prefill_chunk, clock=clock,
        )  # fmt: skip
        self.executor = choose_executor(self.device, kind=config.executor)
        units = max(max(rung.decode, rung.finetune) for rung in self.executor.ladder)
        self.predictor = LatencyPredictor(units)
        self.units = units
        self.policy = policy(self.executor.ladder, self.predictor)
        self.report = Report(chunk_bytes=self.arena.chunk_bytes, executor=self.executor.name)
        self.slack = Slack(1.0, 1.0)
        self._foresight = Foresight(
            self.gate, self.batcher, self.executor, self.predictor, chunk=config.prefill_chunk, units=units,
            cuda=self.device.type == "cuda", holds=isinstance(self.policy, Scheduler),
        )  # fmt: skip
        self._thread: threading.Thread | None = None
        self._ready, self._ending = threading.Event(), threading.Event()
        self._failure: BaseException | None = None
        self._measurements = Measurements(
            self.decoder, self.executor, self.predictor, max_batch=config.max_batch,
            prefill_chunk=config.prefill_chunk, max_context=self.max_context, clock=clock,
        )  # fmt: skip
        self.version = self.adapters.current_version

    # -- life (training thread) --------------------------------------------------------------------------------------
    def start(self) -> None:
        """Measure decoding by itself, set the targets that the user left open, and begin to serve.

        Raises:
            Exception: what broke the measurement.
        """
        self._thread = threading.Thread(target=self._run, name="ygglight-decode", daemon=True)
        self._thread.start()
        self._ready.wait()
        if self._failure is not None:
            raise self._failure
        self.report.started = self.clock()

    def stop(self, drain_seconds: float) -> bool:
        """Take no more requests, finish those that are here, and end the thread; finetuning is let through.

        Args:
            drain_seconds: What those under way may take; then they are cancelled.

        Returns:
            Whether all of them finished.
        """
        self.training_ended()
        if self._thread is None or not self.alive:
            self.gate.close()
            return True
        self.batcher.drain()
        self._ending.set()
        self._thread.join(drain_seconds)
        finished = not self._thread.is_alive()
        if not finished:
            self.batcher.stop()
            self._thread.join()
        return finished

    @property
    def alive(self) -> bool:
        """Whether requests are worked on."""
        return self._thread is not None and self._thread.is_alive()

    def training_ended(self) -> None:
        """Decoding has the machine for itself from now on; the finetune rate is over the time so far."""
        if self.report.ended is None:
            self.report.ended = self.clock()

    def publish(self, model: nn.Module) -> None:
        """Let requests that come from now on use the adapter as it is now; between two optimizer steps."""
        self.version = self.adapters.publish(model)
        self.report.versions = self.version

    # -- a backend of ygglight.serving -------------------------------------------------------------------------------
    def models(self) -> list[str]:
        """``base`` and ``adapter``."""
        return ["base", "adapter"]

    def submit(self, request: Request) -> None:
        """Queue a request; see :meth:`Batcher.submit`."""
        if self._failure is not None:
            raise Closing(1.0)
        told = request.on_event
        request.on_event = lambda event: self._on_event(request, event, told)
        try:
            self.batcher.submit(request)
        except QueueFull:
            self.report.rejected += 1
            raise

    def status(self) -> Mapping[str, Any]:
        """What ``/health`` says."""
        load = self.batcher.load()
        return {
            "running": load.batch, "waiting": load.waiting, "adapter_version": self.version,
            "tpot_slo_ms": self.slack.tpot_slo * 1000, "attainment": self.report.attainment,
            "finetuning": self.report.ended is None, "executor": self.executor.name,
        }  # fmt: skip

    def metrics(self) -> Mapping[str, float]:
        """What ``/metrics`` says."""
        counts, report, load = self.arena.counts(), self.report, self.batcher.load()
        return {
            "running_requests": load.batch, "waiting_requests": load.waiting, "kv_chunks": counts.kv,
            "leased_chunks": counts.leased, "free_chunks": counts.free, "arena_bytes": self.arena.data.nbytes,
            "adapter_version": self.version, "finetune_tokens_total": report.finetune_tokens,
            "micro_batches_total": report.micro_batches, "replays_total": report.replays,
            "requests_in_target_total": report.attained, "preemptions_total": self.batcher.preemptions,
        }  # fmt: skip

    # -- the decode thread -------------------------------------------------------------------------------------------
    def _run(self) -> None:
        try:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)  # a new thread begins on device 0
            with torch.inference_mode():
                self._measurements.alone(self.gate)
                self._set_targets()
                self._ready.set()
                self._serve()
        except BaseException as error:
            self._failure = error
            if self._ready.is_set():  # else start() raises it
                log.exception("the decode thread has ended; finetuning goes on by itself")
            self.batcher.finish_all("error", f"the decode thread has ended: {error}")
        finally:
            self.gate.close()
            self.executor.close()
            self._ready.set()

    def _set_targets(self) -> None:
        config = self.config
        tokens = config.max_batch * min(self.max_context, LONG)
        solo = self.predictor.solo(config.max_batch, tokens, alone(self.units))
        slo = config.tpot_slo if config.tpot_slo is not None else 2 * solo
        gap = config.max_gap if config.max_gap is not None else GAP_FACTOR * slo
        if slo < solo:
            log.warning(
                "the target of %.3g ms a token is below what a decode step of %d sequences takes by itself (%.3g ms): "
                "a full batch will miss it even without finetuning", slo * 1000, config.max_batch, solo * 1000,
            )  # fmt: skip
        self.slack = Slack(slo, gap)
        self.report.tpot_slo, self.report.max_gap = slo, gap
        log.info(
            "target: %.3g ms a token, longest gap %.3g ms; sharing: %s", slo * 1000, gap * 1000, self.executor.name
        )

    def _serve(self) -> None:
        while True:
            self.batcher.wake.clear()
            self.batcher.prefill_chunk = self._foresight.prefill_chunk(self.slack, self.clock())
            work = self.batcher.next_work()
            if work is not None:
                self._step(work)
                continue
            if self._ending.is_set() and self.batcher.idle:
                return
            self._rest()

    def _rest(self) -> None:
        """Nothing can be decoded: finetuning has the machine until a request comes."""
        start = self.clock()
        self._foresight.learn()
        # What decides by fixed rules has no use for it; and once requests come, their steps teach as much, and cost
        # finetuning nothing.
        learns = isinstance(self.policy, Scheduler) and not self.report.output_tokens
        if learns and self._measurements.beside_left and self.gate.running and self.batcher.idle:
            self._measurements.beside(self.gate, stop=lambda: not self.batcher.idle or self._ending.is_set())
        decision = self.policy.decide(Situation(0, 0, self.slack.allowance(start)))
        self.executor.begin(decision, self.gate)
        self.batcher.wake.wait(IDLE_SECONDS)
        ended = self.clock()
        self.report.seconds["idle"] += ended - start
        self._sample(ended, ended - start, "idle", 0, decision, concurrent=False)

    def _step(self, work: Work) -> None:
        start = self.clock()
        situation = self._foresight.situation(work, self.slack, start)
        decision = self.policy.decide(situation)
        self.executor.begin(decision, self.gate)
        begun = self.clock()
        if self.device.type == "cuda":  # a recorded step belongs to the SMs that it was recorded on
            self.decoder.partition = (decision.partition.decode, decision.partition.concurrent)
        before = self.gate.current if self.gate.running else None
        with self.gate.decoding():
            self.batcher.run(work)
        decoded = self.clock()
        during = before or (self.gate.current if self.gate.running else None)
        self.executor.end(decision, self.gate)
        ended = self.clock()
        self._observe(work, situation, decision, decoded - begun, None if during is None else during.phase)
        self._foresight.learn()
        self.report.seconds[work.kind] += decoded - start
        self.report.seconds["waiting"] += ended - decoded
        self._sample(ended, ended - start, work.kind, len(work.requests), decision, concurrent=during is not None)

    def _sample(
        self, now: float, seconds: float, kind: str, batch: int, decision: Decision, *, concurrent: bool
    ) -> None:
        counts = self.arena.counts()
        self.report.sample(
            Sample(now, seconds, kind, batch, decision.reason, concurrent, counts.kv, counts.leased, counts.free)
        )

    def _observe(self, work: Work, situation: Situation, decision: Decision, seconds: float, phase: str | None) -> None:
        partition = decision.partition
        if phase is not None and not partition.concurrent:
            return  # a quantum outlived its wait: that belongs to no rung
        if work.kind == "prefill":
            self.predictor.observe_prefill(
                situation.prefill_tokens, situation.prefill_context, partition, seconds, phase
            )
        else:
            self.predictor.observe_decode(situation.batch, situation.context_tokens, partition, seconds, phase)

    # -- events ------------------------------------------------------------------------------------------------------
    def _on_event(self, request: Request, event: TokenEvent, told: Callable[[TokenEvent], None]) -> None:
        if event.token is not None:
            self.slack.token(request.id, request.token_times[-1])
        if event.finish_reason is not None:
            self.slack.finish(request.id)
            self.report.finished(_outcome(request))
        told(event)


def _outcome(request: Request) -> Outcome:
    times = request.token_times
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert request.arrival is not None and request.finished is not None and request.finish_reason is not None
    return Outcome(
        model=request.model, reason=request.finish_reason, tokens=len(times),
        ttft=times[0] - request.arrival if times else None,
        tpot=sum(gaps) / len(gaps) if gaps else None, gap=max(gaps, default=None), ended=request.finished,
    )  # fmt: skip


def _arena(twin: Any, device: torch.device, config: HarliConfig) -> tuple[Arena, int]:
    """The arena, and the longest text that fits the model, the arena and what the user said."""
    text = unwrap(twin).config.get_text_config(decoder=True)
    chunk = PagedCache.chunk_bytes(text, twin.dtype)
    if config.memory is not None:
        size = parse_bytes(config.memory)
    elif device.type == "cuda":
        size = int(CUDA_SHARE * torch.cuda.mem_get_info(device)[0])
    else:
        size = CPU_MEMORY
    chunks = size // chunk
    longest = int(getattr(text, "max_position_embeddings", 1 << 20))
    if config.max_context is not None and config.max_context > longest:
        raise ValueError(f"max_context is {config.max_context}, and the model was made for {longest} tokens")
    # Half of the arena at most for one request: the other half keeps finetuning and the other requests going.
    context = config.max_context if config.max_context is not None else min(longest, chunks // 2 * PAGE)
    if chunks < 4 or context < 2 or context > (chunks - 1) * PAGE:
        raise ValueError(
            f"memory of {format_bytes(size)} holds {max(0, chunks - 1) * PAGE} tokens of this model "
            f"({format_bytes(chunk)} for {PAGE}), which is too little for max_context={context}: give more memory"
        )
    return Arena(chunk, chunks, device), context
