"""The Triton kernels against their torch twin, in Triton's interpreter."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_kernels_agree_with_the_twin():
    source = Path(__file__).parents[3] / "src"
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "YGGLIGHT_KERNELS": "triton",
        "PYTHONPATH": os.pathsep.join([str(source), os.environ.get("PYTHONPATH", "")]),
    }
    script = Path(__file__).with_name("interpreted.py")
    run = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stderr[-3000:]
    lines = [line for line in run.stdout.splitlines() if line]
    assert [line for line in lines if not line.startswith("ok ")] == []
    assert len(lines) == (3 + 1) * 4 + 6 * 3, run.stdout
