"""Random blocks for tests and benchmarks, as named arguments of `decode_block`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ygglight.kernels.cluster_decode.spec import BlockSpec, BlockWeights


def cast_weights(model: Any, dtype: torch.dtype) -> Any:
    """A model's weights in another dtype, in place; buffers stay: rotary frequencies are in float32 in any model.

    Args:
        model: Any module. dtype: Of its parameters.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def make_spec(heads: int, kv_heads: int, head_dim: int, hidden: int, **changes: Any) -> BlockSpec:
    """A Llama-like block.

    Args:
        heads: See :class:`BlockSpec`, as for kv_heads, head_dim and hidden. **changes: other fields of it.
    """
    plain = BlockSpec(hidden, heads, kv_heads, head_dim, eps=1e-5, scale=head_dim**-0.5, rotary_dim=head_dim)
    return replace(plain, **changes)


@dataclass(frozen=True)
class Block:
    """The arguments of one call. What must not be read (slots beyond the length, room for the new token) is NaN.

    Args:
        spec: Of the block. weights: its weights.
        inputs: The other arguments of `decode_block` by name, ``new_keys`` and ``new_values`` not among them.
    """

    spec: BlockSpec
    weights: BlockWeights
    inputs: dict[str, Tensor]

    def run(self, function: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Output, new keys and new values ``[B, kv_heads, head_dim]`` of a function in the form of `decode_block`.

        Args:
            function: `decode_block`, its reference or a launch. **options: of it.
        """
        slots, rows = self.inputs.get("slots"), torch.arange(len(self.inputs["x"]))
        if slots is None:
            shape = (len(rows), self.spec.kv_heads, self.spec.head_dim)
            fresh = torch.full((2, *shape), torch.nan, dtype=self.inputs["x"].dtype, device=self.inputs["x"].device)
            new_keys, new_values = fresh.unbind()
            output = function(
                weights=self.weights, spec=self.spec, new_keys=new_keys, new_values=new_values, **self.inputs, **options
            )
            return output, new_keys, new_values
        caches = {name: self.inputs[name].clone() for name in ("keys", "values")}
        named = self.inputs | caches | {"new_keys": caches["keys"], "new_values": caches["values"]}
        output = function(weights=self.weights, spec=self.spec, **named, **options)
        return output, *(cache[rows, :, slots] for cache in caches.values())

    def to(self, *args: Any) -> Block:
        """The same on another device or in another dtype; lengths, slots and boolean masks keep theirs.

        Args:
            *args: of `Tensor.to`.
        """

        def moved(tensor: Tensor | None) -> Tensor | None:
            if tensor is None or (isinstance(args[0], torch.dtype) and not tensor.is_floating_point()):
                return tensor
            return tensor.to(*args)

        weights = BlockWeights(**{name: moved(tensor) for name, tensor in vars(self.weights).items()})  # type: ignore[arg-type]
        inputs = {name: moved(tensor) for name, tensor in self.inputs.items()}
        return Block(self.spec, weights, inputs)  # type: ignore[arg-type]


def make_block(
    spec: BlockSpec,
    lengths: list[int],
    *,
    slots: int | None = None,
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
    mask: str | None = None,
    in_place: bool = False,
    seed: int = 0,
) -> Block:
    """Random weights of the size that models have, so that outputs are about 1, and a random cache.

    Args:
        spec: Of the block. lengths: committed tokens of each sequence. slots: of the cache; default: the longest
            length and one more. dtype: of all tensors. bias: on all four projections.
        mask: None, "bool" (a third of the slots hidden) or "added". in_place: write to the cache, behind the length.
        seed: of the numbers.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    batch, count = len(lengths), max(lengths) + 1 if slots is None else slots
    queries, states = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    small = spec.hidden**-0.5
    weights = BlockWeights(
        norm=normal(spec.hidden, scale=0.3) + (1 - spec.norm_offset),
        q=normal(queries, spec.hidden, scale=small),
        k=normal(states, spec.hidden, scale=small),
        v=normal(states, spec.hidden, scale=small),
        o=normal(spec.hidden, queries, scale=queries**-0.5),
        **{
            f"{name}_bias": normal(rows)
            for name, rows in zip("qkvo", (queries, states, states, spec.hidden), strict=True)
        }
        if bias
        else {},
        **{name: normal(spec.head_dim, scale=0.3) + 1 for name in ("q_norm", "k_norm")} if spec.qk_norm else {},
    )
    frequency = 10000.0 ** -(torch.arange(0, spec.rotary_dim, 2) / max(1, spec.rotary_dim))
    angles = (torch.tensor(lengths)[:, None] * frequency).repeat(1, 2)
    # As models hold them, heads before slots, with room between the sequences.
    room = normal(batch, 2, spec.kv_heads, count, spec.head_dim)
    for row, length in zip(room, lengths, strict=True):
        row[:, :, length:] = torch.nan
    inputs = {
        "x": normal(batch, spec.hidden, scale=2.0), "cos": angles.cos().to(dtype), "sin": angles.sin().to(dtype),
        "keys": room[:, 0], "values": room[:, 1], "lengths": torch.tensor(lengths, dtype=torch.int32),
    }  # fmt: skip
    if mask == "bool":
        inputs["mask"] = torch.rand(batch, count, generator=generator) < 0.67
    elif mask == "added":
        inputs["mask"] = normal(1, count).masked_fill(torch.rand(1, count, generator=generator) < 0.3, -1e4)
    if in_place:
        inputs["slots"] = torch.tensor(lengths)
    return Block(spec, weights, inputs)


def unfused_block(block: Block) -> Tensor:
    """The output of a block as a model computes it: each step in the dtype of the weights, in plain torch.

    Args:
        block: To run; its cache is not written.
    """
    spec, weights, given = block.spec, block.weights, block.inputs

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + spec.eps)
        return (wide * (weight.float() + spec.norm_offset)).to(x.dtype)

    def turn(x: Tensor) -> Tensor:
        half = spec.rotary_dim // 2
        cos, sin = given["cos"][:, None, :half], given["sin"][:, None, :half]
        turned, rest = x[..., : spec.rotary_dim], x[..., spec.rotary_dim :]
        if spec.interleaved_rope:
            first, second = turned[..., ::2], turned[..., 1::2]
            both = torch.stack((first * cos - second * sin, second * cos + first * sin), -1).flatten(-2)
        else:
            first, second = turned.chunk(2, dim=-1)
            both = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
        return torch.cat((both, rest), -1)

    x = norm(given["x"], weights.norm)
    query, key, value = (
        functional.linear(x, weight, bias).unflatten(-1, (-1, spec.head_dim))
        for weight, bias in (
            (weights.q, weights.q_bias), (weights.k, weights.k_bias), (weights.v, weights.v_bias),
        )
    )  # fmt: skip
    if weights.q_norm is not None and weights.k_norm is not None:
        query, key = norm(query, weights.q_norm), norm(key, weights.k_norm)
    query, key = turn(query), turn(key)
    rows = []
    for row, length in enumerate(given["lengths"].tolist()):
        seen = torch.ones(length, dtype=torch.bool, device=x.device)
        if spec.window is not None:
            seen[: max(0, length - spec.window + 1)] = False
        if "mask" in given:
            seen &= given["mask"][row, :length]
        keys, values = (
            torch.cat((given[name][row, :, :length][:, seen], new[row, :, None]), 1).repeat_interleave(spec.group, 0)
            for name, new in (("keys", key), ("values", value))
        )
        scores = (keys @ query[row, :, :, None])[..., 0] * spec.scale
        if spec.softcap is not None:
            scores = spec.softcap * torch.tanh(scores / spec.softcap)
        weighted = scores.softmax(-1, dtype=torch.float32).to(keys.dtype)
        rows.append((weighted[:, None] @ values).flatten())
    return functional.linear(torch.stack(rows), weights.o, weights.o_bias)


def count_wrong_replays(block: Block, launch: Callable[..., Tensor], *, rounds: int, **options: Any) -> int:
    """Elements in which replays of a CUDA graph differ from eager calls, while input, lengths and slots change.

    A wait for the device, or another stream, would be an error while the graph is recorded.

    Args:
        block: On CUDA, made in place and with room for the rounds; its cache, lengths and slots move on.
        launch: Of a path. rounds: How many replays. **options: Of the launch.
    """
    caches = {"new_keys": block.inputs["keys"], "new_values": block.inputs["values"]}
    arguments: dict[str, Any] = {"weights": block.weights, "spec": block.spec, **block.inputs, **caches, **options}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        launch(**arguments)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = launch(**arguments)
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    x, lengths, slots = (block.inputs[name] for name in ("x", "lengths", "slots"))
    for _ in range(rounds):
        x.copy_(torch.randn_like(x))
        graph.replay()
        wrong += (captured != launch(**arguments)).sum()
        lengths += 1
        slots += 1
    return int(wrong)
