"""On a real GPU: the compiled kernels against the float64 twin, eagerly and replayed from a CUDA graph."""

import itertools

import pytest
import torch

from ygglight.kernels.testing import rms_ratio
from ygglight.kernels.tree_attention import tree_attention, tree_attention_reference
from ygglight.kernels.tree_attention.testing import into_pages

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


@pytest.mark.parametrize("dtype", list(RATIO), ids=str)
@pytest.mark.parametrize(("page", "kind"), [(16, torch.int32), (256, torch.int64)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pages_like_the_twin(shape, page, kind, dtype):
    (query, key, value, mask), scale = sample(shape, dtype), shape[4] ** -0.5
    mask[-1, ..., : shape[5] // 3] = False  # a sliding window
    *paged, table = into_pages(key, value, mask, page, dtype=kind)
    actual = tree_attention(query, *paged, scale, table=table)
    expected = expected_of((query, key, value, mask), scale)
    assert rms_ratio(actual.cpu(), expected) <= RATIO[dtype]
    assert torch.equal(actual, tree_attention(query, *paged, scale, table=table))
    wrong = tree_attention(query, *paged, scale, table=table.flip(1))
    assert not rms_ratio(wrong.cpu(), expected) <= 10 * RATIO[dtype]


def test_pages_far_apart():
    """More than 2**31 elements from the first page to the last."""
    query, key, value, mask = sample((1, 8, 2, 1, 64, 32), torch.bfloat16, used=1.0)
    arena = torch.empty(2 * 2**30 + 2 * key.numel(), device="cuda", dtype=torch.bfloat16)
    views = [arena.as_strided((3, 2, 16, 64), (2**30, 1024, 64, 1), at) for at in (0, 2048)]
    for view, dense in zip(views, (key, value), strict=True):
        view[2], view[0] = dense[0, :, :16], dense[0, :, 16:]
    table = torch.tensor([[2, 0]], device="cuda")
    actual = tree_attention(query, *views, mask, 0.125, table=table)
    assert rms_ratio(actual.cpu(), expected_of((query, key, value, mask), 0.125)) <= RATIO[torch.bfloat16]


def test_a_replayed_graph_follows_its_block_table():
    shape, scale = (4, 32, 8, 1, 128, 1024), 128**-0.5
    query, key, value, mask = sample(shape, torch.bfloat16)
    tables = [into_pages(key, value, mask, 16, seed) for seed in (0, 1)]
    *static, table = (tensor.clone() for tensor in tables[0])
    tree_attention(query, *static, scale, table=table)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = tree_attention(query, *static, scale, table=table)
    expected = expected_of((query, key, value, mask), scale)
    for fresh in reversed(tables):
        for buffer, tensor in zip((*static, table), fresh, strict=True):
            buffer.copy_(tensor)
        output.zero_()
        graph.replay()
        assert rms_ratio(output.cpu(), expected) <= RATIO[torch.bfloat16]


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
    *paged, table = into_pages(*inputs[1:], 16)
    tree_attention(inputs[0], *paged, 0.1, table=table)
    torch.cuda.set_sync_debug_mode("error")
    try:
        tree_attention(*inputs, 0.1)
        tree_attention(inputs[0], *paged, 0.1, table=table)
    finally:
        torch.cuda.set_sync_debug_mode("default")
