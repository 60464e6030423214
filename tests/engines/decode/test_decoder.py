"""The decoder against plain forwards: every node's logits and every key, checks A4 and A5 of the brief."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from ygglight.engines.decode import Decoder, UnsupportedModel, check_tree_support, why_unsupported

SHAPE: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip


def llama(**changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE | changes)).eval()


def gemma3() -> Any:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    return Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE, head_dim=8, sliding_window=5)).eval()


PARENTS = [-1, 0, 0, 1, 2, 2, 4, 6]


def tree(model: Any) -> tuple[Tensor, Tensor, Tensor]:
    ancestors, depths = torch.eye(len(PARENTS), dtype=torch.bool), torch.zeros(len(PARENTS), dtype=torch.long)
    for node, parent in enumerate(PARENTS[1:], start=1):
        ancestors[node] |= ancestors[parent]
        depths[node] = depths[parent] + 1
    return (torch.arange(len(PARENTS)) * 11 + 5) % model.config.vocab_size, depths, ancestors


def text(model: Any, count: int) -> Tensor:
    return torch.randint(0, model.config.vocab_size, (count,), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("make", [llama, gemma3])
@pytest.mark.parametrize("length", [1, 4, 63, 130])
def test_every_node_has_the_logits_of_its_own_path(make: Any, length: int) -> None:
    model = make().double()
    decoder = Decoder(model, 160)
    prefix = text(model, length)
    decoder.append(prefix)
    tokens, depths, ancestors = tree(model)
    logits = decoder.nodes(tokens, depths, torch.arange(len(tokens)), ancestors).logits[0]
    for node in range(len(tokens)):
        path = torch.cat([prefix, tokens[ancestors[node]]])
        with torch.no_grad():
            expected = model(path[None]).logits[0, -1]
        assert (logits[node] - expected).abs().max() < 1e-9


@pytest.mark.parametrize("make", [llama, gemma3])
def test_kept_nodes_leave_the_cache_of_a_fresh_prompt(make: Any) -> None:
    model = make().double()
    decoder, fresh = Decoder(model, 96), Decoder(model, 96)
    tokens, depths, ancestors = tree(model)
    known = text(model, 7)
    decoder.append(known)
    for path in ([0, 2, 4, 6, 7], [0], [0, 1, 3], [0, 2, 5]):
        decoder.nodes(tokens, depths, torch.arange(len(tokens)), ancestors)
        decoder.keep(torch.tensor(path), len(path))
        known = torch.cat([known, tokens[path]])
    assert decoder.length == len(known)
    fresh.append(known)
    for ours, theirs in zip(decoder.cache.layers, fresh.cache.layers, strict=True):
        for a, b in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            assert (a[:, :, : len(known)] - b[:, :, : len(known)]).abs().max() < 1e-9


def test_stale_slots_are_not_seen() -> None:
    model = llama().double()
    decoder = Decoder(model, 96)
    tokens, depths, ancestors = tree(model)
    decoder.append(text(model, 20))
    decoder.nodes(tokens, depths, torch.arange(len(tokens)), ancestors)
    decoder.reset()
    for layer in decoder.cache.layers:
        layer.keys.fill_(1e6)
        layer.values.fill_(1e6)
    short = text(model, 5)
    with torch.no_grad():
        expected = model(short[None]).logits[0, -1]
    assert (decoder.append(short).logits[0, 0] - expected).abs().max() < 1e-9


def test_a_long_prompt_goes_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    from ygglight.engines.decode import decoder as module

    monkeypatch.setattr(module, "PREFILL_CHUNK", 16)
    model = llama().double()
    decoder = Decoder(model, 128)
    prompt = text(model, 90)
    step = decoder.append(prompt)
    with torch.no_grad():
        expected = model(prompt[None]).logits[0, -1]
    assert (step.logits[0, 0] - expected).abs().max() < 1e-9
    assert decoder.forwards == 6


def test_wide_prompts_take_the_other_kernel_to_the_same_logits() -> None:
    model = llama().double()
    prompt = text(model, 200)
    with torch.no_grad():
        expected = model(prompt[None]).logits[0, -1]
    assert (Decoder(model, 256).append(prompt).logits[0, 0] - expected).abs().max() < 1e-9


def test_a_batch_of_sequences_of_different_lengths() -> None:
    model = llama().double()
    lengths = [3, 9, 6]
    texts = [text(model, 12)[:n] for n in lengths]
    decoder = Decoder(model, 32, batch=3)
    for position in range(max(lengths)):
        # Rows that are done write to a spare slot at the end and attend to it alone.
        live = [position < n for n in lengths]
        tokens = torch.tensor([[t[position] if on else 0] for t, on in zip(texts, live, strict=True)])
        slots = torch.tensor([[position if on else 31] for on in live])
        mask = torch.zeros(3, 1, 1, 32, dtype=torch.bool)
        for row, on in enumerate(live):
            mask[row, 0, 0, : position + 1] = on
            mask[row, 0, 0, 31] = not on
        step = decoder.forward(tokens, slots.clone(), slots, {"full_attention": mask})
        for row, n in enumerate(lengths):
            if position == n - 1:
                with torch.no_grad():
                    expected = model(texts[row][None]).logits[0, -1]
                assert (step.logits[row, -1] - expected).abs().max() < 1e-9


def test_the_hidden_state_is_what_the_head_is_given() -> None:
    model = llama()
    step = Decoder(model, 32).append(text(model, 6))
    assert step.hidden is not None
    assert torch.allclose(model.lm_head(step.hidden), step.logits, atol=1e-5)


def test_the_model_is_as_before_even_after_a_failure() -> None:
    model = llama()
    other = type(model)(model.config).eval()  # shares the configuration object
    before = copy.deepcopy(model.config.to_dict())
    decoder = Decoder(model, 32)
    decoder.append(text(model, 6))
    hook = model.model.layers[1].register_forward_hook(lambda *a: (_ for _ in ()).throw(RuntimeError("broken")))
    with pytest.raises(RuntimeError, match="broken"):
        decoder.append(text(model, 6))
    hook.remove()
    assert model.config.to_dict() == before and model.config._attn_implementation == "sdpa"
    assert not model.lm_head._forward_pre_hooks
    with torch.no_grad():
        assert torch.isfinite(other(text(model, 4)[None]).logits).all()


def test_a_text_longer_than_the_cache() -> None:
    model = llama()
    with pytest.raises(ValueError, match="70 tokens do not fit a cache of 64"):
        Decoder(model, 64).append(text(model, 70))


def test_models_that_cannot_be_run_over_a_tree_say_why() -> None:
    from transformers import BloomConfig, BloomForCausalLM, T5Config, T5ForConditionalGeneration

    bloom = BloomForCausalLM(BloomConfig(vocab_size=61, hidden_size=32, n_layer=1, n_head=2))
    with pytest.raises(UnsupportedModel, match="attention interface"):
        check_tree_support(bloom)
    small = {"vocab_size": 61, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    assert "encoder-decoder" in str(why_unsupported(T5ForConditionalGeneration(T5Config(**small))))
    assert "not a causal language model" in str(why_unsupported(torch.nn.Linear(2, 2)))


def test_a_model_that_counts_positions_itself_is_found_out() -> None:
    model = llama()
    forward = model.model.rotary_emb.forward
    model.model.rotary_emb.forward = lambda x, position_ids: forward(
        x, torch.arange(x.shape[1])[None] + int(position_ids[0, 0])
    )
    with pytest.raises(UnsupportedModel, match="other logits over a tree"):
        check_tree_support(model)


def test_support_is_proven_once_and_leaves_modes_alone() -> None:
    model = llama().train()
    check_tree_support(model)
    calls = []
    model.register_forward_hook(lambda *a: calls.append(1))
    check_tree_support(model)
    assert model.training and not calls
