"""Experts that do not fit: accelerate's hooks, caches of the same slots and of the same memory, MoE-SpeQ.

Every way answers the same prompts in turn, over one link and from one store, and begins each with empty slots. Times
are seconds a new token, prompts apart. The text of every way is compared with that of the unoffloaded model; where it
differs, the two best logits must be closer than rounding.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Goal, Incorrect, Options, Report, Result, Skip, Variant, measure, paired_ratio
from benchmarks.moe_models import CASES, Subject, cases
from benchmarks.moe_speq_baselines import hook_experts
from ygglight.engines.moe_speq import report as engine_report
from ygglight.engines.moe_speq.engine import Engine
from ygglight.engines.moe_speq.generate import MoESpeQGenerate

COLUMNS = (
    "tokens_per_s", "x_best_other", "per_cycle", "drafted", "hits", "late", "misses", "demand_MB_per_token",
    "prefetch_MB_per_token", "ttft_s", "link_GB_per_s", "same",
)  # fmt: skip
TIES = {"float32": 1e-4, "bfloat16": 0.5}
"""Largest gap between the two best logits at which a text may part from the unoffloaded model's."""
FIXED = (2, 4, 8)
WARM, LEARN = 16, 96
"""Tokens of a way's first text, which is not timed; of a way that learns."""
ABLATED = 4
"""The k of the ablations: what ``auto`` chooses depends on what is left out."""
ROUNDS = 3
LRU = ("lru-sc", "lru-sm")
GOALS = {"lru-sm": 0.97, "lru-sc": 1.5}
"""Least speed of MoE-SpeQ against the caches of the same memory and of the same slots."""
REGRET, WASTE = 0.95, 1.15
"""Least speed against the best fixed k; most bytes with prefetches against those without."""


def run(options: Options) -> list[Report]:
    """One report per case.

    Args:
        options: from the command line; a repeat is one prompt.
    """
    plain = Plan(options.device, options.quick, options.repeats or (1 if options.quick else ROUNDS), None, options.only)
    return [_run(name, plain) for name in cases(options.quick, options.size, options.device)]


class Plan(Options):
    """Options of a run whose ways warm up by themselves, each as long as it needs."""

    @property
    def warmup(self) -> int:
        """None beside that."""
        return 0


def _run(name: str, options: Options) -> Report:
    try:
        subject = Subject(CASES[name], options.rounds + 1, options.device)
    except Skip as error:
        return Report("moe_speq", name, [Result("all", f"skipped: {error}")])
    print(f"moe_speq: {subject.line}", flush=True)
    bench = Bench(subject)
    try:
        results = measure((way.variant for way in bench.ways(options)), options)
        for result in results:
            if result.ok:
                way = bench.made[result.name]
                result.seconds = way.per_token[-len(result.seconds) :]
                result.metrics.update(way.metrics())
    finally:
        bench.close()
    report = Report("moe_speq", subject.line, results, LRU, COLUMNS)
    for result in results:
        others = [r for r in results if r.ok and r.name != result.name and not r.name.startswith("unoffloaded")]
        if result.ok and others:
            best = max(other.metrics["tokens_per_s"] for other in others)
            result.metrics["x_best_other"] = result.metrics["tokens_per_s"] / best
    report.goals.extend(_goals(report))
    return report


def _goals(report: Report) -> Iterator[Goal]:
    mine = report.get("moe-speq")
    if mine is None or not mine.ok:
        return
    for name, least in GOALS.items():
        other = report.get(name)
        if other is not None and other.ok:
            gain = paired_ratio(other.seconds, mine.seconds)
            yield Goal(f"moe-speq {gain:.2f}x over {name}; goal {least}x", gain >= least)
    fixed = [r for r in report.results if r.ok and (r.name in {f"k-{k}" for k in FIXED} or r.name == "lru-sm")]
    if fixed:
        best = min(fixed, key=lambda r: sum(r.seconds))
        share = sum(best.seconds) / sum(mine.seconds)
        yield Goal(f"{share:.1%} of the best fixed k ({best.name}; lru-sm is k=0); goal {REGRET:.0%}", share >= REGRET)
    ahead, without = report.get(f"k-{ABLATED}"), report.get(f"k-{ABLATED}-no-prefetch")
    if ahead is not None and ahead.ok and without is not None and without.ok:
        gain = paired_ratio(without.seconds, ahead.seconds)
        more = _moved(ahead) / _moved(without)
        yield Goal(f"prefetching at k={ABLATED}: {gain:.2f}x; goal above 1", gain > 1)
        yield Goal(f"prefetching moves {more:.2f}x the bytes; goal at most {WASTE}x", more <= WASTE)
    loop = report.get(f"k-{ABLATED}-no-int4-kernel")
    if ahead is not None and ahead.ok and loop is not None and loop.ok:
        gain = paired_ratio(loop.seconds, ahead.seconds)
        yield Goal(f"a product in four bits at k={ABLATED}: {gain:.2f}x; goal above 1", gain > 1)


def _moved(result: Result) -> float:
    return float(result.metrics["demand_MB_per_token"] + result.metrics["prefetch_MB_per_token"])


class Bench:
    """All ways of answering the prompts of a case.

    Args:
        subject: Model, experts and prompts.
    """

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.made: dict[str, Way] = {}
        self._expected: dict[int, list[int]] = {}

    def ways(self, options: Options) -> Iterator[Way]:
        """Those that are wanted, from the plainest to ours.

        Args:
            options: Which.
        """
        case = self.subject.case
        ladder: list[tuple[str, Callable[[str], Way]]] = [
            ("unoffloaded", lambda name: Plain(name, self)),
            ("accelerate", lambda name: Hooked(name, self)),
            ("lru-sc", lambda name: Ours(name, self, draft=False, budget=self.subject.budget(draft=False))),
            ("lru-sm", lambda name: Ours(name, self, draft=False)),
            *((f"k-{k}", lambda name, k=k: Ours(name, self, k=k)) for k in FIXED),
            (f"k-{ABLATED}-no-prefetch", lambda name: Ours(name, self, k=ABLATED, prefetch=False)),
        ]
        if not case.noise:
            ladder.append((f"k-{ABLATED}-no-int4-kernel", lambda name: Ours(name, self, k=ABLATED, loop=True)))
        ladder.append(("moe-speq", lambda name: Ours(name, self)))
        for name, make in ladder:
            if options.wants(name):
                self.made[name] = make(name)
                yield self.made[name]

    def close(self) -> None:
        """End what runs beside."""
        for way in self.made.values():
            way.close()

    def expected(self, index: int) -> list[int]:
        """The unoffloaded model's answer."""
        if index not in self._expected:
            tokens = self.subject.case.tokens if index >= 0 else max(LEARN, self.subject.case.tokens)
            self._expected[index] = Plain("", self).answer(index, tokens)
        return self._expected[index]


class Way:
    """A way of answering.

    Args:
        name: In the table. bench: Whose prompts.
    """

    def __init__(self, name: str, bench: Bench) -> None:
        self.name, self.bench, self.case = name, bench, bench.subject.case
        self.per_token: list[float] = []
        self.first: list[float] = []
        self.different, self.largest_gap = 0, 0.0
        self._turn, self._answer = 0, [0]

    # -- what differs ------------------------------------------------------------------------------------------------
    tokens = property(lambda self: self.case.tokens)
    learns = False
    """It changes with what it has seen, and warms up on a longer text."""

    def reset(self) -> None:
        """Forget what the last prompt left in slots."""

    def started(self) -> None:
        """Timed rounds begin."""

    def close(self) -> None:
        """No more prompts."""

    def generate(self, prompt: Tensor, tokens: int) -> tuple[list[int], float, float]:
        """The answer, the seconds to its first token, and those of all others."""
        raise NotImplementedError

    def found(self) -> dict[str, Any]:
        """What else is known of the timed rounds."""
        return {}

    # -- for the harness ---------------------------------------------------------------------------------------------
    @property
    def variant(self) -> Variant:
        """For the harness."""
        return Variant(self.name, self._step, self._prepare, self._around)

    def answer(self, index: int, tokens: int) -> list[int]:
        """Answer a prompt with empty slots, and note how long it took."""
        self.reset()
        answer, first, rest = self.generate(self.bench.subject.prompts[index], tokens)
        self.first.append(first)
        self.per_token.append(rest / max(1, len(answer) - 1))
        return answer

    def _prepare(self) -> dict[str, Any]:
        answer = self.answer(-1, max(LEARN, self.tokens) if self.learns else min(WARM, self.tokens))
        self._check(-1, answer)
        self.different, self.largest_gap = 0, 0.0
        self.started()
        return {}

    def _step(self) -> None:
        self._answer = self.answer(self._turn, self.tokens)

    @contextmanager
    def _around(self) -> Iterator[None]:
        yield
        self._check(self._turn, self._answer)
        self._turn += 1

    def _check(self, index: int, answer: list[int]) -> None:
        """Raise if the answer is wrong; count it if it is a tie that rounding decided otherwise."""
        expected = self.bench.expected(index)[: len(answer)]
        if answer == expected:
            return
        same = next((i for i, (a, b) in enumerate(zip(answer, expected, strict=False)) if a != b), None)
        if same is None:
            raise Incorrect(f"{len(answer)} tokens, the unoffloaded model gives {len(expected)}")
        subject = self.bench.subject
        prompt = subject.prompts[index]
        text = torch.cat([prompt, prompt.new_tensor([expected[:same]])], 1)
        scores = subject.model.generate(
            text, attention_mask=torch.ones_like(text), do_sample=False, max_new_tokens=1,
            return_dict_in_generate=True, output_scores=True,
        ).scores[0][0].float()  # fmt: skip
        gap = float(scores.max() - scores[[answer[same], expected[same]]].min())
        if gap > TIES[self.case.dtype]:
            raise Incorrect(f"token {same} of prompt {index} differs, and the scores are {gap:.2g} apart")
        self.different += 1
        self.largest_gap = max(self.largest_gap, gap)

    def metrics(self) -> dict[str, Any]:
        """Of the timed rounds."""
        times, first = self.per_token[-self._turn :], self.first[-self._turn :]
        found: dict[str, Any] = {"tokens_per_s": len(times) / sum(times), "ttft_s": sum(first) / len(first)}
        found |= {"same": f"{self._turn - self.different}/{self._turn}", "new_tokens": self.tokens * self._turn}
        return found | ({"largest_gap": self.largest_gap} if self.different else {}) | self.found()


class Plain(Way):
    """transformers' ``generate`` with all experts in memory: what none of the others can reach."""

    def __init__(self, name: str, bench: Bench) -> None:
        super().__init__(name, bench)
        self.model = bench.subject.model

    def generate(self, prompt: Tensor, tokens: int) -> tuple[list[int], float, float]:
        """See the class; the time of each token is that at which transformers asks whether it was the last."""
        marks: list[float] = []

        def note(ids: Tensor, scores: Any, **_: Any) -> Tensor:
            ids[0, -1].item()  # a GPU may not have got so far
            marks.append(time.perf_counter())
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        start = time.perf_counter()
        out = self.model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=tokens,
            stopping_criteria=[note],
        )  # fmt: skip
        return out[0, prompt.shape[1] :].tolist(), marks[0] - start, marks[-1] - marks[0]


class Hooked(Plain):
    """The same, with experts offloaded by accelerate."""

    tokens = property(lambda self: self.case.hooked)

    def __init__(self, name: str, bench: Bench) -> None:
        super().__init__(name, bench)
        self.model = bench.subject.twin()
        self.carrier = hook_experts(self.model, bench.subject.store, self.case.bandwidth, self.case.latency)
        self.carrier.moved, self._layers = 0, len(bench.subject.sites)

    def found(self) -> dict[str, Any]:
        """All experts of all layers, every pass: a new token, and a prompt."""
        a_pass = self.carrier.buffer.nbytes * self._layers / 1e6
        return {
            "demand_MB_per_token": a_pass, "prefetch_MB_per_token": 0.0, "prefill_MB": a_pass,
            "link_GB_per_s": self.carrier.moved / self.carrier.seconds / 1e9, "peak_bytes": self.carrier.buffer.nbytes,
        }  # fmt: skip


class Ours(Plain):
    """Slots, with a draft or without.

    Args:
        name: In the table. bench: Whose prompts. draft: Have one. loop: One that widens its weights in a loop.
        budget: Bytes; None: that of the case. **options: See ``Config``.
    """

    def __init__(
        self,
        name: str,
        bench: Bench,
        *,
        draft: bool = True,
        loop: bool = False,
        budget: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(name, bench)
        subject, case = bench.subject, bench.subject.case
        shared = None if not draft else subject.loop_draft if loop else subject.draft
        link = None if case.bandwidth is None else {"bandwidth": case.bandwidth, "latency": case.latency}
        self.model, self.learns = subject.twin(), draft and "k" not in options
        budget = subject.budget() if budget is None else budget
        self.method = _WithDraft(shared, budget, link=link, draft_bits=4 if draft else None, **options)
        self.engine = self.method.engine(self.model)

    def reset(self) -> None:
        """Empty the slots."""
        assert self.engine.runtime is not None
        self.engine.runtime.clear()

    def close(self) -> None:
        """Give the experts back."""
        self.method.release()

    def started(self) -> None:
        """Count from zero."""
        self.method.report = engine_report.Report()

    def generate(self, prompt: Tensor, tokens: int) -> tuple[list[int], float, float]:
        """By the engine's own clock."""
        report = self.method.report
        before = dict(report.seconds)
        out = self.model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=tokens,
            custom_generate=self.method,
        )  # fmt: skip
        taken = {stage: seconds - before.get(stage, 0.0) for stage, seconds in report.seconds.items()}
        first = taken.pop("prefill")
        return out[0, prompt.shape[1] :].tolist(), first, sum(taken.values())

    def found(self) -> dict[str, Any]:
        """From the engine's report."""
        report, runtime = self.method.report, self.engine.runtime
        assert runtime is not None
        asked, later = report.experts["requests"], report.tokens - report.generations
        found: dict[str, Any] = {name: report.experts[name] / asked for name in ("hits", "late", "misses")}
        found |= {f"{cause}_MB_per_token": report.moved[cause] / later / 1e6 for cause in ("demand", "prefetch")}
        found |= {f"{stage}_share": report.seconds[stage] / report.decode_seconds for stage in ("draft", "verify")}
        found |= {
            "prefill_MB": report.moved["prefill"] / report.generations / 1e6, "per_cycle": report.tokens_per_cycle,
            "drafted": " ".join(f"{k}x{n}" for k, n in sorted(report.drafting.items())),
            "accepted": report.accepted / report.drafted if report.drafted else None,
            "link_GB_per_s": (report.bandwidth or 0.0) / 1e9, "peak_bytes": sum(report.memory.values()),
            "slots": runtime.slots,
        }  # fmt: skip
        if report.experts["prefetched"]:
            wasted = report.experts["unused"] + report.experts["evicted"]
            found["prefetched_in_vain"] = wasted / report.experts["prefetched"]
        if report.median_error is not None:
            found["median_error"] = report.median_error
        return found | ({"notes": "; ".join(report.notes)} if report.notes else {})


class _WithDraft(MoESpeQGenerate):
    """A draft is made once for all ways."""

    def __init__(self, draft: Any, budget: int, **options: Any) -> None:
        super().__init__(budget, **options)
        self._draft = draft

    def _make(self, model: Any) -> Engine:
        return Engine(model, self.config, store=model.expert_store, draft=self._draft)
