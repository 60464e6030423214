"""The Triton kernels against their torch twin, in Triton's interpreter: the same bytes and the same values."""

import importlib.util
from pathlib import Path

import pytest

from ygglight.kernels.testing import run_interpreted


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_kernels_write_the_twins_bytes():
    lines = run_interpreted(Path(__file__).with_name("interpreted.py"))
    assert len(lines) == 6 * 3 + 1 + 9, lines
