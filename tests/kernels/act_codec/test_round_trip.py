"""The codecs' promises on a CPU: error bounds, exact outliers, exact sizes, non-finite values, odd lengths."""

import math

import pytest
import torch

from ygglight.kernels.act_codec import (
    INT4,
    INT8,
    MASK,
    PER_TENSOR_INT4,
    CodecSpec,
    bytes_moved,
    is_mask,
    pack,
    packed_nbytes,
    unpack,
    workspace_nbytes,
)
from ygglight.kernels.testing import poisoned_empty

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
AFFINE = [
    INT4,
    INT8,
    CodecSpec("int4", 128, 2, False),
    CodecSpec("int8", 64, 1, False),
    CodecSpec("int4", 32, 4),
    PER_TENSOR_INT4,
]
SIZES = [1, 2, 127, 128, 129, 4096 + 77]


def heavy_tailed(numel, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(numel, generator=generator) * (torch.rand(numel, generator=generator) * 4).exp()
    return x.to(dtype)


def error_bound(p, spec):
    """Per-element bound of A4, from the stored scales: quantum, fixed-point quotient, and the two roundings."""
    scale = p.scale.double().repeat_interleave(spec.block if spec.group else p.numel)[: p.numel]
    offset = p.offset.double().abs().repeat_interleave(spec.block if spec.group else p.numel)[: p.numel]
    size = offset + spec.levels * scale
    quantum = (1.0 if spec.stochastic else 0.5) + 2.0**-14
    return quantum * scale + torch.finfo(p.dtype).eps / 2 * size + 3 * 2.0**-24 * size + torch.finfo(p.dtype).tiny


@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", AFFINE, ids=str)
def test_error_stays_within_the_scale(spec, dtype, numel):
    x = heavy_tailed(numel, dtype)
    with poisoned_empty():
        p = pack(x, spec, 5)
        y = unpack(p)
    assert y.shape == x.shape and y.dtype == dtype
    assert p.nbytes == packed_nbytes(numel, dtype, spec)
    assert ((y.double() - x.double()).abs() <= error_bound(p, spec)).all()


def test_the_bound_can_fail():
    x = heavy_tailed(1024, torch.float32)
    p = pack(x, INT4, 5)
    y = unpack(pack(x, PER_TENSOR_INT4, 5))
    assert ((y.double() - x.double()).abs() > error_bound(p, INT4)).float().mean() > 0.3


@pytest.mark.parametrize("dtype", DTYPES)
def test_outliers_are_bitwise_exact(dtype):
    x = heavy_tailed(128 * 40, dtype)
    p = pack(x, INT4, 5)
    places = p.outlier_index.long() + torch.arange(40)[:, None] * 128
    assert torch.equal(unpack(p)[places], x[places])
    assert (places[:, 0] != places[:, 1]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_outliers_leave_the_smallest_range(dtype):
    spec = CodecSpec("int4", 16, 2, False)
    x = heavy_tailed(16 * 50, dtype, seed=4)
    rows = x.float().view(-1, 16).sort(1).values
    best = torch.stack([rows[:, 13] - rows[:, 0], rows[:, 14] - rows[:, 1], rows[:, 15] - rows[:, 2]]).amin(0)
    scale = pack(x, spec, 0).scale.float()
    # Rounded up to bfloat16: never smaller than the optimum, at most 2^-7 (and the 2^-16 margin) larger.
    assert (scale * 15 >= best).all()
    assert (scale * 15 <= best * (1 + 2**-7) * (1 + 2**-14)).all()


def test_outliers_with_ties():
    x = torch.zeros(128)
    x[[10, 20]], x[30] = 100.0, -1.0
    p = pack(x, INT4, 0)
    # Greedy removal takes -1 first, because taking one of two equal maxima gains nothing.
    assert sorted(p.outlier_index[0].tolist()) == [10, 20]
    assert unpack(p)[[10, 20]].tolist() == [100.0, 100.0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, -0.0, -3.140625, 60000.0, 1e-6])
@pytest.mark.parametrize("numel", [5, 300])
@pytest.mark.parametrize("spec", [INT4, INT8, PER_TENSOR_INT4], ids=str)
def test_constants_are_exact(spec, numel, value, dtype):
    x = torch.full((numel,), value).to(dtype)
    assert torch.equal(unpack(pack(x, spec, 1)), x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tiny_and_huge_values(dtype):
    limits = torch.finfo(dtype)
    tiny = torch.linspace(-1, 1, 128).to(dtype) * limits.tiny
    assert (unpack(pack(tiny, INT8, 0)) - tiny).abs().max() <= max(limits.tiny, 2.0**-99)
    huge = torch.linspace(-0.4, 0.4, 128, dtype=torch.float64).mul(limits.max).to(dtype)
    error = (unpack(pack(huge, INT8, 0)).double() - huge.double()).abs().max()
    assert error <= (0.8 / 255 * 1.02 + 0.4 * limits.eps / 2) * limits.max


@pytest.mark.parametrize("spec", [INT4, INT8, MASK, PER_TENSOR_INT4], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_empty(spec, dtype):
    p = pack(torch.empty(0, dtype=dtype), spec, 0)
    assert unpack(p).shape == (0,) and p.nbytes == packed_nbytes(0, dtype, spec)


@pytest.mark.parametrize("dtype", DTYPES)
def test_non_finite_values_take_the_outlier_places(dtype):
    x = torch.randn(512, generator=torch.Generator().manual_seed(1)).to(dtype)
    x[7], x[9] = torch.nan, -torch.inf
    p = pack(x, INT4, 3)
    y = unpack(p)
    assert y[7].isnan() and y[9] == -torch.inf
    finite = x.isfinite()
    assert ((y - x).double().abs() <= error_bound(p, INT4))[finite].all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(("spec", "count"), [(INT4, 3), (INT8, 1)])
def test_too_many_non_finite_values_poison_their_group_alone(spec, count, bad):
    x = torch.randn(384)
    x[128 : 128 + count] = bad
    y = unpack(pack(x, spec, 3))
    # All but the outlier places, of which one went to the finite extreme at the other end.
    assert y[128:256].isfinite().sum() <= spec.outliers // 2
    assert y[:128].isfinite().all() and y[256:].isfinite().all()


def test_a_range_beyond_fp32_decodes_to_nan():
    x = torch.randn(128)
    x[:3], x[3:6] = 3e38, -3e38
    assert unpack(pack(x, INT4, 3))[6:].isnan().all()


def test_a_nan_in_the_short_last_group_stays_there():
    x = torch.randn(128 + 40)
    x[-1] = torch.nan
    y = unpack(pack(x, INT4, 3))
    assert y[-1].isnan() and y[:-1].isfinite().all()


def test_mean_over_draws_is_the_value():
    x = heavy_tailed(128 * 2, torch.float32)
    p = pack(x, INT4, 0)
    total = torch.zeros(256, dtype=torch.float64)
    square = torch.zeros(256, dtype=torch.float64)
    draws = 4096
    for seed in range(draws):
        error = (unpack(pack(x, INT4, seed)) - x).double()
        total += error
        square += error.square()
    spread = (square / draws - (total / draws).square()).clamp_min(0).sqrt()
    # 5 standard errors, and what 4096 draws cannot resolve: the fixed-point step and the fp32 rounding of the result.
    floor = p.scale.double().repeat_interleave(128) * 2.0**-15 + 2.0**-22 * x.double().abs()
    assert ((total / draws).abs() <= 5 * spread / math.sqrt(draws) + floor).all()


def test_rounding_noise_is_white():
    x = torch.full((1 << 18,), 0.5)
    x[0::128], x[1::128] = 0.0, 15.0
    spec = CodecSpec("int4", 128, 0)

    def ups(seed):
        y = unpack(pack(x, spec, seed)).view(-1, 128)[:, 2:]
        return (y > 0.5).double() - (y > 0.5).double().mean()

    a, b = ups(0), ups(1)
    limit = 5 / math.sqrt(a.numel())
    variance = a.square().mean()
    for lag in (1, 2, 63, 64, 126, 127):
        flat = a.flatten()
        assert abs(float((flat[lag:] * flat[:-lag]).mean() / variance)) < limit, lag
    assert abs(float((a * b).mean() / variance)) < limit


def test_seeds_decide_the_bytes_and_the_global_generator_does_not():
    x = heavy_tailed(5000, torch.bfloat16)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    a = pack(x, INT4, 12345)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(99)
    assert torch.equal(a.code, pack(x, INT4, 12345).code)
    assert not torch.equal(a.code, pack(x, INT4, 12346).code)


def test_chunks_do_not_show(monkeypatch):
    from ygglight.kernels.act_codec import reference

    x = heavy_tailed(5000, torch.float16)
    whole = pack(x, INT4, 8)
    monkeypatch.setattr(reference, "CHUNK", 1024)
    for one, other in zip(whole.tensors(), pack(x, INT4, 8).tensors(), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(unpack(whole), reference.unpack(whole))


@pytest.mark.parametrize(
    ("spec", "bits16", "bits32"),
    [(INT4, 4.625, 5.0), (INT8, 8.25, 8.375), (CodecSpec("int4", 128, 0), 4.25, 4.375)],
)
def test_real_bits_per_element(spec, bits16, bits32):
    assert pack(torch.randn(1 << 14).bfloat16(), spec, 0).bits_per_element == bits16
    assert pack(torch.randn(1 << 14), spec, 0).bits_per_element == bits32
    assert bytes_moved(1 << 14, torch.bfloat16, spec) == (1 << 14) * (16 + bits16) / 8


def live_peak(call, *inputs):
    """Largest number of bytes of storages that are alive at once while `call` runs, those of `inputs` left out."""
    import weakref

    from torch.utils._python_dispatch import TorchDispatchMode

    class Meter(TorchDispatchMode):
        live, peak, seen = 0, 0, None

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, torch.Tensor):
                    storage = tensor.untyped_storage()
                    if storage._cdata not in self.seen:
                        self.seen.add(storage._cdata)
                        size = storage.nbytes()
                        self.live += size
                        self.peak = max(self.peak, self.live)
                        weakref.finalize(storage, self.free, size, storage._cdata)
            return out

        def free(self, size, key):
            self.live -= size
            self.seen.discard(key)

    meter = Meter()
    meter.seen = {tensor.untyped_storage()._cdata for tensor in inputs}
    with meter:
        kept = call()
    return meter.peak, kept


@pytest.mark.parametrize("numel", [100, 5000, 600_001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", [INT4, INT8, CodecSpec("int4", 16, 4), PER_TENSOR_INT4, MASK], ids=str)
def test_workspace_is_an_upper_bound(spec, dtype, numel):
    x = (torch.rand(numel) > 0.5).to(dtype) if spec.name == "mask" else torch.randn(numel).to(dtype)
    bound = workspace_nbytes(numel, dtype, spec, "cpu")
    peak, p = live_peak(lambda: pack(x, spec, 0), x)
    assert peak <= p.nbytes + bound
    peak, _ = live_peak(lambda: unpack(p), *p.tensors())
    # The mask's result is rounded up to whole bytes of code, which the bound counts.
    assert peak <= numel * dtype.itemsize + bound


@pytest.mark.parametrize("numel", [0, 1, 7, 8, 9, 4095, 600_001])
@pytest.mark.parametrize("value", [None, 1.0, -2.5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_mask_is_lossless(dtype, value, numel):
    keep = torch.rand(numel, generator=torch.Generator().manual_seed(2)) > 0.4
    x = keep if value is None else keep.to(dtype) * value
    x = x if value is None else torch.where(keep, x, torch.zeros_like(x))
    p = pack(x, MASK, 0)
    assert is_mask(x)
    assert torch.equal(unpack(p), x)
    assert p.nbytes == packed_nbytes(numel, x.dtype, MASK) == -(-numel // 8) + (0 if value is None else dtype.itemsize)


def test_mask_all_one_value():
    x = torch.full((70,), -1.5, dtype=torch.float16)
    assert torch.equal(unpack(pack(x, MASK, 0)), x)


def test_is_mask_says_no():
    assert not is_mask(torch.tensor([0.0, 1.0, 2.0]))
    assert not is_mask(torch.tensor([0.0, 1.0, -1.0]))
    assert not is_mask(torch.tensor([0.0, torch.inf]))
    assert not is_mask(torch.tensor([0.0, torch.nan]))
    assert not is_mask(torch.tensor([0, 1]))


def test_errors_name_the_mend():
    with pytest.raises(TypeError, match="float64"):
        pack(torch.zeros(4, dtype=torch.float64), INT4, 0)
    with pytest.raises(TypeError, match="bool"):
        pack(torch.zeros(4, dtype=torch.bool), INT8, 0)
    with pytest.raises(ValueError, match="1-D contiguous"):
        pack(torch.zeros(4, 4), INT4, 0)
    with pytest.raises(ValueError, match="1-D contiguous"):
        pack(torch.zeros(8)[::2], INT4, 0)
    for wrong in ({"group": 100}, {"group": 512}, {"outliers": 5}, {"group": 0, "outliers": 1}):
        with pytest.raises(ValueError):
            CodecSpec("int4", **wrong)
    with pytest.raises(ValueError, match="unknown codec"):
        CodecSpec("int5")
