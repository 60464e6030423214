"""Greedy text by a tree is the text of plain generation: checks A1, A2, A6 of the brief."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from ygglight.engines.yggdrasil.config import PLANS
from ygglight.engines.yggdrasil.generate import TreeGenerate
from ygglight.engines.yggdrasil.predictor import DepthPredictor

from .conftest import SHAPE, close_calls, plain, prompts

NEW = 96
TREES: dict[str, Any] = {
    "chain": {"width": 1, "depth": 4},
    "bush": {"width": 8, "depth": 1},
    "pruned": {"width": 4, "depth": 4, "verify": 6},
    "whole": {"width": 3, "depth": 5},
    "auto": "auto",
}
# Every pair of (tree, draft), of (tree, stage plan) and of (draft, static) comes up; the whole product is slow.
PAIRS = [
    (tree, draft, PLANS[(i + j) % len(PLANS)], (i + j // 2) % 2 == 0)
    for i, tree in enumerate(TREES)
    for j, draft in enumerate(("itself", "noisy", "random", "wrong", "extreme", "lookup"))
]


def method(target: Any, draft: Any, tree: Any, plan: Any, static: bool) -> TreeGenerate:
    made = TreeGenerate(draft, tree=TREES.get(tree, tree), plan=plan)
    made.engine(target).static = static
    return made


def check(target: Any, made: TreeGenerate, count: int, new: int = NEW) -> int:
    ties = 0
    for ids in prompts(count):
        expected = plain(target, ids, new)
        assert len(set(expected[0, -96:].tolist())) >= 20, "boring text proves nothing"
        ties += close_calls(target, expected, plain(target, ids, new, custom_generate=made))
    return ties


@pytest.mark.parametrize(("tree", "draft", "plan", "static"), PAIRS, ids=lambda value: str(value))
def test_greedy_text_is_that_of_plain_generation(
    target: Any, drafts: dict[str, Any], tree: str, draft: str, plan: Any, static: bool
) -> None:
    made = method(target, drafts[draft], tree, plan, static)
    ties = check(target, made, 1)
    assert ties == 0
    assert made.report.fallbacks == {}
    assert made.report.iterations > 0


@pytest.mark.slow
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("tree", TREES)
def test_the_whole_product_over_many_prompts(
    target: Any, drafts: dict[str, Any], tree: str, plan: Any, static: bool
) -> None:
    ties = sum(check(target, method(target, draft, tree, plan, static), 7) for draft in drafts.values())
    print(f"{tree}, {plan}, static={static}: {ties} ties in {7 * len(drafts)} texts")


@pytest.mark.slow
def test_two_hundred_prompts_under_all_settings_in_turn(target: Any, drafts: dict[str, Any], tmp_path: Path) -> None:
    """A1 as it is written: 200 prompts of 128 new tokens; the depth predictor on and off, too."""
    torch.manual_seed(0)
    DepthPredictor(target.config.hidden_size, 8, width=8).save(tmp_path)
    settings = list(itertools.product(TREES, PLANS, (False, True), (None, str(tmp_path))))
    kinds = [draft for draft in drafts.values() if draft != "lookup"]
    made: dict[Any, TreeGenerate] = {}
    ties = 0
    for number, ids in enumerate(prompts(200, seed=8)):
        tree, plan, static, predictor = key = settings[number % len(settings)]
        if key not in made:
            made[key] = TreeGenerate(kinds[number % len(kinds)], tree=TREES[tree], plan=plan, predictor=predictor)
            made[key].engine(target).static = static
        expected = plain(target, ids, 128)
        assert len(set(expected[0, -96:].tolist())) >= 20, "boring text proves nothing"
        ties += close_calls(target, expected, plain(target, ids, 128, custom_generate=made[key]))
    steps = sum(one.report.iterations for one in made.values())
    print(f"{ties} ties in 200 texts under {len(settings)} settings, {steps} steps")
    assert len(made) == len(settings) == 120 and steps < 200 * 127
    assert not any(one.report.fallbacks for one in made.values())


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_a_draft_that_is_the_target_is_accepted_whole(target: Any, plan: Any) -> None:
    for tree, depth in (("chain", 4), ("pruned", 4)):
        made = method(target, target, tree, plan, static=True)
        ids = prompts(1)[0]
        plain(target, ids, 1 + 8 * (depth + 1), custom_generate=made)  # the first token, then whole iterations
        assert made.report.iterations == 8
        assert made.report.tokens_per_step == depth + 1


def test_a_draft_that_is_always_wrong_gives_one_token_a_step(target: Any, drafts: dict[str, Any]) -> None:
    made = method(target, drafts["wrong"], "chain", "auto", static=False)
    plain(target, prompts(1)[0], 65, custom_generate=made)
    assert made.report.tokens_per_step == 1.0
    assert made.report.accepted == 0


def test_a_shorter_text_is_a_prefix_of_a_longer_one(target: Any, drafts: dict[str, Any]) -> None:
    ids = prompts(1)[0]
    made = TreeGenerate(drafts["noisy"], tree={"width": 3, "depth": 4})
    longest = plain(target, ids, 40, custom_generate=made)
    for new in (1, 2, 3, 4, 5, 6, 7, 11, 18, 29, 39):
        shorter = plain(target, ids, new, custom_generate=made)
        assert shorter.shape[1] == ids.shape[1] + new
        assert torch.equal(shorter, longest[:, : shorter.shape[1]])


@pytest.mark.parametrize("static", [False, True])
def test_end_tokens_stop_where_plain_generation_stops(target: Any, drafts: dict[str, Any], static: bool) -> None:
    ids = prompts(1)[0]
    text = plain(target, ids, 60)[0, ids.shape[1] :].tolist()
    made = method(target, drafts["itself"], "whole", "auto", static)
    for end in (text[0], text[1], text[7], text[30]):
        expected = plain(target, ids, 60, eos_token_id=end, pad_token_id=0)
        assert expected.shape[1] < ids.shape[1] + 60
        assert torch.equal(plain(target, ids, 60, eos_token_id=end, pad_token_id=0, custom_generate=made), expected)


def architectures() -> list[tuple[str, dict[str, Any]]]:
    window = {"sliding_window": 6}
    return [
        ("Qwen2", {}), ("Qwen3", {"head_dim": 16}), ("Mistral", window), ("Phi", {}), ("GPTNeoX", {}),
        ("Gemma2", {"head_dim": 16, **window}), ("Gemma3Text", {"head_dim": 16, **window}),
        ("Qwen3Moe", {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}),
        ("GptOss", {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": None,
        **window}),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "changes"), architectures(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_other_architectures(name: str, changes: dict[str, Any]) -> None:
    import transformers

    stem = name.removesuffix("Text")
    shape = {k: v for k, v in SHAPE.items() if name != "GPTNeoX" or k != "num_key_value_heads"}
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**shape | changes)
    model = getattr(transformers, f"{stem}ForCausalLM")(config).eval()
    made = TreeGenerate(model, tree={"width": 3, "depth": 4, "verify": 9})
    for ids in prompts(2, length=12):
        expected = plain(model, ids, 48)
        close_calls(model, expected, plain(model, ids, 48, custom_generate=made))
    assert made.report.fallbacks == {}
    assert made.report.tokens_per_step > 3, "its own draft: a lower figure means wrong keys or positions"


def test_trees_of_all_sizes_reuse_one_engine(target: Any, drafts: dict[str, Any]) -> None:
    made = TreeGenerate(drafts["noisy"], tree={"width": 2, "depth": 3})
    for new, ids in itertools.product((5, 90, 20), prompts(2, length=30)):
        close_calls(target, plain(target, ids, new), plain(target, ids, new, custom_generate=made))
