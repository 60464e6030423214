"""The test helpers themselves can fail."""

import pytest
import torch

from ygglight.kernels.testing import assert_close, poisoned_empty


def test_assert_close_fails_on_difference_and_nan():
    x = torch.randn(100)
    assert_close(x * 1.001, x, 0.0011)
    with pytest.raises(AssertionError, match="allowed"):
        assert_close(x * 1.001, x, 0.0009)
    with pytest.raises(AssertionError):
        assert_close(x.clone().fill_(torch.nan), x, 1e9)
    with pytest.raises(AssertionError, match="dtype"):
        assert_close(x.double(), x, 1.0)
    with pytest.raises(AssertionError, match="shape"):
        assert_close(x[:50], x, 1.0)


def test_poison_shows_and_goes():
    with poisoned_empty():
        assert torch.empty(3).isnan().all()
        assert torch.empty_like(torch.ones(2, dtype=torch.uint8)).tolist() == [0x5A, 0x5A]
    assert torch.empty.__name__ == "empty"
