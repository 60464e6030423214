"""The reference of the decode block against a straightforward attention layer, and what its checks refuse."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ygglight.kernels.cluster_decode import BlockSpec, decode_block, decode_block_reference
from ygglight.kernels.cluster_decode.testing import Block, make_block, make_spec
from ygglight.kernels.testing import rms_ratio

GQA = make_spec(4, 2, 16, 24)


def norm(x: Tensor, weight: Tensor, spec: BlockSpec) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight + spec.norm_offset, spec.eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, spec: BlockSpec) -> Tensor:
    """By complex numbers: one pair after the other."""
    result, half = x.clone(), spec.rotary_dim // 2
    for i in range(half):
        one, two = (2 * i, 2 * i + 1) if spec.interleaved_rope else (i, i + half)
        turned = torch.complex(x[:, one], x[:, two]) * torch.complex(cos[i], sin[i])
        result[:, one], result[:, two] = turned.real, turned.imag
    return result


def straightforward(block: Block) -> Tensor:
    """One sequence at a time, one head at a time, without the block's tricks; float64."""
    spec, weights, inputs = block.spec, block.weights, block.inputs
    outputs = []
    for row, length in enumerate(inputs["lengths"].tolist()):
        x = norm(inputs["x"][row], weights.norm, spec)
        q, k, v = (
            F.linear(x, getattr(weights, name), getattr(weights, f"{name}_bias")).view(-1, spec.head_dim)
            for name in "qkv"
        )
        if spec.qk_norm:
            q, k = norm(q, weights.q_norm, spec), norm(k, weights.k_norm, spec)  # type: ignore[arg-type]
        q, k = (rotate(each, inputs["cos"][row], inputs["sin"][row], spec) for each in (q, k))
        mask = inputs.get("mask")
        heads = []
        for head in range(spec.heads):
            own = head // spec.group
            slots = list(range(length) if spec.window is None else range(max(0, length - spec.window + 1), length))
            added = torch.zeros(len(slots) + 1, dtype=x.dtype)
            if mask is not None and mask.dtype is torch.bool:
                slots = [slot for slot in slots if mask[row % len(mask), slot]]
                added = added[: len(slots) + 1]
            elif mask is not None:
                added[:-1] = mask[row % len(mask), slots]
            keys = torch.cat((inputs["keys"][row, own, slots], k[own : own + 1]))
            values = torch.cat((inputs["values"][row, own, slots], v[own : own + 1]))
            scores = keys @ q[head] * spec.scale
            if spec.softcap is not None:
                scores = spec.softcap * torch.tanh(scores / spec.softcap)
            heads.append(torch.softmax(scores + added, 0) @ values)
        outputs.append(F.linear(torch.cat(heads), weights.o, weights.o_bias))
    return torch.stack(outputs)


CASES: dict[str, tuple[BlockSpec, list[int], dict[str, Any]]] = {
    "context 0": (GQA, [0], {}),
    "context 1": (GQA, [1], {}),
    "batch": (GQA, [0, 9, 4], {"bias": True}),
    "mha": (make_spec(3, 3, 10, 24), [7], {}),
    "norm of heads, offset": (replace(GQA, qk_norm=True, norm_offset=1.0), [7], {}),
    "interleaved": (replace(GQA, interleaved_rope=True), [7], {}),
    "interleaved, partial": (replace(GQA, interleaved_rope=True, rotary_dim=6), [7], {}),
    "partial": (replace(GQA, rotary_dim=6), [7], {}),
    "no rotary": (replace(GQA, rotary_dim=0), [7], {}),
    "window": (replace(GQA, window=4), [9, 2], {}),
    "softcap": (replace(GQA, softcap=0.7), [9], {}),
    "mask": (GQA, [9, 6], {"mask": "bool"}),
    "added mask": (replace(GQA, softcap=0.7), [9, 6], {"mask": "added"}),
    "in place": (GQA, [0, 9], {"in_place": True, "slots": 10}),
}


@pytest.mark.parametrize("name", list(CASES))
def test_same_as_a_straightforward_layer(name: str) -> None:
    spec, lengths, options = CASES[name]
    block = make_block(spec, lengths, dtype=torch.float64, **options)
    output, keys, values = block.run(decode_block_reference)
    assert rms_ratio(output, straightforward(block)) < 1e-12
    assert not keys.isnan().any() and not values.isnan().any()
    for dtype, ratio in ((torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)):
        rough = make_block(spec, lengths, dtype=dtype, **options)
        exact = rough.to(torch.float64).run(decode_block_reference)
        for one, other in zip(rough.run(decode_block_reference), exact, strict=True):
            assert one.dtype is dtype and rms_ratio(one, other) < ratio


def test_the_comparison_can_fail() -> None:
    block = make_block(replace(GQA, window=4), [9], dtype=torch.float64)
    for change in ({"window": 5}, {"interleaved_rope": True}, {"softcap": 3.0}, {"norm_offset": 1.0}, {"scale": 0.3}):
        other = Block(replace(block.spec, **change), block.weights, block.inputs)
        assert rms_ratio(other.run(decode_block_reference)[0], straightforward(block)) > 1e-3, change


def test_the_public_function_is_the_reference_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YGGLIGHT_KERNELS", "reference")
    block = make_block(GQA, [5])
    assert all(map(torch.equal, block.run(decode_block), block.run(decode_block_reference)))


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("x", {"x": torch.zeros(1, 23)}, "one new token a sequence"),
    ("dtype of x", {"x": torch.zeros(1, 24, dtype=torch.complex64)}, "cast it to float16"),
    ("another dtype", {"x": torch.zeros(1, 24, dtype=torch.float64)}, "cast them to one dtype"),
    ("cos", {"cos": torch.zeros(2, 16)}, "one row a sequence"),
    ("strides of sin", {"sin": torch.zeros(16, 1).t().expand(1, 16)[:, ::1].repeat(1, 2)[:, ::2]}, "contiguous"),
    ("keys", {"keys": torch.zeros(1, 3, 6, 16)}, "the cache's view"),
    ("values", {"values": torch.zeros(1, 2, 5, 16)}, "the same shape"),
    ("lengths", {"lengths": torch.zeros(1, dtype=torch.int64)}, "int32"),
    ("mask", {"mask": torch.zeros(1, 5, dtype=torch.bool)}, "one column a slot"),
    ("dtype of the mask", {"mask": torch.zeros(1, 6, dtype=torch.uint8)}, "give bool"),
    ("slots", {"slots": torch.zeros(2, dtype=torch.int64)}, "one a sequence"),
    ("a gradient", {"x": torch.zeros(1, 24, requires_grad=True)}, "no backward pass"),
]


@pytest.mark.parametrize(("change", "words"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
def test_wrong_inputs_are_refused(change: dict[str, Any], words: str) -> None:
    block = make_block(GQA, [5])
    new = (
        {} if "slots" not in change else {"new_keys": torch.zeros(1, 2, 6, 16), "new_values": torch.zeros(1, 2, 6, 16)}
    )
    with pytest.raises(ValueError, match=words):
        Block(GQA, block.weights, block.inputs | change).run(_with(decode_block, new))


def _with(function: Any, new: dict[str, Tensor]) -> Any:
    return lambda **named: function(**(named | new))


def test_wrong_weights_are_refused() -> None:
    block = make_block(GQA, [5], bias=True)
    for change, words in (
        ({"q": torch.zeros(63, 24)}, "the spec makes them"),
        ({"k": torch.zeros(24, 32).t()}, "contiguous"),
        ({"v_bias": torch.zeros(32, dtype=torch.float16)}, "cast them to one dtype"),
        ({"q_norm": torch.ones(16)}, "neither without it"),
    ):
        with pytest.raises(ValueError, match=words):
            Block(GQA, replace(block.weights, **change), block.inputs).run(decode_block)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"kv_heads": 3}, "multiple"), ({"rotary_dim": 7}, "even"), ({"rotary_dim": 18}, "even"),
     ({"window": 0}, "window"), ({"softcap": -1.0}, "softcap"), ({"eps": -1.0}, "eps"), ({"heads": 0}, "positive")],
)  # fmt: skip
def test_wrong_specs_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(GQA, **change)
