"""What an iteration leaves behind: caches, host reads, the forecast; checks A5, A14, A16 and A17 of the brief."""

from __future__ import annotations

import copy
import functools
import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import LogitsProcessorList, MaxLengthCriteria, StoppingCriteriaList

from ygglight.engines.decode import Decoder
from ygglight.engines.decode.processors import NodeProcessors
from ygglight.engines.decode.stopping import Stopping
from ygglight.engines.yggdrasil.config import PLANS, Config, StagePlan
from ygglight.engines.yggdrasil.drafts import ModelDraft
from ygglight.engines.yggdrasil.engine import Engine
from ygglight.engines.yggdrasil.generate import TreeGenerate
from ygglight.engines.yggdrasil.loop import Iteration
from ygglight.engines.yggdrasil.objective import Shape
from ygglight.engines.yggdrasil.selector import Selector

from .conftest import SHAPE, noisy, plain, prompts

TREE = {"width": 3, "depth": 4, "verify": 9}


@pytest.fixture(scope="module")
def windowed() -> Any:
    """Its layers see the last six tokens, or all."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    return Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE, head_dim=16, sliding_window=6)).eval()


def run(engine: Engine, prompt: Tensor, new: int) -> Iterator[list[int]]:
    """All tokens after each iteration."""
    limit = len(prompt) + new
    stopping = Stopping(StoppingCriteriaList([MaxLengthCriteria(limit)]))
    text = prompt.tolist()
    for tokens in engine.generate(prompt, NodeProcessors(LogitsProcessorList()), stopping):
        text += tokens
        if len(text) < limit:  # the last iteration commits nothing to the draft
            yield text


def off(decoder: Decoder, text: list[int]) -> float:
    """How far keys and values of a decoder are from those of a fresh prompt, at most, over all layers."""
    fresh = Decoder(decoder.model, decoder.capacity)
    fresh.append(torch.tensor(text[: decoder.length]))
    worst = 0.0
    for ours, theirs in zip(decoder.cache.layers, fresh.cache.layers, strict=True):
        for a, b in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            worst = max(worst, float((a - b)[:, :, : decoder.length].abs().max()))
    return worst


class Alternating(Selector):
    """Every third iteration is plain, as when the objective changes its mind."""

    count = 0

    def next(self, survival: Any = None) -> Shape | None:
        self.count += 1
        return None if self.count % 3 == 0 else super().next(survival)


def engine_of(target: Any, draft: Any, plan: StagePlan, static: bool) -> Engine:
    config = Config(tree=TREE, plan=plan)
    engine = Engine(target, draft, config, static=static)
    selector = Alternating(config, None)
    engine._selector = lambda *args: selector  # type: ignore[method-assign]
    return engine


# -- keys and values -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("make", ["target", "windowed"])
def test_both_caches_are_those_of_a_fresh_prompt(
    request: pytest.FixtureRequest, make: str, plan: StagePlan, static: bool
) -> None:
    """A5, after each iteration, drafted or plain."""
    model = copy.deepcopy(request.getfixturevalue(make)).double()
    engine = engine_of(model, noisy(model, 0.08), plan, static)
    ahead = Counter[int]()
    for number, text in enumerate(run(engine, prompts(1)[0][0], 40)):
        assert engine.decoder is not None and engine.decoder.length == len(text) - 1  # the root is not in it yet
        assert off(engine.decoder, text) < 1e-9
        draft = engine.draft
        if number:  # the draft takes in the prompt with its first tree
            assert isinstance(draft, ModelDraft) and draft.decoder is not None
            known = draft.decoder.length
            ahead[len(text) - known] += 1
            assert off(draft.decoder, text) < 1e-9
            assert draft._pending == text[known:] or (known == len(text) and draft._pending == text[-1:])
    assert number > 8
    if plan.head and static:
        assert ahead[0] > 3, "the head pass never went ahead"


def test_a_cache_that_is_wrong_is_found_out(target: Any) -> None:
    model = copy.deepcopy(target).double()
    decoder = Decoder(model, 64)
    text = prompts(1)[0][0].tolist()
    decoder.append(torch.tensor(text))
    assert off(decoder, text) < 1e-12 < 1e-3 < off(decoder, [*text[:-1], text[-1] + 1])


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_plain_steps_in_between_cost_the_draft_nothing(target: Any, plan: StagePlan) -> None:
    """A draft that is the target is accepted whole, after a plain step as well."""
    engine = engine_of(target, target, plan, static=True)
    for _ in run(engine, prompts(1)[0][0], 60):
        pass
    report = engine.take_report()
    assert report.iterations - report.drafted > 3
    assert report.accepted > 4 * (report.drafted - 1), "but for the last tree, which the limit may cut"


# -- stage plans -----------------------------------------------------------------------------------------------------
def test_all_stage_plans_give_one_text(target: Any, drafts: dict[str, Any]) -> None:
    """A17: the same tokens, and the same number of steps wherever the same nodes are verified."""
    for ids in prompts(3):
        texts, steps = [], {}
        for plan in PLANS:
            made = TreeGenerate(drafts["noisy"], tree=TREE, plan=plan)
            made.engine(target).static = True
            texts.append(plain(target, ids, 48, custom_generate=made))
            steps[plan] = made.report.iterations
        assert all(torch.equal(text, texts[0]) for text in texts)
        assert len(set(steps.values())) == 1, steps


# -- host reads ------------------------------------------------------------------------------------------------------
class Reads(TorchFunctionMode):
    """Counts whatever hands a tensor's numbers to the host."""

    names = frozenset({"tolist", "item", "numpy", "__bool__", "__int__", "__float__", "__index__", "nonzero", "equal"})

    def __init__(self) -> None:
        super().__init__()
        self.seen = Counter[str]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in self.names:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("plan", "reads"),
    [(StagePlan(True, True, "fixed"), 1), (StagePlan(True, False, "fixed"), 1), (StagePlan(True, True, "tree"), 2)],
    ids=str,
)
@pytest.mark.parametrize("settings", [{}, {"do_sample": True, "top_k": 9, "repetition_penalty": 1.2}], ids=["", "more"])
def test_the_host_reads_once_an_iteration(
    target: Any, drafts: dict[str, Any], plan: StagePlan, reads: int, settings: dict[str, Any]
) -> None:
    """A16, by what the code asks for: static shapes as on a GPU. Pruning each very tree is one read more, and says so.

    Without a tail pass a CPU looks up which node was run last, and a GPU does not.
    """
    made = TreeGenerate(drafts["noisy"], tree=TREE, plan=plan)
    made.engine(target).static = True
    marks: list[int] = []
    with Reads() as mode:
        made.watch = lambda iteration: marks.append(mode.seen.total())
        target.generate(prompts(1)[0], max_new_tokens=64, **{"do_sample": False} | settings, custom_generate=made)
    assert len(marks) > 8 and made.report.fallbacks == {}
    between = {b - a for a, b in itertools.pairwise(marks)}
    assert between <= {reads, 1}, "a plain step at the end prunes nothing"
    assert reads in between
    assert made.report.reads <= reads * made.report.iterations


# -- the forecast ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("tree", [TREE, {"width": 1, "depth": 5}, {"width": 8, "depth": 2}], ids=str)
def test_the_forecast_of_accepted_tokens_comes_true(target: Any, tree: dict[str, int]) -> None:
    """A14: once calibrated, the values of the verified nodes add up to what is accepted, within a tenth."""
    made = TreeGenerate(noisy(target, 0.05), tree=tree)
    pairs: list[tuple[float, int]] = []

    def watch(iteration: Iteration) -> None:
        if iteration.shape is not None and iteration.shape.depth == tree["depth"]:  # not cut at the end of a text
            pairs.append((float(iteration.tree.scores.exp().sum()), len(iteration.verdict.tokens)))

    made.watch = watch
    for ids in prompts(12):
        plain(target, ids, 96, custom_generate=made)
    later = pairs[len(pairs) // 4 :]
    promised, came = (sum(column) / len(later) for column in zip(*later, strict=True))
    assert len(later) > 120 and came > 1.3
    assert promised == pytest.approx(came, rel=0.1)


# -- compilation -----------------------------------------------------------------------------------------------------
def test_after_warming_up_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch, target: Any) -> None:
    """A16: prompts of any length and texts that end anywhere need no more than the widths of the tree."""
    from torch._dynamo.testing import CompileCounter

    counter, compiled = CompileCounter(), torch.compile
    torch._dynamo.reset()

    @functools.wraps(compiled)
    def counted(model: Any, **kwargs: Any) -> Any:
        return compiled(model, backend=counter, **kwargs)

    monkeypatch.setattr(torch, "compile", counted)
    draft = noisy(target, 0.08)
    made = TreeGenerate(draft, tree={"width": 5, "depth": 4, "verify": 12}, compile=True)
    seen: list[int] = []
    for ids in [*prompts(6), *prompts(6, length=23, seed=4)]:
        assert torch.equal(plain(target, ids, 40), plain(target, ids, 40, custom_generate=made))
        seen.append(counter.frame_count)
    torch._dynamo.reset()
    assert seen[-1] == seen[6], f"compiled once more, for prompts of other lengths: {seen}"
    assert 3 < seen[-1] < 16, "a width each of target and draft; near the end trees are cut"
