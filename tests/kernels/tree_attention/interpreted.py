"""Run by test_interpreter.py in a process of its own, with TRITON_INTERPRET=1 set before Triton is first imported.

Prints one line a case: "ok NAME" or "FAIL NAME: why". Never in bfloat16: the interpreter's dot of bfloat16 is garbage.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from ygglight.kernels.testing import poisoned_empty, rms_ratio
from ygglight.kernels.tree_attention import tree_attention, tree_attention_reference, triton

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
        actual = triton.launch(*inputs, scale, softcap, sinks, splits or None)
    if not rms_ratio(actual, expected) <= RATIO[dtype]:
        return f"rms ratio {rms_ratio(actual, expected):.3g}"
    if shape[3] > 1 and actual[:, :, 1].abs().max() != 0:
        return "a row that attends to nothing is not zero"
    if not torch.equal(actual, triton.launch(*inputs, scale, softcap, sinks, splits or None)):
        return "other bits in a second run"
    wrong = triton.launch(query, key, value, mask.roll(1, dims=-1), scale, softcap, sinks, splits or None)
    return "" if rms_ratio(wrong, expected) > 10 * RATIO[dtype] else "the control passed: a mask that is one slot off"


def main() -> None:
    """Runs every case."""
    kinds = [(None, False, 0), (3.0, True, 3), (None, True, 1), (3.0, False, 1), (None, True, 3)]
    cases = [*itertools.product(SHAPES, [torch.float32], kinds), *itertools.product(SHAPES, [torch.float16], kinds[:2])]
    for shape, dtype, (softcap, sinks, splits) in cases:
        why = why_wrong(shape, dtype, softcap, sinks, splits)
        name = f"{shape} {dtype} softcap={softcap} sinks={sinks} splits={splits}"
        print(f"FAIL {name}: {why}" if why else f"ok {name}", flush=True)
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


if __name__ == "__main__":
    main()
