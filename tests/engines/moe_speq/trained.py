"""A tiny Mixtral trained in seconds on the manual of Python, byte by byte, so that its routes have structure."""

from __future__ import annotations

import copy
import functools
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor

from ygglight.compat.experts import experts_config, register_experts
from ygglight.modules.upcycling import balance_loss, centroid_router

LAYERS, EXPERTS, TOP_K = 4, 8, 2


@functools.cache
def text() -> Tensor:
    """Some 200 kB of English, as bytes (which are the tokens)."""
    joined = "\n\n".join(topics[name] for name in sorted(topics))[:200_000]
    return torch.tensor(list(joined.encode()), dtype=torch.long)


def held_out(length: int = 64, count: int = 8) -> Tensor:
    """Token ids ``[count, length]`` from the tenth of the text that is not trained on."""
    return text()[-count * length :].view(count, length)


def tiny_trained_moe() -> Any:
    """A ``MixtralForCausalLM`` of 4 layers, 8 experts, hidden size 64 and 256 tokens, float32, in eval mode.

    Trained once a process; each call gives a copy of its own.
    """
    return copy.deepcopy(_trained())


def _all_experts(module: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Every expert on every token: at this size a few products are faster than a loop over experts."""
    gate_up = torch.einsum("th,enh->etn", hidden, module.gate_up_proj)
    results = torch.einsum("etn,ehn->eth", module._apply_gate(gate_up), module.down_proj)
    spread = torch.zeros(len(hidden), EXPERTS).scatter(1, index, weights)
    return torch.einsum("te,eth->th", spread, results)


@functools.cache
def _trained(steps: int = 300) -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=256, hidden_size=64, intermediate_size=32, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=EXPERTS, num_experts_per_tok=TOP_K, max_position_embeddings=512,
        bos_token_id=None, eos_token_id=0, pad_token_id=0, tie_word_embeddings=False, initializer_range=0.08,
    )  # fmt: skip
    register_experts("all_experts", _all_experts)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = MixtralForCausalLM(config).train()
        blocks = [layer.mlp for layer in model.model.layers]
        plain = [block.experts.config for block in blocks]
        for block in blocks:
            block.experts.config = experts_config(block.experts.config, "all_experts")
        seen: list[tuple[Tensor, Tensor]] = []  # of each layer: what its router was given, and its logits
        hooks = [
            block.gate.register_forward_hook(lambda _, given, out: seen.append((given[0], out[0]))) for block in blocks
        ]
        ids, size = text()[: -len(text()) // 10], 64
        routers = [block.gate.weight for block in blocks]
        rest = [p for p in model.parameters() if all(p is not router for router in routers)]
        optimizer = torch.optim.AdamW([{"params": rest}, {"params": routers}], weight_decay=0.0)
        rates = [4e-3, 4e-4]  # routers begin where they should be, and must not run away
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=steps, pct_start=0.1)
        for step in range(steps):
            batch = ids[torch.randint(len(ids) - size, (4, 1)) + torch.arange(size)]
            seen.clear()
            loss = model(batch, labels=batch, use_cache=False).loss
            if step == steps // 4:  # routes that mean something, once there is something to mean
                for block, (given, _) in zip(blocks, seen, strict=True):
                    block.gate.weight.data.copy_(centroid_router(given.detach().flatten(0, -2), EXPERTS, 0.6))
                continue
            (loss + 0.02 * balance_loss([logits for _, logits in seen], TOP_K)).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        for hook in hooks:
            hook.remove()
        for block, own in zip(blocks, plain, strict=True):
            block.experts.config = own
    return model.eval()
