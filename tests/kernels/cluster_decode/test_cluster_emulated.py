"""The cluster kernels' own source, run by `emulated.py`, against the reference."""

import dataclasses

import pytest
import torch

from ygglight.kernels.cluster_decode.emulated import LANGUAGE, Pointer, emulated
from ygglight.kernels.cluster_decode.reference import decode_block_reference
from ygglight.kernels.cluster_decode.testing import make_block, make_spec
from ygglight.kernels.testing import poisoned_empty, rms_ratio

# spec, lengths, blocks, shares, other arguments of make_block
CASES = {
    "one block": (make_spec(2, 2, 64, 128), [63], 1, 1, {}),
    "two blocks": (make_spec(4, 4, 64, 128), [300, 1], 2, 1, {"dtype": torch.bfloat16}),
    "nothing committed": (make_spec(4, 2, 64, 136), [0, 65], 4, 1, {"bias": True}),
    "head of 80, part of it rotated": (make_spec(4, 2, 80, 136, rotary_dim=32), [37, 0, 300], 4, 1, {"bias": True}),
    "interleaved, norm of heads, in place": (
        make_spec(4, 2, 96, 100, interleaved_rope=True, qk_norm=True, norm_offset=1.0), [3, 70], 8, 2,
        {"mask": "bool", "in_place": True},
    ),
    "group of seven, window, softcap": (
        make_spec(7, 1, 128, 300, window=40, softcap=5.0), [1000, 20], 4, 1, {"mask": "bool"},
    ),
    "group of eight in shares": (make_spec(8, 1, 128, 200, qk_norm=True), [129], 2, 4, {"dtype": torch.bfloat16}),
    "head of 256": (make_spec(2, 1, 256, 320, softcap=50.0, window=200), [513], 8, 1, {"in_place": True}),
    "no rotary": (make_spec(2, 2, 64, 64, rotary_dim=0), [5], 4, 1, {}),
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    """Two threads on tensors of a few KiB wait for each other most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(block, **options):
    with poisoned_empty():
        return block.run(emulated("cluster").launch, **options)


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_reference(name):
    spec, lengths, blocks, shares, rest = CASES[name]
    block = make_block(spec, lengths, **{"dtype": torch.float16} | rest)
    exact = block.to(torch.float64).run(decode_block_reference)
    rounded = block.run(decode_block_reference)
    actual = run(block, blocks=blocks, shares=shares)
    for got, expected, unfused in zip(actual, exact, rounded, strict=True):
        assert rms_ratio(got, expected) <= 1.5 * rms_ratio(unfused, expected)
    # The launch's own choice of cluster gives the same up to rounding.
    assert rms_ratio(run(block)[0], exact[0]) <= 1.5 * rms_ratio(rounded[0], exact[0])


@pytest.mark.parametrize("change", ["length", "rotary", "group", "eps"])
def test_a_wrong_block_is_found(change):
    """Controls: each is one slip of an index, and is far outside what the test above allows."""
    spec = make_spec(4, 2, 64, 128)
    block = make_block(spec, [70, 33], dtype=torch.float16)
    exact, rounded = block.to(torch.float64).run(decode_block_reference)[0], block.run(decode_block_reference)[0]
    if change == "length":
        wrong = dataclasses.replace(block, inputs=block.inputs | {"lengths": block.inputs["lengths"] - 1})
    elif change == "rotary":
        wrong = dataclasses.replace(block, spec=dataclasses.replace(spec, interleaved_rope=True))
    elif change == "group":
        weights = dataclasses.replace(block.weights, q=block.weights.q.roll(64, dims=0))
        wrong = dataclasses.replace(block, weights=weights)
    else:
        wrong = dataclasses.replace(block, spec=dataclasses.replace(spec, eps=0.1))
    assert rms_ratio(run(wrong, blocks=4)[0], exact) > 3 * rms_ratio(rounded, exact)


def test_same_bits_for_each_grid_order_and_batch():
    """A sequence's result does not depend on what else is in the batch."""
    spec = make_spec(4, 2, 64, 128)
    block = make_block(spec, [70, 33], dtype=torch.float16)
    both = run(block, blocks=4, shares=1)[0]
    for row in range(2):
        inputs = {name: tensor[row : row + 1] for name, tensor in block.inputs.items()}
        alone = run(dataclasses.replace(block, inputs=inputs), blocks=4, shares=1)[0]
        assert torch.equal(alone[0], both[row])


def test_any_strides_but_the_last():
    spec = make_spec(4, 2, 64, 128)
    block = make_block(spec, [70, 33], dtype=torch.float16)
    expected = run(block, blocks=4)
    turned = {n: block.inputs[n].transpose(1, 2).contiguous().transpose(1, 2) for n in ("keys", "values")}
    fused = torch.cat([block.weights.q, block.weights.k, block.weights.v])
    q, k, v = fused.split([256, 128, 128])
    weights = dataclasses.replace(block.weights, q=q, k=k, v=v)
    moved = dataclasses.replace(block, weights=weights, inputs=block.inputs | turned)
    assert all(map(torch.equal, run(moved, blocks=4), expected))
    bad = dataclasses.replace(block, weights=dataclasses.replace(weights, o=weights.o.T.contiguous().T))
    with pytest.raises(ValueError, match="the weights o have strides"):
        run(bad)
    with pytest.raises(ValueError, match="blocks=3"):
        run(block, blocks=3)


@pytest.mark.parametrize("blocks", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_collectives(blocks, dtype):
    collectives = emulated("collectives")
    x = torch.randn(2, blocks, 77, generator=torch.Generator().manual_seed(0)).to(dtype)
    with poisoned_empty():
        summed, largest = collectives.cluster_reduce_rows(x), collectives.cluster_reduce_rows(x, maximum=True)
        gathered = collectives.cluster_gather_rows(x)
    assert rms_ratio(summed, x.double().sum(1, keepdim=True).expand_as(x)) <= 1e-2
    assert torch.equal(largest, x.amax(1, keepdim=True).expand_as(x))
    assert torch.equal(gathered, x[:, None].expand(2, blocks, blocks, 77))


def test_the_emulation_finds_what_is_out_of_bounds():
    x = torch.arange(10.0)
    place = LANGUAGE.arange(0, 16)
    assert LANGUAGE.load(Pointer.to(x) + place, mask=place < 10, other=0.0)[9] == 9
    assert LANGUAGE.load(Pointer.to(x) + place, mask=place < 10)[10:].isnan().all()
    with pytest.raises(IndexError, match="6 of 16 places"):
        LANGUAGE.load(Pointer.to(x) + place)
    with pytest.raises(IndexError, match="1 of 11 places"):
        LANGUAGE.store(Pointer.to(x) + place, torch.zeros(16), mask=place < 11)
