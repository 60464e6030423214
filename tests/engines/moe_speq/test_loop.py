"""The loop: the unoffloaded model's text, whatever the cache, the draft and k; and a clean state whatever happens.

float32: in bfloat16 a pass over k + 1 rows rounds otherwise than k + 1 passes over one (trap 1).
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from ygglight.engines.moe_speq.generate import MoESpeQGenerate
from ygglight.engines.moe_speq.loop import Round

from .conftest import EXPERTS, FAMILIES, TOP_K, tiny_moe, tokens
from .speculation import CopyDraft, method, plain

SLOTS = (1, TOP_K, EXPERTS // 2, EXPERTS)
DRAFTED = (0, 1, 4, 16)
NOISES = (0.0, 0.1, float("inf"))


def check_text(family: str, slots: int, k: int, noise: float, new: int) -> MoESpeQGenerate:
    model, ids = tiny_moe(family), tokens(9)
    expected = plain(model, ids, new)
    assert len(set(expected[0].tolist())) >= 12, "boring text proves nothing"
    made = method(model, slots, CopyDraft(model, noise) if k else None, k=k)
    assert torch.equal(plain(model, ids, new, custom_generate=made), expected)
    assert made.report.fallbacks == {} and made.report.tokens == new
    assert set(made.report.drafting) <= set(range(k + 1)) and (k in made.report.drafting or k >= new)
    made.release()
    assert torch.equal(plain(model, ids, new), expected)
    return made


# -- check 1 ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("family", "corner"), [(f, i % 4) for i, f in enumerate(FAMILIES)])
def test_the_text_is_that_of_the_whole_model(family: str, corner: int) -> None:
    """Every family, and over them every number of slots and of drafted tokens."""
    made = check_text(family, SLOTS[corner], DRAFTED[(corner + 2) % 4], 0.1, 64)
    assert corner in (2, 3) or made.report.accepted > 5, "nothing was accepted, so nothing was shown"


@pytest.mark.slow
@pytest.mark.parametrize(("slots", "k"), list(itertools.product(SLOTS, DRAFTED)))
@pytest.mark.parametrize("family", FAMILIES)
def test_the_whole_grid(family: str, slots: int, k: int) -> None:
    check_text(family, slots, k, NOISES[(slots + k) % 3], 64)


# -- check 3 ---------------------------------------------------------------------------------------------------------
def test_a_worse_draft_changes_how_soon_and_not_what() -> None:
    accepted = []
    for noise in NOISES:
        report = check_text("qwen3_moe", 4, 4, noise, 48).report
        accepted.append(report.accepted / report.drafted)
    assert accepted[0] > accepted[1] > accepted[2]
    assert accepted[0] == 1.0, "a draft of the same experts sees the same text, and the same keys and values"


def test_without_prefetch_the_text_is_the_same_and_nothing_is_sent_ahead() -> None:
    model, ids = tiny_moe("olmoe"), tokens(9)
    expected = plain(model, ids, 32)
    ahead = {}
    for prefetch in (True, False):
        made = method(model, 4, CopyDraft(model, 0.05), prefetch=prefetch)
        assert torch.equal(plain(model, ids, 32, custom_generate=made), expected)
        ahead[prefetch] = made.report.moved["prefetch"]
        made.release()
    assert ahead[True] > 0 == ahead[False]


# -- check 4 ---------------------------------------------------------------------------------------------------------
def keys_and_values(made: MoESpeQGenerate, model: Any, length: int) -> list[Tensor]:
    decoder = made.engine(model).decoder
    assert decoder is not None
    return [t[:, :, :length].clone() for layer in decoder.cache.layers for t in (layer.keys, layer.values)]


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v2"])
def test_after_each_cycle_the_cache_is_that_of_a_fresh_prompt(family: str) -> None:
    model, ids = tiny_moe(family), tokens(9)
    draft = CopyDraft(model, 0.1)
    made = method(model, 4, draft)
    rounds: list[tuple[Round, list[Tensor]]] = []
    made.watch = lambda r: rounds.append((r, keys_and_values(made, model, r.cached)))
    text = plain(model, ids, 24, custom_generate=made)[0]
    made.release()
    lengths = [len(ids[0]) + 1]
    for cycle, _ in rounds:
        assert cycle.position == lengths[-1]
        lengths.append(lengths[-1] + len(cycle.tokens))
        assert cycle.cached == lengths[-1] - 1
    assert lengths[-1] == len(text) and {cycle.accepted for cycle, _ in rounds} > {0}
    for cycle, found in (rounds[len(rounds) // 2], rounds[-1]):
        fresh = method(model, EXPERTS, draft, k=0)
        plain(model, text[None, : cycle.cached], 1, custom_generate=fresh)
        expected = keys_and_values(fresh, model, cycle.cached)
        fresh.release()
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(found, expected, strict=True))
        # What the draft wrote would not pass.
        assert not all(torch.allclose(a, b.roll(1, 2), atol=1e-4) for a, b in zip(found, expected, strict=True))


def test_the_draft_is_given_the_targets_keys_and_writes_its_own() -> None:
    """A cache that the target did not write anew would show: this draft's keys are wrong."""
    model, ids = tiny_moe("mixtral"), tokens(9)
    made = method(model, 4, CopyDraft(model, 2.0))
    engine = made.engine(model)
    rounds: list[Round] = []
    made.watch = rounds.append
    text = plain(model, ids, 12, custom_generate=made)[0]
    decoder = engine.decoder
    assert decoder is not None and engine.runtime is not None
    length = decoder.length
    before = keys_and_values(made, model, length + 1)
    with engine.runtime.drafting():
        place = torch.zeros(1, dtype=torch.long)
        decoder.nodes(text[-1:], place, place, place[:, None] == 0)
    after = keys_and_values(made, model, length + 1)
    assert all(torch.equal(a[:, :, :length], b[:, :, :length]) for a, b in zip(before, after, strict=True))
    drafted = after[-1][:, :, length].clone()
    with engine.runtime.window(prefill=False):
        decoder.nodes(text[-1:], place, place, place[:, None] == 0)
    assert not torch.allclose(drafted, keys_and_values(made, model, length + 1)[-1][:, :, length], atol=1e-3)
    made.release()


# -- check 6 ---------------------------------------------------------------------------------------------------------
def test_an_end_token_inside_a_window() -> None:
    model, ids = tiny_moe("qwen2_moe"), tokens(9)
    text = plain(model, ids, 40)[0, 9:]
    draft = CopyDraft(model)  # all of a window is accepted, so that ends lie inside it
    made = method(model, 4, draft)
    inside = 0
    for place in range(8, 16):
        end = {"eos_token_id": int(text[place]), "pad_token_id": 0}
        rounds: list[Round] = []
        made.watch = rounds.append
        expected = plain(model, ids, 40, custom_generate=made, **end)
        ended = int((text == text[place]).int().argmax()) + 1
        assert torch.equal(expected[0, 9:], text[:ended])
        if rounds:
            inside += len(rounds[-1].tokens) <= rounds[-1].accepted
            assert rounds[-1].cached == 9 + ended - 1
    assert inside, "no text ended inside of a window"
    assert torch.equal(plain(model, ids, 40, custom_generate=made)[0, 9:], text), "and the next call is right"
    made.release()


@pytest.mark.parametrize("new", [1, 2, 3, 6])
def test_fewer_tokens_left_than_could_be_drafted(new: int) -> None:
    model, ids = tiny_moe("mixtral"), tokens(9)
    expected = plain(model, ids, new)
    draft = CopyDraft(model)
    made = method(model, 4, draft, k=16)
    assert torch.equal(plain(model, ids, new, custom_generate=made), expected)
    assert draft.calls == 2 * made.report.drafted and made.report.drafted == max(0, new - 2)
    made.release()


@pytest.mark.parametrize("where", ["draft", "verify"])
def test_an_error_inside_a_cycle_leaves_a_clean_state(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_moe("mixtral"), tokens(9)
    expected = plain(model, ids, 24)
    draft = CopyDraft(model, 0.1)
    made = method(model, 2, draft)
    plain(model, ids, 4, custom_generate=made)
    engine, before = made.engine(model), made.report.tokens
    assert engine.runtime is not None
    broken = draft if where == "draft" else engine.runtime._layers[1]
    right, calls = broken.forward, itertools.count()

    def fails(*args: Any, **kwargs: Any) -> Tensor:
        if next(calls) == 7:
            raise OSError("the disk is gone")
        return right(*args, **kwargs)

    monkeypatch.setattr(broken, "forward", fails)
    with pytest.raises(OSError, match="the disk is gone"):
        plain(model, ids, 24, custom_generate=made)
    monkeypatch.undo()
    assert made.report.tokens > before, "what came before it is counted"
    assert torch.equal(plain(model, ids, 24, custom_generate=made), expected)
    made.release()
    assert torch.equal(plain(model, ids, 24), expected)


# -- check 5, whole --------------------------------------------------------------------------------------------------
def distance(drawn: Tensor, exact: Tensor) -> float:
    """Total variation between drawn tokens and probabilities."""
    return float((drawn.bincount(minlength=len(exact)) / len(drawn) - exact).abs().sum() / 2)


def test_sampled_text_is_distributed_as_the_models() -> None:
    """The first three tokens after one prompt, under temperature and top-k, against the exact probabilities."""
    model, ids = tiny_moe("qwen3_moe", vocab_size=8, num_hidden_layers=1), tokens(5) % 8
    settings = {"do_sample": True, "temperature": 1.5, "top_k": 4}
    rows = 250

    def next_ones(text: Tensor) -> Tensor:
        with torch.no_grad():
            logits = model(text).logits[:, -1] / 1.5
        return logits.masked_fill(logits < logits.topk(4).values[:, -1:], -torch.inf).softmax(-1)

    joint, seen = torch.ones(1), ids
    exact = []
    for _ in range(3):
        joint = (joint[:, None] * next_ones(seen)).flatten()
        seen = torch.cat([seen.repeat_interleave(8, 0), torch.arange(8).repeat(len(seen))[:, None]], 1)
        exact.append(joint.view(-1, 8).sum(0))
    limits = []
    generator = torch.Generator().manual_seed(4)
    for place in exact:
        direct = [torch.multinomial(place, rows, True, generator=generator) for _ in range(300)]
        limits.append(sorted(distance(drawn, place) for drawn in direct)[-3])
    assert all(distance(torch.arange(8), place) > 3 * limit for place, limit in zip(exact, limits, strict=True))
    made = method(model, 8, CopyDraft(model, 0.3), k=2)
    made.generator = torch.Generator().manual_seed(3)
    found = model.generate(ids.repeat(rows, 1), max_new_tokens=3, custom_generate=made, **settings)[:, 5:]
    assert 0 < made.report.accepted < made.report.drafted
    made.release()
    for drawn, place, limit in zip(found.T, exact, limits, strict=True):
        assert distance(drawn, place) < limit
