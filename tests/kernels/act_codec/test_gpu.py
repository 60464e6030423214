"""On a real GPU: the kernels write the twin's bytes and decode to the twin's values, at sizes of many programs."""

import pytest
import torch

from ygglight.kernels.act_codec import INT4, INT8, MASK, CodecSpec, pack, reference, reference_mask, unpack

pytestmark = pytest.mark.gpu

SPECS = [INT4, INT8, CodecSpec("int4", 64, 1, False), CodecSpec("int8", 256, 2)]


@pytest.mark.parametrize("numel", [1, 127, 128 * 33, 1_000_003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_same_bytes_as_the_twin(spec, dtype, numel):
    x = (torch.randn(numel) * torch.rand(numel).mul(6).exp()).to(dtype)
    packed, expected = pack(x.cuda(), spec, 7), reference.pack(x, spec, 7)
    for ours, theirs in zip(packed.tensors(), expected.tensors(), strict=True):
        assert torch.equal(ours.cpu().view(torch.uint8), theirs.view(torch.uint8))
    assert torch.equal(unpack(packed).cpu(), reference.unpack(expected))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16])
def test_mask_same_bytes_as_the_twin(dtype):
    x = (torch.rand(1_000_003) > 0.9).to(dtype)
    x = x if dtype is torch.bool else x * 1.125
    packed, expected = pack(x.cuda(), MASK, 0), reference_mask.pack(x)
    assert torch.equal(packed.code.cpu(), expected.code)
    assert torch.equal(unpack(packed).cpu(), x)


def test_nothing_is_allocated_beside_the_payload():
    x = torch.randn(1 << 22, device="cuda", dtype=torch.bfloat16)
    kept = pack(x, INT4, 1)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    again = pack(x, INT4, 2)
    # The allocator rounds each of the five payload tensors up to 512 bytes.
    assert torch.cuda.max_memory_allocated() - before <= again.nbytes + 5 * 512
    assert kept.nbytes == again.nbytes


def test_non_finite_groups():
    x = torch.randn(1024, device="cuda")
    x[3], x[200:204] = torch.nan, torch.inf
    decoded = unpack(pack(x, INT4, 1))
    assert decoded[3].isnan()
    assert decoded[:128].isnan().sum() == 1
    assert decoded[128:256].isnan().sum() >= 126
    assert decoded[256:].isfinite().all()
