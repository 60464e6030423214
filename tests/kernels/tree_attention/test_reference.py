"""The torch versions against a float64 oracle written head by head, with controls that must fail."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ygglight.kernels.testing import assert_close, rms_ratio
from ygglight.kernels.tree_attention import reference, tree_attention, tree_attention_reference
from ygglight.kernels.tree_attention.testing import into_pages

# Of the output's rms. Measured: 2e-7, 3e-4 and 2.3e-3; one rounding of the result is half a unit in the last place.
RATIO = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}


def oracle(query, key, value, mask, scale, softcap=None, sinks=None):
    """float64, one head at a time, the sum over slots written out; 0 / 0 is a row that attends to nothing."""
    query, key, value = query.double(), key.double(), value.double()
    batch, heads, width, _ = query.shape
    out = torch.zeros(batch, heads, width, value.shape[-1], dtype=torch.float64)
    for b, h in itertools.product(range(batch), range(heads)):
        group = h // (heads // key.shape[1])
        scores = torch.einsum("wd,cd->wc", query[b, h], key[b, group]) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        top = scores.amax(1, keepdim=True)  # of all slots: in float64 there is room
        weights = (scores - top).exp() * mask[b if mask.shape[0] > 1 else 0, 0]
        total = weights.sum(1, keepdim=True)
        if sinks is not None:
            total = total + (sinks[h].double() - top).exp()
        out[b, h] = torch.nan_to_num(weights @ value[b, group] / total)
    return out


def sample(width, group, head, dtype, batch=1, slots=77, value=None, seed=0, shared_mask=False):
    """A text of two thirds of the slots with a random tree behind it; the last query sees nothing if there are more."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    query, key = normal(batch, 2 * group, width, head), normal(batch, 2, slots, head)
    value = normal(batch, 2, slots, value or head)
    mask = torch.zeros(1 if shared_mask else batch, 1, width, slots, dtype=torch.bool)
    text = slots - width - 5
    mask[..., :text] = True
    tree = torch.rand(*mask.shape[:2], width, width, generator=generator) < 0.3
    mask[..., text : text + width] = tree.tril() | torch.eye(width, dtype=torch.bool)
    if width > 1:
        mask[:, :, -1] = False
    return query, key, value, mask


@pytest.mark.parametrize("dtype", list(RATIO), ids=str)
@pytest.mark.parametrize("extras", [(None, False), (3.0, False), (None, True), (3.0, True)], ids=str)
def test_against_the_oracle(dtype, extras):
    softcap, has_sinks = extras
    shapes = [(1, 1, 64, 1, 77), (1, 7, 96, 3, 33), (5, 3, 80, 2, 77), (16, 2, 128, 1, 130), (33, 1, 64, 2, 129)]
    for number, (width, group, head, batch, slots) in enumerate(shapes):
        inputs = sample(width, group, head, dtype, batch, slots, seed=number, shared_mask=number % 2 == 0)
        sinks = torch.randn(2 * group) if has_sinks else None
        actual = tree_attention(*inputs, head**-0.5, softcap, sinks)
        expected = oracle(*inputs, head**-0.5, softcap, sinks)
        assert rms_ratio(actual, expected) <= RATIO[dtype], (width, group, head)
        if width > 1:
            assert (actual[:, :, -1] == 0).all()
        # Controls: a mask that is one slot off, or whose tree is transposed, must not pass.
        query, key, value, mask = inputs
        if width > 1:
            text = slots - width - 5
            turned = mask.clone()
            turned[..., text : text + width] = mask[..., text : text + width].mT
            wrong = tree_attention(query, key, value, turned, head**-0.5, softcap, sinks)
            assert rms_ratio(wrong, expected) > 10 * RATIO[dtype]
        wrong = tree_attention(query, key, value, mask.roll(1, dims=-1), head**-0.5, softcap, sinks)
        assert rms_ratio(wrong, expected) > 10 * RATIO[dtype]


@pytest.mark.parametrize("width", [1, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_scores_are_not_rounded(dtype, width):
    query, key, value, mask = sample(width, 2, 64, dtype, slots=200)
    query = query * 25  # scores of some tens, as in Qwen2.5
    assert reference.prefers_sdpa(query, key, value, None, None) == (width == 40)
    expected = oracle(query, key, value, mask, 0.125)
    assert rms_ratio(tree_attention(query, key, value, mask, 0.125), expected) <= 2 * RATIO[dtype]
    scores = torch.matmul(query, key.repeat_interleave(2, 1).mT).bfloat16().double() * 0.125
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num(0.0)
    rounded = weights @ value.repeat_interleave(2, 1).double()
    assert rms_ratio(rounded, expected) > 2 * RATIO[torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sdpa_and_the_plain_version_agree(dtype):
    inputs = sample(40, 3, 64, dtype, batch=2, slots=200)
    plain, wide = tree_attention_reference(*inputs, 0.125), reference.tree_attention_sdpa(*inputs, 0.125)
    assert_close(wide, plain, RATIO[dtype])
    assert (wide[:, :, -1] == 0).all()


def test_other_value_size_and_strides():
    query, key, value, mask = sample(4, 2, 64, torch.float32, batch=2, value=48)
    expected = oracle(query, key, value, mask, 0.1)
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (query, key, value)]
    assert rms_ratio(tree_attention(*turned, mask, 0.1), expected) <= 1e-6


class Conversions(TorchDispatchMode):
    """The largest tensor that a change of dtype makes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default:
            self.largest = max(self.largest, out.numel())
        return out


def test_keys_and_values_are_converted_in_chunks(monkeypatch):
    inputs = sample(2, 2, 64, torch.bfloat16, slots=500)
    monkeypatch.setattr(reference, "CHUNK_BYTES", 2 * 64 * 4 * 30)  # 30 slots of 2 heads
    with Conversions() as seen:
        chunked = tree_attention_reference(*inputs, 0.125)
    assert seen.largest == 2 * 64 * 30
    assert rms_ratio(chunked, oracle(*inputs, 0.125)) <= RATIO[torch.bfloat16]


def test_same_bits_each_run():
    for width in (2, 40):
        inputs = sample(width, 2, 64, torch.bfloat16, slots=300)
        first = tree_attention(*inputs, 0.125)
        assert all(torch.equal(first, tree_attention(*inputs, 0.125)) for _ in range(3))


@pytest.mark.parametrize("dtype", list(RATIO), ids=str)
@pytest.mark.parametrize(("width", "page"), [(1, 16), (5, 1), (40, 32)])
def test_pages_against_the_oracle(dtype, width, page):
    """Texts of several lengths, one within a sliding window; what the pages hold around them is NaN."""
    query, key, value, mask = sample(width, 3, 64, dtype, batch=3, slots=133, value=48 if width == 5 else None)
    mask[1, ..., :70] = False
    mask[2, ..., 90 - width :] = False
    *paged, table = into_pages(key, value, mask, page, dtype=torch.int64)
    assert paged[0].isnan().any() and paged[1].isnan().any()
    by_sdpa = width == 40 and dtype in (torch.float32, torch.bfloat16)
    assert reference.prefers_sdpa(query, key, value, None, None) == by_sdpa
    expected = oracle(query, key, value, mask, 0.125)
    actual = tree_attention(query, *paged, 0.125, table=table)
    assert rms_ratio(actual, expected) <= RATIO[dtype]
    assert torch.equal(actual, tree_attention(query, *paged, 0.125, table=table.int()))
    sinks = torch.linspace(-2, 2, 6)
    with_sinks = tree_attention(query, *paged, 0.125, 3.0, sinks, table)
    assert rms_ratio(with_sinks, oracle(query, key, value, mask, 0.125, 3.0, sinks)) <= RATIO[dtype]
    # Controls: another sequence's pages, and pages in another order.
    for other in (table.roll(1, dims=0), table.flip(1)):
        wrong = tree_attention(query, *paged, 0.125, table=other)
        assert not rms_ratio(wrong, expected) <= 10 * RATIO[dtype]


def test_pages_under_one_mask_for_all_sequences():
    query, key, value, mask = sample(4, 2, 64, torch.float32, batch=2, shared_mask=True)
    *paged, table = into_pages(key, value, mask, 8)
    assert paged[2].shape == (1, 1, 4, 80)
    assert rms_ratio(tree_attention(query, *paged, 0.1, table=table), oracle(query, key, value, mask, 0.1)) <= 1e-6


def test_gathered_pages_are_one_piece_without_what_is_hidden():
    _, key, value, mask = sample(3, 2, 16, torch.bfloat16, batch=2, value=8)
    *paged, table = into_pages(key, value, mask, 16)
    with Conversions() as converted:
        found = reference.gather_pages(*paged, table)
    assert converted.largest == 0
    seen = mask.any(dim=2)[..., None]
    for gathered, dense in zip(found, (key, value), strict=True):
        assert gathered.is_contiguous() and gathered.dtype is torch.bfloat16
        assert gathered.shape == (*dense.shape[:2], 80, dense.shape[3])
        assert torch.equal(gathered[:, :, :77], dense.where(seen, 0)) and not gathered[:, :, 77:].any()


def changed(**changes):
    query, key, value, mask = sample(3, 2, 16, torch.float32, batch=2)
    return {"query": query, "key": key, "value": value, "mask": mask, "scale": 0.25} | changes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"query": torch.zeros(4, 3, 16)}, "four dimensions"),
        ({"query": torch.zeros(2, 4, 0, 16)}, "at least one element"),
        ({"query": torch.zeros(2, 3, 3, 16)}, "multiple of key heads"),
        ({"query": torch.zeros(2, 4, 3, 8)}, "same batch and head size"),
        ({"value": torch.zeros(2, 2, 76, 16)}, "only the head size may differ"),
        ({"mask": torch.zeros(2, 1, 3, 77)}, "give torch.bool"),
        ({"mask": torch.ones(2, 4, 3, 77, dtype=torch.bool)}, "one for all heads"),
        ({"mask": torch.ones(2, 1, 77, 3, dtype=torch.bool)}, "one for all heads"),
        ({"query": torch.zeros(2, 4, 3, 16, dtype=torch.int32)}, "cast it to float16"),
        ({"key": torch.zeros(2, 2, 77, 16, dtype=torch.bfloat16)}, "cast them to one dtype"),
        ({"softcap": 0.0}, "above 0"),
        ({"sinks": torch.zeros(2)}, r"a query head, \[4\]"),
        ({"sinks": torch.zeros(4, dtype=torch.int64)}, "one floating logit"),
        ({"value": torch.zeros(2, 2, 77, 16, device="meta")}, "several devices"),
        ({"query": torch.zeros(2, 4, 3, 16, requires_grad=True)}, "no backward pass"),
    ],
)
def test_errors_name_the_mend(changes, words):
    with pytest.raises(ValueError, match=words):
        tree_attention(**changed(**changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"table": torch.zeros(2, 4)}, "torch.int32 or torch.int64"),
        ({"table": torch.zeros(4, dtype=torch.int32)}, r"give \[2, pages"),
        ({"table": torch.zeros(3, 4, dtype=torch.int32)}, r"give \[2, pages"),
        ({"table": torch.zeros(2, 0, dtype=torch.int32)}, r"give \[2, pages"),
        ({"table": torch.zeros(2, 5, dtype=torch.int32)}, "80 slots"),
        ({"table": torch.zeros(2, 4, dtype=torch.int32, device="meta")}, "several devices"),
        ({"key": torch.zeros(7, 2, 24, 16), "value": torch.zeros(7, 2, 24, 16)}, "power of two"),
        ({"key": torch.zeros(6, 2, 16, 16)}, "only the head size may differ"),
        ({"key": torch.zeros(7, 2, 16, 8)}, "same batch and head size"),
    ],
)
def test_errors_of_pages_name_the_mend(changes, words):
    pages = {"key": torch.zeros(7, 2, 16, 16), "value": torch.zeros(7, 2, 16, 16)}
    mask, table = torch.ones(2, 1, 3, 64, dtype=torch.bool), torch.zeros(2, 4, dtype=torch.int32)
    inputs = changed(**pages, mask=mask, table=table)
    tree_attention(**inputs)
    with pytest.raises(ValueError, match=words):
        tree_attention(**inputs | changes)


def test_it_compiles_without_a_graph_break():
    inputs = sample(3, 2, 16, torch.float32)
    compiled = torch.compile(tree_attention, backend="eager", fullgraph=True)
    assert torch.equal(compiled(*inputs, 0.25), tree_attention(*inputs, 0.25))
    *paged, table = into_pages(*inputs[1:], 16)
    eager = tree_attention(inputs[0], *paged, 0.25, table=table)
    assert torch.equal(compiled(inputs[0], *paged, 0.25, table=table), eager)
