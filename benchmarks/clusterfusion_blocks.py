"""The attention half of one decoder layer at the shapes of known models: random inputs, and the best of plain torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ygglight.kernels.cluster_decode import (
    BlockSpec,
    BlockWeights,
    decode_block,
    decode_block_reference,
    latent_block,
)
from ygglight.kernels.cluster_decode.mla import LatentSpec, LatentWeights, latent_block_reference, split_kv_b
from ygglight.kernels.cluster_decode.testing import make_spec

SHAPES: dict[str, BlockSpec | LatentSpec] = {
    "tiny": make_spec(4, 2, 64, 256),
    "tiny-latent": LatentSpec(256, 2, 32, 32, 32, 64, 1e-6, 1e-6, 64**-0.5),
    "llama2-7b": make_spec(32, 32, 128, 4096),
    "llama3-8b": make_spec(32, 8, 128, 4096),
    "deepseek-v2-lite": LatentSpec(2048, 16, 128, 64, 128, 512, 1e-6, 1e-6, 192**-0.5),
}
States = tuple[Tensor, ...]
"""Output, and what the cache got."""


class Layer(ABC):
    """One layer with weights and a cache of its own, in the midst of a text.

    Attributes:
        moved: Bytes that a step must read: weights, and the cache of the committed tokens.
    """

    moved: int

    @abstractmethod
    def unfused(self, step: Callable[..., Tensor]) -> Callable[[], Tensor]:
        """A call of plain torch.

        Args:
            step: `dense_step` or `latent_step`, compiled or not.
        """

    @abstractmethod
    def fused(self, name: str) -> Callable[[], Tensor]:
        """A call of a fused variant, "torch", "split_k" or "cluster-4"."""

    @abstractmethod
    def appended(self) -> States:
        """What the last call wrote to the cache."""

    @abstractmethod
    def exact(self) -> States:
        """Output and appended states in float32."""


def make_layer(spec: BlockSpec | LatentSpec, batch: int, length: int, device: str, seed: int) -> Layer:
    """Random weights of the size that models have, and a random cache, in bfloat16.

    Args:
        spec: Of the layer. batch: sequences. length: committed tokens of each. device: where. seed: of the numbers.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        numbers = torch.empty(shape, dtype=torch.bfloat16, device=device)
        return numbers.normal_(mean, scale, generator=generator)

    if isinstance(spec, LatentSpec):
        return LatentLayer(spec, batch, length, normal)
    return DenseLayer(spec, batch, length, normal)


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As the models' RMSNorm: in float32, then in the dtype of the weights."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


# -- keys and values of each head --------------------------------------------------------------------------------------
class DenseLayer(Layer):
    """Multi-head or grouped-query attention."""

    def __init__(self, spec: BlockSpec, batch: int, length: int, normal: Callable[..., Tensor]) -> None:
        sizes = [spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim, spec.kv_heads * spec.head_dim]
        self.spec, self.length = spec, length
        self.qkv = normal(spec.rows, spec.hidden, scale=spec.hidden**-0.5)
        q, k, v = self.qkv.split(sizes)
        self.weights = BlockWeights(
            normal(spec.hidden, scale=0.3, mean=1.0), q, k, v, normal(spec.hidden, sizes[0], scale=sizes[0] ** -0.5)
        )
        slots = (length // 64 + 1) * 64
        self.x = normal(batch, spec.hidden)
        self.keys, self.values = (normal(batch, spec.kv_heads, slots, spec.head_dim) for _ in range(2))
        self.cos, self.sin = angles(length, spec.rotary_dim // 2, batch, self.x)
        self.cos, self.sin = (part.repeat(1, 2) for part in (self.cos, self.sin))
        self.lengths = torch.full((batch,), length, dtype=torch.int32, device=self.x.device)
        self.slot = torch.full((1,), length, device=self.x.device)
        cache = 2 * batch * spec.kv_heads * length * spec.head_dim
        self.moved = 2 * (sum(w.numel() for w in (self.weights.norm, self.qkv, self.weights.o)) + cache)

    def unfused(self, step: Callable[..., Tensor]) -> Callable[[], Tensor]:
        """See :class:`Layer`."""
        w, s = self.weights, self.spec
        sizes = (s.heads, s.kv_heads, s.head_dim, s.eps, s.scale, self.length)
        return partial(
            step, self.x, w.norm, self.qkv, w.o, self.cos, self.sin, self.keys, self.values, self.slot, *sizes
        )

    def fused(self, name: str) -> Callable[[], Tensor]:
        """See :class:`Layer`."""
        block = {"torch": decode_block_reference, "split_k": partial(decode_block, blocks=0)}.get(name)
        block = block or partial(decode_block, blocks=int(name.removeprefix("cluster-")))
        slots = self.slot.expand(len(self.x))
        return partial(
            block, self.x, self.weights, self.spec, self.cos, self.sin, self.keys, self.values, self.lengths, self.keys,
            self.values, slots=slots,
        )  # fmt: skip

    def appended(self) -> States:
        """See :class:`Layer`."""
        return self.keys[:, :, self.length].clone(), self.values[:, :, self.length].clone()

    def exact(self) -> States:
        """See :class:`Layer`."""
        wide = [each.float() for each in (self.cos, self.sin, self.keys, self.values)]
        new = [torch.empty_like(each[:, :, 0]) for each in wide[2:]]
        spec, weights = self.spec, widened(self.weights)
        return decode_block_reference(self.x.float(), weights, spec, *wide, self.lengths, *new), *new


def dense_step(
    x: Tensor, norm: Tensor, qkv: Tensor, o: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor,
    slot: Tensor, heads: int, kv_heads: int, head_dim: int, eps: float, scale: float, length: int,
) -> Tensor:  # fmt: skip
    """The layer in plain torch as fast engines write it: one product for q, k, v, and groups as rows of attention."""
    batch = len(x)
    q, k, v = (
        F.linear(rms(x, norm, eps), qkv).view(batch, -1, head_dim).split([heads, kv_heads, kv_heads], dim=1)
    )  # fmt: skip
    q, k = (_turn_halves(each, cos[:, None], sin[:, None]) for each in (q, k))
    keys.index_copy_(2, slot, k[:, :, None])
    values.index_copy_(2, slot, v[:, :, None])
    q = q.view(batch, kv_heads, heads // kv_heads, head_dim)
    attended = F.scaled_dot_product_attention(q, keys[:, :, : length + 1], values[:, :, : length + 1], scale=scale)
    return F.linear(attended.reshape(batch, -1), o)


def _turn_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), -1) * sin


# -- one latent for all heads ------------------------------------------------------------------------------------------
class LatentLayer(Layer):
    """Multi-head latent attention with absorbed weights."""

    def __init__(self, spec: LatentSpec, batch: int, length: int, normal: Callable[..., Tensor]) -> None:
        self.spec, self.length = spec, length
        inner = spec.heads * spec.value_dim

        def weight(rows: int, columns: int) -> Tensor:
            return normal(rows, columns, scale=columns**-0.5)

        self.weights = LatentWeights(
            norm=normal(spec.hidden, scale=0.3, mean=1.0),
            q=weight(spec.heads * (spec.nope_dim + spec.rope_dim), spec.hidden),
            kv_a=weight(spec.latent + spec.rope_dim, spec.hidden),
            kv_a_norm=normal(spec.latent, scale=0.3, mean=1.0),
            kv_b=weight(spec.heads * (spec.nope_dim + spec.value_dim), spec.latent),
            o=weight(spec.hidden, inner),
        )
        self.x = normal(batch, spec.hidden)
        self.cache = normal(batch, (length // 64 + 1) * 64, spec.latent + spec.rope_dim)
        self.cos, self.sin = angles(length, spec.rope_dim // 2, batch, self.x)
        self.lengths = torch.full((batch,), length, dtype=torch.int32, device=self.x.device)
        self.slot = torch.full((1,), length, device=self.x.device)
        cache = batch * length * self.cache.shape[2]
        self.moved = 2 * (sum(w.numel() for w in vars(self.weights).values() if w is not None) + cache)

    def unfused(self, step: Callable[..., Tensor]) -> Callable[[], Tensor]:
        """See :class:`Layer`."""
        return partial(step, self.x, self.weights, self.cos, self.sin, self.cache, self.slot, self.spec, self.length)

    def fused(self, name: str) -> Callable[[], Tensor]:
        """See :class:`Layer`."""
        old, new = self._parts(self.cache), self._parts(self.cache[:, self.length])
        if name == "torch":
            block: Callable[..., Tensor] = partial(latent_block, blocks=0)
        else:
            from ygglight.kernels.cluster_decode import cluster_mla

            block = partial(cluster_mla.launch, blocks=int(name.removeprefix("cluster-")))
        return partial(block, self.x, self.weights, self.spec, self.cos, self.sin, *old, self.lengths, *new)

    def _parts(self, cache: Tensor) -> States:
        return cache[..., : self.spec.latent], cache[..., self.spec.latent :]

    def appended(self) -> States:
        """See :class:`Layer`."""
        return self._parts(self.cache[:, self.length].clone())

    def exact(self) -> States:
        """See :class:`Layer`."""
        old, new = self._parts(self.cache.float()), self._parts(torch.empty_like(self.cache[:, 0]).float())
        angle = self.cos.float(), self.sin.float()
        weights = widened(self.weights)
        return latent_block_reference(self.x.float(), weights, self.spec, *angle, *old, self.lengths, *new), *new


def latent_step(
    x: Tensor, weights: LatentWeights, cos: Tensor, sin: Tensor, cache: Tensor, slot: Tensor, spec: LatentSpec,
    length: int,
) -> Tensor:  # fmt: skip
    """The layer in plain torch, absorbed: heads are rows of products over one cache, as keys and as values."""
    batch = len(x)
    normed = rms(x, weights.norm, spec.eps)
    query = F.linear(normed, weights.q).view(batch, spec.heads, -1)
    query_nope, query_rope = query.split([spec.nope_dim, spec.rope_dim], dim=-1)
    latent, key_rope = F.linear(normed, weights.kv_a).split([spec.latent, spec.rope_dim], dim=-1)
    latent = rms(latent, weights.kv_a_norm, spec.latent_eps)
    key_rope, query_rope = _turn_pairs(key_rope, cos, sin), _turn_pairs(query_rope, cos[:, None], sin[:, None])
    cache.index_copy_(1, slot, torch.cat((latent, key_rope), -1)[:, None])
    up, down = split_kv_b(weights.kv_b, spec)
    wide = torch.cat((torch.einsum("bhn,hnl->bhl", query_nope, up), query_rope), -1)
    seen = cache[:, : length + 1]
    chances = torch.softmax((wide @ seen.mT).float() * spec.scale, -1).to(x.dtype)
    attended = torch.einsum("bhl,hvl->bhv", chances @ seen[..., : spec.latent], down)
    return F.linear(attended.flatten(1), weights.o)


def _turn_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((first * cos - second * sin, second * cos + first * sin), -1).flatten(-2)


def angles(position: int, pairs: int, batch: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine ``[batch, pairs]`` of a position, in the dtype and on the device of a tensor."""
    turned = position * 10000.0 ** -(torch.arange(pairs) / pairs)
    both = (part.to(like).expand(batch, -1).contiguous() for part in (turned.cos(), turned.sin()))
    cos, sin = both
    return cos, sin


def widened(weights: Any) -> Any:
    """Weights in float32."""
    tensors = {f.name: getattr(weights, f.name) for f in fields(weights)}
    return replace(weights, **{name: t.float() for name, t in tensors.items() if t is not None})
