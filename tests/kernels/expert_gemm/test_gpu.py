"""On a real GPU: the compiled kernels against the float64 twin, eagerly and replayed from a CUDA graph."""

import pytest
import torch

from ygglight.engines.moe_speq.quantize import choose_group, quantize_nearest
from ygglight.kernels.expert_gemm import (
    Int4Weight,
    expert_mlp,
    expert_mlp_int4,
    expert_mlp_int4_reference,
    expert_mlp_reference,
)
from ygglight.kernels.testing import rms_ratio

pytestmark = pytest.mark.gpu

RATIO = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
# experts, hidden, inner: OLMoE, gpt-oss, Mixtral's in part, odd sizes
SHAPES = [(16, 2048, 1024), (4, 2880, 2880), (4, 4096, 1792), (5, 96, 160)]


def stacks(shape, dtype, transposed=False):
    experts, hidden, inner = shape
    sizes = [(hidden, 2 * inner), (inner, hidden)] if transposed else [(2 * inner, hidden), (hidden, inner)]
    # As a cache of slots: one run of bytes an expert.
    total = sum(rows * columns for rows, columns in sizes) + 384
    slabs = torch.full((experts, total), torch.nan, dtype=dtype, device="cuda")
    views, start = [], 128
    for rows, columns in sizes:
        view = slabs[:, start : start + rows * columns].unflatten(1, (rows, columns))
        view.copy_(torch.randn_like(view) / (rows if transposed else columns) ** 0.5)
        views.append(view)
        start += rows * columns + 128
    return views


def coded(shape):
    experts, hidden, inner = shape
    weights = []
    for rows, columns in ((2 * inner, hidden), (hidden, inner)):
        weight = Int4Weight.allocate(experts, rows, columns, choose_group(columns, "w"), "cuda")
        for expert in range(experts):
            weight.write(
                expert, *quantize_nearest(torch.randn(rows, columns, device="cuda") / columns**0.5, weight.group)
            )
        weights.append(weight)
    return weights


def routes(pairs, experts):
    chosen = torch.randint(0, experts, (pairs,), device="cuda")
    if pairs > 2:
        chosen[1] = -1
        chosen[pairs // 2 :] = chosen[-1]
    return chosen


@pytest.mark.parametrize("dtype", list(RATIO), ids=str)
@pytest.mark.parametrize("pairs", [1, 8, 72, 512])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_same_as_the_twin(shape, transposed, pairs, dtype):
    weights = stacks(shape, dtype, transposed)
    x, experts = torch.randn(pairs, shape[1], device="cuda", dtype=dtype), routes(pairs, shape[0])
    biases = tuple(torch.randn(shape[0], n, device="cuda", dtype=dtype) for n in (2 * shape[2], shape[1]))
    for bias in (None, biases):
        options = {"activation": "silu", "transposed": transposed}
        actual = expert_mlp(x, experts, *weights, biases=bias, **options)
        wide = bias and tuple(b.double() for b in bias)
        expected = expert_mlp_reference(x.double(), experts, *(w.double() for w in weights), "silu", wide, transposed)
        assert rms_ratio(actual, expected) <= RATIO[dtype]
        check_bits(lambda x, e, b=bias, o=options: expert_mlp(x, e, *weights, biases=b, **o), x, experts, actual)
        moved = expert_mlp(x, (experts + 1) % shape[0], *weights, biases=bias, **options)
        assert rms_ratio(moved, expected) > 10 * RATIO[dtype]


@pytest.mark.parametrize("dtype", list(RATIO), ids=str)
@pytest.mark.parametrize("pairs", [1, 8, 72, 512])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_four_bits_like_the_twin(shape, pairs, dtype):
    weights = coded(shape)
    x, experts = torch.randn(pairs, shape[1], device="cuda", dtype=dtype), routes(pairs, shape[0])
    for activation in ("silu", "gelu", lambda both: both[..., ::2].tanh() * both[..., 1::2]):
        actual = expert_mlp_int4(x, experts, *weights, activation=activation)
        expected = expert_mlp_int4_reference(x.double(), experts, *weights, activation)
        assert rms_ratio(actual, expected) <= RATIO[dtype]
        check_bits(lambda x, e, a=activation: expert_mlp_int4(x, e, *weights, activation=a), x, experts, actual)


def check_bits(call, x, experts, actual):
    """Some of the rows, in another order, come out to the bit; rows of nobody are zero."""
    some = torch.randperm(len(x), device="cuda")[: len(x) // 2 + 1]
    assert torch.equal(call(x[some], experts[some]), actual[some])
    assert (actual[experts < 0] == 0).all()


@pytest.mark.parametrize("four_bits", [False, True])
def test_a_replayed_graph_follows_its_inputs(four_bits):
    shape = SHAPES[0]
    weights = coded(shape) if four_bits else stacks(shape, torch.bfloat16)
    run = expert_mlp_int4 if four_bits else expert_mlp
    x, experts = torch.randn(32, shape[1], device="cuda", dtype=torch.bfloat16), routes(32, shape[0])
    run(x, experts, *weights, activation="silu")  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(x, experts, *weights, activation="silu")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run(x, experts, *weights, activation="silu")
    for _ in range(3):
        x.normal_()
        experts.copy_(routes(32, shape[0]))
        output.zero_()
        graph.replay()
        assert torch.equal(output, run(x, experts, *weights, activation="silu"))
