"""On a GPU: fused steps inside the decoder's CUDA graphs and under the callback, against plain ones."""

from __future__ import annotations

import copy
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ygglight.callbacks import ClusterFusion
from ygglight.engines.decode import Decoder
from ygglight.engines.decode.fused import FusedAttention
from ygglight.engines.decode.fusion import ways_of
from ygglight.kernels.cluster_decode import block_ways
from ygglight.kernels.cluster_decode.testing import cast_weights
from ygglight.kernels.testing import rms_ratio

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("own_cache")]

REPLAYS = 1000
CUBLAS = 0.02
"""Other products may be chosen for the MLP inside a graph; a token in a wrong slot is off by far more."""
LATENT: dict[str, Any] = {
    "num_key_value_heads": 8, "q_lora_rank": 384, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "v_head_dim": 128, "first_k_dense_replace": 3,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "llama": {}, "qwen2": {}, "qwen3": {"head_dim": 128}, "mistral": {"sliding_window": 300}, "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
}  # fmt: skip


def make(kind: str = "llama") -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, vocab_size=997, hidden_size=1024, intermediate_size=1024, num_hidden_layers=3, num_attention_heads=8,
        max_position_embeddings=4096, tie_word_embeddings=False, eos_token_id=None, initializer_range=0.04,
        **{"num_key_value_heads": 2} | KINDS[kind],
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).cuda().requires_grad_(False).eval()


def names() -> list[str]:
    return list(block_ways(torch.device("cuda"))[0])


def logits_of(model: Any, text: Tensor, **how: Any) -> Tensor:
    decoder = Decoder(model, 2048, **how)
    decoder.append(text[:700])
    return torch.stack([decoder.append(token[None]).logits[0, -1].clone() for token in text[700:]])


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_inside_graphs(kind: str) -> None:
    """Against float32, at most half as far off again as plain bfloat16; and it is the fused one that was recorded."""
    model = make(kind)
    text = torch.randint(997, (740,), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    plain = logits_of(model, text, fused=False)
    exact = logits_of(cast_weights(copy.deepcopy(model), torch.float32), text, fused=False, graphs=False)
    ways = ways_of(model, torch.device("cuda"))[0]
    assert ("torch" if KINDS[kind] is LATENT else "split_k") in ways
    for name, block in ways.items():
        with FusedAttention(model, block=block) as fused:
            assert fused.reasons == [None] * 3, name
            before = fused.calls
            actual = logits_of(model, text, fused=False)
            assert fused.calls > before, name
        assert rms_ratio(actual, exact) <= 1.5 * rms_ratio(plain, exact), name


def test_replays_are_eager_steps() -> None:
    """1,000 replays: each writes where its token goes. The bits of the block are compared in test_gpu_split_k.py."""
    model = make()
    replayed, eager = Decoder(model, 2048, fused=True), Decoder(model, 2048, fused=True, graphs=False)
    tokens = torch.randint(997, (REPLAYS + 100,), device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    for decoder in (replayed, eager):
        decoder.append(tokens[:100])
    worst = torch.zeros((), device="cuda")
    for token in tokens[100:]:
        one, other = (decoder.append(token[None]).logits.float() for decoder in (replayed, eager))
        worst = torch.maximum(worst, (one - other).norm() / other.norm())
    assert float(worst) <= CUBLAS
    for first, second in zip(replayed.cache.layers, eager.cache.layers, strict=True):
        assert first.keys is not None and second.keys is not None
        assert rms_ratio(first.keys[:, :, : len(tokens)], second.keys[:, :, : len(tokens)]) <= CUBLAS


def test_the_fastest_is_taken_and_remembered() -> None:
    model = make()
    decoder = Decoder(model, 2048)
    decoder.append(torch.arange(100, device="cuda"))
    expected = decoder.append(torch.tensor([5], device="cuda")).logits.clone()
    decision = decoder.single.decision
    assert decision is not None and {"plain", *names()} == set(decision.seconds)
    again = Decoder(model, 2048)
    again.append(torch.arange(100, device="cuda"))
    assert torch.equal(again.append(torch.tensor([5], device="cuda")).logits, expected)
    assert again.single.decision is not None and again.single.decision.seconds == decision.seconds


class Writes(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.lm = make()

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        text: Tensor = self.lm.generate(batch, do_sample=False, max_new_tokens=32)
        return text


@pytest.mark.parametrize("enabled", [True, "auto"])
def test_the_callback(enabled: Any) -> None:
    module, callback = Writes(), ClusterFusion(enabled=enabled)
    trainer = L.Trainer(
        accelerator="gpu", devices=1, callbacks=[callback], logger=False, enable_checkpointing=False,
        enable_progress_bar=False,
    )  # fmt: skip
    text = trainer.predict(module, DataLoader(torch.arange(60).view(3, 20), batch_size=1))
    assert text is not None and all(row.shape == (1, 52) for row in text)
    report = callback.reports[0]
    assert report.way in ("split_k", "cluster") if enabled is True else report.way in ("plain", *names())
    assert report.calls == (0 if report.way == "plain" else 3 * 31 * 3)
    assert not any("forward" in vars(each) for each in module.modules())
