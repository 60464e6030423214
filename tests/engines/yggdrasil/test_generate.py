"""``generate(..., custom_generate=ygglight.yggdrasil(draft))`` takes what ``generate`` takes, and says the same."""

from __future__ import annotations

import copy
import itertools
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ygglight
from ygglight.engines.yggdrasil.decode_log import read_log
from ygglight.engines.yggdrasil.generate import TreeGenerate, routed
from ygglight.engines.yggdrasil.loop import Iteration
from ygglight.engines.yggdrasil.objective import Costs, Latency
from ygglight.modules.testing import tiny_causal_lm

from .conftest import VOCABULARY, close_calls, llama, noisy, plain, prompts

TREE = {"width": 3, "depth": 4}
PADS = (4, 1, 0)
"""Padding before each prompt of the batch."""
LENGTH, NEW = 12, 24

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def draft(target: Any) -> Any:
    return noisy(target, 0.08)


@pytest.fixture
def made(draft: Any) -> TreeGenerate:
    return ygglight.yggdrasil(draft, tree=TREE)


def batch() -> dict[str, Tensor]:
    """Three prompts of different lengths, padded on the left with a token that also occurs in them."""
    ids = torch.randint(0, VOCABULARY, (3, LENGTH), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    for row, pad in enumerate(PADS):
        mask[row, :pad] = 0
        ids[row, :pad] = ids[row, -1]
    return {"input_ids": ids, "attention_mask": mask}


def one() -> Tensor:
    return prompts(1)[0]


def check_lively(text: Tensor) -> None:
    assert len(set(text.flatten().tolist())) >= 20, "boring text proves nothing"


def same(model: Any, made: TreeGenerate, new: int | None = NEW, **kwargs: Any) -> Tensor:
    """Generates both ways; asserts that shape and tokens are equal, and returns them."""
    kwargs = {"do_sample": False, **batch()} | kwargs
    if new is not None:
        kwargs["max_new_tokens"] = new
    expected = model.generate(**kwargs)
    found = model.generate(**kwargs, custom_generate=made)
    assert type(found) is type(expected)
    expected, found = (x if isinstance(x, Tensor) else x.sequences for x in (expected, found))
    assert found.dtype == expected.dtype and torch.equal(found, expected)
    return expected


# -- batches and lengths -------------------------------------------------------------------------------------------
def test_a_batch_padded_on_the_left_equals_plain_generation(target: Any, made: TreeGenerate) -> None:
    check_lively(same(target, made)[:, LENGTH:])
    assert made.report.generations == 3 and made.report.fallbacks == {}
    assert made.report.tokens_per_step > 1, "the draft was of no use, so nothing was shown"


def test_each_row_is_the_text_of_its_prompt_alone(target: Any, made: TreeGenerate) -> None:
    given = batch()
    together = target.generate(**given, do_sample=False, max_new_tokens=NEW, custom_generate=made)
    for row, pad in enumerate(PADS):
        alone = plain(target, given["input_ids"][row : row + 1, pad:], NEW)
        assert torch.equal(together[row : row + 1, pad:], alone)


def test_rows_that_end_earlier_are_padded_on_the_right(target: Any, made: TreeGenerate) -> None:
    text = target.generate(**batch(), do_sample=False, max_new_tokens=NEW)[:, LENGTH:]
    ends = [int(text[0, 5]), int(text[1, 9])]
    found = same(target, made, eos_token_id=ends, pad_token_id=1)
    assert (found[:, LENGTH:] == 1).sum() > 3, "no row ended earlier than another"
    same(target, made, eos_token_id=ends[0])  # then the end token pads


@pytest.mark.parametrize("new", [1, 2, 3])
def test_very_short_answers(target: Any, made: TreeGenerate, new: int) -> None:
    assert same(target, made, new=new).shape == (3, LENGTH + new)


def test_other_ways_to_say_how_long(target: Any, made: TreeGenerate) -> None:
    from transformers import GenerationConfig

    assert same(target, made, new=None, max_length=30).shape[1] == 30
    config = GenerationConfig(max_new_tokens=7, do_sample=False)
    given = batch()
    for count, kwargs in ((7, {}), (9, {"max_new_tokens": 9})):
        found = target.generate(**given, generation_config=config, custom_generate=made, **kwargs)
        assert torch.equal(found, target.generate(**given, generation_config=config, **kwargs))
        assert found.shape[1] == LENGTH + count
    with pytest.raises(ValueError, match="max_length"):
        target.generate(**given, max_length=5, custom_generate=made)


def test_a_models_own_generation_config_counts(made: TreeGenerate) -> None:
    model = llama()
    model.generation_config.max_new_tokens = 5
    assert same(model, made, new=None).shape[1] == LENGTH + 5


@pytest.mark.parametrize("name", ["inputs", "input_ids"])
def test_names_of_the_prompt(target: Any, made: TreeGenerate, name: str) -> None:
    given = batch()
    found = target.generate(
        **{name: given["input_ids"]}, attention_mask=given["attention_mask"], max_new_tokens=9, custom_generate=made
    )
    assert torch.equal(found, same(target, made, new=9))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.uint8, torch.float32], ids=str)
def test_dtypes_of_the_mask(target: Any, made: TreeGenerate, dtype: torch.dtype) -> None:
    same(target, made, new=9, attention_mask=batch()["attention_mask"].to(dtype))
    assert made.report.fallbacks == {}


def test_int32_prompts_and_no_mask(target: Any, made: TreeGenerate) -> None:
    same(target, made, new=9, input_ids=batch()["input_ids"].int())
    same(target, made, new=9, attention_mask=None)
    same(target, made, new=24, input_ids=torch.tensor([[5]]), attention_mask=None)
    assert made.report.fallbacks == {}


def test_the_caches_grow_with_the_prompts(draft: Any) -> None:
    model = llama(max_position_embeddings=4096)
    made = ygglight.yggdrasil(noisy(model, 0.08), tree=TREE)
    capacities = []
    for length in (10, 530, 20, 1100):
        same(model, made, new=24, input_ids=prompts(1, length)[0], attention_mask=None)
        decoder = made.engine(model).decoder
        assert decoder is not None
        capacities.append(decoder.capacity)
    assert capacities[0] < capacities[1] == capacities[2] < capacities[3]
    made.release()
    same(model, made, new=9)


def test_the_same_method_in_and_outside_of_inference_mode(target: Any, draft: Any) -> None:
    made = ygglight.yggdrasil(draft, tree=TREE)
    for i, mode in enumerate((torch.inference_mode, torch.no_grad, torch.enable_grad, torch.inference_mode)):
        with mode():
            same(target, made, new=12, input_ids=prompts(1, 10 + 300 * (i % 2))[0], attention_mask=None)


def test_one_method_serves_two_models(target: Any, draft: Any) -> None:
    other = llama(7)
    made = ygglight.yggdrasil(draft, tree=TREE)
    for model in (target, other, target):
        same(model, made, new=12)
    assert made.engine(target) is not made.engine(other)


def test_a_prompt_beyond_max_tokens_is_an_error_that_names_the_limit(target: Any, draft: Any) -> None:
    made = ygglight.yggdrasil(draft, tree=TREE, max_tokens=LENGTH)
    with pytest.raises(ValueError, match=rf"the prompt has {LENGTH} tokens and max_tokens is {LENGTH}"):
        target.generate(one()[:, :1].repeat(1, LENGTH), max_new_tokens=4, custom_generate=made)
    bounded = ygglight.yggdrasil(draft, tree=TREE, max_tokens=LENGTH + 8)
    ids = prompts(1, LENGTH)[0]
    assert torch.equal(plain(target, ids, 30, custom_generate=bounded), plain(target, ids, 8))


# -- settings ------------------------------------------------------------------------------------------------------
PROCESSED: list[dict[str, Any]] = [
    {"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 2}, {"min_p": 0.1}, {"suppress_tokens": [1, 2, 3]},
    {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3}, {"forced_eos_token_id": 4},
]  # fmt: skip
OTHERS: list[dict[str, Any]] = [
    {"use_cache": False}, {"cache_implementation": "static"}, {"max_time": 100.0}, {"return_dict_in_generate": True},
    {"output_scores": True}, {"remove_invalid_values": True},
]  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "static"),
    [(s, static) for s in PROCESSED for static in (False, True)] + [(s, False) for s in OTHERS],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "static" if value else "",
)
def test_settings_a_tree_can_follow(target: Any, made: TreeGenerate, settings: dict[str, Any], static: bool) -> None:
    made.engine(target).static = static
    check_lively(same(target, made, **settings)[:, LENGTH:])
    assert made.report.fallbacks == {}


def test_settings_change_the_text(target: Any, made: TreeGenerate) -> None:
    """Else the test above could pass with processors that are never called."""
    texts = [same(target, made, **s) for s in ({}, {"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 1})]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(texts, 2))


def test_least_lengths(target: Any, made: TreeGenerate) -> None:
    text = target.generate(**batch(), do_sample=False, max_new_tokens=NEW)[:, LENGTH:]
    end = {"eos_token_id": int(text[0, 5]), "pad_token_id": 0}
    assert (text[0] == end["eos_token_id"]).any()
    for least in ({"min_length": LENGTH + 12}, {"min_new_tokens": 12}):
        found = same(target, made, **end, **least)
        assert not (found[0, LENGTH : LENGTH + 10] == end["eos_token_id"]).any()
    assert made.report.fallbacks == {}


def test_a_users_stopping_criterion(target: Any, made: TreeGenerate) -> None:
    from transformers import StoppingCriteria, StoppingCriteriaList

    class Sevens(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            return input_ids[:, -1] % 7 == 0

    for ids in prompts(4):
        text = same(
            target, made, input_ids=ids, attention_mask=None, stopping_criteria=StoppingCriteriaList([Sevens()])
        )
        new = text[0, ids.shape[1] :]
        assert int(new[-1]) % 7 == 0 and not (new[:-1] % 7 == 0).any()


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A random model that speaks, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = tiny_causal_lm(tmp_path_factory.mktemp("m"), initializer_range=0.2, tie_word_embeddings=False)
    tokenizer = AutoTokenizer.from_pretrained(where)
    tokenizer.pad_token = tokenizer.eos_token
    return AutoModelForCausalLM.from_pretrained(where).eval(), tokenizer


def test_stop_strings(spoken: tuple[Any, Any]) -> None:
    from transformers import GenerationConfig, StopStringCriteria

    model, tokenizer = spoken
    made = ygglight.yggdrasil(noisy(model, 0.05), tree=TREE)
    ids = tokenizer("the quick brown", return_tensors="pt").input_ids
    common: dict[str, Any] = {"do_sample": False, "max_new_tokens": 40, "pad_token_id": 0}
    whole = model.generate(ids, **common)
    check_lively(whole[:, ids.shape[1] :])
    text = tokenizer.decode(whole[0, ids.shape[1] :])
    stops = [next(text[i : i + 2] for i in range(12, len(text)) if text[i : i + 2].isascii() and text[i : i + 2])]
    expected = model.generate(ids, **common, stop_strings=stops, tokenizer=tokenizer)
    assert expected.shape[1] < whole.shape[1]

    criteria = [StopStringCriteria(tokenizer, stops)]  # transformers' own refuses stop_strings here: see the docstring
    assert torch.equal(model.generate(ids, **common, stopping_criteria=criteria, custom_generate=made), expected)
    with routed([model], made):
        assert torch.equal(model.generate(ids, **common, stop_strings=stops, tokenizer=tokenizer), expected)
        ends = model.generation_config.eos_token_id
        config = GenerationConfig(**common, stop_strings=stops, eos_token_id=ends)
        assert torch.equal(model.generate(ids, config, tokenizer=tokenizer), expected)
        assert config.stop_strings == stops, "the user's object was changed"
        with pytest.raises(ValueError, match="add tokenizer="):
            model.generate(ids, **common, stop_strings=stops)
    assert made.report.fallbacks == {}


# -- what goes to transformers' own loop ---------------------------------------------------------------------------
class Favours:
    """A user's logits processor, of which nobody knows what it reads."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        scores[:, input_ids[0, -1] // 2] += 5
        return scores


def unusual(name: str) -> dict[str, Any]:
    given = batch()
    flipped = {"attention_mask": given["attention_mask"].flip(1)}
    nothing = given["attention_mask"].clone()
    nothing[2] = 0
    return {
        "num_beams": {"num_beams": 2},
        "output_scores": {"output_scores": True, "return_dict_in_generate": True},
        "Favours": {"logits_processor": [Favours()]},
        "NoBadWords": {"bad_words_ids": [[3]]},
        "left padding": flipped,
        "padding only": {"attention_mask": nothing},
    }[name]


REASONS = ["num_beams", "output_scores", "Favours", "NoBadWords", "left padding", "padding only"]


@pytest.mark.parametrize("reason", REASONS)
def test_what_a_tree_cannot_do_is_done_plainly_with_one_warning(
    target: Any, made: TreeGenerate, caplog: pytest.LogCaptureFixture, reason: str
) -> None:
    for _ in range(2):
        same(target, made, new=12, **unusual(reason))
    warned = [record.message for record in caplog.records if record.name.startswith("ygglight")]
    assert len(warned) == 1 and reason in warned[0] and "transformers' own loop" in warned[0]
    assert sum(made.report.fallbacks.values()) == 6 and made.report.iterations == 0
    same(target, made, new=12)  # and the next call has its tree again
    assert made.report.iterations > 0


def test_scores_come_as_in_plain_generation(target: Any, made: TreeGenerate) -> None:
    kwargs = batch() | unusual("output_scores") | {"do_sample": False, "max_new_tokens": 6}
    expected, found = target.generate(**kwargs), target.generate(**kwargs, custom_generate=made)
    assert len(found.scores) == 6
    assert all(torch.equal(a, b) for a, b in zip(expected.scores, found.scores, strict=True))


def test_a_streamer_gets_every_token_and_its_end(target: Any, made: TreeGenerate) -> None:
    from transformers.generation.streamers import BaseStreamer

    class Collects(BaseStreamer):
        def __init__(self) -> None:
            self.tokens: list[int] = []
            self.ended = threading.Event()

        def put(self, value: Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.ended.set()

    ids = one()
    expected = plain(target, ids, 10)
    with routed([target], made):
        calls: list[Callable[[Any], Tensor]] = [
            lambda s: plain(target, ids, 10, streamer=s),
            lambda s: target.generate(ids, None, None, None, None, None, None, s, do_sample=False, max_new_tokens=10),
        ]
        streams = [Collects() for _ in calls]
        found = [call(stream) for call, stream in zip(calls, streams, strict=True)]
    direct = Collects()
    found.append(plain(target, ids, 10, streamer=direct, custom_generate=made))
    for text, stream in zip(found, [*streams, direct], strict=True):
        assert torch.equal(text, expected)
        assert stream.ended.is_set() and stream.tokens == expected[0].tolist()
    assert sum(made.report.fallbacks.values()) == 3


def test_training_mode_is_left_to_transformers(made: TreeGenerate) -> None:
    model = llama(attention_dropout=0.2).train()
    model.gradient_checkpointing_enable()  # which leaves no cache
    given = batch()
    torch.manual_seed(1)
    expected = model.generate(**given, do_sample=False, max_new_tokens=8)
    torch.manual_seed(1)
    assert torch.equal(model.generate(**given, do_sample=False, max_new_tokens=8, custom_generate=made), expected)
    assert model.training
    assert "training mode" in next(iter(made.report.fallbacks))


def test_embeddings_instead_of_tokens(target: Any, made: TreeGenerate) -> None:
    embeddings = target.get_input_embeddings()(batch()["input_ids"])
    same(target, made, new=9, inputs_embeds=embeddings)
    assert "embeddings" in next(iter(made.report.fallbacks))


def test_positions_of_ones_own(target: Any, made: TreeGenerate) -> None:
    ids = one()
    own = torch.arange(ids.shape[1])[None] * 3 + 5
    plainly = {"input_ids": ids, "attention_mask": None}
    assert not torch.equal(same(target, made, **plainly, position_ids=own), same(target, made, **plainly))
    assert sum(made.report.fallbacks.values()) == 1 and "position_ids" in next(iter(made.report.fallbacks))
    mask = batch()["attention_mask"]
    same(target, made, position_ids=(mask.cumsum(-1) - 1).clamp_min(0))  # those that it would have had
    assert sum(made.report.fallbacks.values()) == 1


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_what_is_put_before_the_prompt_is_not_lost(made: TreeGenerate, kind: str) -> None:
    """The model itself never learns of it: peft adds it in a method that it puts on the model."""
    peft = pytest.importorskip("peft", reason="needs the extra `lora`")
    model = llama()
    torch.manual_seed(3)
    tuned = peft.get_peft_model(model, getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    kwargs: dict[str, Any] = {**batch(), "do_sample": False, "max_new_tokens": NEW}
    expected = tuned.generate(**kwargs)
    with tuned.disable_adapter():
        assert not torch.equal(tuned.generate(**kwargs), expected), "the virtual tokens do nothing"
    with routed([model], made):
        assert torch.equal(tuned.generate(**kwargs), expected)
    assert made.report.iterations == 0 and "prepare_inputs" in next(iter(made.report.fallbacks))


def test_a_class_that_prepares_its_own_inputs(made: TreeGenerate) -> None:
    from transformers import LlamaForCausalLM

    class Reversed(LlamaForCausalLM):  # type: ignore[misc]
        def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
            return super().prepare_inputs_for_generation(VOCABULARY - 1 - input_ids, *args, **kwargs)

    model = llama()
    plainly = same(model, made)
    model.__class__ = Reversed
    assert not torch.equal(same(model, made), plainly)
    assert "prepare_inputs" in next(iter(made.report.fallbacks))


def test_modes_whose_code_is_elsewhere_are_not_taken_for_greedy(target: Any, made: TreeGenerate) -> None:
    for mode in ({"penalty_alpha": 0.6, "top_k": 4}, {"dola_layers": "low"}):
        with pytest.raises(ValueError, match="custom_generate decodes greedily or samples"):
            target.generate(one(), max_new_tokens=4, custom_generate=made, **mode)
        with routed([target], made), pytest.raises(ValueError, match="trust_remote_code"):  # as without us
            target.generate(one(), max_new_tokens=4, **mode)


def test_an_empty_prompt_fails_as_without_us(target: Any, made: TreeGenerate) -> None:
    for kwargs in ({}, {"inputs": torch.empty(1, 0, dtype=torch.long)}):
        errors = []
        for extra in ({}, {"custom_generate": made}):
            with pytest.raises((ValueError, RuntimeError)) as caught:
                target.generate(**kwargs, max_new_tokens=4, **extra)
            errors.append(str(caught.value))
        assert errors[0] == errors[1]


# -- routing -------------------------------------------------------------------------------------------------------
def test_routing_leaves_models_as_they_were(target: Any, made: TreeGenerate) -> None:
    before = target.config.to_dict()
    with pytest.raises(KeyError), routed([target], made):
        assert "generate" in target.__dict__
        plain(target, one(), 12)
        raise KeyError("by the user")
    assert made.report.iterations > 0
    assert "generate" not in target.__dict__
    assert target.config.to_dict() == before and target.config._attn_implementation == "sdpa"
    assert not target.lm_head._forward_pre_hooks


def test_a_generate_that_the_user_put_on_the_model_is_called_and_stays(made: TreeGenerate) -> None:
    model = llama()
    calls: list[int] = []
    original = model.generate

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return original(*args, **kwargs)

    model.generate = counted
    expected = plain(model, one(), 12)
    with routed([model], made):
        assert torch.equal(plain(model, one(), 12), expected)
    assert model.generate is counted
    assert len(calls) == 2 and made.report.iterations > 0


# -- dtypes --------------------------------------------------------------------------------------------------------
def check_close(model: Any, made: TreeGenerate, count: int = 4) -> None:
    """In bfloat16 a tree's logits are rounded otherwise than a chain's: texts may part where two tokens are near."""
    parted = 0
    for ids in prompts(count):
        expected = plain(model, ids, 24)
        with torch.no_grad():
            scale = float(model(expected).logits.abs().max())
        # Four units in the last place of the largest logit: three layers round, and attention at two precisions.
        parted += close_calls(model, expected, plain(model, ids, 24, custom_generate=made), gap=scale * 2**-6)
    assert parted < count, "not one text is the same: these are no ties"


@pytest.mark.parametrize("mine", [torch.bfloat16, torch.float32], ids=str)
def test_bfloat16(target: Any, draft: Any, mine: torch.dtype) -> None:
    model = copy.deepcopy(target).bfloat16()
    made = ygglight.yggdrasil(copy.deepcopy(draft).to(mine), tree=TREE)
    check_close(model, made)
    assert made.report.fallbacks == {} and made.report.tokens_per_step > 1.2


def test_autocast_after_and_before_plain_float32(target: Any, draft: Any) -> None:
    model = copy.deepcopy(target)
    made = ygglight.yggdrasil(draft, tree=TREE)
    for on in (True, False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            check_close(model, made, 3)
    assert made.report.fallbacks == {} and made.report.tokens_per_step > 1.2


# -- drafts and trees ----------------------------------------------------------------------------------------------
def test_bad_drafts_are_one_clear_error(target: Any) -> None:
    with pytest.raises(ValueError, match="vocabulary of 50 tokens, the target of 97"):
        plain(target, one(), 4, custom_generate=ygglight.yggdrasil(llama(vocab_size=50)))
    with pytest.raises(TypeError, match="'looked up' is neither 'lookup' nor"):
        plain(target, one(), 4, custom_generate=ygglight.yggdrasil("looked up"))


def test_drafts_that_cannot_be_run_over_a_tree_are_one_clear_error(target: Any) -> None:
    from transformers import BloomConfig, BloomForCausalLM

    miscounts = llama(1)
    forward = miscounts.model.rotary_emb.forward
    miscounts.model.rotary_emb.forward = lambda x, position_ids: forward(
        x, torch.arange(x.shape[1])[None] + int(position_ids[0, 0])
    )
    drafts = {
        "attention interface": BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=1)),
        "not a causal language model": torch.nn.Linear(2, 2),
        "other logits over a tree": miscounts,
    }
    for reason, unfit in drafts.items():
        with pytest.raises(ValueError, match=f"the draft cannot be used: .*{reason}.*draft='lookup'"):
            plain(target, one(), 4, custom_generate=ygglight.yggdrasil(unfit))


def table(monkeypatch: pytest.MonkeyPatch, target: Latency, draft: Latency) -> None:
    monkeypatch.setattr(
        "ygglight.engines.yggdrasil.engine.measure_costs", lambda *args, **kwargs: Costs(target, draft, 0.0)
    )


FLAT = Latency((1, 64), (1.0, 1.0))
LINEAR = Latency((1, 64), (1.0, 64.0))


def test_on_a_machine_where_trees_win_the_tree_runs(monkeypatch: pytest.MonkeyPatch, target: Any) -> None:
    table(monkeypatch, FLAT, Latency((1, 8), (0.01, 0.01)))
    made = ygglight.yggdrasil(target)
    shapes: list[Any] = []
    depths: list[tuple[int, int]] = []

    def watch(iteration: Iteration) -> None:
        shapes.append(iteration.shape)
        depths.append((len(iteration.verdict.path) - 1, int(iteration.tree.depths.max())))

    made.watch = watch
    check_lively(plain(target, one(), 96, custom_generate=made)[:, 9:])
    assert all(shape is not None for shape in shapes)
    assert all(accepted == drafted for accepted, drafted in depths), "the draft is the target"
    assert made.report.accepted == sum(drafted for _, drafted in depths)
    assert made.report.tokens_per_step > 4 and made.report.notes == []


@pytest.mark.parametrize("slower", [1.0, 0.999])
def test_where_nothing_beats_plain_decoding_it_says_so(
    monkeypatch: pytest.MonkeyPatch, target: Any, draft: Any, slower: float
) -> None:
    table(monkeypatch, LINEAR, Latency((1, 8), (slower, 8.0)))
    made = ygglight.yggdrasil(draft)
    same(target, made, new=20)
    assert "plain decoding is measured to be the fastest" in made.report.table()
    assert made.report.drafted < 0.1 * made.report.iterations, "plain, but for a look now and then"


def test_the_note_comes_whenever_plain_decoding_was_chosen(
    monkeypatch: pytest.MonkeyPatch, target: Any, draft: Any
) -> None:
    """A tree that promises one per cent is not taken, and then the text is plain all the same."""
    from ygglight.engines.yggdrasil import selector
    from ygglight.engines.yggdrasil.objective import Choice

    table(monkeypatch, FLAT, FLAT)
    monkeypatch.setattr(selector, "choose_shape", lambda *args, **kwargs: Choice(None, 1.01, 1.0, ()))
    made = ygglight.yggdrasil(draft)
    same(target, made, new=8)  # fewer than the steps after which a tree is looked at again
    assert made.report.drafted == 0
    assert "plain decoding is measured to be the fastest" in made.report.table()


# -- the log -------------------------------------------------------------------------------------------------------
def test_the_log_can_be_read(target: Any, draft: Any, tmp_path: Path) -> None:
    made = ygglight.yggdrasil(draft, tree=TREE | {"verify": 7}, log=str(tmp_path / "log"))
    same(target, made, new=30)
    made.release()
    rows = read_log(tmp_path / "log")
    assert len(rows["accepted"]) == made.report.drafted > 0
    assert rows["hidden"].shape[1] == target.config.hidden_size and torch.isfinite(rows["hidden"]).all()
    assert (rows["accepted"] <= rows["drafted"]).all() and (rows["accepted"] >= 0).all()
    assert (rows["drafted"] >= 1).all() and (rows["drafted"] <= 4).all()
    assert int(rows["accepted"].sum()) == made.report.accepted
    assert sorted(set(rows["prompt"].tolist())) == [0, 1, 2]


# -- sampling ------------------------------------------------------------------------------------------------------
def test_a_seed_decides_the_text(target: Any, draft: Any) -> None:
    def draw(seed: int, tree: Any = TREE) -> Tensor:
        torch.manual_seed(seed)
        made = ygglight.yggdrasil(draft, tree=tree)
        return target.generate(**batch(), do_sample=True, top_k=5, max_new_tokens=24, custom_generate=made)

    first = draw(5)
    assert torch.equal(first, draw(5))
    assert not torch.equal(first, draw(6))
    made = ygglight.yggdrasil(draft, tree=TREE)
    torch.manual_seed(5)
    twice = [target.generate(**batch(), do_sample=True, max_new_tokens=24, custom_generate=made) for _ in range(2)]
    assert not torch.equal(*twice), "the second call used the first one's random numbers"


def test_a_generator_of_ones_own_leaves_torchs_alone(target: Any, draft: Any) -> None:
    texts = []
    state = torch.get_rng_state()
    for _ in range(2):
        made = ygglight.yggdrasil(draft, tree=TREE)
        made.generator = torch.Generator().manual_seed(4)
        texts.append(target.generate(one(), do_sample=True, max_new_tokens=24, custom_generate=made))
    assert torch.equal(*texts)
    assert torch.equal(state, torch.get_rng_state())


def test_several_texts_of_one_prompt(target: Any, made: TreeGenerate) -> None:
    found = target.generate(one(), do_sample=True, num_return_sequences=3, max_new_tokens=12, custom_generate=made)
    assert found.shape == (3, one().shape[1] + 12)
    assert len(set(map(tuple, found.tolist()))) == 3


SMALL, TOP, WORDS = 8, 5, 3


@pytest.fixture(scope="module")
def toy() -> tuple[Any, Any]:
    """A target that surprises, and a draft that is often right."""
    shape = {"vocab_size": SMALL, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    model = llama(2, **shape, num_attention_heads=2, num_key_value_heads=1)
    model.lm_head.weight.data.mul_(1.5)
    return model, noisy(model, 0.3)


def joint(model: Any, ids: Tensor, temperature: float) -> Tensor:
    """Probabilities of all texts of WORDS tokens under top-k sampling, ``[SMALL ** WORDS]``."""
    total = torch.ones(1, dtype=torch.float64)
    prefixes = ids
    for _ in range(WORDS):
        with torch.no_grad():
            logits = model(prefixes).logits[:, -1].double() / temperature
        logits = logits.masked_fill(logits < logits.topk(TOP).values[:, -1:], -torch.inf)
        total = (total[:, None] * torch.softmax(logits, -1)).reshape(-1)
        tokens = torch.arange(SMALL).repeat(len(prefixes))[:, None]
        prefixes = torch.cat([prefixes.repeat_interleave(SMALL, 0), tokens], dim=1)
    return total


def chi_square_p(counts: Tensor, expected: Tensor) -> float:
    """The chance of a fit as bad as this one (Wilson-Hilferty); rare cells are put together."""
    if bool(counts[expected == 0].any()):
        return 0.0
    common = expected >= 8
    cells = torch.cat([expected[common], expected[~common].sum()[None]])
    found = torch.cat([counts[common], counts[~common].sum()[None]]).double()
    cells, found = cells[cells > 0], found[cells > 0]
    freedom = len(cells) - 1
    statistic = float(((found - cells) ** 2 / cells).sum())
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    return 0.5 * math.erfc(z / math.sqrt(2))


@pytest.mark.parametrize(
    ("draws", "control", "static"),
    [
        (400, 1.6, False), (400, 1.6, True),
        pytest.param(2000, 1.3, False, marks=pytest.mark.slow), pytest.param(2000, 1.3, True, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_sampled_texts_have_the_targets_distribution(
    toy: tuple[Any, Any], draws: int, control: float, static: bool
) -> None:
    """Three tokens: the first comes of the prompt, the others of trees, accepted or drawn after a refusal."""
    model, draft = toy
    temperature = 1.1
    ids = torch.tensor([[1, 5, 2]])
    made = ygglight.yggdrasil(draft, tree={"width": 2, "depth": 2})
    made.engine(model).static = static
    made.generator = torch.Generator().manual_seed(20)
    settings: dict[str, Any] = {"do_sample": True, "top_k": TOP, "temperature": temperature, "max_new_tokens": WORDS}
    texts = model.generate(ids.repeat(draws, 1), **settings, custom_generate=made)[:, 3:]
    counts = torch.bincount((texts * torch.tensor([SMALL**2, SMALL, 1])).sum(1), minlength=SMALL**WORDS)
    assert made.report.generations == draws and made.report.fallbacks == {}
    assert 0.2 < made.report.accepted / draws < 1.9, "both kinds of token must occur"

    right = joint(model, ids, temperature)
    assert abs(float(right.sum()) - 1) < 1e-6 and int((right > 0).sum()) == TOP**WORDS
    assert chi_square_p(counts, right * draws) > 0.001
    # Negative control: the same bound would not be met by texts of another temperature.
    assert chi_square_p(counts, joint(model, ids, temperature * control) * draws) < 1e-6


@pytest.mark.slow
def test_sampled_texts_of_a_larger_vocabulary_are_as_likely(target: Any) -> None:
    """A9: mean negative log-likelihood of 500 texts each way, two-sided; a hotter sampler must be found out."""
    settings: dict[str, Any] = {"do_sample": True, "top_k": 0, "max_new_tokens": NEW}
    ids = torch.cat([prompt[:, :9] for prompt in prompts(500, seed=6)])

    def likelihoods(seed: int, temperature: float = 2.0, **more: Any) -> Tensor:
        torch.manual_seed(seed)
        found = target.generate(ids, temperature=temperature, **settings, **more)
        with torch.no_grad():
            scores = torch.log_softmax(target(found).logits[:, 8:-1].float() / 2.0, -1)
        return -scores.gather(2, found[:, 9:, None])[..., 0].mean(1)

    def z_score(mine: Tensor, theirs: Tensor) -> float:
        return float((mine.mean() - theirs.mean()) / (mine.var() / len(mine) + theirs.var() / len(theirs)).sqrt())

    theirs = likelihoods(1)
    for static in (False, True):
        made = ygglight.yggdrasil(noisy(target, 0.08), tree=TREE | {"verify": 8})
        made.engine(target).static = static
        assert abs(z_score(likelihoods(2, custom_generate=made), theirs)) < 3.3
        assert made.report.generations == 500 and made.report.accepted > 500
    assert z_score(likelihoods(3, temperature=2.2), theirs) > 3.3
