"""The Triton kernels against their torch twin, in Triton's interpreter."""

import importlib.util
from pathlib import Path

import pytest

from ygglight.kernels.testing import run_interpreted


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_kernels_agree_with_the_twin():
    lines = run_interpreted(Path(__file__).with_name("interpreted.py"))
    assert len(lines) == 5 * (5 + 2) + (5 + 1) + 3, lines
