"""Run by test_interpreter.py in a process of its own, with TRITON_INTERPRET=1 set before Triton is first imported.

Prints one line a case: "ok NAME" or "FAIL NAME: why". Never in bfloat16: the interpreter's dot of bfloat16 is garbage.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from ygglight.kernels.testing import poisoned_empty, rms_ratio
from ygglight.kernels.tree_attention import tree_attention, tree_attention_reference, triton
from ygglight.kernels.tree_attention.testing import into_pages

RATIO = {torch.float32: 1e-6, torch.float16: 5e-4}
# batch, query heads, key heads, queries, head size, value size, slots
SHAPES = [
    (1, 4, 2, 1, 64, 64, 100),
    (2, 6, 2, 5, 80, 48, 140),
    (1, 9, 1, 8, 16, 16, 300),
    (1, 3, 1, 2, 256, 256, 40),
    (1, 3, 3, 1, 96, 96, 16),
]


def sample(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys and values are the front of a longer cache, and queries come as models give them, heads last."""
    batch, heads, groups, width, head, size, slots = shape
    generator = torch.Generator().manual_seed(3)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator).to(dtype)

    query = normal(batch, width, heads, head).transpose(1, 2)
    key, value = (
        normal(batch, groups, slots + 9, head)[:, :, :slots],
        normal(batch, slots, groups, size).transpose(1, 2),
    )
    mask = torch.rand(batch, 1, width, slots, generator=generator) < 0.4
    mask[..., slots * 2 // 3 :] = False
    mask[..., 3] = True
    if width > 1:
        mask[:, :, 1] = False
    return query, key, value, mask


def why_wrong(shape: tuple[int, ...], dtype: torch.dtype, softcap: float | None, has_sinks: bool, splits: int) -> str:
    """The empty string if all is well."""
    query, key, value, mask = inputs = sample(shape, dtype)
    sinks = torch.linspace(-2, 2, shape[1]) if has_sinks else None
    scale = shape[4] ** -0.5
    expected = tree_attention_reference(query.double(), key.double(), value.double(), mask, scale, softcap, sinks)
    with poisoned_empty():
        actual = triton.launch(*inputs, scale, softcap, sinks, splits=splits or None)
    if not rms_ratio(actual, expected) <= RATIO[dtype]:
        return f"rms ratio {rms_ratio(actual, expected):.3g}"
    if shape[3] > 1 and actual[:, :, 1].abs().max() != 0:
        return "a row that attends to nothing is not zero"
    if not torch.equal(actual, triton.launch(*inputs, scale, softcap, sinks, splits=splits or None)):
        return "other bits in a second run"
    wrong = triton.launch(query, key, value, mask.roll(1, dims=-1), scale, softcap, sinks, splits=splits or None)
    return "" if rms_ratio(wrong, expected) > 10 * RATIO[dtype] else "the control passed: a mask that is one slot off"


# shape, dtype, slots of a page (blocks have 32, 32, 16, 64 and 16 slots), splits, first slots of the sliding windows
PAGED = [
    (SHAPES[0], torch.float32, 16, 3, (0,)),
    (SHAPES[1], torch.float32, 128, 0, (70, 3)),
    ((2, 6, 2, 3, 256, 256, 77), torch.float32, 4, 1, (41, 0)),
    (SHAPES[0], torch.float16, 16, 0, (57,)),
    ((3, 4, 2, 1, 256, 64, 61), torch.float16, 32, 2, (0, 33, 17)),
]


def why_paged_wrong(
    shape: tuple[int, ...], dtype: torch.dtype, page: int, splits: int, starts: tuple[int, ...], kind: torch.dtype
) -> str:
    """The empty string if all is well; pages before the window and behind the text hold NaN and are not even owned."""
    query, key, value, mask = sample(shape, dtype)
    for mask_row, start in zip(mask, starts, strict=True):
        mask_row[..., :start] = False
    key_pages, value_pages, paged_mask, table = into_pages(key, value, mask, page, dtype=kind)
    scale = shape[4] ** -0.5
    expected = tree_attention_reference(query.double(), key.double(), value.double(), mask, scale)
    rest = (key_pages, value_pages, paged_mask, scale)
    with poisoned_empty():
        actual = triton.launch(query, *rest, table=table, splits=splits or None)
    if not rms_ratio(actual, expected) <= RATIO[dtype]:
        return f"rms ratio {rms_ratio(actual, expected):.3g}"
    if not torch.equal(actual, tree_attention(query, *rest, table=table)) and not splits:
        return "other bits through the public function"
    wrong = triton.launch(query, *rest, table=table.roll(1, dims=1), splits=splits or None)
    return "" if not rms_ratio(wrong, expected) <= 10 * RATIO[dtype] else "the control passed: a table that is rolled"


def why_far_wrong() -> str:
    """Pages 2**30 elements apart: offsets of 32 bits would be negative. Untouched, 4 GiB are address space alone."""
    query, key, value, mask = sample((1, 4, 2, 1, 64, 64, 32), torch.float16)
    stride = 2**30
    arena = torch.empty(2 * stride + 2 * key.numel(), dtype=torch.float16)
    views = [arena.as_strided((3, 2, 16, 64), (stride, 1024, 64, 1), at) for at in (0, 2048)]
    for view, dense in zip(views, (key, value), strict=True):
        view[2], view[0] = dense[0, :, :16], dense[0, :, 16:]
    expected = tree_attention_reference(query, key, value, mask, 0.125)
    actual = triton.launch(query, *views, mask, 0.125, table=torch.tensor([[2, 0]], dtype=torch.int32))
    return "" if rms_ratio(actual, expected) <= RATIO[torch.float16] else "wrong"


def main() -> None:
    """Runs every case."""
    kinds = [(None, False, 0), (3.0, True, 3), (None, True, 1), (3.0, False, 1), (None, True, 3)]
    cases = [*itertools.product(SHAPES, [torch.float32], kinds), *itertools.product(SHAPES, [torch.float16], kinds[:2])]
    for shape, dtype, (softcap, sinks, splits) in cases:
        why = why_wrong(shape, dtype, softcap, sinks, splits)
        name = f"{shape} {dtype} softcap={softcap} sinks={sinks} splits={splits}"
        print(f"FAIL {name}: {why}" if why else f"ok {name}", flush=True)
    for number, case in enumerate(PAGED):
        why = why_paged_wrong(*case, (torch.int32, torch.int64)[number % 2])
        print(f"FAIL paged {case}: {why}" if why else f"ok paged {case}", flush=True)
    why = why_far_wrong()
    print(f"FAIL pages far apart: {why}" if why else "ok pages far apart", flush=True)
    inputs = sample(SHAPES[1], torch.float32)
    one_mask = inputs[3][:1]
    both = [tree_attention(*inputs[:3], m, 0.1) for m in (one_mask, one_mask.expand(2, -1, -1, -1))]
    apart = tree_attention_reference(*inputs[:3], one_mask, 0.1)
    good = torch.equal(*both) and rms_ratio(both[0], apart) <= 1e-6
    print("ok one mask for all sequences" if good else "FAIL one mask for all sequences")
    compiled = torch.compile(tree_attention, backend="aot_eager", fullgraph=True)(*inputs, 0.1)
    eager = tree_attention(*inputs, 0.1)
    good = torch.equal(compiled, eager) and compiled.stride() == eager.stride()
    print("ok compiled" if good else "FAIL compiled")
    *paged, table = into_pages(*inputs[1:], 16)
    compiled = torch.compile(tree_attention, backend="aot_eager", fullgraph=True)(inputs[0], *paged, 0.1, table=table)
    eager = tree_attention(inputs[0], *paged, 0.1, table=table)
    good = torch.equal(compiled, eager) and compiled.stride() == eager.stride()
    print("ok compiled with a table" if good else "FAIL compiled with a table")


if __name__ == "__main__":
    main()
