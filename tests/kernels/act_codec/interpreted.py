"""Run by test_interpreter.py in a process of its own, with TRITON_INTERPRET=1 set before Triton is first imported.

Prints one line a case: "ok NAME" or "FAIL NAME: why". The interpreter runs a custom reduction element by element, so
the tensors are small.
"""

from __future__ import annotations

import dataclasses
import itertools

import torch
from torch import Tensor

from ygglight.kernels.act_codec import INT4, INT8, CodecSpec, Packed, pack, reference, reference_mask, unpack

SPECS = [
    INT4,
    INT8,
    CodecSpec("int4", 32, 1),
    CodecSpec("int4", 128, 0, False),
    CodecSpec("int8", 256, 2, False),
    CodecSpec("int8", 16, 2),
]


def sample(dtype: torch.dtype) -> Tensor:
    """Values over six decades with constant, zero, signed-zero and infinite places, and an odd length."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(256 * 3 + 37, generator=generator) * (torch.rand(256 * 3 + 37, generator=generator) * 6).exp()
    x[0:128] = 3.1
    x[128:256] = 0.0
    x[130] = -0.0
    x[300] = torch.inf
    x[301] = -torch.inf
    x[520:524] = torch.inf
    return x.to(dtype)


def same_bytes(a: Packed, b: Packed) -> bool:
    """Whether two payloads hold the same bytes."""
    return all(
        torch.equal(u.view(torch.uint8), v.view(torch.uint8)) for u, v in zip(a.tensors(), b.tensors(), strict=True)
    )


def expected_decoding(p: Packed) -> Tensor:
    """The twin's decoding; for bfloat16 cut off instead of rounded, which is what the interpreter's cast does."""
    if p.dtype is not torch.bfloat16:
        return reference.unpack(p)
    assert p.offset is not None
    values = None if p.outlier_value is None else p.outlier_value.float()
    wide = dataclasses.replace(p, dtype=torch.float32, offset=p.offset.float(), outlier_value=values)
    return (reference.unpack(wide).view(torch.int32) >> 16 << 16).view(torch.float32).to(torch.bfloat16)


def main() -> None:
    """Runs every case."""
    for spec, dtype in itertools.product(SPECS, (torch.float32, torch.float16, torch.bfloat16)):
        name = f"{spec.name}/{spec.group}/{spec.outliers} {dtype}"
        x = sample(dtype)
        by_kernel, by_twin = pack(x, spec, 11), reference.pack(x, spec, 11)
        decoded, expected = unpack(by_twin), expected_decoding(by_twin)
        if not same_bytes(by_kernel, by_twin):
            print(f"FAIL {name}: payloads differ")
        elif not torch.equal(decoded.nan_to_num(7.0), expected.nan_to_num(7.0)):
            print(f"FAIL {name}: decodings differ")
        elif not torch.equal(decoded.isnan(), expected.isnan()):
            print(f"FAIL {name}: NaN places differ")
        else:
            print(f"ok {name}")
    nan = sample(torch.float32)
    nan[[5, 700, 701, 702]] = torch.nan
    agrees = torch.equal(unpack(pack(nan, INT4, 1)).isnan(), reference.unpack(reference.pack(nan, INT4, 1)).isnan())
    print("ok nan places" if agrees else "FAIL nan places")
    for dtype, numel in itertools.product((torch.bool, torch.float32, torch.bfloat16), (1, 8, 4099)):
        mask = (torch.rand(numel, generator=torch.Generator().manual_seed(1)) > 0.3).to(dtype)
        mask = mask if dtype is torch.bool else mask * -1.25
        spec = CodecSpec("mask")
        good = same_bytes(pack(mask, spec, 0), reference_mask.pack(mask))
        good = good and torch.equal(unpack(pack(mask, spec, 0)), mask)
        print(f"{'ok' if good else 'FAIL'} mask {dtype} {numel}")


if __name__ == "__main__":
    main()
