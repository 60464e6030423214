"""The torch twin against products by hand, and what wrong inputs say."""

import pytest
import torch
from torch.nn import functional

from ygglight.kernels.expert_gemm import Int4Weight, expert_mlp, expert_mlp_int4, pack_codes, unpack_codes
from ygglight.kernels.testing import poisoned_empty, rms_ratio


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) / shape[-1] ** 0.5


EXPERTS = torch.tensor([3, 0, -1, 3, 1, 3, 0])


def by_hand(x, experts, gate_up, down, activate, biases=None):
    rows = []
    for row, expert in zip(x, experts.tolist(), strict=True):
        if expert < 0:
            rows.append(torch.zeros_like(row))
            continue
        inner = gate_up[expert] @ row + (0 if biases is None else biases[0][expert])
        rows.append(down[expert] @ activate(inner[None])[0] + (0 if biases is None else biases[1][expert]))
    return torch.stack(rows)


def silu_gate(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up


def alternating(gate_up):
    return gate_up[..., ::2].tanh() * (gate_up[..., 1::2] + 1)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("name", "activate"), [("silu", silu_gate), (alternating, alternating)])
def test_rows_go_through_their_expert(name, activate, transposed, biased):
    x, gate_up, down = normal(7, 16, seed=1), normal(4, 24, 16), normal(4, 16, 12)
    biases = (normal(4, 24), normal(4, 16)) if biased else None
    stacks = [stack.mT.contiguous() if transposed else stack for stack in (gate_up, down)]
    with poisoned_empty():
        actual = expert_mlp(x, EXPERTS, *stacks, activation=name, biases=biases, transposed=transposed)
    expected = by_hand(x, EXPERTS, gate_up, down, activate, biases)
    assert rms_ratio(actual, expected) < 1e-6
    assert (actual[2] == 0).all()
    wrong = by_hand(x, EXPERTS.clamp(min=0), gate_up.roll(1, 0), down, activate, biases)
    assert rms_ratio(wrong, expected) > 0.1
    if not biased:
        assert not torch.equal(actual, expert_mlp(x, EXPERTS, *stacks, activation="gelu", transposed=transposed))


def test_experts_may_lie_in_slabs():
    """Views with gaps of NaN between experts give the same bits as stacks of their own."""
    x, gate_up, down = normal(7, 16, seed=1), normal(4, 24, 16), normal(4, 16, 12)
    slabs = torch.full((4, 1024), torch.nan)
    views = [slabs[:, 64 : 64 + 384].unflatten(1, (24, 16)), slabs[:, 512 : 512 + 192].unflatten(1, (16, 12))]
    views[0].copy_(gate_up), views[1].copy_(down)
    assert torch.equal(*(expert_mlp(x, EXPERTS, *pair, activation="silu") for pair in (views, (gate_up, down))))


@pytest.mark.parametrize("group", [32, 64])
def test_codes_of_four_bits(group):
    codes = torch.randint(0, 16, (3, 5, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    packed = pack_codes(codes, group)
    assert packed.shape == (3, 5, 64) and torch.equal(unpack_codes(packed, group), codes)
    scale = torch.rand(3, 5, 128 // group).bfloat16()
    weight = Int4Weight(packed, scale)
    expected = (codes[1].double() - 8) * scale[1].double().repeat_interleave(group, -1)
    assert torch.equal(weight.dequantize(1, torch.float64), expected)
    assert weight.shape == (3, 5, 128) and weight.group == group and weight.nbytes == 3 * 5 * (64 + 2 * 128 // group)


def test_int4_is_the_product_with_its_weights():
    weights = []
    for rows, columns in ((128, 64), (64, 64)):
        codes = torch.randint(0, 16, (4, rows, columns), dtype=torch.uint8)
        weights.append(Int4Weight(pack_codes(codes, 32), torch.rand(4, rows, columns // 32).bfloat16() / 8))
    x = normal(7, 64)
    wide = [torch.stack([weight.dequantize(e, torch.float32) for e in range(4)]) for weight in weights]
    actual = expert_mlp_int4(x, EXPERTS, *weights, activation="silu")
    assert torch.equal(actual, expert_mlp(x, EXPERTS, *wide, activation="silu"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(7, 8)}, "sizes do not fit"),
        ({"x": torch.zeros(7, 16, dtype=torch.float16)}, "cast x"),
        ({"x": torch.zeros(0, 16), "experts": EXPERTS[:0]}, "at least one"),
        ({"experts": EXPERTS[:3]}, "one int32 or int64 a row"),
        ({"experts": EXPERTS.float()}, "one int32 or int64 a row"),
        ({"gate_up": torch.zeros(24, 16)}, "stack of matrices"),
        ({"down": torch.zeros(4, 16, 24)}, "halves them"),
        ({"down": torch.zeros(3, 16, 12)}, "sizes do not fit"),
        ({"activation": "relu"}, "'silu', 'gelu' or a function"),
        ({"biases": (torch.zeros(4, 23), torch.zeros(4, 16))}, "first bias"),
        ({"x": torch.zeros(7, 16, requires_grad=True)}, "no backward pass"),
        ({"gate_up": torch.zeros(4, 24, 16, device="meta")}, "several devices"),
    ],
)
def test_wrong_inputs(change, message):
    inputs = {"x": normal(7, 16), "experts": EXPERTS, "gate_up": normal(4, 24, 16), "down": normal(4, 16, 12)}
    with pytest.raises(ValueError, match=message):
        expert_mlp(**inputs | {"activation": "silu"} | change)
