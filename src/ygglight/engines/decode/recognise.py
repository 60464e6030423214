"""Which decoder layers are made so that their attention half can run as one fused block, and with which switches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ygglight.compat.autograd import is_wrapper
from ygglight.compat.decoder_layers import why_altered
from ygglight.kernels.cluster_decode import BlockSpec, BlockWeights

# The rotary embeddings that a layer may have; which one is found by running it.
_ROTARY = ("halves", "pairs", "none")
_CLOSE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}


class NotFusable(ValueError):
    """The layer is made otherwise; the text says how."""


@dataclass(frozen=True)
class LayerParts:
    """The attention half of a decoder layer.

    Args:
        norm: RMSNorm in front. attention: with projections of plain linear layers.
        spec: What they compute; its rotary embedding is a guess until the layer was run.
    """

    norm: nn.Module
    attention: nn.Module
    spec: BlockSpec

    def modules(self) -> Iterator[nn.Module]:
        """All modules whose forward the block replaces."""
        yield self.norm
        yield from self.attention.modules()

    def weights(self) -> BlockWeights:
        """The layer's own parameters as they are now (a module may have been moved), by identity."""
        attention: Any = self.attention
        spec = self.spec
        if hasattr(attention, "qkv_proj"):
            sizes = [spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim, spec.kv_heads * spec.head_dim]
            q, k, v = attention.qkv_proj.weight.split(sizes)
            bias = attention.qkv_proj.bias
            q_bias, k_bias, v_bias = (None, None, None) if bias is None else bias.split(sizes)
        else:
            linears = (attention.q_proj, attention.k_proj, attention.v_proj)
            q, k, v = (linear.weight for linear in linears)
            q_bias, k_bias, v_bias = (linear.bias for linear in linears)
        norm: Any = self.norm
        return BlockWeights(
            norm.weight, q, k, v, attention.o_proj.weight, q_bias, k_bias, v_bias, attention.o_proj.bias,
            q_norm=attention.q_norm.weight if spec.qk_norm else None,
            k_norm=attention.k_norm.weight if spec.qk_norm else None,
        )  # fmt: skip

    def angles(self, embeddings: Any, spec: Any) -> tuple[Tensor, Tensor] | None:
        """Cosine and sine of the new token's position as the block takes them, or None where there are no such.

        Args:
            embeddings: What the model gives its layers. spec: one of the candidates.
        """
        if not isinstance(embeddings, tuple) or len(embeddings) != 2:
            return None
        # Where there is no rotary embedding they are not asked for.
        return embeddings[0][..., : spec.rotary_dim], embeddings[1][..., : spec.rotary_dim]

    def candidates(self, embeddings: Any) -> list[BlockSpec]:
        """The spec with each rotary embedding that the layer may have.

        Args:
            embeddings: Cosine and sine, of as many elements of a head as are rotated.
        """
        rotary_dim = embeddings[0].shape[-1]
        if not 0 < rotary_dim <= self.spec.head_dim or rotary_dim % 2:
            return [replace(self.spec, rotary_dim=0)]
        return [
            replace(self.spec, rotary_dim=0 if kind == "none" else rotary_dim, interleaved_rope=kind == "pairs")
            for kind in _ROTARY
        ]

    def fits(self, keys: Tensor, values: Tensor) -> bool:
        """Whether a cache holds the layer's keys and values.

        Args:
            keys: ``[B, heads, C, size]``. values: the same.
        """
        return keys.shape == values.shape and keys.shape[1::2] == (self.spec.kv_heads, self.spec.head_dim)

    def cached(self, states: Tensor) -> Tensor:
        """A cache's keys or values ``[B, kv_heads, C, D]`` as the block takes them: as they are.

        Args:
            states: Keys or values.
        """
        return states

    def new(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Memory for the new token's key and value, as the block writes them.

        Args:
            hidden: ``[B, 1, hidden]``.
        """
        shape = (len(hidden), self.spec.kv_heads, self.spec.head_dim)
        return hidden.new_empty(shape), hidden.new_empty(shape)

    def states(self, new: Tensor) -> Tensor:
        """What :meth:`new` gave, written, as a cache takes it: ``[B, kv_heads, 1, D]``.

        Args:
            new: Keys or values.
        """
        return new[:, :, None]


def recognise(layer: nn.Module) -> LayerParts:
    """Reads the make of a decoder layer from its modules, and asks its norms what they compute. Reads a few numbers.

    Args:
        layer: Of any model that names its modules as Llama does (also with ``qkv_proj``, as Phi-3).

    Raises:
        NotFusable: it is made otherwise, or adapters, quantisation or hooks are in the way.
    """
    norm, attention = child(layer, "input_layernorm"), child(layer, "self_attn")
    head_dim, scale = getattr(attention, "head_dim", None), getattr(attention, "scaling", None)
    if not isinstance(head_dim, int) or not isinstance(scale, float):
        raise NotFusable(f"{type(attention).__name__} names no head_dim or scaling")
    output = linear(attention, "o_proj")
    queries = output.in_features
    if hasattr(attention, "qkv_proj"):
        fused = linear(attention, "qkv_proj")
        states, linears = (fused.out_features - queries) // 2, [fused]
    else:
        linears = [linear(attention, name) for name in ("q_proj", "k_proj", "v_proj")]
        states = linears[1].out_features
        if [linear.out_features for linear in linears] != [queries, states, states]:
            raise NotFusable(f"{type(attention).__name__} projects to other sizes than heads of head_dim")
    if queries % head_dim or states % head_dim or not states or queries % states:
        raise NotFusable(f"{type(attention).__name__} has {queries} and {states} rows, no heads of {head_dim}")
    for module in (layer, attention, norm):
        refuse_altered(module, type(module).__name__)
    norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    owners = [norm, *linears, output, *(each for each in norms if each is not None)]
    check_weights(type(attention).__name__, owners)

    eps, offset = norm_kind(norm, linears[0].in_features)
    qk_norm = None not in norms
    if qk_norm:
        for name in ("q_norm", "k_norm"):
            if norm_kind(child(attention, name), head_dim) != (eps, offset):
                raise NotFusable(f"{name} is not the RMSNorm of the layer, over heads of {head_dim}")
    spec = BlockSpec(
        linears[0].in_features, queries // head_dim, states // head_dim, head_dim, eps=eps, scale=scale, rotary_dim=0,
        norm_offset=offset, qk_norm=qk_norm, softcap=getattr(attention, "attn_logit_softcapping", None),
    )  # fmt: skip
    return LayerParts(norm, attention, spec)


def child(module: nn.Module, name: str) -> nn.Module:
    """The submodule of a name; refuses a module that has none.

    Args:
        module: Of a decoder layer. name: of the submodule.
    """
    found = getattr(module, name, None)
    if not isinstance(found, nn.Module):
        raise NotFusable(f"{type(module).__name__} has no {name}")
    return found


def linear(attention: nn.Module, name: str) -> nn.Linear:
    """The linear layer of a name; refuses what computes something else.

    Args:
        attention: Its parent. name: of the layer.
    """
    found = child(attention, name)
    if type(found) is not nn.Linear:  # peft's and bitsandbytes' compute something else, and some are subclasses
        kind = f"{type(found).__module__.split('.')[0]}'s {type(found).__name__}"
        raise NotFusable(f"{name} is {kind}, not a plain linear layer: merge adapters, or load without quantisation")
    refuse_altered(found, name)
    return found


def check_weights(name: str, owners: list[nn.Module]) -> None:
    """Refuses weights that are not loaded, not in one dtype, or not plain tensors.

    Args:
        name: Of the attention module. owners: all modules with weights.
    """
    weights = [parameter for owner in owners for parameter in owner.parameters()]
    wrapped = next((weight for weight in weights if is_wrapper(weight)), None)
    if wrapped is not None:  # torchao's and DTensor's, in linear layers that look plain
        kind = f"{type(wrapped).__module__.split('.')[0]}'s {type(wrapped).__name__}"
        raise NotFusable(f"{name} has weights in {kind}, not in plain tensors: load without quantisation or sharding")
    if len({weight.dtype for weight in weights}) != 1 or any(weight.is_meta for weight in weights):
        raise NotFusable(f"{name} has weights on meta or of several dtypes: load them in one")


def refuse_altered(module: nn.Module, name: str) -> None:
    """Refuses a module that hooks or another forward have changed.

    Args:
        module: Of a decoder layer. name: for the reason.
    """
    reason = why_altered(module)
    if reason is not None:
        raise NotFusable(f"{name} {reason}")


def norm_kind(norm: nn.Module, size: int) -> tuple[float, float]:
    """(epsilon, offset of the weights) of an RMSNorm of any class; asked by its result, for the class does not tell."""
    name, weight = type(norm).__name__, getattr(norm, "weight", None)
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if not isinstance(weight, Tensor) or tuple(weight.shape) != (size,) or not isinstance(eps, float):
        raise NotFusable(f"{name} is not an RMSNorm with {size} weights and an epsilon")
    refuse_altered(norm, name)
    if weight.is_meta:
        raise NotFusable(f"{name} is on meta: load the weights first")
    # With a mean, which LayerNorm would take away, and small, so that the epsilon shows.
    probe = (torch.linspace(0, 9, size, device=weight.device).sin() + 0.4) * (10 * eps) ** 0.5
    with torch.no_grad():
        actual = norm(probe.to(weight.dtype)).double()
        exact = probe.to(weight.dtype).double()
        exact = exact * torch.rsqrt(exact.square().mean() + eps)
        for offset in (0.0, 1.0):
            expected = exact * (weight.double() + offset)
            if bool((actual - expected).norm() <= _CLOSE.get(weight.dtype, 3e-2) * expected.norm()):
                return eps, offset
    raise NotFusable(f"{name} computes something else than an RMSNorm")
