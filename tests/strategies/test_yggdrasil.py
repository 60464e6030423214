"""YggdrasilStrategy through the Trainer, on modules that know nothing of it: same text, and nothing left behind."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import ygglight  # noqa: F401  (registers the names)
from ygglight.engines.yggdrasil.drafts import LookupDraft
from ygglight.engines.yggdrasil.objective import Costs, Latency
from ygglight.engines.yggdrasil.predictor import DepthPredictor
from ygglight.modules import CausalLM
from ygglight.modules.testing import tiny_causal_lm
from ygglight.strategies.yggdrasil import YggdrasilStrategy

VOCABULARY, NEW, PROMPTS = 97, 32, 3
TREE = {"width": 3, "depth": 4}

pytestmark = pytest.mark.usefixtures("own_cache")


def llama(seed: int = 0, **changes: Any) -> Any:
    """Random, with text that is not boring."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "tie_word_embeddings": False, "initializer_range": 0.2,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    }  # fmt: skip
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**shape | changes)).eval()


def noisy(model: Any, amount: float = 0.08) -> Any:
    """A draft that is right now and then."""
    copied = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    for parameter in copied.parameters():
        parameter.data += amount * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return copied


class Writes(L.LightningModule):
    """Knows nothing of ygglight. Notes in which hooks its model's ``generate`` was another one."""

    def __init__(self, model: Any = None) -> None:
        super().__init__()
        self.lm = llama() if model is None else model
        self.routed: list[tuple[str, bool]] = []
        self.texts: list[Tensor] = []

    def note(self, hook: str) -> None:
        self.routed.append((hook, any("generate" in m.__dict__ for m in self.lm.modules())))

    def write(self, ids: Tensor) -> Tensor:
        return self.lm.generate(input_ids=ids, do_sample=False, max_new_tokens=NEW)

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.note("step")
        return self.write(batch)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.note("step")
        self.texts.append(self.write(batch))

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def on_predict_batch_end(self, *args: Any) -> None:
        self.note("outside")

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.note("outside")
        loss: Tensor = self.lm(input_ids=batch, labels=batch).loss
        self.texts.append(loss.detach())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 1e-3)


def data(size: int = 1) -> DataLoader:
    ids = torch.randint(0, VOCABULARY, (PROMPTS, size, 9), generator=torch.Generator().manual_seed(3))
    return DataLoader(list(ids), batch_size=None)


def trainer(strategy: Any = "auto", **kwargs: Any) -> L.Trainer:
    quiet: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0,
    }  # fmt: skip
    return L.Trainer(strategy=strategy, **quiet | kwargs)


def predict(module: Any, strategy: Any = "auto", loader: Any = None, **kwargs: Any) -> Any:
    return trainer(strategy, **kwargs).predict(module, loader or data())


def same(found: Any, expected: Any) -> None:
    assert len(found) == len(expected) > 0
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert len(set(torch.cat(list(expected), 1)[:, 9:].flatten().tolist())) >= 20, "boring text proves nothing"


def tree(model: Any, **kwargs: Any) -> YggdrasilStrategy:
    return YggdrasilStrategy(draft=noisy(model), tree=TREE, **kwargs)


Told = list[str]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    """What the strategy said at the end."""
    lines: Told = []
    monkeypatch.setattr("ygglight.strategies.generating.rank_zero_info", lines.append)
    return lines


@pytest.fixture(scope="module")
def expected() -> Any:
    return predict(Writes())


# -- the steps -----------------------------------------------------------------------------------------------------
def test_by_name_it_copies_from_the_text_and_says_the_same(expected: Any) -> None:
    module, run = Writes(), trainer("yggdrasil")
    same(run.predict(module, data()), expected)
    strategy: Any = run.strategy
    assert isinstance(strategy, YggdrasilStrategy)
    assert strategy.report.generations == PROMPTS and strategy.report.tokens == PROMPTS * NEW
    assert strategy.report.fallbacks == {}
    (method,) = strategy._methods.values()
    assert isinstance(method.engine(module.lm).draft, LookupDraft)


def test_predict_with_a_draft_model(expected: Any) -> None:
    module = Writes()
    strategy = tree(module.lm)
    same(predict(module, strategy), expected)
    assert strategy.report.tokens_per_step > 1 and strategy.report.fallbacks == {}
    assert module.routed == [("step", True), ("outside", False)] * PROMPTS


@pytest.mark.parametrize("verb", ["validate", "test"])
def test_validation_and_test_steps(expected: Any, verb: str) -> None:
    module = Writes()
    strategy = tree(module.lm)
    getattr(trainer(strategy), verb)(module, data(), verbose=False)
    same(module.texts, expected)
    assert strategy.report.generations == PROMPTS and strategy.report.iterations > 0
    assert all(on for _, on in module.routed)


def test_training_steps_are_not_touched_and_validation_between_them_is(told: Told) -> None:
    runs = []
    for strategy in ("auto", tree(llama())):
        module = Writes()
        trainer(strategy, max_steps=2, val_check_interval=1).fit(module, data(2), data())
        runs.append(module)
        if isinstance(strategy, YggdrasilStrategy):
            assert [on for hook, on in module.routed if hook == "step"] == [True] * 2 * PROMPTS
            assert not any(on for hook, on in module.routed if hook == "outside")
            assert strategy.report.generations == 2 * PROMPTS and strategy.report.iterations > 0
            assert all(not method._engines for method in strategy._methods.values()), "caches are held"
    plain, ours = runs
    assert len(ours.texts) == len(plain.texts) == 2 + 2 * PROMPTS
    assert all(torch.equal(a, b) for a, b in zip(ours.texts, plain.texts, strict=True))
    for a, b in zip(plain.parameters(), ours.parameters(), strict=True):
        assert torch.equal(a, b)
    assert len(told) == 1


def test_one_trainer_twice_and_a_batch_of_two(expected: Any) -> None:
    module = Writes()
    strategy = tree(module.lm)
    run = trainer(strategy)
    same(run.predict(module, data()), expected)
    same(run.predict(module, data(2)), predict(Writes(), loader=data(2)))
    assert strategy.report.generations == 2 * PROMPTS, "the report is of the last run"
    assert next(module.parameters()).device == torch.device("cpu")


def test_without_inference_mode(expected: Any) -> None:
    module = Writes()
    same(predict(module, tree(module.lm), inference_mode=False), expected)


def test_half_precision_and_autocast_run_on_the_tree() -> None:
    """Texts may part at ties there (test_generate.py looks at that): here, that a tree ran and was of use."""
    for precision in ("bf16-true", "bf16-mixed"):
        module = Writes()
        strategy = YggdrasilStrategy(draft=noisy(module.lm, 0.02), tree=TREE)
        found = predict(module, strategy, precision=precision)
        assert all(text.shape == (1, 9 + NEW) for text in found)
        assert strategy.report.fallbacks == {} and strategy.report.tokens_per_step > 1.5


# -- two models ----------------------------------------------------------------------------------------------------
class Two(L.LightningModule):
    """One model continues what the other one wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = llama(0), llama(5, vocab_size=89)
        self.on: list[tuple[bool, bool]] = []

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.on.append(("generate" in self.first.__dict__, "generate" in self.second.__dict__))
        written = self.first.generate(batch, do_sample=False, max_new_tokens=NEW)
        return self.second.generate(written % 89, do_sample=False, max_new_tokens=NEW)


def test_two_models_have_drafts_of_their_own(told: Told) -> None:
    module, before = Two(), predict(Two())
    strategy = YggdrasilStrategy(draft={"first": noisy(module.first), "second": noisy(module.second)}, tree=TREE)
    same(predict(module, strategy), before)
    assert module.on == [(True, True)] * PROMPTS
    reports = {name: method.report for name, method in strategy._methods.items()}
    assert all(report.tokens_per_step > 1 and report.generations == PROMPTS for report in reports.values())
    assert strategy.report.generations == 2 * PROMPTS
    assert len(told) == 2 and "yggdrasil, first:" in told[0] and "yggdrasil, second:" in told[1]


def test_a_model_that_the_mapping_leaves_out_is_left_alone() -> None:
    module, before = Two(), predict(Two())
    strategy = YggdrasilStrategy(draft={"second": "lookup"}, tree=TREE)
    same(predict(module, strategy), before)
    assert module.on == [(False, True)] * PROMPTS


def test_a_mapping_that_names_nothing_lists_what_there_is() -> None:
    with pytest.raises(ValueError, match="draft names 'third', but the generation models here are: first, second"):
        predict(Two(), YggdrasilStrategy(draft={"third": "lookup"}))


def test_one_draft_for_two_vocabularies_is_one_clear_error() -> None:
    module = Two()
    with pytest.raises(ValueError, match="vocabulary of 97 tokens, the target of 89"):
        predict(module, YggdrasilStrategy(draft=noisy(module.first)))


# -- exceptions ----------------------------------------------------------------------------------------------------
class Breaks(Writes):
    """Fails in the second step, in the midst of a text or after it."""

    def __init__(self, inside: bool) -> None:
        super().__init__()
        self.inside, self.breaks = inside, True

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        def stop(ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            if self.breaks and batch_idx == 1 and self.inside and ids.shape[1] > 20:
                raise KeyError("by the user")
            return torch.zeros(len(ids), dtype=torch.bool)

        text = self.lm.generate(batch, do_sample=False, max_new_tokens=NEW, stopping_criteria=[stop])
        if self.breaks and batch_idx == 1:
            raise KeyError("by the user")
        return text


@pytest.mark.parametrize("inside", [True, False])
def test_after_an_exception_all_is_as_it_was(expected: Any, told: Told, inside: bool) -> None:
    module = Breaks(inside)
    module.lm.set_attn_implementation("eager")
    before = module.lm.config.to_dict(), set(module.lm.__dict__)
    strategy = tree(module.lm)
    with pytest.raises(KeyError, match="by the user"):
        predict(module, strategy)
    assert strategy.report.iterations > 0, "it never ran"
    assert "generate" not in module.lm.__dict__
    assert (module.lm.config.to_dict(), set(module.lm.__dict__)) == before
    assert module.lm.config._attn_implementation == "eager"
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in module.modules())
    module.breaks = False
    batch = next(iter(data()))
    for again in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(again.write(batch), expected[0])
        same(predict(again), expected)
    same(predict(module, tree(module.lm)), expected)
    assert len(told) == 2


# -- adapters and quantised weights --------------------------------------------------------------------------------
def adapted() -> Any:
    peft = pytest.importorskip("peft", reason="needs the extra `lora`")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = llama()
    torch.manual_seed(2)
    model = peft.get_peft_model(model, config).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(4)
    return model


@pytest.mark.parametrize("key", ["whole", "by name"])
def test_an_adapter_on_the_target_acts(expected: Any, key: str) -> None:
    with_adapter = predict(Writes(adapted()))
    assert not any(torch.equal(a, b) for a, b in zip(with_adapter, expected, strict=True)), "the adapter does nothing"
    module = Writes(adapted())
    drafting = noisy(llama())
    strategy = YggdrasilStrategy(draft=drafting if key == "whole" else {"lm": drafting}, tree=TREE)
    same(predict(module, strategy), with_adapter)
    assert strategy.report.generations == PROMPTS and strategy.report.fallbacks == {}
    assert all(on for hook, on in module.routed if hook == "step")
    with module.lm.disable_adapter():
        assert torch.equal(module.write(next(iter(data()))), expected[0])


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_target(tmp_path: Path, bits: int) -> None:
    pytest.importorskip("bitsandbytes", reason="needs the extra `bnb`")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    drafting = llama(intermediate_size=128)  # blocks of 64 values, or bitsandbytes itself fails on a CPU
    drafting.save_pretrained(tmp_path / "m")
    kind = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"} if bits == 4 else {"load_in_8bit": True}
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", quantization_config=BitsAndBytesConfig(**kind), device_map={"": "cpu"}, dtype=torch.float32
    )
    before = predict(Writes(loaded))
    strategy = YggdrasilStrategy(draft=drafting, tree=TREE)
    found = predict(Writes(loaded), strategy)
    assert strategy.report.fallbacks == {} and strategy.report.tokens_per_step > 1
    if bits == 4:
        same(found, before)
        return
    for a, b in zip(found, before, strict=True):  # which activations are rounded to 8 bits depends on all rows
        where = int((a != b).int().argmax())
        with torch.no_grad():
            logits = loaded(b[:, :where]).logits[0, -1] if where else torch.zeros(2)
        assert logits.topk(2).values.diff().abs() <= 0.1 * logits.abs().max()


# -- what is reported ----------------------------------------------------------------------------------------------
class Bar:
    """In place of tqdm's."""

    made: list[Bar]

    def __init__(self, **kwargs: Any) -> None:
        self.n, self.closed = 0, False
        Bar.made.append(self)

    def update(self, count: int) -> None:
        self.n += count

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize(("progress", "bars"), [(True, 1), (None, 0), (False, 0)])
def test_a_bar_counts_tokens(monkeypatch: pytest.MonkeyPatch, progress: bool | None, bars: int) -> None:
    """``None``: as the Trainer has one, and here it has none."""
    Bar.made = []
    monkeypatch.setattr("tqdm.auto.tqdm", Bar)
    module = Writes()
    predict(module, tree(module.lm, progress=progress))
    assert [(bar.n, bar.closed) for bar in Bar.made] == [(PROMPTS * NEW, True)] * bars


def test_the_bar_is_closed_when_a_step_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    Bar.made = []
    monkeypatch.setattr("tqdm.auto.tqdm", Bar)
    module = Breaks(inside=False)
    with pytest.raises(KeyError):
        predict(module, tree(module.lm, progress=True))
    assert [(bar.n, bar.closed) for bar in Bar.made] == [(2 * NEW, True)]


def test_the_table_comes_once_at_the_end(told: Told) -> None:
    module = Writes()
    strategy = tree(module.lm)
    predict(module, strategy)
    (table,) = told
    strategy.teardown()
    assert len(told) == 1
    for part in ("yggdrasil, lm:", "tokens", "accepted a step", "draft ", "verify ", "host ", "trees", "3x4"):
        assert part in table


def test_disabled_it_does_nothing_and_says_so(expected: Any, told: Told) -> None:
    module = Writes()
    strategy = tree(module.lm, enabled=False)
    same(predict(module, strategy), expected)
    assert not any(on for _, on in module.routed)
    assert strategy.report.generations == 0
    assert len(told) == 1 and "off (enabled=False)" in told[0]


def table(monkeypatch: pytest.MonkeyPatch, verify: float, draft: float) -> None:
    """A machine on which a forward of 64 tokens takes so many times as long as one of a token."""
    costs = Costs(Latency((1, 64), (1.0, verify)), Latency((1, 8), (draft, draft)), 0.0)
    monkeypatch.setattr("ygglight.engines.yggdrasil.engine.measure_costs", lambda *args, **kwargs: costs)


def test_a_draft_that_is_the_target_is_accepted_whole(monkeypatch: pytest.MonkeyPatch, expected: Any) -> None:
    table(monkeypatch, verify=1.0, draft=0.01)
    module = Writes()
    strategy = YggdrasilStrategy(draft=llama())
    same(predict(module, strategy), expected)
    report = strategy.report
    assert report.iterations == report.drafted > 0 and report.notes == []
    depths = sum(depth * count for (_, depth), count in report.shapes.items())
    assert report.accepted == depths, "a step did not accept its full depth"
    assert report.tokens_per_step > 4


def test_where_no_tree_pays_the_table_says_so(monkeypatch: pytest.MonkeyPatch, expected: Any, told: Told) -> None:
    table(monkeypatch, verify=64.0, draft=1.0)
    module = Writes()
    strategy = YggdrasilStrategy(draft=noisy(module.lm))
    same(predict(module, strategy), expected)
    assert strategy.report.drafted < 0.1 * strategy.report.iterations
    assert "plain decoding is measured to be the fastest here" in told[0]


# -- bad input -----------------------------------------------------------------------------------------------------
class Nothing(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        raise AssertionError("prediction began")

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.layer(batch[..., :2].float()).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_a_module_without_a_generation_model_is_one_clear_error() -> None:
    with pytest.raises(TypeError, match="Nothing holds no causal language model of transformers"):
        predict(Nothing(), "yggdrasil")
    trainer("yggdrasil", max_steps=1).fit(Nothing(), data())  # fit asked for none
    predict_off = YggdrasilStrategy(enabled=False)
    with pytest.raises(AssertionError, match="prediction began"):
        predict(Nothing(), predict_off)


class NeverBegins(Writes):
    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        raise AssertionError("prediction began")


def test_a_draft_of_another_vocabulary_is_refused_before_prediction_begins() -> None:
    with pytest.raises(ValueError, match="vocabulary of 60 tokens, the target of 97: they must share a tokenizer"):
        predict(NeverBegins(), YggdrasilStrategy(draft=llama(vocab_size=60)))


def test_a_draft_that_cannot_be_run_over_a_tree_is_refused_before_prediction_begins() -> None:
    from transformers import BloomConfig, BloomForCausalLM

    bloom = BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=1))
    with pytest.raises(ValueError, match="the draft cannot be used: the attention of BloomForCausalLM"):
        predict(NeverBegins(), YggdrasilStrategy(draft=bloom))


def test_a_predictor_that_does_not_fit_is_refused_before_prediction_begins(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"fit_depth_predictor\.yaml"):
        predict(NeverBegins(), YggdrasilStrategy(predictor=str(tmp_path)))
    DepthPredictor(72, 4, width=8).save(tmp_path)
    with pytest.raises(ValueError, match="hidden size 72, and this one's is 64"):
        predict(NeverBegins(), YggdrasilStrategy(predictor=str(tmp_path)))


@pytest.mark.parametrize("strategy", [lambda: "yggdrasil", YggdrasilStrategy], ids=["name", "object"])
def test_two_devices_are_refused(strategy: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match="runs on one device, but the Trainer was given 2"):
        trainer(strategy(), devices=2)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"tree": "wide"}, "tree='wide' is neither 'auto' nor numbers"),
        ({"tree": {"width": 0, "depth": 2}}, "width=0 must be a whole number from 1"),
        ({"plan": {"head": True}}, "needs tail=True"),
        ({"max_verify": 1000}, "max_verify=1000 must be a whole number from 1 to 128"),
        ({"max_tokens": 1}, "max_tokens=1 leaves no room"),
    ],
)
def test_bad_numbers_are_refused_at_once(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        YggdrasilStrategy(**kwargs)


def test_a_prompt_longer_than_max_tokens_names_the_limit() -> None:
    with pytest.raises(ValueError, match="the prompt has 9 tokens and max_tokens is 9"):
        predict(Writes(), YggdrasilStrategy(tree=TREE, max_tokens=9))


# -- CausalLM, and drafts by name ----------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_causal_lm(tmp_path_factory.mktemp("target"), tie_word_embeddings=False, initializer_range=0.2)


def say(folder: Path, strategy: Any, **kwargs: Any) -> list[dict[str, Any]]:
    prompts = DataLoader(["the quick brown fox", "to be, or not", "Question: how many eggs are in"], batch_size=2)
    module = CausalLM(model=str(folder), max_new_tokens=NEW, **kwargs)
    return [row for batch in predict(module, strategy, prompts) for row in batch]


def test_causal_lm_returns_text(folder: Path, tmp_path: Path) -> None:
    draft = tiny_causal_lm(tmp_path / "draft", seed=3, num_hidden_layers=1)
    before = say(folder, "auto")
    assert len({token for row in before for token in row["tokens"]}) >= 20
    for named in (str(draft), str(folder), "lookup"):
        strategy = YggdrasilStrategy(draft=named, tree=TREE)
        found = say(folder, strategy)
        assert found == before and all(isinstance(row["text"], str) and row["text"] for row in found)
        assert strategy.report.generations == 3 and strategy.report.fallbacks == {}
    ends = [row["tokens"] for row in before]
    assert all(len(tokens) <= NEW for tokens in ends)


def test_causal_lm_with_settings_for_generate(folder: Path) -> None:
    settings = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}
    before = say(folder, "auto", generation=settings)
    assert before != say(folder, "auto")
    assert say(folder, YggdrasilStrategy(draft=str(folder), tree=TREE), generation=settings) == before


def test_named_drafts_that_do_not_fit(folder: Path, tmp_path: Path) -> None:
    larger = tiny_causal_lm(tmp_path / "larger", vocab_size=350)
    with pytest.raises(ValueError, match="vocabulary of 350 tokens"):
        say(folder, YggdrasilStrategy(draft=str(larger)))
    shuffled = tiny_causal_lm(tmp_path / "shuffled")
    rules = json.loads((shuffled / "tokenizer.json").read_text())
    words = rules["model"]["vocab"]
    a, b = list(words)[40:42]
    words[a], words[b] = words[b], words[a]
    (shuffled / "tokenizer.json").write_text(json.dumps(rules))
    with pytest.raises(ValueError, match=r"another vocabulary than the model .*has another id"):
        say(folder, YggdrasilStrategy(draft=str(shuffled)))
    with pytest.raises(FileNotFoundError):
        say(folder, YggdrasilStrategy(draft=str(tmp_path / "missing")))
