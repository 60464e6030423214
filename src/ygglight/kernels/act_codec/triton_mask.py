# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Fused Triton kernels of the mask codec; the launchers are called with the right GPU already current."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ygglight.kernels.act_codec.spec import MASK, Packed, empty_packed

# 512 bytes of code, 4096 elements a program: 32 elements a thread, eight of them one byte.
BLOCK = 512
NUM_WARPS = 4


@triton.jit(do_not_specialize=["numel"])
def pack_mask_kernel(x_ptr, code_ptr, c_ptr, numel, HAS_VALUE: tl.constexpr, BLOCK: tl.constexpr):
    """Packs BLOCK bytes a program; `c_ptr` holds zero before the launch."""
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    bit = tl.arange(0, 8)[None, :]
    at = byte[:, None] * 8 + bit
    # As fp32: the interpreter compares bfloat16 by its bits, where -0 is not 0.
    x = tl.load(x_ptr + at, mask=at < numel, other=0).to(tl.float32)
    code = tl.sum((x != 0).to(tl.int32) << bit, 1)
    tl.store(code_ptr + byte, code.to(tl.uint8), mask=byte * 8 < numel)
    if HAS_VALUE:
        # Every program that saw a non-zero writes the same c, so the race is benign.
        high, low = tl.max(tl.max(x, 1), 0), tl.min(tl.min(x, 1), 0)
        c = tl.where(tl.abs(high) >= tl.abs(low), high, low)
        tl.store(c_ptr, c.to(c_ptr.dtype.element_ty), mask=c != 0)


@triton.jit(do_not_specialize=["numel"])
def unpack_mask_kernel(out_ptr, code_ptr, c_ptr, numel, HAS_VALUE: tl.constexpr, BLOCK: tl.constexpr):
    """Unpacks BLOCK bytes a program."""
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    bit = tl.arange(0, 8)[None, :]
    at = byte[:, None] * 8 + bit
    code = tl.load(code_ptr + byte, mask=byte * 8 < numel, other=0).to(tl.int32)
    bits = (code[:, None] >> bit) & 1
    if HAS_VALUE:
        c = tl.load(c_ptr)
        out = tl.where(bits != 0, c, 0.0).to(c.dtype)
    else:
        out = bits.to(tl.uint8)
    tl.store(out_ptr + at, out, mask=at < numel)


def pack(x: Tensor) -> Packed:
    """Compresses a mask in one launch.

    Args:
        x: [numel], contiguous, bool or floating with values in {0, c}.

    Returns:
        The payload, the same bytes as `reference_mask.pack`.
    """
    packed = empty_packed(x.numel(), x.dtype, MASK, x.device)
    if packed.offset is not None:
        packed.offset.zero_()
    if x.numel():
        has_value = packed.offset is not None
        pack_mask_kernel[(triton.cdiv(x.numel(), 8 * BLOCK),)](
            x if has_value else x.view(torch.uint8),
            packed.code,
            packed.offset if has_value else packed.code,
            x.numel(),
            HAS_VALUE=has_value,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )
    return packed


def unpack(packed: Packed) -> Tensor:
    """Restores a mask in one launch.

    Args:
        packed: from `pack`.

    Returns:
        [numel] in the original dtype.
    """
    out = torch.empty(packed.numel, dtype=packed.dtype, device=packed.code.device)
    if packed.numel:
        has_value = packed.offset is not None
        unpack_mask_kernel[(triton.cdiv(packed.numel, 8 * BLOCK),)](
            out if has_value else out.view(torch.uint8),
            packed.code,
            packed.offset if has_value else packed.code,
            packed.numel,
            HAS_VALUE=has_value,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )
    return out
