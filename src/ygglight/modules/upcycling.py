"""The arithmetic of upcycling: a dense model as a mixture of experts, and whether its routers route. No Lightning."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ygglight.compat import transformers as hf

__all__ = [
    "balance_loss",
    "centroid_router",
    "normalised_entropy",
    "run_experts",
    "set_routers",
    "upcycle",
]

DIRECTIONS = 32
"""Of a router's inputs, in which its clusters lie."""


def upcycle(dense: Any, layers: Sequence[int], experts: int, top_k: int) -> Any:
    """A Mixtral out of some layers of a Llama, every expert a copy of its layer's feed-forward network.

    As routing weights add up to one, it computes what those layers would compute without experts, whatever its
    routers say; they are random until :func:`centroid_router`.

    Args:
        dense: A ``LlamaForCausalLM``. layers: Which of its layers, in order. experts: A layer. top_k: A token.

    Raises:
        ValueError: the model is no Llama, has biases, or has not all of these layers.
    """
    from transformers import MixtralConfig, MixtralForCausalLM

    config = dense.config
    if config.model_type != "llama" or config.attention_bias or config.mlp_bias:
        raise ValueError(f"only a Llama without biases can be upcycled, not a {config.model_type} model")
    if not layers or not all(0 <= layer < config.num_hidden_layers for layer in layers):
        raise ValueError(f"layers={list(layers)} must be some of 0..{config.num_hidden_layers - 1}")
    fields = (
        "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
        "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "rope_parameters",
        "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
    )  # fmt: skip
    shape = {name: getattr(config, name) for name in fields}
    shape |= {"num_hidden_layers": len(layers), "num_local_experts": experts, "num_experts_per_tok": top_k}
    moe: Any = MixtralForCausalLM(MixtralConfig(**shape)).to(next(dense.parameters()).dtype)
    with torch.no_grad():
        there: list[Any] = hf.decoder_layers(dense)
        for mine, theirs in zip(moe.model.layers, [there[layer] for layer in layers], strict=True):
            for name in ("self_attn", "input_layernorm", "post_attention_layernorm"):
                getattr(mine, name).load_state_dict(getattr(theirs, name).state_dict())
            ffn, copies = theirs.mlp, mine.mlp.experts
            copies.gate_up_proj.copy_(torch.cat([ffn.gate_proj.weight, ffn.up_proj.weight]))
            copies.down_proj.copy_(ffn.down_proj.weight)
        moe.model.norm.load_state_dict(dense.model.norm.state_dict())
        moe.get_input_embeddings().load_state_dict(dense.get_input_embeddings().state_dict())
        moe.get_output_embeddings().load_state_dict(dense.get_output_embeddings().state_dict())
    return moe


def run_experts(module: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """An experts function for training on a CPU.

    Transformers' own loop slices the stack of weights once an expert, and the gradient of each slice is a whole stack
    of zeros: at 8 experts that is 8 times the memory traffic of this one, which takes the stack apart once.

    Args:
        module: The experts. hidden: ``[T, H]``. index, weights: ``[T, k]``.
    """
    out = torch.zeros_like(hidden)
    stacks = zip(module.gate_up_proj.unbind(), module.down_proj.unbind(), strict=True)
    for expert, (gate_up, down) in enumerate(stacks):
        token, place = torch.where(index == expert)
        if len(token):
            result = F.linear(module._apply_gate(F.linear(hidden[token], gate_up)), down)
            out = out.index_add(0, token, (result * weights[token, place, None]).to(out.dtype))
    return out


def centroid_router(inputs: Tensor, experts: int, entropy: float, *, rounds: int = 20, seed: int = 0) -> Tensor:
    """The weight of a linear router that sends each token to its cluster, all clusters of one size.

    k-means over the main directions of the standardised inputs; a bias a cluster, moved until all have the same share
    of the tokens (as in Sinkhorn's algorithm), keeps them balanced. A router of Mixtral has no bias. But there is a
    direction along which all inputs are nearly 1 (least squares finds it, for the norm before a router leaves a large
    common mean), and the constants ride on that.

    Args:
        inputs: What the router of one layer sees, ``[N, H]``. experts: How many clusters.
        entropy: Mean entropy of a token's probabilities as a share of the largest, ln(experts): how sharp it is.
        rounds: Of k-means. seed: Of its start.

    Returns:
        ``[experts, H]``, float32.

    Raises:
        ValueError: fewer inputs than experts, or an entropy that is not between 0 and 1.
    """
    if len(inputs) < experts or not 0 < entropy < 1:
        raise ValueError(f"{len(inputs)} inputs for {experts} experts at entropy={entropy}, which must be in (0, 1)")
    x = inputs.float()
    mean, deviation = x.mean(0), x.std(0).clamp_min(1e-6)
    # The main directions of what varies: in all of them the centres would follow the noise of these very tokens.
    axes = torch.linalg.eigh(torch.cov(((x - mean) / deviation).T)).eigenvectors[:, -DIRECTIONS:] / deviation[:, None]
    z = (x - mean) @ axes
    generator = torch.Generator().manual_seed(seed)
    centre = z[torch.randperm(len(z), generator=generator)[:experts].to(z.device)]
    bias = z.new_zeros(experts)
    for _ in range(rounds):
        score = z @ centre.T - centre.square().sum(1) / 2
        temperature = float(score.std(1).mean()) / 4  # soft enough for the bias to converge, and near k-means
        bias = _balanced(score, bias, temperature)
        share = ((score + bias) / temperature).softmax(1)
        centre = (share.T @ z) / share.sum(0)[:, None]
    score = z @ centre.T - centre.square().sum(1) / 2
    for _ in range(3):
        bias = _balanced(score, bias, _temperature(score + bias, entropy))
    slope = centre @ axes.T
    weight = slope + (bias - centre.square().sum(1) / 2 - slope @ mean)[:, None] * _ones(x)
    weight -= weight.mean(0)  # changes no probability, and spares bfloat16 the large numbers
    return weight / _temperature(x @ weight.T, entropy)


@torch.no_grad()
def set_routers(gates: Sequence[Any], inputs: Sequence[Tensor], entropy: float, seed: int = 0) -> None:
    """Give each router the clusters of what it sees.

    Args:
        gates: The routers. inputs: Of each of them, ``[..., H]``.
        entropy: See :func:`centroid_router`. seed: Of the first router's clusters; one more for each that follows.
    """
    for number, (gate, seen) in enumerate(zip(gates, inputs, strict=True)):
        rows = seen.flatten(0, -2).float()
        gate.weight.copy_(centroid_router(rows, len(gate.weight), entropy, seed=seed + number))


def _balanced(score: Tensor, bias: Tensor, temperature: float, rounds: int = 12) -> Tensor:
    for _ in range(rounds):
        share = ((score + bias) / temperature).softmax(1).mean(0)
        bias = bias - temperature * (share * len(bias)).clamp_min(1e-9).log()
    return bias - bias.mean()


def _temperature(score: Tensor, entropy: float) -> float:
    """By which scores are divided to have this entropy, which rises with it: bisection of the exponent."""
    unit, low, high = float(score.std()), -6.0, 6.0
    for _ in range(24):
        middle = (low + high) / 2
        sharp = normalised_entropy((score / (unit * math.exp(middle))).softmax(1)) < entropy
        low, high = (middle, high) if sharp else (low, middle)
    return unit * math.exp(middle)


def _ones(x: Tensor) -> Tensor:
    """The direction along which inputs are as near 1 as can be: least squares with a small ridge."""
    moment = x.T @ x / len(x)
    ridge = 1e-4 * moment.diagonal().mean() * torch.eye(len(moment), device=x.device)
    return torch.linalg.solve(moment + ridge, x.mean(0))


def normalised_entropy(probabilities: Tensor) -> float:
    """The mean entropy of distributions as a share of the largest there can be.

    Args:
        probabilities: ``[..., E]``, each row summing to 1.
    """
    p = probabilities.double()
    return float(torch.special.entr(p).sum(-1).mean()) / math.log(p.shape[-1])


def balance_loss(logits: Sequence[Tensor], top_k: int) -> Tensor:
    """The loss of Switch Transformer (arXiv 2101.03961) for each layer by itself, averaged; 1 where loads are equal.

    Transformers' function pools all layers, so that loads of one may make up for those of another.

    Args:
        logits: Of each layer's router, ``[T, E]``. top_k: Experts a token.
    """
    losses = []
    for layer in logits:
        p = layer.float().softmax(-1)
        load = F.one_hot(p.topk(top_k).indices, p.shape[-1]).sum(1).float().mean(0) / top_k
        losses.append(p.shape[-1] * (load * p.mean(0)).sum())
    return torch.stack(losses).mean()
