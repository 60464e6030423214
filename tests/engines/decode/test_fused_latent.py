"""Latent attention fused under transformers' models: the same text, the same latents, and the rest left alone."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import DynamicCache

from ygglight.engines.decode import Decoder, fusion
from ygglight.engines.decode.fused import FusedAttention, fusable
from ygglight.kernels.cluster_decode import decode_block
from ygglight.kernels.cluster_decode.mla import split_kv_b
from ygglight.kernels.cluster_decode.testing import cast_weights

from .test_fused import check_replaced_later, generate, prompts

pytestmark = pytest.mark.usefixtures("own_cache", "one_thread")

LAYERS = 2
SHAPE: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 16, "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8, "v_head_dim": 10, "q_lora_rank": None, "max_position_embeddings": 256,
    "initializer_range": 0.3, "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None,
    "pad_token_id": 0,
}  # fmt: skip
EXPERTS: dict[str, Any] = {
    "n_routed_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "mscale": 1.3, "mscale_all_dim": 0.7,
    "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1,
}  # fmt: skip
# name -> model type, and what its configuration needs besides
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "v2": ("deepseek_v2", EXPERTS),
    "v2, all switches": ("deepseek_v2", EXPERTS | {"q_lora_rank": 20, "attention_bias": True, "rope_parameters": YARN}),
    "v3": ("deepseek_v3", EXPERTS | {"q_lora_rank": 20}),
    "v3, all switches": ("deepseek_v3", EXPERTS | {"attention_bias": True, "rope_parameters": YARN}),
    "v3, halves": ("deepseek_v3", EXPERTS | {"rope_interleave": False}),
    "minicpm3": ("minicpm3", {"q_lora_rank": 20}),
    "youtu": ("youtu", {"q_lora_rank": 20}),
    "glm4_moe_lite": ("glm4_moe_lite", EXPERTS | {"q_lora_rank": 20, "mlp_layer_types": ["dense", "sparse"]}),
    "axk1": ("axk1", EXPERTS | {"q_lora_rank": 20}),
}


def make(name: str = "v2", attention: str = "sdpa", **changes: Any) -> Any:
    """A model of random weights in which norms and biases are random too."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.mistral4 import Mistral4ForCausalLM  # no automatic class knows it

    torch.manual_seed(0)
    kind, needs = MODELS.get(name, (name, {}))
    config = AutoConfig.for_model(kind, **SHAPE | needs | changes)
    made: Any = Mistral4ForCausalLM._from_config if kind == "mistral4" else AutoModelForCausalLM.from_config
    model = made(config, dtype=torch.float32, attn_implementation=attention).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key or key.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", list(MODELS))
def test_generate_writes_the_same_text(name: str, attention: str) -> None:
    model = make(name, attention)
    fused = FusedAttention(model)
    assert fused.reasons == [None] * LAYERS and fused.paths == ["torch"] * LAYERS
    for cache in ("dynamic", "static"):
        for batch in (1, 3):  # with padding on the left
            before, plain = generate(model, batch, cache)
            with fused:
                calls = fused.calls
                after, logits = generate(model, batch, cache)
            assert fused.calls - calls == 7 * LAYERS  # the prompt gives the first token
            assert torch.equal(before, after)
            assert float((plain - logits).norm() / plain.norm()) < 1e-5


@pytest.mark.parametrize("name", ["v2, all switches", "v3"])
def test_the_decoder_writes_the_same_text(name: str) -> None:
    model = make(name)

    def run(fused: bool) -> tuple[Tensor, Decoder]:
        decoder, logits = Decoder(model, 80, fused=fused), []
        step = decoder.append(torch.arange(9) * 5 % 97)
        for _ in range(8):
            logits.append(step.logits[0, -1])
            step = decoder.append(step.logits[0, -1].argmax()[None])
        return torch.stack(logits), decoder

    (plain, expected), (logits, actual) = run(False), run(True)
    decision = actual.single.decision
    assert decision is not None and decision.way == "torch" and decision.fused is not None
    assert decision.fused.calls == 8 * LAYERS
    assert torch.equal(plain.argmax(-1), logits.argmax(-1))
    assert float((plain - logits).norm() / plain.norm()) < 1e-5
    for one, other in zip(actual.cache.layers, expected.cache.layers, strict=True):
        assert one.keys is not None and other.keys is not None and one.keys.shape[1::2] == (1, 16)
        assert float((one.keys - other.keys).norm() / other.keys.norm()) < 1e-5
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("batch", [1, 3])  # with padding on the left
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits(dtype: torch.dtype, batch: int) -> None:
    """Errors against float32 are of the size of the model's own."""
    model, text = make("v3, all switches"), prompts(batch, 40)
    kept = F.pad(text["attention_mask"], (0, 1), value=1)
    positions = (kept.cumsum(-1) - 1).clamp(min=0)

    def second_token() -> Tensor:
        with torch.no_grad():
            cache = DynamicCache(config=model.config)
            model(**text, position_ids=positions[:, :-1], past_key_values=cache)
            more = {"attention_mask": kept, "position_ids": positions[:, -1:], "past_key_values": cache}
            return model(input_ids=torch.full((batch, 1), 7), **more).logits[:, -1].float()

    exact = second_token()
    cast_weights(model, dtype)
    plain, fused = second_token(), FusedAttention(model)
    assert fused.reasons == [None] * LAYERS
    with fused:
        actual = second_token()
    assert fused.calls == LAYERS
    assert 0 < float((actual - exact).norm()) < 2 * float((plain - exact).norm())


def wrong(change: str) -> Any:
    """A block in which half of the absorbed weights, the rotated part or the scale is not what it should be."""

    def block(x: Tensor, weights: Any, spec: Any, cos: Tensor, sin: Tensor, *rest: Any, **named: Any) -> Tensor:
        up, down = split_kv_b(weights.kv_b, spec)
        if change == "up":
            weights = replace(weights, kv_b=torch.cat((up.roll(1, 0), down), 1).flatten(0, 1))
        elif change == "down":
            weights = replace(weights, kv_b=torch.cat((up, down.roll(1, 0)), 1).flatten(0, 1))
        elif change == "scale":
            spec = replace(spec, scale=spec.scale * 1.1)
        else:
            sin = -sin
        return decode_block(x, weights, spec, cos, sin, *rest, **named)

    return block


@pytest.mark.parametrize("change", ["up", "down", "scale", "angle"])
def test_a_wrong_block_would_show(change: str) -> None:
    """The control of the proof: with it every layer is left alone."""
    fused = FusedAttention(make("v2, all switches"), block=wrong(change))
    assert fused.fused == 0
    assert all("other results" in str(reason) for reason in fused.reasons)


def test_a_wrong_block_changes_the_text() -> None:
    """The control of the tests above: they would see it if it got through the proof."""
    model = make("v2")
    fused = FusedAttention(model)
    plain = generate(model, 1, "dynamic")[1]
    for layer in fused._layers:
        layer._block = wrong("down")
    with fused:
        logits = generate(model, 1, "dynamic")[1]
    assert float((plain[1] - logits[1]).norm() / plain[1].norm()) > 1e-2


def test_a_forward_that_is_replaced_later_is_not_overlooked() -> None:
    check_replaced_later(make("v3"), ("q_b_proj", "q_a_layernorm", "kv_b_proj", "o_proj"), LAYERS)


def test_removal_restores_everything() -> None:
    model = make("v3")
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    tokens = torch.arange(7)[None]
    plain = model(input_ids=tokens).logits
    with FusedAttention(model):
        assert torch.equal(model(input_ids=tokens).logits, plain)  # a prompt runs the model's own code, bit for bit
    assert before == {name: set(vars(module)) for name, module in model.named_modules()}
    assert torch.equal(model(input_ids=tokens).logits, plain)


def test_what_is_not_a_plain_step_runs_the_models_own_code() -> None:
    model = make("v2", "eager")
    with FusedAttention(model) as fused:
        calls = fused.calls

        def step(**options: Any) -> Any:
            with torch.no_grad():
                cache = DynamicCache(config=model.config)
                model(input_ids=torch.arange(5)[None], past_key_values=cache)
            return model(input_ids=torch.tensor([[7]]), past_key_values=cache, **options)

        step().logits.sum().backward()
        with torch.no_grad():
            assert step(output_attentions=True).attentions[0].shape[-1] == 6
            model.train()
            step()
            model.eval()
            with torch.autocast("cpu", torch.bfloat16):
                step()
            handle = model.model.layers[0].self_attn.kv_b_proj.register_forward_hook(lambda *args: None)
            assert fused.calls == calls
            step()
            assert fused.calls == calls + 1  # but for the layer with the hook
            handle.remove()
            step()
            assert fused.calls == calls + 1 + LAYERS


def test_why_layers_are_left_alone() -> None:
    model = make("v3", num_hidden_layers=5)
    attentions = [layer.self_attn for layer in model.model.layers]
    attentions[0].kv_b_proj = type("Linear4bit", (nn.Linear,), {})(16, 88, bias=False)
    attentions[1].register_forward_hook(lambda *args: None)
    attentions[2].kv_a_layernorm = nn.LayerNorm(16)
    attentions[3].indexer = nn.Linear(32, 4)
    attentions[4].scaling *= 1.5  # the block takes it as it is
    reasons = [fusable(layer) for layer in model.model.layers]
    words = (
        "kv_b_proj is",
        "has forward hooks",
        "something else than an RMSNorm",
        "more than latent attention: indexer",
    )
    assert all(word in str(reason) for word, reason in zip(words, reasons, strict=False)) and reasons[4] is None
    fused = FusedAttention(model)
    assert fused.fused == 1 and fused.reasons == reasons


def test_a_layer_that_computes_something_else_is_left_alone() -> None:
    model = make("v2")
    attention = model.model.layers[1].self_attn
    expand = attention.expand_kv
    attention.expand_kv = lambda *args: tuple(part * 1.1 for part in expand(*args))
    fused = FusedAttention(model)
    assert fused.reasons[0] is None and "other results than the layer" in str(fused.reasons[1])
    before = generate(model, 1, "dynamic")[0]
    with fused:
        assert torch.equal(generate(model, 1, "dynamic")[0], before)


def test_a_cache_of_expanded_keys_is_left_alone() -> None:
    """As transformers had it before 5.x, and remote code has it."""
    model = make("v2")
    for layer in model.model.layers:
        attention = layer.self_attn
        expand = attention.expand_kv

        def forward(
            hidden_states: Tensor, attention_mask: Any = None, past_key_values: Any = None,
            attention: Any = attention, expand: Any = expand, own: Any = attention.forward, **kwargs: Any,
        ) -> Any:  # fmt: skip
            attention.expand_kv = lambda *latents: past_key_values.update(*expand(*latents), attention.layer_idx)
            return own(hidden_states, attention_mask, None, **kwargs)

        # Of a class of its own, since an instance's forward is refused by itself.
        attention.__class__ = type("Expanding", (type(attention),), {"forward": staticmethod(forward)})
    fused = FusedAttention(model)
    assert all("cache holds something else" in str(reason) for reason in fused.reasons), fused.reasons


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("mistral4", EXPERTS | {"q_lora_rank": 20}, "other results"),
        ("longcat_flash", {"q_lora_rank": 20, "num_layers": 1, "n_routed_experts": 4}, "names no head_dim"),
        ("glm_moe_dsa", EXPERTS | {"q_lora_rank": 20}, "more than latent attention: indexer"),
        ("glm_moe_dsa", EXPERTS | {"q_lora_rank": 20, "indexer_types": ["full", "shared"]}, "indexer"),
        ("kimi_linear", EXPERTS | {"layer_types": ["full_attention"] * 2}, "no angles of a rotary embedding"),
        ("deepseek_v32", EXPERTS | {"q_lora_rank": 20}, "more than latent attention: indexer"),
    ],
)
def test_models_that_are_made_otherwise(kind: str, changes: dict[str, Any], words: str) -> None:
    if kind == "mistral4":  # scales its queries behind so many tokens
        changes = changes | {"rope_parameters": YARN | {"llama_4_scaling_beta": 0.1}}
    fused = FusedAttention(make(kind, "eager", **changes))
    assert fused.fused == 0 and fused.reasons
    assert all(words in str(reason) for reason in fused.reasons), fused.reasons


def test_adapters_are_left_to_their_own_code() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["kv_b_proj"], layers_to_transform=[1])
    model = peft.get_peft_model(make(), config).eval()
    fused = FusedAttention(model)
    assert fused.reasons[0] is None and "merge adapters" in str(fused.reasons[1])


@pytest.mark.parametrize(("seconds", "way"), [(0.9e-3, "torch"), (0.99e-3, "plain")])
def test_torch_is_a_way_that_is_measured(monkeypatch: pytest.MonkeyPatch, seconds: float, way: str) -> None:
    """Of latent attention on a CPU; layers of keys and values have none there."""
    from .test_fused import make as make_dense

    cpu = torch.device("cpu")
    assert fusion.ways_of(make_dense("llama"), cpu)[0] == {}
    ran: list[bool] = []
    monkeypatch.setattr(fusion, "timed", lambda run, width, device: (run(width), seconds if ran[-1] else 1e-3)[1])

    def prepare(fused: FusedAttention | None) -> fusion.Trial:
        return fusion.Trial(lambda: ran.append(fused is not None))

    model = make()
    assert list(fusion.ways_of(model, cpu)[0]) == ["torch"]
    decision = fusion.decide(model, cpu, prepare, key={})
    assert decision.way == way and (decision.fused is None) == (way == "plain")
    assert set(decision.seconds) == {"plain", "torch"}


def test_on_a_gpu_clusters_are_ways_beside_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    import ygglight.kernels.cluster_decode.choose as choose

    def triton(name: str, device: str) -> Any:
        return SimpleNamespace(implementation="triton", reason="", name=name)

    monkeypatch.setattr(choose._dispatch, "implementation", triton)
    monkeypatch.setattr(choose, "_triton_version", lambda: (3, 9))
    for capability, expected in (((9, 0), ["torch", *(f"cluster {n}" for n in (1, 2, 4, 8))]), ((8, 0), ["torch"])):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert list(fusion.ways_of(make(), torch.device("cuda"))[0]) == expected
