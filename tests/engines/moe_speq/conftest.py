"""Tiny random mixture-of-experts models of every family, whose text is not boring."""

from __future__ import annotations

from typing import Any

import pytest
import torch

VOCABULARY, EXPERTS, TOP_K = 97, 8, 2
FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe", "gpt_oss", "deepseek_v2", "deepseek_v3")

SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "num_experts_per_tok": TOP_K, "tie_word_embeddings": False, "initializer_range": 0.2,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
# DeepSeek attends through low-rank projections; its first layer may be dense, and has one in both models here.
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 4, "num_hidden_layers": 3, "moe_intermediate_size": 32, "n_routed_experts": EXPERTS,
    "n_shared_experts": 1, "first_k_dense_replace": 1, "kv_lora_rank": 16, "q_lora_rank": None,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
}  # fmt: skip
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_FAMILY: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": EXPERTS}),
    "qwen2_moe": (
        "Qwen2Moe",
        {"num_experts": EXPERTS, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48},
    ),
    "qwen3_moe": ("Qwen3Moe", {"num_experts": EXPERTS, "moe_intermediate_size": 32, "head_dim": 16}),
    "olmoe": ("Olmoe", {"num_experts": EXPERTS, "num_key_value_heads": 4}),
    "phimoe": ("Phimoe", {"num_local_experts": EXPERTS, "attention_bias": True, "lm_head_bias": True}),
    "gpt_oss": (
        "GptOss",
        {"num_local_experts": EXPERTS, "head_dim": 16, "sliding_window": 64, "rope_parameters": _ROPE},
    ),
    "deepseek_v2": ("DeepseekV2", _LATENT | {"head_dim": 8}),
    "deepseek_v3": ("DeepseekV3", _LATENT | {"n_group": 2, "topk_group": 1}),
}


def tiny_moe(name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
    """A model of two sparse layers with 8 experts, 2 of them a token, in well under a second.

    Args:
        name: One of ``FAMILIES``. dtype: Of the weights. seed: Of the weights. changes: To the configuration.
    """
    import transformers

    prefix, fields = _FAMILY[name]
    config = getattr(transformers, f"{prefix}Config")(**SHAPE | fields | changes)
    torch.manual_seed(seed)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config)
    with torch.no_grad():  # biases start at zero, where leaving them out would go unseen
        for tensor in (*model.parameters(), *model.buffers()):
            if not tensor.any():
                tensor.normal_(std=0.1)
    return model.eval().to(dtype)


def tokens(count: int = 7, rows: int = 1, seed: int = 3) -> torch.Tensor:
    """Token ids ``[rows, count]``."""
    return torch.randint(0, VOCABULARY, (rows, count), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def on_one_thread(one_thread: None) -> None:
    """All tests of these small models."""
