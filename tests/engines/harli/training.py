"""Small models, the plain training loop, and the same loop through a session, for the tests of the finetune side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ygglight.engines.harli.finetune import FinetuneSession
from ygglight.engines.harli.gate import Gate, Quantum
from ygglight.engines.memory.arena import Arena, Lease
from ygglight.kernels.linear_cross_entropy import linear_cross_entropy

SMALLEST = 512


class Block(nn.Module):
    """A pre-norm GPT block with dropout and a split qkv, whose views share one storage."""

    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).split(width, dim=-1)
        q, k, v = (t.view(batch, length, self.heads, -1).transpose(1, 2) for t in (q, k, v))
        scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
        weights = F.dropout(scores.masked_fill(~mask, -1e9).softmax(-1), 0.1, self.training)
        x = x + self.out((weights @ v).transpose(1, 2).reshape(batch, length, width))
        hidden = F.dropout(F.gelu(self.up(self.norm2(x))), 0.1, self.training)
        return x + self.down(hidden)


class GPT(nn.Module):
    """Embedding, blocks, chunked loss."""

    def __init__(self, width: int = 16, layers: int = 4, vocabulary: int = 40) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        mask = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool, device=tokens.device).tril()
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, mask=mask)
        hidden = self.norm(x)[:, :-1].flatten(0, 1)
        return linear_cross_entropy(hidden, self.head.weight, tokens[:, 1:].flatten(), chunk_tokens=10)


def gpt() -> tuple[nn.Module, list[nn.Module], Callable[[Tensor], Tensor]]:
    model = GPT()
    return model, list(model.blocks), model


def llama(
    checkpointing: bool | None = None, twice: bool = False
) -> tuple[nn.Module, list[nn.Module], Callable[[Tensor], Tensor]]:
    """A tiny Llama with LoRA on all linear layers and dropout.

    Args:
        checkpointing: None: off; else ``use_reentrant`` of transformers' gradient checkpointing.
        twice: Two forwards in one step.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    lora = LoraConfig(r=4, lora_dropout=0.1, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(LlamaForCausalLM(config), lora)
    if checkpointing is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
    model.train()

    def loss(tokens: Tensor) -> Tensor:
        mask = torch.ones_like(tokens)
        mask[0, :3] = 0
        first: Tensor = model(input_ids=tokens, attention_mask=mask, labels=tokens, use_cache=False).loss
        if not twice:
            return first
        return first + model(input_ids=tokens.flip(1), labels=tokens, use_cache=False).loss.square()

    return model, list(model.base_model.model.model.layers), loss


FAMILIES: dict[str, Callable[[], Any]] = {
    "gpt": gpt,
    "llama": llama,
    "llama, checkpointed": lambda: llama(checkpointing=False),
    "llama, reentrant": lambda: llama(checkpointing=True),
    "llama, two forwards": lambda: llama(twice=True),
}


class PoisonedArena(Arena):
    """Fills what is given back with NaN: who still reads it shows."""

    def release(self, lease: Lease, event: Any = None) -> None:
        super().release(lease, event)
        self.data[lease.first : lease.first + lease.count] = 255


class ScriptedGate(Gate):
    """Does things at given boundaries: ``script[i]()`` before the i-th."""

    def __init__(self, script: dict[int, Callable[[], None]] | None = None) -> None:
        super().__init__()
        self.script = script or {}
        self.passed: list[Quantum] = []

    def boundary(self, quantum: Quantum) -> None:
        self.passed.append(quantum)
        todo = self.script.pop(len(self.passed) - 1, None)
        if todo is not None:
            todo()
        super().boundary(quantum)


def batches(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 40, (2, 16), generator=generator) for _ in range(count)]


Outcome = tuple[list[Tensor], list[Tensor], Tensor]
"""Losses, then gradients before each optimizer step and the final weights, then the random state."""


def trained(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def plain(family: Callable[[], Any], micro_batches: int = 2, accumulate: int = 2) -> Outcome:
    """The loop that a user would write."""
    torch.manual_seed(7)
    module, _, loss_of = family()
    optimizer = torch.optim.AdamW(trained(module), lr=1e-2)
    losses, tensors = [], []
    for index, batch in enumerate(batches(micro_batches)):
        loss = loss_of(batch)
        losses.append(loss.detach().clone())
        loss.backward()
        if (index + 1) % accumulate == 0:
            tensors += [p.grad.clone() for p in trained(module) if p.grad is not None]
            torch.nn.utils.clip_grad_norm_(trained(module), 0.5)
            optimizer.step()
            optimizer.zero_grad()
    return losses, [*tensors, *[p.detach().clone() for p in trained(module)]], torch.get_rng_state()


def through_session(
    family: Callable[[], Any],
    gate: Gate,
    arena: Arena | None,
    micro_batches: int = 2,
    accumulate: int = 2,
    configure: Callable[[FinetuneSession], None] | None = None,
    **options: Any,
) -> tuple[Outcome, FinetuneSession]:
    """The same loop through a session."""
    torch.manual_seed(7)
    module, blocks, loss_of = family()
    optimizer = torch.optim.AdamW(trained(module), lr=1e-2)
    options = {"smallest": SMALLEST, "hold_seconds": 0.0, "elements": 100} | options
    session = FinetuneSession(module, blocks, gate, arena, "cpu", **options)
    session.attach()
    if configure is not None:
        configure(session)
    losses, tensors = [], []
    try:
        for index, batch in enumerate(batches(micro_batches)):
            last: list[Tensor] = [session.forward(lambda batch=batch: loss_of(batch), 30)]

            def replay(batch: Tensor = batch, last: list[Tensor] = last) -> None:
                with session.step(30):
                    last[0] = loss_of(batch)
                last[0].backward()

            session.backward(lambda last=last: last[0].backward(), replay)
            losses.append(last[0].detach().clone())
            if (index + 1) % accumulate == 0:
                tensors += [p.grad.clone() for p in trained(module) if p.grad is not None]
                session.clip(trained(module), 0.5)
                session.optimizer_step(optimizer)
                optimizer.zero_grad()
    finally:
        session.detach()
    return (losses, [*tensors, *[p.detach().clone() for p in trained(module)]], torch.get_rng_state()), session


def same(one: Outcome, other: Outcome) -> bool:
    """Whether two outcomes agree bit for bit."""
    pairs = zip([*one[0], *one[1], one[2]], [*other[0], *other[1], other[2]], strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def hooks_of(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())
