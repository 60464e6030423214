"""Generation at batch 1: plain, transformers' assisted generation, chains and trees of every policy, Yggdrasil.

One ladder in one run: each way answers the same prompts in turn, prompt and answer timed together, as a user waits for
them. Ways with settings are swept on calibration prompts first, and the fastest setting stands for them. The text of
every way is compared with plain ``generate``; where it differs, the two best logits must be closer than rounding.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks.decode_pairs import CASES, Pair, cases, load
from benchmarks.harness import Goal, Incorrect, Options, Report, Result, Variant, measure, paired_ratio
from benchmarks.yggdrasil_baselines import LevelBeamDraft, StaticTreeDraft, sequoia
from benchmarks.yggdrasil_predictor import fit_predictor
from ygglight.engines.decode import Decoder
from ygglight.engines.yggdrasil.generate import TreeGenerate

COLUMNS = ("tokens_per_s", "per_step", "draft_share", "verify_share", "same", "chosen")
CALIBRATION = 2
"""Prompts that settings are chosen on; they are not among those timed."""
TIES = {"float32": 1e-4, "bfloat16": 0.5, "float16": 0.1}
"""Largest gap between the two best logits at which a text may part from plain generation's."""
GOALS = {"cpu": (1.0, 1.0, 1.0), "cuda": (3.98, 1.5, 1.0)}
"""Over eager decoding, over the best chain, over the best other tree: the paper's, and on a CPU simply faster."""

Generate = Callable[[Tensor], list[int]]
Makers = dict[str, Callable[[], tuple[Generate, TreeGenerate | None]]]


def run(options: Options) -> list[Report]:
    """One report per case.

    Args:
        options: from the command line; a repeat is one prompt.
    """
    return [_run(name, options) for name in cases(options.device, options.quick, options.size)]


def _run(name: str, options: Options) -> Report:
    case = CASES[name]
    pair = load(case, options.device, options.rounds + options.warmup + CALIBRATION)
    print(f"yggdrasil: {pair.line}", flush=True)
    bench = Ladder(pair, options)
    results = measure((way.variant for way in bench.ways()), options)
    report = Report("yggdrasil", pair.line, results, ("plain", "best-chain"), COLUMNS)
    for result in results:
        if result.ok:
            result.metrics.update(bench.made[result.name].metrics(result, options))
    report.goals.extend(_goals(report, options.device))
    return report


def _goals(report: Report, device: str) -> Iterator[Goal]:
    mine = [r for r in report.results if r.ok and r.name.startswith("yggdrasil")]
    if not mine:
        return
    best = min(mine, key=lambda result: sum(result.seconds))
    trees = ("sequoia", "level-beam")
    others = (
        ("plain generation", ["plain"]), ("the best chain", ["best-chain"]), ("the best other tree", list(trees)),
    )  # fmt: skip
    for (text, names), least in zip(others, GOALS[device], strict=True):
        found = [r for r in map(report.get, names) if r is not None and r.ok]
        if found:
            other = min(found, key=lambda result: sum(result.seconds))
            gain = paired_ratio(other.seconds, best.seconds)
            yield Goal(f"{best.name} {gain:.2f}x over {text} ({other.name}); goal {least}x", gain >= least)
    for name in ("static", "assisted", "prompt-lookup"):
        peer = report.get(name)
        if peer is not None and peer.ok:
            gain = paired_ratio(peer.seconds, best.seconds)
            yield Goal(f"{best.name} {gain:.2f}x over {name}; goal above 1", gain > 1)


class Ladder:
    """All ways of answering the prompts of a pair."""

    def __init__(self, pair: Pair, options: Options) -> None:
        self.pair, self.options = pair, options
        self.made: dict[str, Way] = {}
        self._expected: dict[int, list[int]] = {}
        self._rates: list[float] | None = None
        self._folder = tempfile.TemporaryDirectory()

    def ways(self) -> Iterator[Way]:
        """In the order of the ladder."""
        draft, cuda = self.pair.draft, self.options.device == "cuda"
        model = draft != "lookup"
        static: dict[str, Any] = {"cache_implementation": "static"} | ({} if cuda else {"disable_compile": True})
        ladder: list[tuple[str, Makers]] = [
            ("plain", {"": lambda: (self._hugging_face(), None)}),
            ("static", {"": lambda: (self._hugging_face(**static), None)}),
            ("decoder", {"": lambda: (self._decoder(), None)}),
            ("prompt-lookup", {"10": lambda: (self._hugging_face(prompt_lookup_num_tokens=10), None)}),
        ]
        if model:
            ladder.append(("assisted", {"": lambda: (self._hugging_face(assistant_model=draft), None)}))
        ladder.append(("best-chain", {f"K={k}": self._fixed(1, k) for k in self._few((1, 2, 3, 4, 6))}))
        if model:
            ladder.append(("sequoia", {f"{n} nodes, depth {d}": self._sequoia(n, d) for n, d in self._few(STATIC)}))
            ladder.append(("level-beam", {f"{w}x{d}, {v} nodes": self._beam(w, d, v) for w, d, v in self._few(BEAMS)}))
        ladder.append(("egt", {f"{w}x{d}": self._fixed(w, d) for w, d in self._few(TREES)}))
        ladder.append(("egt-prune", {f"{w}x{d}, {v} nodes": self._fixed(w, d, v) for w, d, v in self._few(PRUNED)}))
        ladder.append(("yggdrasil", {"": lambda: self._tree(tree="auto", plan={"prune": "tree"})}))
        if model:
            ladder.append(("yggdrasil-predictor", {"": self._with_predictor}))
        if cuda:  # on a CPU nothing overlaps: there is one plan
            ladder.append(("yggdrasil-plan", {"": lambda: self._tree(tree="auto", plan="auto")}))
        for name, makers in ladder:
            self.made[name] = Way(name, makers, self)
            yield self.made[name]

    def _few(self, settings: tuple[Any, ...]) -> tuple[Any, ...]:
        return settings[1:3] if self.options.quick else settings

    def expected(self, index: int) -> list[int]:
        """Plain generation's answer."""
        if index not in self._expected:
            self._expected[index] = self._hugging_face()(self.pair.prompts[index])
        return self._expected[index]

    def offer(self, index: int, tokens: list[int]) -> None:
        """Plain generation was just run."""
        self._expected[index] = tokens

    # -- ways --------------------------------------------------------------------------------------------------------
    def _hugging_face(self, **options: Any) -> Generate:
        def generate(prompt: Tensor) -> list[int]:
            ones = torch.ones_like(prompt)
            out = self.pair.target.generate(
                prompt, attention_mask=ones, do_sample=False, max_new_tokens=self.pair.case.tokens, **options
            )
            return out[0, prompt.shape[1] :].tolist()  # type: ignore[no-any-return]

        return generate

    def _tree(self, draft: Any = None, **options: Any) -> tuple[Generate, TreeGenerate]:
        method = TreeGenerate(self.pair.draft if draft is None else draft, **options)
        return self._hugging_face(custom_generate=method), method

    def _fixed(self, width: int, depth: int, verify: int | None = None) -> Callable[[], tuple[Generate, TreeGenerate]]:
        tree = {"width": width, "depth": depth} | ({} if verify is None else {"verify": verify})
        return lambda: self._tree(tree=tree, plan={"prune": "fixed"})

    def _decoder(self) -> Generate:
        """Our decode engine without any speculation."""
        decoder: list[Decoder] = []

        @torch.inference_mode()
        def generate(prompt: Tensor) -> list[int]:
            length = prompt.shape[1] + self.pair.case.tokens
            if not decoder or decoder[0].capacity < length:
                decoder[:] = [Decoder(self.pair.target, -(-length // 512) * 512)]
            decoder[0].reset()
            end = self.pair.target.generation_config.eos_token_id
            ends = set(end if isinstance(end, list) else [end])
            tokens: list[int] = []
            step = decoder[0].append(prompt[0])
            while True:
                best = step.logits[0, -1].argmax()
                tokens.append(int(best))
                if tokens[-1] in ends or len(tokens) == self.pair.case.tokens:
                    return tokens
                step = decoder[0].append(best[None])

        return generate

    def _sequoia(self, nodes: int, depth: int) -> Callable[[], tuple[Generate, TreeGenerate]]:
        def make() -> tuple[Generate, TreeGenerate]:
            topology = sequoia(self._acceptance(), nodes, depth)
            draft = StaticTreeDraft(self.pair.draft, self._vocabulary, topology)
            tree = {"width": nodes, "depth": max(topology.depths), "verify": nodes}
            return self._tree(draft, tree=tree, plan={"prune": "fixed"})

        return make

    def _beam(self, width: int, depth: int, verify: int) -> Callable[[], tuple[Generate, TreeGenerate]]:
        tree = {"width": width, "depth": depth, "verify": verify}
        return lambda: self._tree(LevelBeamDraft(self.pair.draft, self._vocabulary), tree=tree, plan={"prune": "fixed"})

    def _with_predictor(self) -> tuple[Generate, TreeGenerate]:
        folder = fit_predictor(self.pair, self.pair.prompts[-CALIBRATION:], self._folder.name)
        return self._tree(tree="auto", plan={"prune": "tree"}, predictor=folder)

    @property
    def _vocabulary(self) -> int:
        return int(self.pair.target.config.vocab_size)

    def _acceptance(self) -> list[float]:
        """The chance of each rank, measured on the calibration prompts: what Sequoia's search is given."""
        if self._rates is None:
            generate, method = self._tree(tree={"width": 4, "depth": 4}, plan={"prune": "fixed"})
            for prompt in self.pair.prompts[-CALIBRATION:]:
                generate(prompt)
            selector = next(iter(method.engine(self.pair.target).selectors.values()))
            self._rates = list(selector.acceptance.rates)
        return self._rates


STATIC = ((4, 3), (8, 4), (8, 6), (16, 6))
BEAMS = ((2, 3, 6), (2, 5, 8), (4, 5, 8), (4, 5, 16))
TREES = ((2, 3), (2, 5), (4, 4))
PRUNED = ((2, 4, 6), (2, 6, 8), (4, 5, 8), (4, 5, 12))
"""Settings that are swept."""


class Way:
    """A way of answering, in its best setting."""

    def __init__(self, name: str, makers: Makers, ladder: Ladder) -> None:
        self.name, self.makers, self.ladder = name, makers, ladder
        self.generate: Generate | None = None
        self.method: TreeGenerate | None = None
        self._turn, self._answer = 0, [0]
        self._lengths: list[int] = []
        self._different, self._gap = 0, 0.0

    @property
    def variant(self) -> Variant:
        """For the harness."""
        return Variant(self.name, self._step, self._prepare, self._around)

    def _prepare(self) -> dict[str, Any]:
        ladder, sweep = self.ladder, {}
        for label, make in self.makers.items():
            generate, method = make()
            if len(self.makers) > 1:
                seconds = []
                for index in range(-CALIBRATION, 0):
                    start = time.perf_counter()
                    answer = generate(ladder.pair.prompts[index])
                    seconds.append(time.perf_counter() - start)
                    self._check(index, answer)
                sweep[label] = round(sum(seconds), 2)
                if sweep[label] > min(sweep.values()):
                    continue
            self.generate, self.method, best = generate, method, label
        assert self.generate is not None
        self._check(-1, self.generate(ladder.pair.prompts[-1]))
        self._different, self._gap = 0, 0.0
        return {"chosen": best} | ({"sweep": sweep} if sweep else {})

    def _step(self) -> None:
        assert self.generate is not None
        self._answer = self.generate(self.ladder.pair.prompts[self._turn])

    @contextmanager
    def _around(self) -> Iterator[None]:
        if self._turn == self.ladder.options.warmup and self.method is not None:
            self.method.report = type(self.method.report)()
        yield
        if self.name == "plain":
            self.ladder.offer(self._turn, self._answer)
        self._check(self._turn, self._answer)
        self._lengths.append(len(self._answer))
        self._turn += 1

    def _check(self, index: int, answer: list[int]) -> None:
        """Raise if the answer is wrong; count it if it is a tie that rounding decided otherwise."""
        expected = self.ladder.expected(index)
        if answer == expected:
            return
        same = next((i for i, (a, b) in enumerate(zip(answer, expected, strict=False)) if a != b), None)
        if same is None:
            raise Incorrect(f"{len(answer)} tokens, plain generation gives {len(expected)}")
        pair = self.ladder.pair
        prefix = torch.tensor([expected[:same]], device=pair.target.device, dtype=torch.long)
        with torch.inference_mode():
            logits = pair.target(torch.cat([pair.prompts[index], prefix], 1)).logits[0, -1].float()
        gap = float(logits.max() - logits[[answer[same], expected[same]]].min())
        if gap > TIES[pair.case.dtype]:
            raise Incorrect(f"token {same} of prompt {index} differs, and the logits are {gap:.2g} apart")
        self._different += 1
        self._gap = max(self._gap, gap)

    def metrics(self, result: Result, options: Options) -> dict[str, Any]:
        """Tokens a second over all timed prompts, and what the engine reports of them."""
        lengths = self._lengths[-len(result.seconds) :]
        found: dict[str, Any] = {
            "tokens_per_s": sum(lengths) / sum(result.seconds), "tokens": sum(lengths),
            "same": f"{len(lengths) + options.warmup - self._different}/{len(lengths) + options.warmup}",
        }  # fmt: skip
        if self._different:
            found["largest_gap"] = self._gap
        if self.method is not None:
            report = self.method.report
            found |= {"per_step": report.tokens_per_step, "verified": report.verified}
            found |= {f"{s}_share": report.seconds[s] / report.decode_seconds for s in ("draft", "verify", "host")}
            found["shapes"] = {f"{w}x{d}": n for (w, d), n in report.shapes.most_common(5)}
        return found
