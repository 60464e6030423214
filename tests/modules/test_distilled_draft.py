"""DistilledDraft: a draft cut out of the target learns its distribution, and becomes a directory that drafts."""

from __future__ import annotations

import copy
import json
import logging
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from ygglight.modules import CausalLM, DistilledDraft
from ygglight.modules.testing import tiny_causal_lm
from ygglight.strategies import YggdrasilStrategy

Sample = dict[str, Tensor]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers, and weights large enough that its next token is no coin toss."""
    return tiny_causal_lm(tmp_path_factory.mktemp("target"), num_hidden_layers=3, initializer_range=0.15)


@pytest.fixture
def text() -> DataLoader[Sample]:
    ids = torch.randint(1, 300, (16, 24), generator=torch.Generator().manual_seed(2))
    samples: Any = [{"input_ids": row} for row in ids]
    return DataLoader(samples, batch_size=4)


pytestmark = pytest.mark.usefixtures("own_cache")


def trainer(**options: Any) -> L.Trainer:
    defaults: dict[str, Any] = {
        "max_steps": 2, "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
        "enable_checkpointing": False,
    }  # fmt: skip
    return L.Trainer(accelerator="cpu", devices=1, **defaults | options)


def made(target: Path, output: str = "draft", **options: Any) -> DistilledDraft:
    return DistilledDraft(str(target), output, **{"warmup_steps": 2} | options)


def model_of(directory: Path | str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(directory), local_files_only=True).eval()


def divergence(target: Any, draft: Any, tokens: Tensor, mask: Tensor | None = None) -> float:
    """KL(target || draft) a token by whole logits in float64."""
    with torch.no_grad():
        p, q = (F.log_softmax(m(tokens, attention_mask=mask).logits.double(), dim=-1) for m in (target, draft))
    each = (p.exp() * (p - q)).sum(-1)
    return float(each.mean() if mask is None else each[mask.bool()].mean())


# -- the cut -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("tied", [True, False])
def test_the_draft_begins_as_the_first_layers_of_the_target(tmp_path: Path, tied: bool) -> None:
    directory = tiny_causal_lm(tmp_path / "m", num_hidden_layers=3, tie_word_embeddings=tied)
    module = made(directory, layers=2)
    assert not list(module.parameters()), "constructing loads nothing"
    module.configure_model()
    draft = module.draft
    module.configure_model()
    assert module.draft is draft, "a second call loads nothing"
    theirs = model_of(directory).state_dict()
    ours = draft.state_dict()
    assert set(ours) == {name for name in theirs if ".layers.2." not in name}
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert draft.config.num_hidden_layers == 2 and draft.config.vocab_size == model_of(directory).config.vocab_size
    assert draft.training and module._teacher[0].config.num_hidden_layers == 3


def test_a_draft_of_all_layers_is_the_target(target: Path, text: DataLoader[Sample]) -> None:
    run = trainer(max_steps=-1)
    run.validate(made(target, layers=3), text, verbose=False)
    assert abs(float(run.callback_metrics["val_loss"])) < 1e-6
    assert float(run.callback_metrics["val_acceptance"]) == 1.0


def test_random_weights_are_drawn_anew_by_seed_and_leave_the_generator_alone(target: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    drafts = []
    for seed in (0, 0, 1):
        module = made(target, init="random", seed=seed)
        module.configure_model()
        drafts.append(module.draft.get_input_embeddings().weight)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(drafts[0], drafts[1]) and not torch.equal(drafts[0], drafts[2])
    assert not torch.equal(drafts[0], model_of(target).get_input_embeddings().weight)


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_embeddings(target: Path, text: DataLoader[Sample], frozen: bool) -> None:
    module = made(target, freeze_embeddings=frozen)
    trainer(max_steps=3).fit(module, text)
    before = model_of(target)
    for name in ("get_input_embeddings", "get_output_embeddings"):
        ours, theirs = getattr(module.draft, name)().weight, getattr(before, name)().weight
        assert torch.equal(ours, theirs) == frozen
    layer = module.draft.model.layers[0].mlp.down_proj.weight
    assert not torch.equal(layer, before.model.layers[0].mlp.down_proj.weight)


# -- training --------------------------------------------------------------------------------------------------------
def test_training_lowers_the_divergence_and_leaves_the_target_alone(target: Path, text: DataLoader[Sample]) -> None:
    module = made(target, layers=1, learning_rate=5e-3)
    run = trainer(max_steps=32)  # whole epochs: validation sees the last step
    run.validate(module, text, verbose=False)
    before = {name: float(value) for name, value in run.callback_metrics.items()}
    tokens = torch.cat([batch["input_ids"] for batch in text])
    assert before["val_loss"] == pytest.approx(divergence(model_of(target), module.draft, tokens), rel=1e-4)
    run.fit(module, text, text)
    after = {name: float(value) for name, value in run.callback_metrics.items()}
    assert after["val_loss"] < 0.7 * before["val_loss"]
    assert before["val_acceptance"] + 0.05 < after["val_acceptance"] <= 1
    assert {"train_loss", "train_acceptance", "val_loss", "val_acceptance"} <= set(after)

    teacher, stored = module._teacher[0], model_of(target).state_dict()
    assert all(torch.equal(value, stored[name]) for name, value in teacher.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters()) and not teacher.training
    ours = {p.data_ptr() for p in module.parameters()}
    assert not ours & {p.data_ptr() for p in teacher.parameters()}, "the draft shares weights with its target"
    written = model_of("draft").eval()
    assert divergence(model_of(target), written, tokens) == pytest.approx(after["val_loss"], rel=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_padding_does_not_count(target: Path, temperature: float) -> None:
    module = made(target, temperature=temperature)
    module.configure_model()
    ids = torch.randint(1, 300, (3, 12), generator=torch.Generator().manual_seed(4))
    lengths = [12, 5, 8]
    mask = torch.stack([(torch.arange(12) < n).long() for n in lengths])
    losses = []
    for padding in (0, 9):  # whatever stands where nothing is
        batch = {"input_ids": ids.masked_fill(mask == 0, padding), "attention_mask": mask}
        loss, agree, count = module._compare(batch)
        losses.append(float(loss.detach()))
        assert count == sum(lengths) and 0 <= int(agree) <= count
    alone = [module._compare({"input_ids": ids[i : i + 1, :n]}) for i, n in enumerate(lengths)]
    expected = sum(float(loss.detach()) * count for loss, _, count in alone) / sum(lengths)
    assert losses == pytest.approx([expected] * 2, rel=1e-5)
    unmasked = float(module._compare({"input_ids": ids})[0].detach())
    assert abs(unmasked - expected) > 1e-4 * expected, "the mask must be able to matter"


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_lower_precisions_train(target: Path, text: DataLoader[Sample], precision: str) -> None:
    dtype = "float32" if precision == "bf16-mixed" else "bfloat16"
    run = trainer(precision=precision)
    run.fit(made(target, dtype=dtype), text)
    assert torch.isfinite(run.callback_metrics["train_loss"])
    assert json.loads(Path("draft/config.json").read_text())["dtype"] == dtype


def test_checkpoints_hold_the_draft_alone_and_a_run_goes_on(tmp_path: Path, target: Path, loader: Any) -> None:
    whole = made(target, "whole", schedule="constant")
    trainer(max_steps=6).fit(whole, copy.copy(loader))
    first = made(target, "first", schedule="constant")
    run = trainer(max_steps=4, enable_checkpointing=True, default_root_dir=tmp_path)
    run.fit(first, copy.copy(loader))
    path = run.checkpoint_callback.best_model_path  # type: ignore[union-attr]
    names = torch.load(path, weights_only=True)["state_dict"]
    assert names and all(name.startswith("draft.") for name in names) and not any(".layers.2." in n for n in names)
    rest = made(target, "rest", schedule="constant")
    trainer(max_steps=6).fit(rest, copy.copy(loader), ckpt_path=path)
    for name, value in whole.draft.state_dict().items():
        assert torch.equal(value, rest.draft.state_dict()[name]), name


# -- the result ------------------------------------------------------------------------------------------------------
def test_the_output_drafts_for_its_target(target: Path, text: DataLoader[Sample]) -> None:
    trainer(max_steps=2).fit(made(target), text)
    from transformers import AutoTokenizer

    ours, theirs = (AutoTokenizer.from_pretrained(str(d), local_files_only=True) for d in ("draft", target))
    assert ours.get_vocab() == theirs.get_vocab() and ours.eos_token_id == theirs.eos_token_id
    assert model_of("draft").config.vocab_size == model_of(target).config.vocab_size

    prompts: Any = ["what is 2 plus 2?", "the quick brown fox"]
    loader: Any = DataLoader(prompts, batch_size=1, collate_fn=list)
    module = CausalLM(str(target), max_new_tokens=16)
    plain = trainer().predict(module, loader)
    strategy = YggdrasilStrategy(draft="draft", tree={"width": 2, "depth": 3})
    drafted = trainer(strategy=strategy).predict(CausalLM(str(target), max_new_tokens=16), loader)
    assert [str(p) for p in drafted or []] == [str(p) for p in plain or []]
    report = strategy.report
    assert report.generations == 2 and report.drafted and not report.fallbacks


class Stop(L.Callback):
    """Breaks training off after a step."""

    def __init__(self, error: type[BaseException], step: int = 2) -> None:
        self.error, self.step = error, step

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise self.error("broken off")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_broken_run_writes_beside_the_finished_draft(target: Path, text: Any, error: type[BaseException]) -> None:
    trainer(max_steps=1).fit(made(target), text)
    finished = {file.name: file.read_bytes() for file in Path("draft").iterdir()}
    broken = made(target, learning_rate=1e-2)
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit if error is KeyboardInterrupt else error):
            trainer(max_steps=9, callbacks=[Stop(error)]).fit(broken, text)
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning turns it off before it exits
    assert {file.name: file.read_bytes() for file in Path("draft").iterdir()} == finished
    rescued = model_of("draft-interrupted").state_dict()
    assert all(torch.equal(value, rescued[name]) for name, value in broken.draft.state_dict().items())
    assert Path("draft-interrupted/tokenizer.json").is_file()


def test_a_run_that_stops_before_its_first_step_writes_nothing(target: Path, text: Any) -> None:
    class Never(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            raise RuntimeError("no data")

    with pytest.raises(RuntimeError, match="no data"):
        trainer(callbacks=[Never()]).fit(made(target), text)
    assert not list(Path().glob("draft*"))


def test_validation_that_breaks_off_writes_nothing(target: Path, text: Any) -> None:
    class Bad(L.Callback):
        def on_validation_batch_end(self, *args: Any) -> None:
            raise RuntimeError("bad batch")

    module = made(target)
    with pytest.raises(RuntimeError, match="bad batch"):
        trainer(callbacks=[Bad()]).validate(module, text, verbose=False)
    assert not list(Path().glob("draft*"))


@pytest.mark.parametrize("broken", [False, True])
def test_fast_dev_run_writes_nothing(target: Path, text: DataLoader[Sample], broken: bool) -> None:
    run = trainer(fast_dev_run=True, callbacks=[Stop(RuntimeError, 1)] if broken else None)
    if broken:
        with pytest.raises(RuntimeError, match="broken off"):
            run.fit(made(target), text, text)
    else:
        run.fit(made(target), text, text)
    assert not list(Path().glob("draft*"))


def test_it_says_where_the_draft_is(target: Path, text: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "ygglight.modules.distilled_draft"):
        trainer().fit(made(target, "deep/down/draft"), text)
    (message,) = [r.getMessage() for r in caplog.records if "YggdrasilStrategy" in r.getMessage()]
    assert "deep/down/draft" in message and Path("deep/down/draft/config.json").is_file()


# -- what cannot be --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "message"), [({"layers": 0}, "layers=0 must be"), ({"temperature": 0.0}, "temperature=0.0 must be")]
)
def test_bad_numbers(target: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(target, **options)


def test_more_layers_than_there_are(target: Path, text: DataLoader[Sample]) -> None:
    with pytest.raises(ValueError, match="layers=9, but the target has 3"):
        trainer().fit(made(target, layers=9), text)


def test_a_target_that_is_not_there() -> None:
    with pytest.raises(FileNotFoundError, match="no-such-model"):
        DistilledDraft("no-such-model", "draft")


def test_an_output_that_cannot_be_written_fails_before_training(target: Path, text: DataLoader[Sample]) -> None:
    Path("file").write_text("mine")
    with pytest.raises(ValueError, match="is a file"):
        made(target, "file")
    module = made(target, "file/draft")
    run = trainer()
    with pytest.raises(ValueError, match="output='file/draft' cannot be written"):
        run.fit(module, text)
    assert run.global_step == 0 and Path("file").read_text() == "mine"


@pytest.mark.parametrize("kind", ["softcap", "scaled"])
def test_logits_that_are_more_than_a_linear_head_are_refused(tmp_path: Path, kind: str) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM

    shape: dict[str, Any] = {
        "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    model: Any = (
        Gemma2ForCausalLM(Gemma2Config(**shape, head_dim=8, final_logit_softcapping=3.0))
        if kind == "softcap"
        else GraniteForCausalLM(GraniteConfig(**shape, logits_scaling=4.0))
    )
    model.save_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match="more than a linear head"):
        made(tmp_path / "m", layers=1).configure_model()
