"""torch's int4 product on this CPU against the twin, and its order of bytes undone."""

import pytest
import torch

from ygglight.kernels import _dispatch
from ygglight.kernels.expert_gemm import (
    CpuInt4Weight,
    Int4Weight,
    allocate,
    expert_mlp_int4,
    expert_mlp_int4_reference,
    pack_codes,
)
from ygglight.kernels.expert_gemm.cpu import has_product
from ygglight.kernels.testing import rms_ratio

needs_product = pytest.mark.skipif(not has_product(), reason="this torch or CPU has no fast int4 product")
# Bits of bfloat16 in rows, gate-up, activation and output: four roundings of 2**-9 at most.
RATIO = {torch.float32: 8e-3, torch.bfloat16: 8e-3}
EXPERTS = 3


def weights(shapes, groups, experts=EXPERTS):
    ours, theirs = [], allocate(experts, shapes, groups, "cpu")
    for (rows, columns), group, target in zip(shapes, groups, theirs, strict=True):
        codes = torch.randint(0, 16, (experts, rows, columns), dtype=torch.uint8)
        scale = ((torch.rand(experts, rows, columns // group) + 0.5) / 5 / columns**0.5).bfloat16()
        ours.append(Int4Weight(pack_codes(codes, group), scale))
        for expert, (packed, its_scale) in enumerate(ours[-1].read()):
            target.write(expert, packed, its_scale)
    return ours, theirs


@needs_product
@pytest.mark.parametrize("dtype", list(RATIO), ids=str)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("shapes", "groups"), [(((128, 128), (128, 64)), (128, 64)), (((64, 96), (96, 32)), (32, 32))])
def test_like_the_twin(shapes, groups, biased, dtype):
    torch.manual_seed(0)
    ours, theirs = weights(shapes, groups)
    assert all(isinstance(weight, CpuInt4Weight) for weight in theirs)
    experts = torch.tensor([2, 0, -1, 2, 2, 0])
    x = torch.randn(6, shapes[0][1], dtype=dtype)
    biases = tuple(torch.randn(EXPERTS, rows, dtype=dtype) for rows, _ in shapes) if biased else None
    wide = biases and tuple(bias.double() for bias in biases)
    actual = expert_mlp_int4(x, experts, *theirs, activation="silu", biases=biases)
    expected = expert_mlp_int4_reference(x.double(), experts, *ours, "silu", wide)
    assert actual.dtype is dtype and rms_ratio(actual, expected) < RATIO[dtype]
    assert (actual[2] == 0).all()
    moved = expert_mlp_int4_reference(x.double(), (experts + 1) % EXPERTS, *ours, "silu", wide)
    assert rms_ratio(actual[[0, 1, 3]], moved[[0, 1, 3]]) > 10 * RATIO[dtype]


@needs_product
def test_zeros_add_nothing_and_scales_multiply():
    """One product in bfloat16 of powers of two is exact: (code - 8) * scale, and nothing else."""
    weight = CpuInt4Weight.allocate(1, 16, 64, 32)
    codes = torch.arange(16, dtype=torch.uint8)[:, None].expand(16, 64)
    weight.write(0, pack_codes(codes, 32), torch.tensor([0.25, 2.0]).expand(16, 2).bfloat16())
    x = torch.zeros(2, 64, dtype=torch.bfloat16)
    x[0, 3], x[1, 40] = 1, 1
    levels = torch.arange(16.0) - 8
    assert torch.equal(weight.product(0, x).float(), torch.stack([levels * 0.25, levels * 2]))


@needs_product
@pytest.mark.parametrize("shape", [(16, 32), (48, 96), (208, 64), (112, 224)])
def test_bytes_come_back(shape):
    torch.manual_seed(1)
    rows, columns = shape
    ours, theirs = weights((shape, (columns, 32)), (32, 32), experts=2)
    for (packed, scale), (packed_back, scale_back) in zip(ours[0].read(), theirs[0].read(), strict=True):
        assert torch.equal(packed, packed_back) and torch.equal(scale, scale_back)
    assert theirs[0].shape == ours[0].shape == (2, rows, columns) and theirs[0].group == 32
    assert theirs[0].nbytes == ours[0].nbytes + 2 * rows * columns // 32 * 2


def test_falls_back(monkeypatch):
    assert isinstance(allocate(2, ((24, 64), (64, 32)), (64, 32), "cpu")[0], Int4Weight)  # 24 rows: no product for them
    monkeypatch.setenv(_dispatch.ENVIRONMENT_VARIABLE, "reference")
    assert isinstance(allocate(2, ((64, 64), (64, 32)), (64, 32), "cpu")[0], Int4Weight)
    monkeypatch.delenv(_dispatch.ENVIRONMENT_VARIABLE)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    first, second = allocate(2, ((64, 64), (64, 32)), (64, 32), "cpu")
    assert isinstance(first, Int4Weight) and isinstance(second, Int4Weight)


@needs_product
def test_two_orders_of_bytes_do_not_mix():
    ours, theirs = weights(((64, 64), (64, 32)), (32, 32))
    with pytest.raises(ValueError, match="different machines"):
        expert_mlp_int4(torch.zeros(1, 64), torch.tensor([0]), ours[0], theirs[1], activation="silu")
