"""What the attention half of a decoder layer is: sizes and switches, and the layer's weights by reference."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class BlockSpec:
    """Sizes and switches of one block: norm, query/key/value projection, rotary, attention, output projection.

    Args:
        hidden: size of the residual stream.
        heads: query heads.
        kv_heads: key and value heads; query heads are a multiple of them.
        head_dim: size of a head.
        eps: of every RMSNorm of the block.
        scale: of the scores.
        rotary_dim: leading elements of a head that are rotated, an even number; 0 for none.
        norm_offset: what RMSNorm adds to its weights before it multiplies by them; 1 in Gemma.
        qk_norm: RMSNorm over each head of queries and keys before the rotary embedding (Qwen3, Gemma 3).
        window: tokens that the new one attends to, itself among them, counted in slots; None for all.
        softcap: scores become ``softcap * tanh(scores / softcap)`` (Gemma 2, arXiv:2408.00118).
        interleaved_rope: elements 2i and 2i + 1 are rotated together (GPT-J), not i and i + rotary_dim / 2 (NeoX).
    """

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    scale: float
    rotary_dim: int
    norm_offset: float = 0.0
    qk_norm: bool = False
    window: int | None = None
    softcap: float | None = None
    interleaved_rope: bool = False

    def __post_init__(self) -> None:
        """Refuses what no implementation could compute."""
        sizes = (self.hidden, self.heads, self.kv_heads, self.head_dim)
        if min(sizes) < 1:
            raise ValueError(f"hidden, heads, kv_heads and head_dim are {sizes}: give positive numbers")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads, {self.kv_heads} kv_heads: heads must be a multiple of kv_heads")
        if self.rotary_dim % 2 or not 0 <= self.rotary_dim <= self.head_dim:
            raise ValueError(f"rotary_dim={self.rotary_dim}: give an even number from 0 to head_dim={self.head_dim}")
        if not self.eps >= 0:
            raise ValueError(f"eps={self.eps}: give the norm's epsilon, 0 or more")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window}: give a number of tokens above 0, or None for no window")
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap={self.softcap}: give a number above 0, or None for no cap")

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.heads // self.kv_heads

    @property
    def rows(self) -> int:
        """Rows of the query, key and value projections together."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim


@dataclass(frozen=True)
class BlockWeights:
    """The weights of one block: the model's own tensors, or views of them, never copies.

    Args:
        norm: ``[hidden]``.
        q: ``[heads * head_dim, hidden]``. k: ``[kv_heads * head_dim, hidden]``. v: the same.
        o: ``[output size, heads * head_dim]``.
        q_bias: One number a row of ``q``, or None; so are k_bias, v_bias and o_bias.
        q_norm: ``[head_dim]``, with ``BlockSpec.qk_norm``. k_norm: the same.
    """

    norm: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    o_bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
