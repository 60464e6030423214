"""What the codecs do to the gradient of a Linear's weight: dW = dy.T @ x̂ is linear in x̂."""

import pytest
import torch

from ygglight.kernels.act_codec import INT4, INT8, PER_TENSOR_INT4, CodecSpec, pack, unpack
from ygglight.kernels.testing import rms_ratio

# Fewer than 32 Ki elements: torch then runs one thread, which a busy machine does not stall at every barrier.
TOKENS, WIDTH = 48, 512


@pytest.fixture(scope="module")
def linear():
    """Output gradient and a normed input with three channels of 25 times the gain (the fixture of A5)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, WIDTH, generator=generator)
    x[:, [37, 200, 411]] *= 25
    return torch.randn(TOKENS, 64, generator=generator), x


def weight_gradient(dy, x, spec, seed):
    return dy.t() @ unpack(pack(x.reshape(-1), spec, seed)).view_as(x)


@pytest.mark.parametrize("spec", [INT4, INT8, CodecSpec("int4", 128, 0)], ids=str)
def test_stochastic_rounding_is_unbiased(linear, spec):
    dy, x = linear
    exact = dy.double().t() @ x.double()
    draws = torch.stack([weight_gradient(dy, x, spec, seed) for seed in range(64)])
    single = sum(rms_ratio(draw, exact) for draw in draws[:8]) / 8
    ratio = single / rms_ratio(draws.mean(0), exact)
    assert 6.5 <= ratio <= 10, ratio  # sqrt(64) = 8


def test_nearest_rounding_is_not(linear):
    dy, x = linear
    spec = CodecSpec("int4", 128, 2, False)
    exact = dy.double().t() @ x.double()
    draws = torch.stack([weight_gradient(dy, x, spec, seed) for seed in range(4)])
    assert rms_ratio(draws[0], exact) / rms_ratio(draws.mean(0), exact) < 1.01


def test_outliers_are_what_helps(linear):
    dy, x = linear
    exact = dy.double().t() @ x.double()
    nearest = {"stochastic": False}
    ours = rms_ratio(weight_gradient(dy, x, CodecSpec("int4", 128, 2, **nearest), 0), exact)
    grouped = rms_ratio(weight_gradient(dy, x, CodecSpec("int4", 128, 0, **nearest), 0), exact)
    whole = rms_ratio(weight_gradient(dy, x, PER_TENSOR_INT4, 0), exact)
    assert ours < 0.05
    # Negative control: the bad codec must break the bound that ours keeps, else the bound says nothing.
    assert whole > 0.1
    # Measured 0.040, 0.209 and 0.623: factors 5.3 and 15.7.
    assert whole > 10 * ours
    assert grouped > 4 * ours


def test_values_of_ordinary_channels(linear):
    """The loud channels dominate the gradient above; the quiet ones are what a per-tensor scale destroys."""
    dy, x = linear
    quiet = torch.ones(WIDTH, dtype=torch.bool)
    quiet[[37, 200, 411]] = False

    def error(spec):
        return rms_ratio(weight_gradient(dy, x, spec, 0)[:, quiet], dy.t() @ x[:, quiet])

    assert error(INT4) < 0.15
    assert error(PER_TENSOR_INT4) > 0.9
