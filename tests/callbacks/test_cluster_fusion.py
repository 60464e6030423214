"""ClusterFusion through the Trainer: the same text, a table that is true, and nothing left behind."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import ygglight  # noqa: F401  (registers the names)
from ygglight.callbacks import ClusterFusion
from ygglight.engines.decode import fused, fusion
from ygglight.engines.moe_speq.config import STAGING
from ygglight.kernels.cluster_decode import Choice, decode_block
from ygglight.strategies import MoESpeQStrategy, YggdrasilStrategy

NEW, PROMPTS, LAYERS = 12, 2, 2
SHAPE: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.3, "tie_word_embeddings": False,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": {}, "qwen2": {}, "qwen3": {"head_dim": 16}, "mistral": {"sliding_window": 12}, "gemma": {"head_dim": 16},
}  # fmt: skip
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4, "q_lora_rank": 20, "kv_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8,
    "v_head_dim": 10, "n_routed_experts": 8, "num_local_experts": 8, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1,
}  # fmt: skip
MODELS |= {"deepseek_v2": LATENT, "deepseek_v3": LATENT}
MIXTRAL = {"num_local_experts": 8, "num_experts_per_tok": 2}

pytestmark = pytest.mark.usefixtures("own_cache", "one_thread")


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr("ygglight.callbacks.cluster_fusion.rank_zero_info", lines.append)
    return lines


def make(kind: str = "llama", **changes: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SHAPE | MODELS.get(kind, {}) | changes)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


class Writes(L.LightningModule):
    """Knows nothing of ygglight. Notes whether its model's layers had other forwards."""

    def __init__(self, model: nn.Module | None = None, breaks: bool = False) -> None:
        super().__init__()
        self.lm: Any = make() if model is None else model
        self.breaks = breaks
        self.inside: list[bool] = []

    @property
    def replaced(self) -> bool:
        return any("forward" in vars(module) for module in self.lm.modules())

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.inside.append(self.replaced)
        text: Tensor = self.lm.generate(batch, do_sample=False, max_new_tokens=NEW)
        if self.breaks and batch_idx == 1:
            raise KeyError("by the user")
        return text

    validation_step = test_step = predict_step

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        assert not self.replaced
        loss: Tensor = self.lm(input_ids=batch, labels=batch).loss
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 1e-3)


def data(size: int = 1) -> DataLoader:
    ids = torch.randint(1, 97, (PROMPTS, size, 9), generator=torch.Generator().manual_seed(3))
    return DataLoader(list(ids), batch_size=None)


def trainer(callback: ClusterFusion | None = None, strategy: Any = "auto", **more: Any) -> L.Trainer:
    quiet: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False,
    }  # fmt: skip
    return L.Trainer(strategy=strategy, callbacks=[] if callback is None else [callback], **quiet | more)


def predict(module: Any, callback: ClusterFusion | None = None, strategy: Any = "auto", size: int = 1) -> Tensor:
    return torch.cat(trainer(callback, strategy).predict(module, data(size)))


@pytest.mark.parametrize("kind", MODELS)
def test_the_text_is_the_same(kind: str, told: list[str]) -> None:
    module = Writes(make(kind))
    expected = predict(module)
    held = {name: set(vars(each)) for name, each in module.named_modules()}
    pointers = [parameter.data_ptr() for parameter in module.parameters()]
    callback = ClusterFusion(enabled=True)
    module.inside.clear()
    assert torch.equal(predict(module, callback), expected)
    assert len(set(expected[:, 9:].flatten().tolist())) >= 10, "boring text proves nothing"
    assert module.inside == [True] * PROMPTS
    assert held == {name: set(vars(each)) for name, each in module.named_modules()}
    assert pointers == [parameter.data_ptr() for parameter in module.parameters()]
    # The prompt gives the first token of each text.
    assert callback.reports[0].calls == PROMPTS * (NEW - 1) * LAYERS
    assert told == [
        "ClusterFusion:\n  lm: asked for, not measured\n"
        f"    {LAYERS} layers fused by torch, {PROMPTS * (NEW - 1)} times each"
    ]


def test_with_a_tree(told: list[str]) -> None:
    module = Writes()
    expected = predict(module)
    strategy = YggdrasilStrategy(draft="lookup", tree={"width": 2, "depth": 3})
    callback = ClusterFusion(enabled=True)
    assert torch.equal(predict(module, callback, strategy), expected)
    assert strategy.report.iterations > 0 and strategy.report.fallbacks == {}
    assert callback.reports[0].calls > 0  # where nothing was found to copy, a pass is of one token
    assert not module.replaced


@pytest.mark.parametrize("kind", ["mixtral", "deepseek_v2"])
def test_with_experts_elsewhere(kind: str) -> None:
    module = Writes(make(kind, **(MIXTRAL | {"intermediate_size": 32} if kind == "mixtral" else {})))
    expected = predict(module)
    slots, slab, staging, draft = 3 * 2, 3 * 32 * 32 * 4, STAGING, 60_000
    strategy = MoESpeQStrategy((slots + staging) * slab + draft, k=1)
    callback = ClusterFusion(enabled=True)
    assert torch.equal(predict(module, callback, strategy), expected)
    assert callback.reports[0].calls > 0 and callback.reports[0].layers == (None,) * LAYERS
    assert not module.replaced


@pytest.mark.parametrize("verb", ["validate", "test"])
def test_other_stages(verb: str, told: list[str]) -> None:
    module = Writes()
    getattr(trainer(ClusterFusion(enabled=True)), verb)(module, data(), verbose=False)
    assert module.inside == [True] * PROMPTS and not module.replaced
    assert "fused by torch" in told[0]


def test_inside_a_fit_only_validation(told: list[str]) -> None:
    module, callback = Writes(), ClusterFusion(enabled=True)
    trainer(callback, max_epochs=2).fit(module, data(), data())
    assert module.inside == [True] * (2 * PROMPTS + 2) and not module.replaced  # two of them before training
    assert len(told) == 1 and f"{(2 * PROMPTS + 2) * (NEW - 1)} times each" in told[0]


def test_an_error_inside_a_step() -> None:
    module = Writes(breaks=True)
    with pytest.raises(KeyError, match="by the user"):
        predict(module, ClusterFusion(enabled=True))
    assert module.inside == [True, True] and not module.replaced


def test_on_a_cpu_auto_is_off_and_says_so(told: list[str]) -> None:
    module, callback = Writes(), ClusterFusion()
    expected = predict(Writes())
    assert torch.equal(predict(module, callback), expected)
    assert not any(module.inside)
    assert told == ["ClusterFusion:\n  lm: steps as they were: tensors on 'cpu', not on CUDA"]


@pytest.mark.parametrize("faster", [True, False])
def test_on_a_cpu_auto_measures_latent_attention(
    faster: bool, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    module, callback = Writes(make("deepseek_v2")), ClusterFusion(context=20)
    expected = predict(module)
    monkeypatch.setattr(
        fusion,
        "timed",
        lambda run, width, device: (run(width), 1e-3 if module.replaced == faster else 2e-3)[1],
    )
    module.inside.clear()
    assert torch.equal(predict(module, callback), expected)
    assert module.inside == [faster] * PROMPTS and not module.replaced
    way, words = ("torch", "measured faster: torch") if faster else ("plain", "measured no faster: torch")
    assert callback.reports[0].way == way and words in told[0]


def test_disabled(told: list[str]) -> None:
    module = Writes()
    predict(module, ClusterFusion(enabled=False))
    assert not any(module.inside) and "enabled=False" in told[0]


def test_reasons_are_grouped(told: list[str]) -> None:
    peft = pytest.importorskip("peft")
    adapters = peft.LoraConfig(target_modules=["q_proj"], layers_to_transform=[0, 2])
    predict(Writes(peft.get_peft_model(make(num_hidden_layers=3), adapters).eval()), ClusterFusion(enabled=True))
    fused, left = told[0].splitlines()[2:]
    assert fused == f"    1 layer fused by torch, {PROMPTS * (NEW - 1)} times each"
    assert left.startswith("    2 layers as they were: q_proj is peft's Linear")


def test_steps_that_cannot_run_fused_are_said_to_be_none(told: list[str]) -> None:
    torch.cat(trainer(ClusterFusion(enabled=True), precision="bf16-mixed").predict(Writes(), data()))
    assert "but never: there was no plain step of one token (autocast" in told[0]


def test_what_is_refused() -> None:
    class Empty(L.LightningModule):
        def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return batch

    with pytest.raises(TypeError, match="Empty holds no causal language model"):
        predict(Empty(), ClusterFusion(enabled=True))
    predict(Empty(), ClusterFusion())
    neox = make("gpt_neox", num_attention_heads=4)
    with pytest.raises(
        ValueError, match=r"no decoder layer of lm \(GPTNeoXForCausalLM\) can run fused: .*no self_attn"
    ):
        predict(Writes(neox), ClusterFusion(enabled=True))
    for wrong in ({"enabled": "on"}, {"cluster_size": 3}, {"context": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
            ClusterFusion(**wrong)


# -- auto, on a device that has ways -----------------------------------------------------------------------------------
class Machine:
    """Stands for a GPU: its ways are the torch twin, with times of their own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float]) -> None:
        self.ran: list[str] = []
        self.monkeypatch, self.seconds = monkeypatch, seconds
        ways = {name: self.way(name) for name in seconds if name != fusion.PLAIN}
        monkeypatch.setattr(fusion, "block_ways", lambda device: (ways, "made up"))
        monkeypatch.setattr(fusion, "timed", self.timed)
        monkeypatch.setattr(fused, "choose_path", lambda *args: Choice("cluster", "made up"))

    def way(self, name: str) -> Any:
        def block(*args: Any, **kwargs: Any) -> Tensor:
            self.ran.append(name)
            if self.seconds[name] == float("inf"):
                raise RuntimeError("no cluster of this size fits\nand a second line")
            return decode_block(*args, **kwargs)

        return block

    def timed(self, run: Any, width: int, device: torch.device) -> float:
        self.ran.clear()
        run(width)
        return self.seconds[self.ran[0] if self.ran else fusion.PLAIN]


def test_auto_takes_the_fastest_and_remembers(monkeypatch: pytest.MonkeyPatch, told: list[str]) -> None:
    module = Writes()
    expected = predict(module)
    machine = Machine(monkeypatch, {"plain": 2e-3, "split_k": 1.5e-3, "cluster 2": 1.6e-3, "cluster 4": 1e-3})
    callback = ClusterFusion(context=20)
    assert torch.equal(predict(module, callback), expected)
    assert callback.reports[0].way == "cluster 4" and set(machine.ran) == {"cluster 4"}
    assert "lm: measured faster: cluster 4 1 ms a step, plain 2 ms\n" in told[0]
    machine.seconds["split_k"] = 0.0  # not looked at: the table is kept
    predict(module, callback)
    assert callback.reports[0].way == "cluster 4"
    predict(module, callback := ClusterFusion(context=20, cluster_size=2))
    assert callback.reports[0].way == "cluster 2"


def test_auto_leaves_what_is_no_faster(monkeypatch: pytest.MonkeyPatch, told: list[str]) -> None:
    Machine(monkeypatch, {"plain": 1e-3, "split_k": 0.99e-3})
    predict(module := Writes(), ClusterFusion(context=20))
    assert not any(module.inside)
    assert "steps as they were: measured no faster: split_k 0.99 ms a step, plain 1 ms" in told[0]


def test_auto_leaves_out_what_fails(monkeypatch: pytest.MonkeyPatch, told: list[str]) -> None:
    machine = Machine(monkeypatch, {"plain": 2e-3, "split_k": 1.5e-3, "cluster 8": float("inf")})
    predict(Writes(), callback := ClusterFusion(context=20))
    assert callback.reports[0].way == "split_k"
    machine.seconds["split_k"] = float("inf")
    predict(module := Writes(make("qwen2")), ClusterFusion(context=20))
    assert not any(module.inside)
    assert "RuntimeError: no cluster of this size fits" in told[1] and "second line" not in told[1]


def test_measuring_takes_no_time_from_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Putting the block in place costs time on the host, which a run pays once and not at each step."""
    module = Writes()
    Machine(monkeypatch, {"plain": 2e-3, "split_k": 1e-3})
    spent: list[bool] = []

    def timed(run: Any, width: int, device: torch.device) -> float:
        before = module.replaced
        run(width)
        spent.append(before == module.replaced)
        return time.perf_counter()

    monkeypatch.setattr(fusion, "timed", timed)
    predict(module, ClusterFusion(context=20))
    assert spent and all(spent)
