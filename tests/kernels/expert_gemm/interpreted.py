"""Run by test_interpreter.py in a process of its own, with TRITON_INTERPRET=1 set before Triton is first imported.

Prints one line a case: "ok NAME" or "FAIL NAME: why". Never in bfloat16: the interpreter's dot of bfloat16 is garbage.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from ygglight.kernels.expert_gemm import expert_mlp, expert_mlp_int4, expert_mlp_int4_reference, expert_mlp_reference
from ygglight.kernels.expert_gemm.int4 import Int4Weight, pack_codes
from ygglight.kernels.testing import poisoned_empty, rms_ratio

RATIO = {torch.float32: 2e-6, torch.float16: 2e-3}
EXPERTS = 5


def routes(pairs: int) -> Tensor:
    """More than a tile of rows for one expert, none for another, two rows for nobody."""
    experts = torch.randint(0, EXPERTS - 1, (pairs,), generator=torch.Generator().manual_seed(5))
    experts[pairs // 3 :] = torch.where(torch.arange(pairs - pairs // 3) % 2 == 0, 2, experts[pairs // 3 :])
    if pairs > 4:
        experts[[1, pairs - 1]] = -1
    return experts


def slots(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
    """Views of slabs, as a cache of experts holds them: each expert's tensors in one run of bytes, NaN between them."""
    generator = torch.Generator().manual_seed(7)
    sizes = [-(-torch.Size(shape).numel() * dtype.itemsize // 256) * 256 for shape in shapes]
    slabs = torch.full((EXPERTS, (sum(sizes) + 256) // dtype.itemsize), torch.nan, dtype=dtype)
    views, start = [], 0
    for shape, size in zip(shapes, sizes, strict=True):
        count = torch.Size(shape).numel()
        view = slabs[:, start : start + count].unflatten(1, shape)
        view.copy_(torch.randn(EXPERTS, *shape, generator=generator) / shape[-1] ** 0.5)
        views.append(view)
        start += size // dtype.itemsize
    return views


def codes(rows: int, columns: int, group: int) -> Int4Weight:
    """Random codes, all sixteen of them."""
    generator = torch.Generator().manual_seed(11)
    numbers = torch.randint(0, 16, (EXPERTS, rows, columns), generator=generator, dtype=torch.uint8)
    scale = (torch.rand(EXPERTS, rows, columns // group, generator=generator) + 0.5) / 5 / columns**0.5
    return Int4Weight(pack_codes(numbers, group), scale.bfloat16())


def clamped(gate_up: Tensor) -> Tensor:
    """An activation of its own, of interleaved gate and up (as that of gpt-oss)."""
    gate, up = gate_up[..., ::2].clamp(max=2.0), gate_up[..., 1::2]
    return (up + 1) * gate * torch.sigmoid(gate * 1.702)


def compare(call: Any, reference: Any, x: Tensor, experts: Tensor, *args: Any, wide: Any, **options: Any) -> str:
    """The empty string if all is well."""
    ratio = RATIO[x.dtype]
    expected = reference(x.double(), experts, *wide, **options)
    with poisoned_empty():
        actual = call(x, experts, *args, **options)
    if not rms_ratio(actual, expected) <= ratio:
        return f"rms ratio {rms_ratio(actual, expected):.3g}"
    if (experts < 0).any() and actual[experts < 0].abs().max() != 0:
        return "rows of no expert are not zero"
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    some = order[: len(x) // 2 + 1]
    # To the bit on a GPU (test_gpu.py); here numpy's product decides, which minds where a row lies.
    if not rms_ratio(call(x[some], experts[some].int(), *args, **options), actual[some].double()) <= ratio:
        return "a row differs among fewer rows, in another order"
    moved = torch.where(experts >= 0, (experts + 1) % EXPERTS, experts)
    return "" if rms_ratio(call(x, moved, *args, **options), expected) > 10 * ratio else "the control passed"


def why_wrong(pairs: int, sizes: tuple[int, int], dtype: torch.dtype, activation: Any, bias: bool, turned: bool) -> str:
    """Stacks in the dtype of the rows."""
    hidden, inner = sizes
    matrices = [(hidden, 2 * inner), (inner, hidden)] if turned else [(2 * inner, hidden), (hidden, inner)]
    gate_up, down, *rest = slots([*matrices, (2 * inner,), (hidden,)], dtype)
    x = torch.randn(pairs, hidden, generator=torch.Generator().manual_seed(3)).to(dtype)
    biases = tuple(rest) if bias else None
    options = {"activation": activation, "transposed": turned}
    return compare(
        lambda *a, **o: expert_mlp(*a, biases=biases, **o),
        lambda *a, **o: expert_mlp_reference(*a, biases=biases and tuple(b.double() for b in biases), **o),
        x, routes(pairs), gate_up, down, wide=(gate_up.double(), down.double()), **options,
    )  # fmt: skip


def why_codes_wrong(
    pairs: int, sizes: tuple[int, int], groups: tuple[int, int], dtype: torch.dtype, activation: Any, bias: bool
) -> str:
    """Weights in four bits."""
    hidden, inner = sizes
    gate_up, down = codes(2 * inner, hidden, groups[0]), codes(hidden, inner, groups[1])
    biases = tuple(slots([(2 * inner,), (hidden,)], dtype)) if bias else None
    x = torch.randn(pairs, hidden, generator=torch.Generator().manual_seed(3)).to(dtype)
    return compare(
        expert_mlp_int4, expert_mlp_int4_reference, x, routes(pairs), gate_up, down, wide=(gate_up, down),
        activation=activation, biases=biases,
    )  # fmt: skip


def main() -> None:
    """Runs every case."""
    kinds = [("silu", False, False), ("gelu", True, False), (clamped, True, True), ("silu", True, True)]
    shapes = [(1, (64, 32)), (9, (96, 40)), (37, (40, 72))]
    cases = [
        *itertools.product(shapes, [torch.float32], kinds),
        *itertools.product(shapes[1:2], [torch.float16], kinds),
    ]
    for (pairs, sizes), dtype, (activation, bias, turned) in cases:
        why = why_wrong(pairs, sizes, dtype, activation, bias, turned)
        name = f"{pairs} {sizes} {dtype} {activation} bias={bias} transposed={turned}"
        print(f"FAIL {name}: {why}" if why else f"ok {name}", flush=True)
    coded = [(1, (64, 32), (64, 32)), (10, (128, 96), (128, 32)), (37, (96, 64), (32, 64))]
    for (pairs, sizes, groups), dtype in zip(coded * 2, [*RATIO, *RATIO, *RATIO], strict=True):
        for activation, bias in (("silu", True), ("gelu", False), (clamped, True)):
            why = why_codes_wrong(pairs, sizes, groups, dtype, activation, bias)
            name = f"int4 {pairs} {sizes} {groups} {dtype} {activation} bias={bias}"
            print(f"FAIL {name}: {why}" if why else f"ok {name}", flush=True)


if __name__ == "__main__":
    main()
