"""Checkpoints of HarliStrategy: the adapter alone, in two forms, and resuming from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from ygglight.modules import CausalLM

from .harli_cases import LENGTH, Asked, Beside, Tuned, adapter, close, fit, loader, strategy, trainer


def two(engine: Any) -> list[Asked]:
    return [Asked(engine, [5, 6, 7], 60), Asked(engine, [9, 8], 60, "adapter")]


class Headed(Tuned):
    """Trains something besides the LoRA model."""

    def __init__(self, directory: Path, **options: Any) -> None:
        super().__init__(directory, **options)
        self.scale = torch.nn.Parameter(torch.ones(()))

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        return self.scale * super().loss(batch)


def causal(tiny: Path) -> CausalLM:
    return CausalLM(str(tiny), lora={"r": 4}, schedule="constant")


def headed(tiny: Path) -> Tuned:
    return Headed(tiny, dropout=0.0)


def bare(tiny: Path) -> Tuned:
    """The LoRA layers are in the transformers model, without a wrapper of peft's."""
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM

    module = Tuned(tiny, dropout=0.0)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny)
    model.add_adapter(LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    module.lm = model.train()
    return module


@pytest.mark.parametrize("make", [causal, headed, bare])
def test_a_checkpoint_holds_the_adapter_alone_and_peft_loads_its_folder(tiny: Path, make: Any) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    module, chosen = make(tiny), strategy()
    keep = ModelCheckpoint("kept", filename="{step}", every_n_train_steps=2, save_top_k=-1)
    fit(module, chosen, keep, Beside(chosen, two), enable_checkpointing=True, max_steps=4)
    files = sorted(path.name for path in Path("kept").iterdir())
    assert files == ["step=2-adapter", "step=2.ckpt", "step=4-adapter", "step=4.ckpt"]
    saved = torch.load("kept/step=4.ckpt", weights_only=False)["state_dict"]
    assert set(saved) == set(adapter(module)) and len(saved) >= 28
    assert all(torch.equal(saved[name], value) for name, value in adapter(module).items())
    size = sum(f.stat().st_size for f in Path("kept/step=4-adapter").iterdir())
    assert size < sum(f.stat().st_size for f in tiny.iterdir()), "the folder holds the base as well"
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), "kept/step=4-adapter").eval()
    ids = torch.arange(1, 20)[None]
    network: Any = module.model if isinstance(module, CausalLM) else module.lm
    with torch.no_grad():
        logits = network.eval()(input_ids=ids).logits
        assert torch.allclose(loaded(input_ids=ids).logits, logits, rtol=0, atol=1e-6)
        older = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), "kept/step=2-adapter").eval()
        assert not torch.allclose(older(input_ids=ids).logits, logits, rtol=0, atol=1e-3)


def test_rotation_removes_the_folder_too(tiny: Path) -> None:
    keep = ModelCheckpoint("kept", filename="{step}", every_n_train_steps=1, save_top_k=1, monitor="step", mode="max")
    fit(Tuned(tiny), strategy(), keep, enable_checkpointing=True, max_steps=3)
    assert sorted(path.name for path in Path("kept").iterdir()) == ["step=3-adapter", "step=3.ckpt"]


@pytest.mark.parametrize("make", [causal, headed, bare])
def test_resuming_is_like_an_unbroken_run(tiny: Path, make: Any) -> None:
    data: dict[str, Any] = {"data": loader(4), "gradient_clip_val": 0.3}  # two batches an epoch
    whole = make(tiny)
    losses = fit(whole, max_steps=6, **data).losses
    keep = ModelCheckpoint("kept", filename="{step}", every_n_train_steps=4)
    first = fit(make(tiny), strategy(), keep, enable_checkpointing=True, max_steps=4, **data)
    chosen, resumed = strategy(), make(tiny)
    second = fit(resumed, chosen, Beside(chosen, two), max_steps=6, ckpt_path="kept/step=4.ckpt", **data)
    assert first.losses + second.losses == pytest.approx(losses, abs=1e-6)
    assert close(adapter(resumed), adapter(whole)) and not close(adapter(resumed), adapter(make(tiny)), 1e-3)


def test_what_a_fit_saved_can_be_tested(tiny: Path) -> None:
    """Other runs put the adapter on the base as well, and are Lightning's own otherwise."""
    module, chosen = Tuned(tiny, dropout=0.0), strategy()
    keep = ModelCheckpoint("kept", filename="{step}")
    fit(module, chosen, keep, enable_checkpointing=True, max_steps=4)
    expected = trainer().test(module, loader(4), verbose=False)
    path = str(next(Path("kept").glob("*.ckpt")))
    found = trainer(strategy()).test(Tuned(tiny, dropout=0.0), loader(4), ckpt_path=path, verbose=False)
    untrained = trainer(strategy()).test(Tuned(tiny, dropout=0.0), loader(4), verbose=False)
    assert found == [pytest.approx(expected[0], abs=1e-6)] and found != untrained


def test_the_checkpoint_of_another_adapter_is_refused(tiny: Path) -> None:
    keep = ModelCheckpoint("kept", filename="{step}")
    fit(Tuned(tiny, target_modules=["q_proj"]), strategy(), keep, enable_checkpointing=True, max_steps=1)
    path = str(next(Path("kept").glob("*.ckpt")))
    with pytest.raises(ValueError, match="another `lora`"):
        fit(Tuned(tiny), strategy(), max_steps=2, ckpt_path=path)
    with pytest.raises(ValueError, match="another `lora`"):
        fit(Tuned(tiny, target_modules=["v_proj"]), strategy(), max_steps=2, ckpt_path=path)


def test_lengths_are_those_of_the_loss(tiny: Path) -> None:
    """The report counts loss-bearing tokens: labels that are -100 bear none."""
    chosen = strategy()
    module = Tuned(tiny)
    batch = [{"input_ids": row["input_ids"], "labels": row["labels"].clone()} for row in loader(4).dataset]
    for row in batch:
        row["labels"][:10] = -100
    fit(module, chosen, data=torch.utils.data.DataLoader(batch, batch_size=2), max_steps=2)
    assert chosen.report is not None and chosen.report.finetune_tokens == 4 * (LENGTH - 10)
