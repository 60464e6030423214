"""On a GPU: the split-K kernels against torch, and replayed from a graph."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from ygglight.kernels.cluster_decode import decode_block_reference
from ygglight.kernels.cluster_decode.testing import count_wrong_replays, make_block, make_spec, unfused_block
from ygglight.kernels.testing import rms_ratio

pytestmark = pytest.mark.gpu
pytest.importorskip("triton")

LENGTHS = (0, 1, 63, 64, 65, 1024, 4096, 16384)
LLAMA_2, LLAMA_3 = make_spec(32, 32, 128, 4096), make_spec(32, 8, 128, 4096)
OTHERS = [
    make_spec(14, 2, 64, 896),
    make_spec(32, 32, 80, 2560, rotary_dim=32),
    make_spec(16, 16, 96, 1536, interleaved_rope=True),
    make_spec(8, 4, 256, 2304, norm_offset=1.0, softcap=50.0, window=300),
    make_spec(28, 4, 128, 3584, qk_norm=True),
]
APPENDED = {torch.float16: 5e-4, torch.bfloat16: 4e-3}


def check(spec: Any, lengths: list[int], dtype: torch.dtype, splits: int | None = None, **options: Any) -> None:
    from ygglight.kernels.cluster_decode import split_k

    block = make_block(spec, lengths, dtype=dtype, **options).to("cuda")
    exact = block.to(torch.float64).run(decode_block_reference)
    actual = block.run(split_k.launch, splits=splits)
    assert rms_ratio(actual[0], exact[0]) <= 1.5 * rms_ratio(unfused_block(block), exact[0])
    for got, expected in zip(actual[1:], exact[1:], strict=True):
        assert rms_ratio(got, expected) <= APPENDED[dtype]
    again = block.run(split_k.launch, splits=splits)
    assert all(map(torch.equal, actual, again)), "other bits in a second run"


@pytest.mark.parametrize("spec", [LLAMA_2, LLAMA_3], ids=["Llama-2", "Llama-3"])
@pytest.mark.parametrize("length", LENGTHS)
def test_block(spec: Any, length: int) -> None:
    """In a cache with room, at the first slot and in the last one."""
    check(spec, [length], torch.bfloat16, in_place=True, slots=length + 100)
    check(spec, [length], torch.bfloat16, in_place=True)


@pytest.mark.parametrize("spec", OTHERS, ids=lambda spec: f"{spec.heads}/{spec.kv_heads}x{spec.head_dim}")
def test_block_of_other_models(spec: Any) -> None:
    for dtype, splits in itertools.product(APPENDED, (None, 1, 7)):
        check(spec, [130, 0, 777], dtype, splits, bias=True, mask="bool")


def test_a_wrong_block_would_show() -> None:
    """The control of the criterion."""
    block = make_block(LLAMA_3, [65], dtype=torch.bfloat16).to("cuda")
    exact = block.to(torch.float64).run(decode_block_reference)[0]
    wrong = replace(LLAMA_3, scale=LLAMA_3.scale * 1.2)
    off = rms_ratio(type(block)(wrong, block.weights, block.inputs).run(decode_block_reference)[0], exact)
    assert off > 1.5 * rms_ratio(unfused_block(block), exact)


@pytest.mark.parametrize("lengths", [[500], [500, 20, 64]])
def test_graph_replays(lengths: list[int]) -> None:
    """1,000 replays equal eager calls while lengths, slots and input change."""
    from ygglight.kernels.cluster_decode import split_k

    block = make_block(LLAMA_3, lengths, slots=2048, dtype=torch.bfloat16, in_place=True).to("cuda")
    for name in ("keys", "values"):
        block.inputs[name].nan_to_num_()
    assert count_wrong_replays(block, split_k.launch, rounds=1000) == 0
    assert block.inputs["lengths"].tolist() == [length + 1000 for length in lengths]
