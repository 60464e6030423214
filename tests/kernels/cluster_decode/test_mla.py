"""Latent attention with absorbed weights against the transformers module, which expands every latent."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV2Config
from transformers.cache_utils import DynamicCache
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2DecoderLayer, DeepseekV2RotaryEmbedding

from ygglight.kernels.cluster_decode.mla import LatentSpec, LatentWeights, latent_block_reference
from ygglight.kernels.testing import rms_ratio


def make_layer(q_lora_rank: int | None) -> tuple[Any, Any]:
    torch.manual_seed(0)
    config = DeepseekV2Config(
        hidden_size=48, num_attention_heads=4, num_key_value_heads=4, q_lora_rank=q_lora_rank, kv_lora_rank=24,
        qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=10, intermediate_size=32, first_k_dense_replace=1,
        num_hidden_layers=1, attn_implementation="eager",
    )  # fmt: skip
    layer: Any = DeepseekV2DecoderLayer(config, 0).double().eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return config, layer


def weights_of(layer: Any) -> LatentWeights:
    attention = layer.self_attn
    queries = {"q": attention.q_proj.weight} if attention.q_proj is not None else {
        "q": attention.q_b_proj.weight, "q_a": attention.q_a_proj.weight, "q_a_norm": attention.q_a_layernorm.weight,
    }  # fmt: skip
    return LatentWeights(
        norm=layer.input_layernorm.weight, kv_a=attention.kv_a_proj_with_mqa.weight,
        kv_a_norm=attention.kv_a_layernorm.weight, kv_b=attention.kv_b_proj.weight, o=attention.o_proj.weight,
        **queries,
    )  # fmt: skip


def run(block: Any, layer: Any, config: Any, x: Tensor, cache: DynamicCache, angles: Tensor) -> tuple[Tensor, ...]:
    attention, batch = layer.self_attn, len(x)
    spec = LatentSpec(
        hidden=48, heads=4, nope_dim=12, rope_dim=8, value_dim=10, latent=24,
        eps=layer.input_layernorm.variance_epsilon, latent_eps=attention.kv_a_layernorm.variance_epsilon,
        scale=attention.scaling,
    )  # fmt: skip
    latents, rotated = cache.layers[0].keys[:, 0], cache.layers[0].values[:, 0]
    room = torch.full((batch, 3, 24), torch.nan, dtype=x.dtype), torch.full((batch, 3, 8), torch.nan, dtype=x.dtype)
    new_latents, new_rotated = torch.empty(batch, 24, dtype=x.dtype), torch.empty(batch, 8, dtype=x.dtype)
    output = block(
        x[:, 0], weights_of(layer), spec, angles.real, angles.imag, torch.cat((latents, room[0]), 1),
        torch.cat((rotated, room[1]), 1), torch.full((batch,), latents.shape[1], dtype=torch.int32),
        new_latents, new_rotated,
    )  # fmt: skip
    return output, new_latents, new_rotated


@pytest.mark.parametrize("q_lora_rank", [None, 20])
@pytest.mark.parametrize("context", [1, 17])
@torch.no_grad()
def test_absorbed_is_the_same_as_expanded(q_lora_rank: int | None, context: int) -> None:
    config, layer = make_layer(q_lora_rank)
    rotary = DeepseekV2RotaryEmbedding(config)
    # The module reads the size of the rotary part from `head_dim`.
    assert config.head_dim == 8
    hidden = torch.randn(2, context + 1, 48, dtype=torch.float64)
    angles = rotary(hidden, torch.arange(context + 1)[None].expand(2, -1))
    cache = DynamicCache()
    mask = torch.ones(context, context).tril().log()[None, None].double()

    def plain(states: Tensor, mask: Tensor | None, angles: Tensor) -> Tensor:
        normed = layer.input_layernorm(states)
        return layer.self_attn(normed, attention_mask=mask, past_key_values=cache, position_embeddings=angles)[0]

    plain(hidden[:, :context], mask, angles[:, :context])
    actual = run(latent_block_reference, layer, config, hidden[:, context:], cache, angles[:, context])
    other = run(latent_block_reference, layer, config, hidden[:, context:], cache, angles[:, context - 1])
    expected = plain(hidden[:, context:], None, angles[:, context:])[:, 0]
    # The angles and the norm of the module are in float32, whatever its weights.
    assert rms_ratio(actual[0], expected) < 1e-6
    assert rms_ratio(other[0], expected) > 1e-4  # control: a position that is one off
    for new, cached in zip(actual[1:], (cache.layers[0].keys, cache.layers[0].values), strict=True):
        assert rms_ratio(new, cached[:, 0, -1]) < 1e-6
