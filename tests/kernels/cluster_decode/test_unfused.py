"""The unfused block, by whose error in 16 bits fused blocks are judged, is the same block."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ygglight.kernels.cluster_decode import decode_block_reference
from ygglight.kernels.cluster_decode.testing import make_block, make_spec, unfused_block
from ygglight.kernels.testing import rms_ratio

SPECS = [
    (make_spec(4, 2, 64, 48), {}),
    (make_spec(4, 2, 64, 48, qk_norm=True, rotary_dim=32), {"bias": True}),
    (make_spec(4, 1, 64, 48, norm_offset=1.0, softcap=5.0, window=20), {"mask": "bool"}),
    (make_spec(3, 3, 96, 48, interleaved_rope=True), {"mask": "bool", "in_place": True}),
]


@pytest.mark.parametrize(("spec", "options"), SPECS, ids=range(len(SPECS)))
def test_it_computes_the_same(spec: Any, options: dict[str, Any]) -> None:
    block = make_block(spec, [70, 0, 5], **options)
    exact = block.to(torch.float64).run(decode_block_reference)[0]
    assert rms_ratio(unfused_block(block), exact) < 1e-6
    rounded = make_block(spec, [70, 0, 5], dtype=torch.bfloat16, **options)
    exact = rounded.to(torch.float64).run(decode_block_reference)[0]
    plain, fused = (rms_ratio(out, exact) for out in (unfused_block(rounded), rounded.run(decode_block_reference)[0]))
    assert 1e-3 < plain < 0.02 and fused <= 1.5 * plain
