"""Decoder layers of multi-head latent attention (DeepSeek-V2 and V3): recognised by their parts, as in `recognise`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, get_args

from torch import Tensor, nn

from ygglight.engines.decode.recognise import NotFusable, check_weights, child, linear, norm_kind, refuse_altered
from ygglight.kernels.cluster_decode.mla import LatentSpec, LatentWeights, Rotary

_PARTS = ("q_proj", "q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj",
          "o_proj")  # fmt: skip


@dataclass(frozen=True)
class LatentParts:
    """The attention half of a decoder layer whose cache holds one latent a token, as key, and one rotated key part.

    Args:
        norm: RMSNorm in front. attention: with projections of plain linear layers.
        spec: What they compute; its rotary embedding is a guess until the layer was run.
    """

    norm: nn.Module
    attention: nn.Module
    spec: LatentSpec

    def modules(self) -> Iterator[nn.Module]:
        """All modules whose forward the block replaces."""
        yield self.norm
        yield from self.attention.modules()

    def weights(self) -> LatentWeights:
        """The layer's own parameters as they are now (a module may have been moved), by identity."""
        attention: Any = self.attention
        norm: Any = self.norm
        first = getattr(attention, "q_a_proj", None)
        queries = attention.q_proj if first is None else attention.q_b_proj
        return LatentWeights(
            norm.weight, queries.weight, attention.kv_a_proj_with_mqa.weight, attention.kv_a_layernorm.weight,
            attention.kv_b_proj.weight, attention.o_proj.weight,
            q_a=None if first is None else first.weight,
            q_a_norm=None if first is None else attention.q_a_layernorm.weight,
            q_a_bias=None if first is None else first.bias,
            kv_a_bias=attention.kv_a_proj_with_mqa.bias, o_bias=attention.o_proj.bias,
        )  # fmt: skip

    def angles(self, embeddings: Any, spec: Any) -> tuple[Tensor, Tensor] | None:
        """Cosine and sine ``[B or 1, 1, rope_dim / 2]`` of the new token's pairs, or None where there are no such.

        Args:
            embeddings: What the model gives its layers: complex numbers (V2), or cosine and sine with each pair twice.
            spec: one of the candidates.
        """
        half = self.spec.rope_dim // 2
        if isinstance(embeddings, Tensor) and embeddings.is_complex() and embeddings.shape[-1] == half:
            return embeddings.real, embeddings.imag
        if isinstance(embeddings, tuple) and len(embeddings) == 2 and embeddings[0].shape[-1] == 2 * half:
            return embeddings[0][..., :half], embeddings[1][..., :half]
        return None

    def candidates(self, embeddings: Any) -> list[LatentSpec]:
        """The spec with each rotary embedding that the layer may have.

        Args:
            embeddings: See :meth:`angles`.
        """
        if isinstance(embeddings, Tensor):  # complex numbers multiply neighbours, which stay where they are
            return [replace(self.spec, rotary="pairs")]
        return [replace(self.spec, rotary=kind) for kind in get_args(Rotary)]

    def fits(self, keys: Tensor, values: Tensor) -> bool:
        """Whether a cache holds latents, and not what they were expanded to.

        Args:
            keys: ``[B, heads, C, size]``. values: the same of another size.
        """
        return keys.shape[1::2] == (1, self.spec.latent) and values.shape[1::2] == (1, self.spec.rope_dim)

    def cached(self, states: Tensor) -> Tensor:
        """A cache's keys or values ``[B, 1, C, size]`` as the block takes them.

        Args:
            states: Latents or rotated key parts.
        """
        return states[:, 0]

    def new(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Memory for the new token's key and value, as the block writes them.

        Args:
            hidden: ``[B, 1, hidden]``.
        """
        batch = len(hidden)
        return hidden.new_empty(batch, self.spec.latent), hidden.new_empty(batch, self.spec.rope_dim)

    def states(self, new: Tensor) -> Tensor:
        """What :meth:`new` gave, written, as a cache takes it: ``[B, 1, 1, size]``.

        Args:
            new: Latents or rotated key parts.
        """
        return new[:, None, None]


def is_latent(layer: nn.Module) -> bool:
    """Whether a decoder layer has latent attention, by its parts; whether it can run fused is another question.

    Args:
        layer: One of a model's decoder layers.
    """
    attention = getattr(layer, "self_attn", None)
    return hasattr(attention, "kv_a_proj_with_mqa") and hasattr(attention, "kv_b_proj")


def recognise_latent(layer: nn.Module) -> LatentParts:
    """Reads the make of a decoder layer from its modules; all sizes follow from shapes. Reads a few numbers.

    Args:
        layer: Of any model that names its modules as DeepSeek-V2 does.

    Raises:
        NotFusable: it is made otherwise, or adapters, quantisation or hooks are in the way.
    """
    norm, attention = child(layer, "input_layernorm"), child(layer, "self_attn")
    name, scale = type(attention).__name__, getattr(attention, "scaling", None)
    others = [each for each, _ in attention.named_children() if each not in _PARTS]
    # An indexer picks which tokens are attended to, which a short trial does not show. Where it is there and None, the
    # layer goes by what an earlier one has picked (GLM-5).
    if hasattr(attention, "indexer") and "indexer" not in others:
        others.append("indexer")
    if others:
        raise NotFusable(f"{name} has more than latent attention: {', '.join(others)}")
    if not isinstance(scale, float):
        raise NotFusable(f"{name} names no scaling")
    first, queries = _queries_of(attention)
    a_norm = None if first is None else child(attention, "q_a_layernorm")
    kv_a, kv_b = (linear(attention, each) for each in ("kv_a_proj_with_mqa", "kv_b_proj"))
    output, kv_norm = linear(attention, "o_proj"), child(attention, "kv_a_layernorm")
    if queries.bias is not None or kv_b.bias is not None:
        raise NotFusable(f"{name} has a bias behind a latent, which the block has no place for")
    latent = kv_b.in_features
    rope, nope_rows = kv_a.out_features - latent, kv_b.out_features - output.in_features
    heads = (queries.out_features - nope_rows) // rope if rope > 0 else 0
    rows = (queries.out_features, kv_b.out_features, output.in_features)
    whole = heads > 0 and rope % 2 == 0 and nope_rows > 0 and not any(size % heads for size in (nope_rows, *rows))
    if not whole or heads * rope + nope_rows != queries.out_features:
        raise NotFusable(f"{name} has {rows} rows and {kv_a.out_features} of latents, which make no heads")
    for module in (layer, attention):
        refuse_altered(module, type(module).__name__)
    linears = [each for each in (first, queries, kv_a, kv_b, output) if each is not None]
    check_weights(name, [norm, *([] if a_norm is None else [a_norm]), kv_norm, *linears])
    eps, offset = norm_kind(norm, kv_a.in_features)
    inner = [norm_kind(kv_norm, latent)]
    if a_norm is not None and first is not None:
        inner.append(norm_kind(a_norm, first.out_features))
    if {offset, *(each[1] for each in inner)} != {0.0} or len(set(inner)) != 1:
        raise NotFusable(f"the norms of {name} have an offset, or two epsilons for latents")
    spec = LatentSpec(
        kv_a.in_features, heads, nope_rows // heads, rope, output.in_features // heads, latent, eps, inner[0][0], scale
    )
    return LatentParts(norm, attention, spec)


def _queries_of(attention: nn.Module) -> tuple[nn.Linear | None, nn.Linear]:
    """The projection to a query latent, if there is one, and that to queries."""
    if getattr(attention, "q_a_proj", None) is None:
        return None, linear(attention, "q_proj")
    return linear(attention, "q_a_proj"), linear(attention, "q_b_proj")
