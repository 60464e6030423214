"""MoESpeQStrategy with what people put around a model: other models, adapters, precisions, compilers, checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import Tensor

import ygglight  # noqa: F401  (registers the names)
from ygglight.modules import CausalLM
from ygglight.strategies import MoESpeQStrategy

from .sparse import NEW, VOCABULARY, Scores, Writes, mixtral, plain, prompts, same, slabs, trainer
from .sparse import alone as alone  # a fixture


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """What was printed at the end of runs."""
    lines: list[str] = []
    monkeypatch.setattr("ygglight.strategies.generating.rank_zero_info", lines.append)
    return lambda: "\n".join(lines)


def drafting(model: Any, slots: int = 4) -> MoESpeQStrategy:
    return MoESpeQStrategy(slabs(model, slots) + 40_000, k=3)


class Several(L.LightningModule):
    """Writes with each of its models."""

    def __init__(self, **models: Any) -> None:
        super().__init__()
        self.models = torch.nn.ModuleDict(models)

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return torch.cat([m.generate(batch, do_sample=False, max_new_tokens=NEW) for m in self.models.values()])


def test_two_mixtures_share_the_budget_and_a_dense_model_is_left_alone(told: Callable[[], str]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    ends = {"eos_token_id": None, "pad_token_id": None, "bos_token_id": None}
    dense = LlamaForCausalLM(LlamaConfig(**shape, **ends, num_attention_heads=2)).eval()
    module = Several(one=mixtral(0), other=mixtral(1, num_hidden_layers=3), dense=dense)
    expected = [module.predict_step(row, 0) for row in prompts()]
    splits: list[int] = []

    class Looks(L.Callback):
        def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            splits.extend(engine.split.nbytes for engine in trainer.strategy.engines.values())  # type: ignore[attr-defined]

    budget = 800_000
    found = trainer(MoESpeQStrategy(budget, k=3), callbacks=[Looks()]).predict(module, prompts())
    assert same(found, expected)
    assert len(splits) == 2 and sum(splits) <= budget < 3 * min(splits), "one budget, and it is used"
    assert "models.one:" in told() and "models.other:" in told() and "models.dense" not in told()


def test_adapters_on_the_attention() -> None:
    peft = pytest.importorskip("peft")
    model = mixtral()
    before = plain(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    module, used = Writes(adapted), drafting(model)
    expected = [module.predict_step(row, 0) for row in prompts()]
    assert not same(expected, before)
    assert same(trainer(used).predict(module, prompts()), expected)
    assert used.report.accepted > 0 and not used.report.fallbacks


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_a_trainer_that_casts_the_model(precision: Any) -> None:
    expected = trainer("auto", precision=precision).predict(Writes(mixtral()), prompts())
    model = mixtral()
    used = drafting(model)
    assert same(trainer(used, precision=precision).predict(Writes(model), prompts()), expected)  # type: ignore[arg-type]
    assert used.report.accepted > 0
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16 if precision == "bf16-true" else torch.float16}


def test_under_autocast_experts_compute_in_their_own_dtype_as_transformers_do() -> None:
    model = mixtral()
    exact = trainer("auto").predict(Scores(model), prompts())
    expected = trainer("auto", precision="bf16-mixed").predict(Scores(model), prompts())
    found = trainer(MoESpeQStrategy(slabs(model, 2), k=0), precision="bf16-mixed").predict(Scores(model), prompts())
    assert exact and expected and found
    for one, other, whole in zip(found, expected, exact, strict=True):
        assert one.dtype == other.dtype
        rounded = (whole.float() - other.float()).norm()
        assert (one.float() - other.float()).norm() < 0.2 * rounded, "as far off as bfloat16 experts would be"


def test_a_compiled_model() -> None:
    model = mixtral()
    expected = plain(model)
    used = drafting(model)
    assert same(trainer(used).predict(Writes(torch.compile(model, backend="eager")), prompts()), expected)
    assert used.report.accepted > 0


def test_steps_of_validation_and_test_generate_so_too() -> None:
    class Checks(Writes):
        def __init__(self, model: Any) -> None:
            super().__init__(model)
            self.found: list[Tensor] = []

        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            self.found.append(self.predict_step(batch, batch_idx))

        test_step = validation_step

    model = mixtral()
    expected = plain(model)
    for verb in ("validate", "test"):
        module, used = Checks(model), drafting(model)
        getattr(trainer(used), verb)(module, prompts(), verbose=False)
        assert same(module.found, expected) and used.report.drafted > 0


def test_the_same_seed_draws_the_same_text() -> None:
    class Draws(Writes):
        def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.model.generate(batch, do_sample=True, temperature=0.9, max_new_tokens=NEW)

    model, found = mixtral(), []
    for seed in (7, 7, 8):
        L.seed_everything(seed, verbose=False)
        found.append(trainer(drafting(model)).predict(Draws(model), prompts()))
    assert same(found[0], found[1]) and not same(found[0], found[2])  # type: ignore[arg-type]


def test_one_trainer_runs_again_and_after_it_nothing_takes_the_experts(told: Callable[[], str]) -> None:
    model, used = mixtral(), drafting(mixtral())
    expected, module, one = plain(model), Writes(model), trainer(used)
    assert same(one.predict(module, prompts()), expected) and same(one.predict(module, prompts()), expected)
    assert used.engines == {} and used.report.generations == len(expected)
    assert [name for name, _ in model.named_parameters() if ".experts." in name]
    assert "stays for the next run" in told()


def test_forwards_alone_are_told_of_and_trying_the_model_out_is_not(told: Callable[[], str]) -> None:
    model = mixtral()
    trainer(MoESpeQStrategy(slabs(model, 2), k=0)).predict(Scores(model), prompts())
    assert "bytes moved" in told()
    counts = []
    for times in (1, 2):

        class Repeats(Writes):
            def predict_step(self, batch: Tensor, batch_idx: int, times: int = times) -> Tensor:
                return torch.cat([super(Repeats, self).predict_step(batch, 0) for _ in range(times)])

        used = MoESpeQStrategy(slabs(model, 2), k=0)
        trainer(used).predict(Repeats(model), prompts())
        counts.append(used.report.experts["requests"])
    assert counts[1] == 2 * counts[0]


# -- checkpoints -------------------------------------------------------------------------------------------------------
class Tokens(CausalLM):
    """Prompts are token ids."""

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.generate(batch, do_sample=False, max_new_tokens=NEW)


def test_a_checkpoint_is_loaded_before_the_experts_go_and_refused_where_they_are_not(tmp_path: Path) -> None:
    trained, model = mixtral(5), mixtral()
    model.save_pretrained(tmp_path / "moe")
    module = Tokens(str(tmp_path / "moe"), loss="full")
    module.configure_model()
    module.model.load_state_dict(trained.state_dict())  # type: ignore[union-attr]
    saver = trainer("auto")
    saver.strategy.connect(module)
    saver.save_checkpoint(tmp_path / "x.ckpt")

    def run(**options: Any) -> Any:
        module = Tokens(str(tmp_path / "moe"), loss="full", **options)
        kwargs = {"ckpt_path": str(tmp_path / "x.ckpt"), "weights_only": False}
        return trainer(MoESpeQStrategy(slabs(model, 2), k=0)).predict(module, prompts(), **kwargs)

    assert same(run(), plain(trained)) and not same(run(), plain(model))
    with pytest.raises(ValueError, match="experts='memory'"):
        run(experts="disk")


def test_experts_in_files_are_for_this_strategy_and_their_own_dtype(tmp_path: Path) -> None:
    model = mixtral()
    model.save_pretrained(tmp_path / "moe")
    for other in ("auto", "yggdrasil", MoESpeQStrategy("1MiB", enabled=False)):
        with pytest.raises(ValueError, match="strategy='moe_speq'"):
            trainer(other).predict(Tokens(str(tmp_path / "moe"), experts="disk"), prompts())
    for precision in ("bf16-true", "16-true"):
        with pytest.raises(ValueError, match=r"opened as torch\.float32 and the model is"):
            module = Tokens(str(tmp_path / "moe"), experts="disk")
            trainer(MoESpeQStrategy("1MiB", k=0), precision=precision).predict(module, prompts())
