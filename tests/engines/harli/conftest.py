"""A small random model with a LoRA adapter that says something else than its base."""

from __future__ import annotations

from typing import Any

import torch

VOCABULARY = 97
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "tie_word_embeddings": False, "initializer_range": 0.2,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip


def llama(seed: int = 0, **changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SHAPE | changes)).eval()


def with_lora(model: Any, seed: int = 1, **lora: Any) -> Any:
    """The model under peft, its B matrices not zero."""
    import peft

    config = peft.LoraConfig(
        **{"task_type": "CAUSAL_LM", "target_modules": "all-linear", "r": 4, "lora_alpha": 8, "lora_dropout": 0.1}
        | lora
    )
    wrapped = peft.get_peft_model(model, config)
    shake(wrapped, seed)
    return wrapped.eval()


def shake(model: Any, seed: int) -> None:
    """Another adapter: as if some optimizer steps had passed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def prompts(count: int, length: int = 9, seed: int = 3) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCABULARY, (length + 3 * i % 14,), generator=generator).tolist() for i in range(count)]


def generated(model: Any, prompt: list[int], new: int) -> list[int]:
    """What plain greedy generation of transformers says."""
    ids = torch.tensor([prompt])
    found = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new, pad_token_id=0
    )
    return found[0, len(prompt) :].tolist()
