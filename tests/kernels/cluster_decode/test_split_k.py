"""The plain Triton kernels of the decode block against the float64 reference, in Triton's interpreter; their sizes."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from ygglight.kernels.testing import run_interpreted

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@needs_triton
def test_kernels_agree_with_the_reference() -> None:
    lines = run_interpreted(Path(__file__).with_name("interpreted_split_k.py"))
    assert len(lines) == 12 + 22 + 3, lines


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
