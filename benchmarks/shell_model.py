"""A small model inside the shape of a big one: the same tokens, at the big model's cost.

A 135M target is launch-bound on a big GPU, and a model with random weights accepts no draft. So a real Llama is widened
from H to H' with zeros: the residual stream keeps its H live channels, RMSNorm's weights grow by sqrt(H/H') and its eps
shrinks by H/H' (the mean now runs over H' channels, of which H are not zero), added heads and added neurons write
nothing, and added blocks have zero output projections. Every product is computed in full; none of them is skipped.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

SHAPES: dict[str, dict[str, int]] = {
    # Heads stay as wide as SmolLM2's (64) and three query heads go to one of keys, as in SmolLM2.
    "1b": {"hidden_size": 2112, "intermediate_size": 5632, "num_hidden_layers": 30, "num_key_value_heads": 11},
    "7b": {"hidden_size": 4032, "intermediate_size": 11008, "num_hidden_layers": 32, "num_key_value_heads": 21},
}


def shell(model: Any, shape: str | dict[str, int]) -> Any:
    """The model in a bigger body.

    Args:
        model: a Llama of transformers. shape: a name of :data:`SHAPES`, or the numbers.

    Returns:
        A new model of the same class and dtype, on the CPU, whose logits are those of ``model`` up to rounding.

    Raises:
        ValueError: the body is smaller than the model, or the number of heads does not fit.
    """
    sizes = SHAPES[shape] if isinstance(shape, str) else shape
    old = model.config
    group = old.num_attention_heads // old.num_key_value_heads
    config = copy.deepcopy(old)
    for name, value in sizes.items():
        if value < getattr(old, name):
            raise ValueError(f"a shell with {name}={value} is smaller than the model's {getattr(old, name)}")
        setattr(config, name, value)
    config.num_attention_heads = sizes["num_key_value_heads"] * group
    config.head_dim = getattr(old, "head_dim", None) or old.hidden_size // old.num_attention_heads
    ratio = config.hidden_size / old.hidden_size
    config.rms_norm_eps = old.rms_norm_eps / ratio
    dtype = next(model.parameters()).dtype
    big = type(model)(config).to(dtype)
    inner, outer = model.get_decoder(), big.get_decoder()
    with torch.no_grad():
        for name, parameter in big.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.02, generator=torch.Generator().manual_seed(0))
        for index, layer in enumerate(outer.layers):
            if index < len(inner.layers):
                _fill(inner.layers[index], layer, ratio)
            else:
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
        _norm(inner.norm, outer.norm, ratio)
        _embedding(model.get_input_embeddings(), big.get_input_embeddings())
        if not config.tie_word_embeddings:
            _embedding(model.get_output_embeddings(), big.get_output_embeddings())
    big.generation_config = copy.deepcopy(model.generation_config)
    return big.requires_grad_(False).eval()


def _fill(small: Any, big: Any, ratio: float) -> None:
    for name in ("input_layernorm", "post_attention_layernorm"):
        _norm(getattr(small, name), getattr(big, name), ratio)
    for part, name in (
        ("self_attn", "q_proj"), ("self_attn", "k_proj"), ("self_attn", "v_proj"), ("self_attn", "o_proj"),
        ("mlp", "gate_proj"), ("mlp", "up_proj"), ("mlp", "down_proj"),
    ):  # fmt: skip
        source, target = getattr(getattr(small, part), name).weight, getattr(getattr(big, part), name).weight
        rows, columns = source.shape
        # Inputs beyond the live ones are zero (the residual stream) or must not count (added heads and neurons), and
        # outputs beyond them must not reach the residual stream; only added rows of q, k, v, gate and up stay random.
        target[:, columns:] = 0
        if name in ("o_proj", "down_proj"):
            target[rows:] = 0
        target[:rows, :columns] = source


def _norm(small: Any, big: Any, ratio: float) -> None:
    big.weight.fill_(1.0)
    big.weight[: len(small.weight)] = small.weight / math.sqrt(ratio)


def _embedding(small: nn.Module, big: nn.Module) -> None:
    source, target = _weight(small), _weight(big)
    target[:, source.shape[1] :] = 0
    target[:, : source.shape[1]] = source


def _weight(module: nn.Module) -> Tensor:
    return module.weight  # type: ignore[return-value]
