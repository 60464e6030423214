# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Fused Triton kernels of the affine codecs: one read of the values, one write of codes and metadata, and back.

The same bytes as `reference.py`: rounding by the add-2^23 trick, integer keys, IEEE division, and launches with
`enable_fp_fusion=False`, because a multiply and add contracted into one instruction rounds once where torch rounds
twice. Imported only when it is to run, so that `import ygglight` needs no Triton.

Shape of the work: a program takes ROWS groups; each group is read as four quarter tiles [ROWS, GROUP/4], so that
four values that are compared first lie in one thread and only log2(GROUP/4/8) = 2 shuffle levels remain at 16 bits.
Bytes moved at 16 bits and GROUP=128, INT4: pack 2 + 0.578, unpack 0.578 + 2 an element. Not yet timed on a GPU. The
sm_90 code for bfloat16 has 34 instructions an element for INT4 pack, 24 for INT8 pack, 18 and 8 for unpack; at 128 a
cycle and SM that bounds INT4 pack near 2.2 TB/s on 132 SMs at 1.75 GHz: about 70 % of an H100's copy bandwidth and half
of an H200's.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from ygglight.kernels.act_codec import triton_mask
from ygglight.kernels.act_codec.reference import padded_tail
from ygglight.kernels.act_codec.rounding import MULTIPLIER_1, MULTIPLIER_2, WEYL, seed_words
from ygglight.kernels.act_codec.spec import CodecSpec, Packed, empty_packed
from ygglight.kernels.act_codec.triton_rank import (
    finite_span,
    kept_or,
    key_of,
    merge_three,
    merge_two,
    sorted4,
    value_of,
)

_WEYL = tl.constexpr(WEYL)
_MULTIPLIER_1 = tl.constexpr(MULTIPLIER_1)
_MULTIPLIER_2 = tl.constexpr(MULTIPLIER_2)
_SMALLEST_SCALE = tl.constexpr(2.0**-100)
# 32 groups of 128 over 128 threads: 32 values a thread, so 16-byte loads at 16 bits and ~100 registers.
ROWS = 32
NUM_WARPS = 4


@triton.jit
def _hash(pair, word0, word1):
    h = pair * _WEYL + word0
    h = (h ^ (h >> 16)) * _MULTIPLIER_1
    h = h ^ word1
    h = (h ^ (h >> 15)) * _MULTIPLIER_2
    return h ^ (h >> 16)


@triton.jit
def _fixed(value, offset, inverse):
    """Quotient in units of 2^-15 codes, in the low 23 bits."""
    return ((value - offset[:, None]) * inverse[:, None] + 8388608.0).to(tl.int32, bitcast=True)


@triton.jit
def _store(code_ptr, at, live, first, second, noise, BITS: tl.constexpr, HALF: tl.constexpr, RANDOM: tl.constexpr):
    """Rounds the fixed-point quotients of a pair of tiles and writes their codes; `at` counts in code bytes."""
    if RANDOM:
        first = first + (noise & 32767)
        second = second + ((noise >> 16) & 32767)
    else:
        first = first + 16384
        second = second + 16384
    if BITS == 4:
        tl.store(code_ptr + at, (((first >> 15) & 15) | ((second >> 11) & 240)).to(tl.uint8), mask=live)
    else:
        tl.store(code_ptr + at, ((first >> 15) & 255).to(tl.uint8), mask=live)
        tl.store(code_ptr + at + HALF, ((second >> 15) & 255).to(tl.uint8), mask=live)


@triton.jit(do_not_specialize=["n_groups", "first_group", "word0", "word1"])
def pack_kernel(
    x_ptr,  # values, n_groups * GROUP
    code_ptr,  # uint8
    scale_ptr,  # bfloat16 [n_groups]
    offset_ptr,  # dtype of the values [n_groups]
    value_ptr,  # outlier values [n_groups, OUTLIERS], unread without outliers
    place_ptr,  # uint8 [n_groups, OUTLIERS]
    n_groups,
    first_group,  # number of the first group, for the random counter
    word0,
    word1,
    widened,  # (1 + 2^-16) / levels, fp32
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    OUTLIERS: tl.constexpr,
    RANDOM: tl.constexpr,
    EXACT: tl.constexpr,  # values of 16 bits: keys lose nothing
    ROWS: tl.constexpr,
):
    """Packs ROWS groups a program; pointers start at the first group of the launch."""
    QUARTER: tl.constexpr = GROUP // 4
    PLACES: tl.constexpr = GROUP - 1
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live_row = row < n_groups
    live = live_row[:, None]
    col = tl.arange(0, QUARTER)[None, :]
    at = x_ptr + row[:, None] * GROUP + col
    v0 = tl.load(at, mask=live, other=0.0).to(tl.float32)
    v1 = tl.load(at + QUARTER, mask=live, other=0.0).to(tl.float32)
    v2 = tl.load(at + 2 * QUARTER, mask=live, other=0.0).to(tl.float32)
    v3 = tl.load(at + 3 * QUARTER, mask=live, other=0.0).to(tl.float32)

    if OUTLIERS == 0:
        # Whole bits, no place: exact at fp32 too. The map is its own inverse, with no low bits to spare.
        k0, k1, k2, k3 = key_of(v0, 0, 0, True), key_of(v1, 0, 0, True), key_of(v2, 0, 0, True), key_of(v3, 0, 0, True)
        high = value_of(tl.max(tl.maximum(tl.maximum(k0, k1), tl.maximum(k2, k3)), 1), 0)
        low = value_of(tl.min(tl.minimum(tl.minimum(k0, k1), tl.minimum(k2, k3)), 1), 0)
        span = finite_span(high, low)
    else:
        k0 = key_of(v0, col, PLACES, EXACT)
        k1 = key_of(v1, col + QUARTER, PLACES, EXACT)
        k2 = key_of(v2, col + 2 * QUARTER, PLACES, EXACT)
        k3 = key_of(v3, col + 3 * QUARTER, PLACES, EXACT)
        s1, s2, s3, s4 = sorted4(k0, k1, k2, k3)
        if OUTLIERS == 1:
            a1, a2, z1, z2 = tl.reduce((s1, s2, s4, s3), 1, merge_two)
            from_top = finite_span(value_of(a2, PLACES), value_of(z1, PLACES))
            from_bottom = finite_span(value_of(a1, PLACES), value_of(z2, PLACES))
            bottom = from_bottom < from_top
            span = tl.where(bottom, from_bottom, from_top)
            slot0 = tl.where(bottom, z1, a1)
            slot1 = slot0
            high_key, low_key = tl.where(bottom, a1, a2), tl.where(bottom, z2, z1)
        else:
            a1, a2, a3, z1, z2, z3 = tl.reduce((s1, s2, s3, s4, s3, s2), 1, merge_three)
            span = finite_span(value_of(a2, PLACES), value_of(z2, PLACES))
            from_top = finite_span(value_of(a3, PLACES), value_of(z1, PLACES))
            from_bottom = finite_span(value_of(a1, PLACES), value_of(z3, PLACES))
            top = from_top < span
            span = tl.where(top, from_top, span)
            bottom = from_bottom < span
            span = tl.where(bottom, from_bottom, span)
            top = top & (bottom == 0)
            slot0 = tl.where(bottom, z2, a1)
            slot1 = tl.where(top, a2, z1)
            high_key = tl.where(bottom, a1, tl.where(top, a3, a2))
            low_key = tl.where(bottom, z3, tl.where(top, z1, z2))
        high, low = value_of(high_key, PLACES), value_of(low_key, PLACES)
        if not EXACT:
            p, n = float("inf"), float("-inf")
            lows = tl.minimum(kept_or(v0, k0, slot0, slot1, p), kept_or(v1, k1, slot0, slot1, p))
            lows = tl.minimum(lows, tl.minimum(kept_or(v2, k2, slot0, slot1, p), kept_or(v3, k3, slot0, slot1, p)))
            highs = tl.maximum(kept_or(v0, k0, slot0, slot1, n), kept_or(v1, k1, slot0, slot1, n))
            highs = tl.maximum(highs, tl.maximum(kept_or(v2, k2, slot0, slot1, n), kept_or(v3, k3, slot0, slot1, n)))
            low, high = tl.min(lows, 1), tl.max(highs, 1)
            # A NaN that was kept shows in the span of the keys, since max and min pass over it.
            span = tl.where(span < float("inf"), finite_span(high, low), span)
        source = x_ptr + row * GROUP
        place0 = slot0 & PLACES
        tl.store(place_ptr + row * OUTLIERS, place0.to(tl.uint8), mask=live_row)
        tl.store(value_ptr + row * OUTLIERS, tl.load(source + place0, mask=live_row), mask=live_row)
        if OUTLIERS == 2:
            place1 = slot1 & PLACES
            tl.store(place_ptr + row * OUTLIERS + 1, place1.to(tl.uint8), mask=live_row)
            tl.store(value_ptr + row * OUTLIERS + 1, tl.load(source + place1, mask=live_row), mask=live_row)

    finite = span < float("inf")
    wanted = tl.maximum(span * widened, _SMALLEST_SCALE)
    wanted = tl.where(finite & (span > 0), wanted, 0.0)
    bits = (wanted.to(tl.int32, bitcast=True) + 65535) >> 16
    scale = (bits << 16).to(tl.float32, bitcast=True)
    inverse = tl.where(scale > 0, tl.div_rn(32768.0, tl.where(scale > 0, scale, 1.0)), 0.0)
    offset = tl.where(finite, low + 0.0, 0.0)
    # 0x7fc0 is the NaN of bfloat16, written as bits: a float cast could pick another.
    tl.store(scale_ptr + row, tl.where(finite, bits, 0x7FC0).to(tl.int16).to(tl.bfloat16, bitcast=True), mask=live_row)
    tl.store(offset_ptr + row, offset.to(offset_ptr.dtype.element_ty), mask=live_row)

    pair = (first_group + row[:, None]) * (GROUP // 2) + col
    f0, f1 = _fixed(v0, offset, inverse), _fixed(v1, offset, inverse)
    f2, f3 = _fixed(v2, offset, inverse), _fixed(v3, offset, inverse)
    noise0, noise1 = pair.to(tl.int32), pair.to(tl.int32)
    if RANDOM:
        noise0 = _hash(pair.to(tl.int32), word0, word1)
        noise1 = _hash((pair + QUARTER).to(tl.int32), word0, word1)
    out = row[:, None] * (GROUP * BITS // 8) + col
    _store(code_ptr, out, live, f0, f2, noise0, BITS, GROUP // 2, RANDOM)
    _store(code_ptr, out + QUARTER, live, f1, f3, noise1, BITS, GROUP // 2, RANDOM)


@triton.jit
def _exact(decoded, col, value_ptr, place_ptr, row, live_row, OUTLIERS: tl.constexpr):
    """Puts the outliers of each row in their places."""
    for j in tl.static_range(OUTLIERS):
        place = tl.load(place_ptr + row * OUTLIERS + j, mask=live_row, other=0).to(tl.int32)
        value = tl.load(value_ptr + row * OUTLIERS + j, mask=live_row)
        decoded = tl.where(col == place[:, None], value[:, None], decoded)
    return decoded


@triton.jit(do_not_specialize=["n_groups"])
def unpack_kernel(
    out_ptr,
    code_ptr,
    scale_ptr,
    offset_ptr,
    value_ptr,
    place_ptr,
    n_groups,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    OUTLIERS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Unpacks ROWS groups a program; each program writes its groups once, outliers included."""
    HALF: tl.constexpr = GROUP // 2
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live_row = row < n_groups
    live = live_row[:, None]
    col = tl.arange(0, HALF)[None, :]
    at = code_ptr + row[:, None] * (GROUP * BITS // 8) + col
    if BITS == 4:
        both = tl.load(at, mask=live, other=0).to(tl.int32)
        first, second = both & 15, both >> 4
    else:
        first = tl.load(at, mask=live, other=0).to(tl.int32)
        second = tl.load(at + HALF, mask=live, other=0).to(tl.int32)
    scale = tl.load(scale_ptr + row, mask=live_row, other=0.0).to(tl.float32)[:, None]
    offset = tl.load(offset_ptr + row, mask=live_row, other=0.0).to(tl.float32)[:, None]
    kind = out_ptr.dtype.element_ty
    first = (first.to(tl.float32) * scale + offset).to(kind)
    second = (second.to(tl.float32) * scale + offset).to(kind)
    first = _exact(first, col, value_ptr, place_ptr, row, live_row, OUTLIERS)
    second = _exact(second, col + HALF, value_ptr, place_ptr, row, live_row, OUTLIERS)
    to = out_ptr + row[:, None] * GROUP + col
    tl.store(to, first, mask=live)
    tl.store(to + HALF, second, mask=live)


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Makes the tensor's GPU the current one: Triton launches on the current device, whatever its arguments."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _launch_pack(x: Tensor, packed: Packed, first: int, groups: int, words: tuple[int, int]) -> None:
    spec = packed.spec
    assert packed.scale is not None and packed.offset is not None
    width = spec.block * (4 if spec.name == "int4" else 8) // 8
    pack_kernel[(triton.cdiv(groups, ROWS),)](
        x,
        packed.code[first * width :],
        packed.scale[first:],
        packed.offset[first:],
        packed.offset if packed.outlier_value is None else packed.outlier_value[first:],
        packed.code if packed.outlier_index is None else packed.outlier_index[first:],
        groups,
        first,
        *words,
        (1.0 + 2.0**-16) / spec.levels,
        GROUP=spec.group,
        BITS=4 if spec.name == "int4" else 8,
        OUTLIERS=spec.outliers,
        RANDOM=spec.stochastic,
        EXACT=x.dtype is not torch.float32,
        ROWS=ROWS,
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )


def pack(x: Tensor, spec: CodecSpec, seed: int) -> Packed:
    """Compresses a flat tensor in one launch, or two when the last group is short.

    Args:
        x: [numel], contiguous.
        spec: a codec with `has_kernel`.
        seed: of the stochastic rounding.

    Returns:
        The payload, the same bytes as `reference.pack`.
    """
    if spec.name == "mask":
        with on_device(x):
            return triton_mask.pack(x)
    packed = empty_packed(x.numel(), x.dtype, spec, x.device)
    whole, words = x.numel() // spec.group, seed_words(seed)
    with on_device(x):
        if whole:
            _launch_pack(x, packed, 0, whole, words)
        if whole * spec.group < x.numel():
            _launch_pack(padded_tail(x, spec.group), packed, whole, 1, words)
    return packed


def _launch_unpack(out: Tensor, packed: Packed, first: int, groups: int) -> None:
    spec = packed.spec
    assert packed.scale is not None and packed.offset is not None
    width = spec.block * (4 if spec.name == "int4" else 8) // 8
    unpack_kernel[(triton.cdiv(groups, ROWS),)](
        out,
        packed.code[first * width :],
        packed.scale[first:],
        packed.offset[first:],
        packed.offset if packed.outlier_value is None else packed.outlier_value[first:],
        packed.code if packed.outlier_index is None else packed.outlier_index[first:],
        groups,
        GROUP=spec.group,
        BITS=4 if spec.name == "int4" else 8,
        OUTLIERS=spec.outliers,
        ROWS=ROWS,
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )


def unpack(packed: Packed) -> Tensor:
    """Decodes a payload in one launch, or two when the last group is short.

    Args:
        packed: from `pack`.

    Returns:
        [numel] in the original dtype, the same values as `reference.unpack`.
    """
    with on_device(packed.code):
        if packed.spec.name == "mask":
            return triton_mask.unpack(packed)
        group, numel = packed.spec.group, packed.numel
        out = torch.empty(numel, dtype=packed.dtype, device=packed.code.device)
        whole = numel // group
        if whole:
            _launch_unpack(out, packed, 0, whole)
        if whole * group < numel:
            tail = torch.empty(group, dtype=packed.dtype, device=out.device)
            _launch_unpack(tail, packed, whole, 1)
            out[whole * group :].copy_(tail[: numel - whole * group])
        return out
