"""On a real GPU: the compiled kernels against the float64 twin, eagerly and replayed from a CUDA graph."""

import itertools

import pytest
import torch

from ygglight.kernels.testing import rms_ratio
from ygglight.kernels.tree_attention import tree_attention, tree_attention_reference

pytestmark = pytest.mark.gpu

RATIO = {torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}
# batch, query heads, key heads, queries, head size, slots
SHAPES = [(1, 32, 8, 1, 128, 4096), (1, 32, 8, 64, 128, 1000), (2, 14, 2, 8, 64, 777), (1, 32, 32, 5, 80, 2048),
          (1, 8, 4, 16, 256, 515), (3, 9, 3, 33, 96, 300), (1, 4, 1, 3, 512, 400)]  # fmt: skip


def sample(shape, dtype, used=0.7):
    batch, heads, groups, width, head, slots = shape
    query = torch.randn(batch, width, heads, head, device="cuda", dtype=dtype).transpose(1, 2)
    key, value = (torch.randn(batch, groups, slots, head, device="cuda", dtype=dtype) for _ in range(2))
    mask = torch.rand(batch, 1, width, slots, device="cuda") < 0.8
    mask[..., int(slots * used) :] = False
    if width > 1:
        mask[:, :, 1] = False
    return query, key, value, mask


def expected_of(inputs, *rest):
    query, key, value, mask = (t.cpu() for t in inputs)
    rest = tuple(t.cpu() if isinstance(t, torch.Tensor) else t for t in rest)
    return tree_attention_reference(query.double(), key.double(), value.double(), mask, *rest)


@pytest.mark.parametrize("dtype", list(RATIO), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_same_as_the_twin(shape, dtype):
    inputs, scale = sample(shape, dtype), shape[4] ** -0.5
    for softcap, has_sinks in itertools.product((None, 20.0), (False, True)):
        sinks = torch.randn(shape[1], device="cuda", dtype=dtype) if has_sinks else None
        actual = tree_attention(*inputs, scale, softcap, sinks)
        expected = expected_of(inputs, scale, softcap, sinks)
        assert rms_ratio(actual.cpu(), expected) <= RATIO[dtype]
        assert torch.equal(actual, tree_attention(*inputs, scale, softcap, sinks))
        if shape[3] > 1:
            assert (actual[:, :, 1] == 0).all()
        rolled = tree_attention(*inputs[:3], inputs[3].roll(1, dims=-1), scale, softcap, sinks)
        assert rms_ratio(rolled.cpu(), expected) > 10 * RATIO[dtype]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_a_replayed_graph_follows_its_inputs(shape, dtype):
    static, scale = sample(shape, dtype), shape[4] ** -0.5
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            tree_attention(*static, scale)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = tree_attention(*static, scale)
    for used in (0.1, 0.5, 1.0):  # the mask decides how far programs read
        for buffer, fresh in zip(static, sample(shape, dtype, used), strict=True):
            buffer.copy_(fresh)
        graph.replay()
        assert rms_ratio(output.cpu(), expected_of(static, scale)) <= RATIO[dtype]
        assert torch.equal(output, tree_attention(*static, scale))


def test_nothing_waits_for_the_device():
    inputs = sample(SHAPES[0], torch.bfloat16)
    tree_attention(*inputs, 0.1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        tree_attention(*inputs, 0.1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
