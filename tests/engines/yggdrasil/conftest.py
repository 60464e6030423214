"""Small random models whose text is not boring, and drafts for them of every quality."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

VOCABULARY = 97
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "tie_word_embeddings": False, "initializer_range": 0.2,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip


def llama(seed: int = 0, **changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SHAPE | changes)).eval()


def noisy(model: Any, amount: float) -> Any:
    """The same model with noise on its weights: right now and then."""
    copied = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    for parameter in copied.parameters():
        parameter.data += amount * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return copied


def wrong(model: Any) -> Any:
    """Foresees everything but what the target says: its logits are the target's with the sign turned."""
    copied = copy.deepcopy(model)
    copied.lm_head.weight.data.neg_()
    return copied


def extreme(model: Any) -> Any:
    """Logits of thousands, but no NaN."""
    copied = copy.deepcopy(model)
    copied.lm_head.weight.data.mul_(1e4)
    return copied


@pytest.fixture(scope="session")
def target() -> Any:
    return llama()


@pytest.fixture(scope="session")
def drafts(target: Any) -> dict[str, Any]:
    return {
        "itself": target,
        "noisy": noisy(target, 0.08),
        "random": llama(5, num_hidden_layers=1),
        "wrong": wrong(target),
        "extreme": extreme(noisy(target, 0.08)),
        "lookup": "lookup",
    }


def prompts(count: int, length: int = 9, seed: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCABULARY, (1, length + i % 5), generator=generator) for i in range(count)]


def plain(model: Any, ids: Tensor, new: int, **kwargs: Any) -> Tensor:
    return model.generate(ids, do_sample=False, max_new_tokens=new, **kwargs)


def close_calls(model: Any, expected: Tensor, found: Tensor, gap: float = 1e-4) -> int:
    """How often two texts part where the model was sure; asserts that it is only where it was not.

    Returns:
        1 if they part at a tie, 0 if they are equal.
    """
    if torch.equal(expected, found):
        return 0
    length = min(expected.shape[1], found.shape[1])
    where = int((expected[0, :length] != found[0, :length]).int().argmax())
    with torch.no_grad():
        best = model(expected[:, :where]).logits[0, -1].topk(2).values
    assert best[0] - best[1] <= gap, f"another token at {where}, where the best leads by {best[0] - best[1]:.2g}"
    return 1
