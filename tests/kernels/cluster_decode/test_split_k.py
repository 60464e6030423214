"""The plain Triton kernels of the decode block against the float64 reference, in Triton's interpreter; their sizes."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("interpreted_split_k.py")

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@needs_triton
def test_kernels_agree_with_the_reference() -> None:
    source = Path(__file__).parents[3] / "src"
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "YGGLIGHT_KERNELS": "triton",
        "PYTHONPATH": os.pathsep.join([str(source), os.environ.get("PYTHONPATH", "")]),
    }
    run = subprocess.run([sys.executable, str(SCRIPT)], env=environment, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stderr[-3000:]
    lines = [line for line in run.stdout.splitlines() if line]
    assert [line for line in lines if not line.startswith("ok ")] == []
    assert len(lines) == 12 + 22 + 3, run.stdout


@needs_triton
def test_tiles_fill_the_device() -> None:
    from ygglight.kernels.cluster_decode.split_k import DOT_BATCH, TILE_BYTES, choose_tile

    for rows in (96, 960, 6144, 28672):
        for columns in (64, 576, 4096, 8192):
            for itemsize in (2, 4):
                for batch in (1, 2, 40):
                    tile = choose_tile(rows, columns, batch, itemsize, processors=132)
                    assert tile.columns >= 16 and tile.columns & (tile.columns - 1) == 0
                    assert tile.rows * tile.columns * itemsize <= TILE_BYTES
                    assert tile.sequences == (1 if batch == 1 else DOT_BATCH)
    small = choose_tile(960, 576, 1, 2, processors=132)
    assert -(-960 // small.rows) > 132  # a small model's rows go to all SMs
    assert choose_tile(6144, 4096, 1, 2, processors=132).rows == 16
