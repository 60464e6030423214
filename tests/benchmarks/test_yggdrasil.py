"""The ladder of the Yggdrasil benchmark on a tiny pair: right baselines, a wrong way that is caught, shells."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch

from benchmarks import yggdrasil
from benchmarks.decode_pairs import Case, Pair
from benchmarks.harness import Incorrect, Options
from benchmarks.shell_model import shell
from benchmarks.yggdrasil_baselines import sequoia


def llama(seed: int = 0, **changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    shape = {
        "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "initializer_range": 0.2,
        "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": 3, "pad_token_id": 0,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**shape | changes)).eval()


@pytest.fixture(scope="module")
def pair() -> Pair:
    target = llama()
    draft = copy.deepcopy(target)
    generator = torch.Generator().manual_seed(1)
    for parameter in draft.parameters():
        parameter.data += 0.05 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    prompts = [torch.randint(4, 97, (1, n), generator=generator) for n in (5, 9, 12, 7, 6)]
    return Pair(target, draft, prompts, Case("tiny", "tiny", "none", "float32", tokens=20), None)


# -- the ladder ------------------------------------------------------------------------------------------------------
def test_every_way_of_the_ladder_says_what_plain_generation_says(pair: Pair) -> None:
    options = Options(quick=True, repeats=2)
    ladder = yggdrasil.Ladder(pair, options)
    results = yggdrasil.measure((way.variant for way in ladder.ways()), options, say=lambda line: None)
    assert {r.name: r.status for r in results} == dict.fromkeys(ladder.made, "ok")
    assert {"sequoia", "level-beam", "assisted", "yggdrasil-predictor"} <= set(ladder.made)
    for result in results:
        metrics = ladder.made[result.name].metrics(result, options)
        assert metrics["same"] == "3/3" and metrics["tokens"] > 20
    per_step = ladder.made["level-beam"].metrics(results[-1], options)["per_step"]
    assert per_step > 1.3, "the draft is good, and trees must show it"


def test_a_way_that_says_something_else_is_caught(pair: Pair) -> None:
    ladder = yggdrasil.Ladder(pair, Options(quick=True))
    way = yggdrasil.Way("liar", {}, ladder)
    answer = list(ladder.expected(0))
    way._check(0, answer)
    with pytest.raises(Incorrect, match="plain generation gives"):
        way._check(0, answer[:-1])
    with pytest.raises(Incorrect, match="token 7 of prompt 0 differs"):
        way._check(0, [*answer[:7], (answer[7] + 1) % 97, *answer[8:]])


# -- Sequoia's search ------------------------------------------------------------------------------------------------
def expected_tokens(parents: tuple[int, ...], ranks: tuple[int, ...], rates: list[float]) -> float:
    chance = [1.0]
    for parent, rank in zip(parents[1:], ranks[1:], strict=True):
        chance.append(chance[parent] * rates[rank])
    return sum(chance)


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_the_static_tree_is_the_best_of_all(depth: int) -> None:
    """Against every tree of five nodes: parents and ranks tried out."""
    rates = [0.6, 0.2, 0.1, 0.05]
    found = sequoia(rates, 5, depth)
    best = 0.0
    for parents in itertools.product(*(range(n) for n in range(1, 5))):
        tree, depths, ranks = (-1, *parents), [0], [0]
        for node in range(1, 5):
            depths.append(depths[tree[node]] + 1)
            ranks.append(sum(tree[other] == tree[node] for other in range(1, node)))
        if max(depths) <= depth and max(ranks) < len(rates):
            best = max(best, expected_tokens(tree, tuple(ranks), rates))
    assert max(found.depths) <= depth
    assert all(parent < node for node, parent in enumerate(found.parents))
    assert expected_tokens(found.parents, found.ranks, rates) == pytest.approx(best)


# -- shells ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("tied", [False, True])
def test_a_shell_says_the_same(tied: bool) -> None:
    model = llama(tie_word_embeddings=tied)
    for parameter in model.named_parameters():
        if "norm" in parameter[0]:
            torch.nn.init.uniform_(parameter[1], 0.5, 1.5)
    sizes = {"hidden_size": 160, "intermediate_size": 200, "num_hidden_layers": 5, "num_key_value_heads": 5}
    big = shell(model, sizes)
    ids = torch.randint(4, 97, (2, 30))
    with torch.no_grad():
        mine, theirs = big(ids).logits, model(ids).logits
    torch.testing.assert_close(mine, theirs, rtol=2e-4, atol=2e-4)
    assert sum(p.numel() for p in big.parameters()) > 4 * sum(p.numel() for p in model.parameters())
    # The work is real: what was added is not zero where it may be anything.
    assert big.model.layers[0].self_attn.q_proj.weight[64:, :64].abs().min() > 0
    ids = ids[:1, :8]
    said = [m.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=None) for m in (model, big)]
    assert torch.equal(*said)


def test_a_shell_that_is_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match="hidden_size=32 is smaller than the model's 64"):
        shell(llama(), {"hidden_size": 32})
