"""LoRA finetuning beside serving: every way to share the machine, on the same requests, in one process.

A variant replays one trace of requests while ``Trainer.fit`` runs with ``HarliStrategy``; they differ in nothing but
what decides how much finetuning goes with each decode step. ``p50`` is the time per output token of a request, and the
ratios compare the same requests. Rounds are not repeated: a trace has many requests, and all of them are measured.
"""

from __future__ import annotations

import gc
import logging
import math
import tempfile
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np

from benchmarks.harli_policies import POLICIES
from benchmarks.harness import BadInput, Goal, Options, Report, Result, quantile
from ygglight.data import TextData
from ygglight.engines.harli.replay import Served
from ygglight.engines.harli.trace import Trace, heavy_tailed, load_step, poisson
from ygglight.modules import CausalLM
from ygglight.strategies.harli import HarliStrategy

COLUMNS = (
    "attainment", "tpot_p50_ms", "tpot_p99_ms", "longest_gap_ms", "ttft_p99_ms", "finetune_tokens_per_s",
    "share_of_alone", "quanta", "requests", "tpot_slo_ms",
)  # fmt: skip
VIOLATING = ("whole-step", "naive")
ATTAINED = 0.99
"""Share of inference-only's attainment that counts as equal."""
GOALS = (1.46, 1.92)
"""Finetune throughput over the best baseline of equal attainment: mean over loads and best, the paper's."""


@dataclass(frozen=True)
class Case:
    """Sizes of a run.

    Args:
        model: Packaged name. block: Tokens of a training sequence. batch: Sequences. loads: Requests a second, and the
            target in times of what a decode step of a full batch takes by itself. seconds: Of a trace. alone: Seconds
            of finetuning alone. prompt, answer: Median tokens of a request. max_batch: Of decoding.
    """

    model: str
    block: int
    batch: int
    loads: tuple[tuple[float, float], ...]
    seconds: float
    alone: float
    prompt: int
    answer: int
    max_batch: int


CASES = {
    "quick": Case("smollm2-135m-instruct", 64, 1, ((0.5, 2.0),), 6, 4, 24, 12, 2),
    "smollm2": Case("smollm2-135m-instruct", 128, 1, ((0.5, 2.0), (0.25, 2.0), (0.5, 1.4)), 40, 15, 48, 24, 4),
    "smollm2-gpu": Case("smollm2-135m-instruct", 512, 4, ((4.0, 2.0), (8.0, 2.0), (16.0, 2.0)), 60, 20, 256, 128, 32),
}


def run(options: Options) -> list[Report]:
    """One report per load, and one for the load step.

    Args:
        options: from the command line; repeats are not used.
    """
    name = options.size or ("quick" if options.quick else "smollm2-gpu" if options.device == "cuda" else "smollm2")
    if name not in CASES:
        raise BadInput(f"no size {name!r}; there are: {', '.join(CASES)}")
    case = CASES[name]
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    bench = Bench(case, options)
    alone = bench.alone()
    reports = [bench.load(rate, times, alone, first=i == 0) for i, (rate, times) in enumerate(case.loads)]
    if not options.quick:
        reports.append(bench.step(*max(case.loads), alone))
    reports[-1].goals.extend(_over_loads(reports))
    return reports


class Bench:
    """Runs variants.

    Args:
        case: Sizes. options: From the command line.
    """

    def __init__(self, case: Case, options: Options) -> None:
        self.case, self.options = case, options
        self._solo = 0.0  # of a full batch, measured once for all
        self._slo: float | None = None
        self._folder = tempfile.TemporaryDirectory()

    def alone(self) -> float:
        """Loss tokens a second of finetuning with the machine to itself."""
        strategy = self._strategy(POLICIES["naive"], None)
        self._fit(strategy, lambda _: threading.Event().wait(self.case.alone))
        assert strategy.report is not None
        rate = _rate(strategy.report, strategy.report.started or 0.0)
        if not rate:
            raise RuntimeError(f"no micro-batch was done in {self.case.alone:g} s: is the machine busy?")
        print(f"harli: finetuning alone {rate:.1f} loss tokens/s", flush=True)
        self._solo = strategy.report.tpot_slo / 2  # left open, the target is twice that
        return rate

    def load(self, rate: float, times: float, alone: float, *, first: bool) -> Report:
        """All variants at a load and a target; those that keep none at any load only at the first."""
        case = self.case
        prompts, answers = (
            heavy_tailed(case.prompt, 0.5, 4 * case.prompt),
            heavy_tailed(case.answer, 0.4, 3 * case.answer),
        )
        trace = poisson(rate, case.seconds, prompts, answers, model="adapter", seed=1)
        names = [name for name in POLICIES if first or name not in VIOLATING]
        return self._report(f"Poisson {rate:g} requests/s", trace, times, alone, names)

    def step(self, rate: float, times: float, alone: float) -> Report:
        """Nothing, the highest load, nothing: ours beside inference only."""
        case = self.case
        third = case.seconds / 3
        trace = load_step(rate, third, third, third, case.prompt, case.answer, model="adapter", seed=2)
        names = ["inference-only", "harli"]
        return self._report(f"load step 0, {rate:g}, 0 requests/s", trace, times, alone, names)

    def _report(self, load: str, trace: Trace, times: float, alone: float, names: Sequence[str]) -> Report:
        case = self.case
        self._slo = times * self._solo
        line = (
            f"{case.model}, LoRA r 16, {case.batch}x{case.block} tokens a step; {load}, {len(trace.requests)} "
            f"requests, about {case.prompt} + {case.answer} tokens, target {1000 * self._slo:.0f} ms "
            f"({times:g} times solo)"
        )
        print(f"harli: {line}", flush=True)
        results = []
        for name in names:
            if self.options.wants(name):
                results.append(self._variant(name, trace, alone))
                found = {key: results[-1].metrics.get(key) for key in ("attainment", "finetune_tokens_per_s")}
                print(f"  {name}: {results[-1].status}, {found}", flush=True)
        report = Report("harli", line, results, ("inference-only",), COLUMNS)
        report.goals.extend(_goals(report))
        return report

    def _variant(self, name: str, trace: Trace, alone: float) -> Result:
        result = Result(name)
        strategy = self._strategy(POLICIES[name], trace)
        try:
            self._fit(strategy, lambda s: s.replayer.wait(6 * self.case.seconds))
        except Exception as error:
            result.status = f"failed: {type(error).__name__}: {error}"[:300]
            return result
        assert strategy.report is not None and strategy.replayer is not None
        served, report = strategy.replayer.results, strategy.report
        result.seconds = [s.tpot if s.tpot is not None else math.inf for s in served]
        slo, gap = report.tpot_slo, report.max_gap
        tpots = [s.tpot for s in served if s.tpot is not None]
        rate = _rate(report, strategy.started)
        result.metrics = {
            "attainment": sum(_attains(s, slo, gap) for s in served) / len(served),
            "tpot_p50_ms": 1000 * quantile(tpots, 0.5), "tpot_p99_ms": 1000 * quantile(tpots, 0.99),
            "longest_gap_ms": 1000 * max(g for s in served for g in s.gaps),
            "ttft_p99_ms": 1000 * float(np.quantile([s.ttft for s in served if s.ttft is not None], 0.99)),
            "finetune_tokens_per_s": rate, "share_of_alone": rate / alone, "requests": len(served),
            "tpot_slo_ms": 1000 * slo, "max_gap_ms": 1000 * gap, "alone_tokens_per_s": alone,
            "peak_bytes": (report.peak_kv + report.peak_leased) * report.chunk_bytes,
            "reasons": dict(report.reasons.most_common(4)),
        }  # fmt: skip
        quanta = getattr(strategy.engine_policy, "quanta", None)
        if quanta is not None:
            result.metrics["quanta"] = quanta
        return result

    def _strategy(self, policy: Any, trace: Trace | None) -> Any:
        path = None
        if trace is not None:
            path = str(Path(self._folder.name) / "trace.jsonl")
            trace.save(path)
        slo = None if self._slo is None else 1000 * self._slo
        made = _Benched(server=False, requests=path, tpot_slo_ms=slo, max_batch=self.case.max_batch, max_context=512,
                        memory="768MiB" if self.options.device == "cpu" else None)  # fmt: skip
        made.policy = policy  # type: ignore[misc]
        return made

    def _fit(self, strategy: Any, wait: Callable[[Any], Any]) -> None:
        """Train until ``wait`` returns."""
        case = self.case
        L.seed_everything(0, verbose=False)
        module = CausalLM(case.model, lora={"r": 16, "lora_alpha": 32}, learning_rate=1e-4)
        data = TextData("gsm8k", tokenizer=case.model, block_size=case.block, batch_size=case.batch)
        trainer = L.Trainer(
            strategy=strategy, accelerator="gpu" if self.options.device == "cuda" else "cpu", devices=1,
            max_steps=10**6,
            logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            limit_val_batches=0, gradient_clip_val=1.0, callbacks=[_Until(strategy, wait)],
        )  # fmt: skip
        trainer.fit(module, data)
        gc.collect()


class _Benched(HarliStrategy):
    """Keeps what the measurement asks for after the run."""

    replayer: Any = None
    engine_policy: Any = None
    started: float = 0.0

    def setup(self, trainer: Any) -> None:
        super().setup(trainer)
        assert self._traffic is not None and self.engine is not None
        self.replayer, self.engine_policy = self._traffic.replayer, self.engine.policy
        self.started = self.engine.clock()


class _Until(L.Callback):
    """Ends training when something else is over, from a thread: a baseline may let training wait all the time."""

    def __init__(self, strategy: Any, wait: Callable[[Any], Any]) -> None:
        self._strategy, self._wait = strategy, wait

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        engine = self._strategy.engine

        def watch() -> None:
            self._wait(self._strategy)
            trainer.should_stop = True
            trainer.fit_loop.epoch_loop.max_steps = 0
            engine.training_ended()
            engine.gate.close()

        threading.Thread(target=watch, daemon=True).start()


def _rate(report: Any, start: float) -> float:
    """Loss tokens a second from the start to the last micro-batch that was done while requests were served."""
    done = [(time, tokens) for time, tokens in report.trainings if report.ended is None or time <= report.ended]
    return sum(tokens for _, tokens in done) / (done[-1][0] - start) if done else 0.0


def _attains(served: Served, slo: float, gap: float) -> bool:
    if served.finish_reason not in ("stop", "length"):
        return False
    return served.tpot is None or (served.tpot <= slo and max(served.gaps) <= gap)


def _goals(report: Report) -> list[Goal]:
    ours, only = report.get("harli"), report.get("inference-only")
    if ours is None or only is None or not ours.ok or not only.ok:
        return []
    mine, theirs = ours.metrics["attainment"], only.metrics["attainment"]
    goals = [
        Goal(
            f"attainment {mine:.1%}, inference only {theirs:.1%}; goal {ATTAINED:.0%} of it", mine >= ATTAINED * theirs
        )
    ]
    share = ours.metrics["share_of_alone"]
    goals.append(Goal(f"finetuning at {share:.0%} of what it does alone; goal 25% at half load", share >= 0.25))
    for name in VIOLATING:
        other = report.get(name)
        if other is not None and other.ok:
            value = other.metrics["attainment"]
            goals.append(Goal(f"{name} attains {value:.1%}: shown violating", value < ATTAINED * theirs))
    best = _best_baseline(report)
    if best is not None:
        gain = ours.metrics["finetune_tokens_per_s"] / best.metrics["finetune_tokens_per_s"]
        goals.append(
            Goal(f"{gain:.2f}x the finetune tokens/s of the best baseline that attains ({best.name})", gain > 1)
        )
    return goals


def _best_baseline(report: Report) -> Result | None:
    """The one with most finetune tokens a second among those whose attainment equals inference only's."""
    only = report.get("inference-only")
    if only is None or not only.ok:
        return None
    least = ATTAINED * only.metrics["attainment"]
    found = [
        r for r in report.results
        if r.ok and r.name not in ("harli", "inference-only") and r.metrics["attainment"] >= least
        and r.metrics["finetune_tokens_per_s"] > 0
    ]  # fmt: skip
    return max(found, key=lambda r: r.metrics["finetune_tokens_per_s"], default=None)


def _over_loads(reports: Sequence[Report]) -> list[Goal]:
    gains = []
    for report in reports:
        ours, best = report.get("harli"), _best_baseline(report)
        if ours is not None and ours.ok and best is not None:
            gains.append(ours.metrics["finetune_tokens_per_s"] / best.metrics["finetune_tokens_per_s"])
    if not gains:
        return []
    mean, top = sum(gains) / len(gains), max(gains)
    return [
        Goal(f"over {len(gains)} loads {mean:.2f}x on average and {top:.2f}x at best over the best baseline of equal "
             f"attainment; goal {GOALS[0]}x and {GOALS[1]}x", mean >= GOALS[0] and top >= GOALS[1])
    ]  # fmt: skip
