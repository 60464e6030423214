import copy
import logging
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from torch.utils.data import DataLoader

from ygglight.modules import CausalLM
from ygglight.modules.testing import tiny_causal_lm

LORA = {"r": 4, "lora_alpha": 8}


def trainer(tmp_path: Path, **options) -> L.Trainer:
    defaults = {"max_steps": 3, "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(accelerator="cpu", devices=1, default_root_dir=tmp_path, **defaults | options)


def prompts_of(prompts: list[str]) -> DataLoader:
    return DataLoader(prompts, batch_size=len(prompts), collate_fn=list)


def loss_and_gradients(module: CausalLM, batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    module.configure_model()
    loss = module._loss(batch)
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in module.named_parameters() if p.requires_grad}


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp_min(1e-12))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("lora", [None, LORA])
def test_chunked_loss_and_gradients_equal_the_full_ones(tmp_path, batch, tied, lora):
    directory = tiny_causal_lm(tmp_path, tie_word_embeddings=tied)
    chunked, got = loss_and_gradients(CausalLM(str(directory), lora=lora, loss="chunked"), batch)
    full, want = loss_and_gradients(CausalLM(str(directory), lora=lora, loss="full"), batch)
    assert relative(chunked, full) < 1e-5
    assert got.keys() == want.keys()
    assert all(relative(got[n], want[n]) < 1e-5 for n in want)
    assert any(want[n].norm() > 1e-3 for n in want)  # the comparison must be able to fail


def test_logits_with_a_soft_cap_keep_the_chunked_loss(tmp_path, batch):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, final_logit_softcapping=3.0, query_pre_attn_scalar=8,
    )  # fmt: skip
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    modules = [CausalLM(str(tmp_path), loss=loss, attention="eager") for loss in ("chunked", "full")]
    (chunked, got), (full, want) = (loss_and_gradients(m, batch) for m in modules)
    assert modules[0]._chunked and modules[0]._softcap == 3.0
    assert relative(chunked, full) < 1e-5
    assert all(relative(got[n], want[n]) < 1e-4 for n in want)


def test_scaled_logits_fall_back_to_the_full_loss_with_one_warning(tmp_path, batch, caplog):
    from transformers import GraniteConfig, GraniteForCausalLM

    config = GraniteConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, logits_scaling=4.0,
    )  # fmt: skip
    GraniteForCausalLM(config).save_pretrained(tmp_path)
    module = CausalLM(str(tmp_path))
    with caplog.at_level(logging.WARNING):
        loss, _ = loss_and_gradients(module, batch)
    assert not module._chunked
    assert sum("more than a linear head" in r.message for r in caplog.records) == 1
    assert relative(loss, loss_and_gradients(CausalLM(str(tmp_path), loss="full"), batch)[0]) == 0


def test_adapters_on_the_head_fall_back_to_the_full_loss(tiny):
    module = CausalLM(str(tiny), lora=LORA | {"target_modules": ["lm_head", "q_proj"]})
    module.configure_model()
    assert not module._chunked


def test_constructing_is_cheap_and_configure_model_idempotent(tiny):
    module = CausalLM(str(tiny))
    assert module.model is None and not list(module.parameters())
    with pytest.raises(RuntimeError, match="configure_model"):
        module.generate()
    module.configure_model()
    model = module.model
    module.configure_model()
    assert module.model is model and model.training


def test_fit_lowers_the_loss_and_logs(tmp_path, tiny, loader):
    module = CausalLM(str(tiny), learning_rate=1e-2, warmup_steps=2, weight_decay=0.1)
    run = trainer(tmp_path, max_steps=12, enable_checkpointing=False)
    run.validate(module, loader, verbose=False)
    before = run.callback_metrics["val_loss"].item()
    run.fit(module, loader, loader)
    assert run.callback_metrics["val_loss"].item() < before - 0.1
    assert run.callback_metrics["tokens"].item() == 12 * 4 * 15
    groups = {g["weight_decay"]: g["params"] for g in run.optimizers[0].param_groups}
    assert all(p.ndim >= 2 for p in groups[0.1]) and all(p.ndim == 1 for p in groups[0.0])


@pytest.mark.parametrize("lora", [None, LORA])
@pytest.mark.parametrize("broken_at", [4, 6])  # within an epoch of 6 batches, and at its end
def test_a_resumed_run_equals_an_unbroken_one(tmp_path, tiny, loader, lora, broken_at):
    def fit(name: str, steps: int, ckpt: str | None = None) -> tuple[CausalLM, L.Trainer]:
        module = CausalLM(str(tiny), lora=lora, learning_rate=1e-2, schedule="constant")
        run = trainer(tmp_path / name, max_steps=steps)
        run.fit(module, copy.copy(loader), ckpt_path=ckpt)
        return module, run

    whole, _ = fit("whole", 12)
    _, first = fit("first", broken_at)
    rest, run = fit("rest", 12, first.checkpoint_callback.best_model_path)
    assert run.global_step == 12
    for (name, p), q in zip(whole.named_parameters(), rest.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert int(rest._tokens) == 12 * 4 * 15


def test_lora_saves_only_adapters_and_peft_loads_them(tmp_path, tiny, loader, batch):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    module = CausalLM(str(tiny), lora=LORA, learning_rate=1e-2)
    run = trainer(tmp_path)
    run.fit(module, loader)
    path = run.checkpoint_callback.best_model_path
    state = torch.load(path, weights_only=True)["state_dict"]
    assert state and all("lora_" in name for name in state)
    assert any(v.abs().sum() > 0 for n, v in state.items() if "lora_B" in n)

    module.save_adapter(str(tmp_path / "adapter"))
    base = AutoModelForCausalLM.from_pretrained(str(tiny), local_files_only=True)
    plain = base(batch["input_ids"]).logits
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    module.eval()
    assert torch.allclose(loaded(batch["input_ids"]).logits, module(batch["input_ids"]).logits, atol=1e-6)
    assert not torch.allclose(plain, module(batch["input_ids"]).logits, atol=1e-3)

    again = CausalLM.load_from_checkpoint(path, map_location="cpu").eval()
    assert torch.equal(again(batch["input_ids"]).logits, module(batch["input_ids"]).logits)


def test_a_lora_checkpoint_of_other_adapters_is_refused(tmp_path, tiny, loader):
    run = trainer(tmp_path)
    run.fit(CausalLM(str(tiny), lora=LORA | {"target_modules": ["q_proj"]}), loader)
    with pytest.raises(ValueError, match=r"lacks .* adapter tensors"):
        other = CausalLM(str(tiny), lora=LORA | {"target_modules": ["q_proj", "v_proj"]})
        trainer(tmp_path).fit(other, loader, ckpt_path=run.checkpoint_callback.best_model_path)


def test_predict_returns_text(tmp_path, tiny):
    module = CausalLM(str(tiny), max_new_tokens=5)
    prompts = ["to be, or", "the quick brown fox jumps over the"]
    run = trainer(tmp_path)
    (together,) = run.predict(module, prompts_of(prompts))
    assert [r["prompt"] for r in together] == prompts
    for result in together:
        assert isinstance(result["text"], str) and 1 <= len(result["tokens"]) <= 5
    # Left padding must not change what a prompt is continued with.
    alone = [run.predict(module, prompts_of([p]))[0][0] for p in prompts]
    assert [r["tokens"] for r in alone] == [r["tokens"] for r in together]


def test_bare_prompts_are_refused(tmp_path, tiny):
    with pytest.raises(TypeError, match="prompts go in batches"):
        trainer(tmp_path).predict(CausalLM(str(tiny)), ["one prompt", "another"])


def test_predict_stops_at_the_end_token_and_can_sample_and_chat(tmp_path, tiny):
    module = CausalLM(str(tiny), max_new_tokens=4, generation={"do_sample": True, "temperature": 0.5}, chat=True)
    ((result,),) = trainer(tmp_path).predict(module, prompts_of(["hello"]))
    assert result["prompt"] == "hello"
    ids = module._encode(["hello"])["input_ids"]
    assert module.tokenizer.decode(ids[0]) == "<|user|>hello<|assistant|>"
    end = module.tokenizer.eos_token_id
    assert module._result("p", [5, 6, end, end])["tokens"] == [5, 6, end]


def test_gradient_checkpointing_changes_nothing_but_memory(tiny, batch):
    plain, want = loss_and_gradients(CausalLM(str(tiny)), batch)
    module = CausalLM(str(tiny), gradient_checkpointing=True)
    loss, got = loss_and_gradients(module, batch)
    assert module.model.is_gradient_checkpointing
    assert torch.equal(loss, plain) and all(torch.equal(got[n], want[n]) for n in want)


def test_random_weights_depend_on_the_seed_alone_and_layers_can_be_cut(tiny):
    def build(**options) -> CausalLM:
        module = CausalLM(str(tiny), **options)
        module.configure_model()
        return module

    one, same, other = (build(init="random", seed=s).state_dict() for s in (1, 1, 2))
    assert all(torch.equal(one[n], same[n]) for n in one)
    assert not torch.equal(one["model.lm_head.weight"], other["model.lm_head.weight"])
    whole, cut = build().state_dict(), build(config_overrides={"num_hidden_layers": 1}).state_dict()
    assert len(cut) < len(whole) and all(torch.equal(cut[n], whole[n]) for n in cut)


def test_autocast_and_half_precision_train(tmp_path, tiny, loader):
    for precision in ("bf16-mixed", "bf16-true"):
        run = trainer(tmp_path, precision=precision, enable_checkpointing=False)
        run.fit(CausalLM(str(tiny)), loader)
        assert torch.isfinite(run.callback_metrics["train_loss"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "no/such/place"}, "neither a directory .* packaged one"),
        ({"model": "gsm8k"}, "packaged text, not a model"),
        ({"quantization": "4bit"}, "CUDA"),
        ({"quantization": "2bit"}, "not one of"),
        ({"optimizer": "sgd"}, "not one of 'adamw'"),
        ({"loss": "cut"}, "not one of"),
        ({"learning_rate": -1.0}, "at least 0"),
        ({"max_new_tokens": 0}, "at least 1"),
    ],
)
def test_bad_arguments_are_refused_at_construction(tiny, options, message):
    if "quantization" in options and torch.cuda.is_available():
        pytest.skip("CUDA is here")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        CausalLM(**{"model": str(tiny)} | options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora": {"rank": 4}}, "keys are those of peft.LoraConfig"),
        ({"lora": {"target_modules": ["nope"]}}, "it has .*q_proj"),
        ({"config_overrides": {"layers": 3}}, "LlamaConfig has not: layers"),
        ({"config_overrides": {"hidden_size": 16}}, "changes the shape"),
    ],
)
def test_what_only_the_model_can_refuse(tiny, options, message):
    with pytest.raises(ValueError, match=message):
        CausalLM(str(tiny), **options).configure_model()


def test_a_directory_without_a_model_and_adapters_without_lora(tmp_path, tiny):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        CausalLM(str(tmp_path))
    with pytest.raises(ValueError, match="no adapters"):
        CausalLM(str(tiny)).save_adapter(str(tmp_path))


def test_a_missing_extra_is_named(tiny, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"ygglight\[lora\]"):
        CausalLM(str(tiny), lora=LORA)
    with pytest.raises(ModuleNotFoundError, match=r"ygglight\[bnb\]"):
        CausalLM(str(tiny), optimizer="adamw8bit")
