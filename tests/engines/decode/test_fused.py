"""The fused attention half under transformers' models: the same text, the same keys, and nothing left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from ygglight.engines.decode import Decoder
from ygglight.engines.decode.fused import FusedAttention, fusable
from ygglight.kernels.cluster_decode import decode_block_reference

SHAPE: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.3, "tie_word_embeddings": False,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
LATER = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64,
    "llama_4_scaling_beta": 0.1, "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32.0, "beta_slow": 1.0,
}  # fmt: skip
SLIDING = {"sliding_window": 12}  # of a prompt of 9 tokens and 8 new ones
# model type -> what its configuration needs besides
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": SLIDING,
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 9, **SLIDING},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 9, **SLIDING},
    "phi3": {},
    "glm": {"head_dim": 16, "partial_rotary_factor": 0.5},
    "granite": {"attention_multiplier": 0.3, "residual_multiplier": 0.5},
}


def make(kind: str, attention: str = "sdpa", **changes: Any) -> Any:
    """A model of random weights in which norms and biases are random too."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SHAPE | MODELS.get(kind, {}) | changes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def prompts(batch: int, length: int = 9) -> dict[str, Tensor]:
    """Token ids with padding on the left, a different number in each row."""
    tokens = torch.randint(1, 97, (batch, length), generator=torch.Generator().manual_seed(1))
    kept = torch.ones_like(tokens)
    for row in range(1, batch):
        kept[row, : 2 * row + 1] = 0
    return {"input_ids": tokens * kept, "attention_mask": kept}


def generate(model: Any, batch: int, cache: str) -> tuple[Tensor, Tensor]:
    output = model.generate(
        **prompts(batch), max_new_tokens=8, do_sample=False, cache_implementation=cache, disable_compile=True,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    return output.sequences, torch.stack(output.logits)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("kind", list(MODELS))
def test_generate_writes_the_same_text(kind: str, cache: str) -> None:
    # Gemma 2's soft cap is what transformers' sdpa leaves out.
    model = make(kind, "eager" if kind == "gemma2" else "sdpa")
    fused = FusedAttention(model)
    assert fused.reasons == [None] * 3
    for batch in (1, 3):
        before, plain = generate(model, batch, cache)
        with fused:
            calls = fused.calls
            after, logits = generate(model, batch, cache)
        assert fused.calls - calls == 7 * 3  # the prompt gives the first token
        assert torch.equal(before, after)
        assert float((plain - logits).norm() / plain.norm()) < 1e-5


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gemma3_text", "qwen3"])
def test_the_decoder_writes_the_same_text(kind: str) -> None:
    model = make(kind)

    def run() -> Tensor:
        decoder, logits = Decoder(model, 80), []
        step = decoder.append(torch.arange(9) * 5 % 97)
        for _ in range(8):
            logits.append(step.logits[0, -1])
            step = decoder.append(step.logits[0, -1].argmax()[None])
        return torch.stack(logits)

    plain = run()
    with FusedAttention(model) as fused:
        calls = fused.calls
        logits = run()
    assert fused.calls - calls == 8 * 3
    assert torch.equal(plain.argmax(-1), logits.argmax(-1))
    assert float((plain - logits).norm() / plain.norm()) < 1e-5


def test_a_tree_on_the_text_is_as_without() -> None:
    """A node alone is a step of one token, whose slot is not its position and whose siblings are hidden."""
    model = make("mistral")
    logits = []
    for fused in (FusedAttention(model), None):
        decoder = Decoder(model, 80)
        decoder.append(torch.arange(9) * 5 % 97)
        two = torch.tensor([3, 4])
        if fused is not None:
            fused.install()
        decoder.nodes(two, torch.zeros(2, dtype=torch.long), torch.arange(2), torch.eye(2, dtype=torch.bool))
        step = decoder.nodes(
            torch.tensor([8]), torch.tensor([1]), torch.tensor([2]), torch.tensor([[True, False, True]])
        )
        logits.append(step.logits)
        if fused is not None:
            assert fused.calls == 3
            fused.remove()
    assert float((logits[0] - logits[1]).norm() / logits[1].norm()) < 1e-5


def test_a_wrong_block_would_show() -> None:
    """The control of the proof: a block that is a little off is found, and the layer is left alone."""

    def off(x: Tensor, weights: Any, spec: Any, cos: Tensor, sin: Tensor, *rest: Any, **named: Any) -> Tensor:
        return decode_block_reference(x, weights, spec, cos.roll(1, -1), sin, *rest, **named)

    fused = FusedAttention(make("llama"), block=off)
    assert fused.fused == 0
    assert all("other results" in str(reason) for reason in fused.reasons)


@pytest.mark.parametrize("failure", [torch.OutOfMemoryError, MemoryError, OSError])
def test_what_says_nothing_of_a_layer_is_no_reason(failure: type[Exception]) -> None:
    def fails(*args: Any, **kwargs: Any) -> Tensor:
        raise failure("no room")

    model = make("llama").train()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    with pytest.raises(failure, match="no room"):
        FusedAttention(model, block=fails)
    assert before == {name: set(vars(module)) for name, module in model.named_modules()}
    assert all(module.training for module in model.modules())


class Chaotic(nn.Module):
    """As a router near a tie: the least difference in what comes in is a large one in what goes out."""

    runs = 0

    def forward(self, hidden: Tensor) -> Tensor:
        self.runs += 1
        return (hidden * 1e8).sin()


def test_what_follows_attention_does_not_tell_of_the_block() -> None:
    model = make("llama")
    for layer in model.model.layers:
        layer.mlp = Chaotic()
    assert FusedAttention(model).reasons == [None] * 3
    # A prompt, the token, and the token once more around the layer's own attention.
    assert [layer.mlp.runs for layer in model.model.layers] == [3] * 3


def test_a_layer_that_uses_its_norm_twice_is_left_alone() -> None:
    """The control: its attention is what the block computes, but the norm has another reader."""
    model = make("llama")

    def forward(self: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        normed = self.input_layernorm(hidden_states)
        return hidden_states + self.self_attn(hidden_states=normed, **kwargs)[0] + self.mlp(normed)

    layer = model.model.layers[1]
    layer.__class__ = type("LlamaDecoderLayer", (type(layer),), {"forward": forward})  # layers are known by that name
    reasons = FusedAttention(model).reasons
    assert reasons[0] is None and reasons[2] is None and "around its attention" in str(reasons[1])


@pytest.mark.parametrize("cached", [0, 1])
def test_a_candidate_that_is_not_a_number_is_not_taken(cached: int) -> None:
    """GLM turns pairs, which are tried second; the first candidate gives NaN where it cannot be right."""

    def block(x: Tensor, weights: Any, spec: Any, *rest: Any, **named: Any) -> Tensor:
        output = decode_block_reference(x, weights, spec, *rest, **named)
        if spec.rotary_dim and not spec.interleaved_rope:
            (rest[5 + cached] if cached else output).fill_(torch.nan)  # the new values, or the output
        return output

    assert FusedAttention(make("glm"), block=block).reasons == [None] * 3
    reasons = FusedAttention(make("llama"), block=block).reasons
    assert all("other results" in str(reason) for reason in reasons)


def test_weights_that_wrap_tensors_are_refused() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    model = make("llama")
    projection = model.model.layers[1].self_attn.k_proj
    halves = projection.weight.detach()
    projection.weight = nn.Parameter(TwoTensor(halves, halves.clone()), requires_grad=False)
    reasons = FusedAttention(model).reasons
    assert reasons[0] is None and "torch's TwoTensor, not in plain tensors" in str(reasons[1])


def test_a_forward_that_is_replaced_later_is_not_overlooked() -> None:
    check_replaced_later(make("qwen3"), ("o_proj", "k_norm", "q_proj"), 3)


def check_replaced_later(model: Any, names: tuple[str, ...], layers: int) -> None:
    """One layer's inner module computes twice as much as in the proof: its own code runs, and the other layers' block.

    Args:
        model: Any that is fused. names: of modules in its attention. layers: that it has.
    """
    fused = FusedAttention(model)
    assert fused.reasons == [None] * layers
    for name in names:
        module = getattr(model.model.layers[1].self_attn, name)
        own = module.forward
        module.forward = lambda hidden, own=own: 2 * own(hidden)
        expected, logits = generate(model, 1, "dynamic")
        with fused:
            calls = fused.calls
            text, actual = generate(model, 1, "dynamic")
        assert fused.calls - calls == 7 * (layers - 1), name
        assert torch.equal(text, expected) and float((actual - logits).norm() / logits.norm()) < 1e-5, name
        del module.forward


def test_removal_restores_everything() -> None:
    model = make("qwen2")
    before = {name: vars(module).copy() for name, module in model.named_modules()}
    pointers = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    tokens = torch.arange(7)[None]
    plain = model(input_ids=tokens).logits
    with FusedAttention(model):
        assert torch.equal(model(input_ids=tokens).logits, plain)  # a prompt runs the model's own code, bit for bit
    after = {name: vars(module) for name, module in model.named_modules()}
    assert {name: set(held) for name, held in before.items()} == {name: set(held) for name, held in after.items()}
    assert torch.equal(model(input_ids=tokens).logits, plain)
    assert pointers == {name: parameter.data_ptr() for name, parameter in model.named_parameters()}


def test_what_is_not_a_plain_step_runs_the_models_own_code() -> None:
    model = make("llama", "eager")
    with FusedAttention(model) as fused:
        calls = fused.calls

        def step(**options: Any) -> Any:
            with torch.no_grad():
                cache = DynamicCache(config=model.config)
                model(input_ids=torch.arange(5)[None], past_key_values=cache)
            return model(input_ids=torch.tensor([[7]]), past_key_values=cache, **options)

        step().logits.sum().backward()  # gradients
        with torch.no_grad():
            assert step(output_attentions=True).attentions[0].shape[-1] == 6
            model.train()
            step()
            model.eval()
            with torch.autocast("cpu", torch.bfloat16):
                step()
            handle = model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *args: None)
            model(input_ids=torch.tensor([[7]]), use_cache=False)
            assert fused.calls == calls
            step()
            assert fused.calls == calls + 2  # but for the layer with the hook
            handle.remove()
            step()
            assert fused.calls == calls + 5


def test_weights_are_read_at_each_step() -> None:
    model = make("llama")
    with FusedAttention(model) as fused:
        model.double()
        with torch.no_grad():
            cache = DynamicCache(config=model.config)
            model(input_ids=torch.arange(5)[None], past_key_values=cache)
            actual = model(input_ids=torch.tensor([[7]]), past_key_values=cache).logits[0, -1]
            assert fused.calls == 3
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([[0, 1, 2, 3, 4, 7]])).logits[0, -1]
    assert float((actual - expected).norm() / expected.norm()) < 1e-5  # the model's own norms are in float32


def test_why_layers_are_left_alone() -> None:
    model = make("llama")
    layers = model.model.layers
    layers[0].self_attn.q_proj = type("Linear4bit", (nn.Linear,), {})(32, 32, bias=False)
    layers[1].self_attn.register_forward_hook(lambda *args: None)
    layers[2].input_layernorm = nn.LayerNorm(32)
    reasons = [fusable(layer) for layer in layers]
    for reason, words in zip(
        reasons, ("q_proj is", "has forward hooks", "something else than an RMSNorm"), strict=True
    ):
        assert words in str(reason)
    fused = FusedAttention(model)
    assert fused.fused == 0 and fused.reasons == reasons


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("gpt_neox", {}, "no self_attn"),
        ("olmo2", {}, "no input_layernorm"),
        ("cohere", {}, "something else than an RMSNorm"),
        # scales its queries behind so many tokens
        ("ministral3", {"head_dim": 16, "rope_parameters": LATER}, "other results"),
        ("gpt_oss", {"head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1}, "other results"),
    ],
)
def test_models_that_are_made_otherwise(kind: str, changes: dict[str, Any], words: str) -> None:
    fused = FusedAttention(make(kind, "eager", **changes))
    assert fused.fused == 0
    assert all(words in str(reason) for reason in fused.reasons), fused.reasons


def test_adapters_are_left_to_their_own_code() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["v_proj"], layers_to_transform=[1])
    model = peft.get_peft_model(make("llama"), config).eval()
    fused = FusedAttention(model)
    assert [reason is None for reason in fused.reasons] == [True, False, True]
    assert "merge adapters" in str(fused.reasons[1])


def test_an_adapter_that_comes_later_is_not_overlooked() -> None:
    peft = pytest.importorskip("peft")
    model = make("llama")
    with FusedAttention(model) as fused:
        calls = fused.calls
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])).eval()
        generate(model, 1, "dynamic")
        assert fused.calls == calls


def test_a_layer_without_rotary_is_found() -> None:
    model = make("smollm3", no_rope_layers=[1, 0, 1])
    fused = FusedAttention(model)
    assert fused.reasons == [None] * 3
    before, _ = generate(model, 1, "dynamic")
    with fused:
        assert torch.equal(generate(model, 1, "dynamic")[0], before)
