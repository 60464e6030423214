"""Affine codecs (int4, int8) in plain torch: the truth for the Triton kernel, and what a CPU runs.

Layout. Blocks of `group` elements; in a block, element j and element j + group/2 share a byte (int4: low and high
nibble) and a hash, so that every pass here is a contiguous half row. The last, short block is filled up with the
median of its own elements (never an outlier, and exact for a constant tail).

Outliers. Of all ways to take k elements out of a group, the one that leaves the smallest range removes s from the top
and k - s from the bottom; all k + 1 splits are compared, so the choice is the optimum and not a heuristic (distance
from the mean takes the wrong end when the group is skewed, and removing greedily fails when the two largest are
equal). Elements are ranked by an integer key: the fp32 bits made monotone, low bits replaced by the place in the
group. So ties are settled alike everywhere, NaN and Inf sort outside every finite value and take the outlier places
first, and one reduction yields value and place. For 16-bit values the replaced bits are zero and nothing is lost;
for fp32 ranks are exact to 2^-16, and the range is taken again over the values themselves.

Metadata. The offset is an element's own value, hence exact in the tensor's dtype; the scale is bfloat16 rounded up
(range of fp32, at most 2^-7 too large), so the codes always cover the range and need no clamp.

Error bound, with s the stored scale: |x - x̂| <= s/2 (nearest) or s (stochastic), plus s * 2^-14 for the fixed-point
quotient, plus half a unit in the last place of x̂ in the tensor's dtype, plus 3 * 2^-24 * (|offset| + range).

Non-finite. A group with more non-finite elements than outlier places, or whose range exceeds the fp32 maximum,
decodes to NaN as a whole (outlier places excepted), so that a GradScaler sees it. Codes at outlier places and in
NaN groups are never read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ygglight.kernels.act_codec.rounding import FRACTION_BITS, FRACTION_MASK, HALF, WEYL, hash_pairs_, seed_words
from ygglight.kernels.act_codec.spec import CodecSpec, Packed, empty_packed

# Elements processed at once: 2.6 MB of scratch. int4 pack measured 7.0 / 4.2 / 2.9 ns an element at 64 / 128 / 256 Ki
# (2 cores, fp32, 1 Mi elements): below, the ~70 op calls a chunk cost more than the cache misses that they save.
CHUNK = 256 * 1024
MAGIC = float(1 << 23)
# 1/levels, widened by 2^-16 so that (x - lo)/scale stays below the last code after every fp32 rounding.
WIDEN = 1.0 + 2.0**-16
# Below this a scale's reciprocal times 2^15 would overflow fp32; the error is then at most 2^-100.
SMALLEST_SCALE = 2.0**-100
_SIGN_FLIP = 0x7FFFFFFF
# Written as bits, since a cast of a float NaN to bfloat16 gives other bits on other devices.
_BFLOAT16_NAN = 0x7FC0


def split_order(outliers: int) -> list[int]:
    """How many of the k outliers come from the top, in the order in which ties are settled: even split first."""
    return sorted(range(outliers + 1), key=lambda top: (abs(2 * top - outliers), -top))


def padded_tail(x: Tensor, block: int) -> Tensor:
    """The elements behind the last whole block, filled up to a block with their own median (NaN ignored).

    Args:
        x: [numel].
        block: elements in a block.

    Returns:
        [1, block] in the dtype of `x`.
    """
    tail = x[x.numel() // block * block :]
    fill = tail.float().nanmedian().to(x.dtype)
    return torch.cat([tail, fill.expand(block - tail.numel())]).view(1, block)


def _values_of_keys(keys: Tensor, mask: int) -> Tensor:
    """Turns keys back into the values that they rank (low bits zero). int32 to float32, same shape."""
    keys = keys & ~mask
    return (keys ^ ((keys >> 31) & (_SIGN_FLIP & ~mask))).view(torch.float32)


def _find_range(
    values: Tensor, keys: Tensor, spec: CodecSpec, exact_keys: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Smallest and largest kept value of each group and the places of its outliers.

    Args:
        values: float32 [groups, group]; overwritten at outlier places when the keys are inexact.
        keys: int32 scratch [groups, group].
        spec: the codec.
        exact_keys: the values came from a 16-bit dtype.

    Returns:
        low [groups, 1], high [groups, 1], places int64 [groups, outliers] or None.
    """
    k = spec.outliers
    if k == 0:
        return values.amin(1, keepdim=True), values.amax(1, keepdim=True), None
    mask = spec.group - 1
    bits = values.view(torch.int32)
    torch.bitwise_right_shift(bits, 31, out=keys)
    keys.bitwise_and_(_SIGN_FLIP & ~mask).bitwise_xor_(bits)
    if not exact_keys:
        keys.bitwise_and_(~mask)
    keys.bitwise_or_(torch.arange(spec.group, dtype=torch.int32, device=keys.device))
    top = [keys.amax(1, keepdim=True)]
    for _ in range(k):
        keys.scatter_(1, (top[-1] & mask).long(), -(1 << 31))
        top.append(keys.amax(1, keepdim=True))
    taken = torch.cat(top[:k], 1)
    keys.scatter_(1, (taken & mask).long(), taken)
    bottom = [keys.amin(1, keepdim=True)]
    for _ in range(k):
        keys.scatter_(1, (bottom[-1] & mask).long(), (1 << 31) - 1)
        bottom.append(keys.amin(1, keepdim=True))

    high, low = (_values_of_keys(torch.cat(ends, 1), mask) for ends in (top, bottom))
    best = torch.full_like(high[:, :1], torch.inf)
    splits = split_order(k)
    best_low, best_high, low_key, from_top = best, best, bottom[0], torch.full_like(bottom[0], splits[0])
    for s in splits:
        low_s, high_s, key_s = low[:, k - s : k - s + 1], high[:, s : s + 1], bottom[k - s]
        # A NaN span compares as not better, so a split that keeps a NaN or Inf wins only when every one does.
        better = high_s - low_s < best
        best = torch.where(better, high_s - low_s, best)
        best_low, best_high = torch.where(better, low_s, best_low), torch.where(better, high_s, best_high)
        low_key, from_top = torch.where(better, key_s, low_key), torch.where(better, s, from_top)
    slots = [torch.where(from_top > j, top[j], bottom[k - 1 - j]) for j in range(k)]
    places = (torch.cat(slots, 1) & mask).long()
    if exact_keys:
        return best_low, best_high, places
    kept = values.gather(1, (low_key & mask).long())
    values.scatter_(1, places, kept.expand(-1, k))
    return values.amin(1, keepdim=True), values.amax(1, keepdim=True), places


def _scale_up(low: Tensor, high: Tensor, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scale (bfloat16, rounded up), its reciprocal times 2^15 (float32), and the offset (float32), each [groups, 1]."""
    span = high - low
    finite = span < torch.inf
    wanted = (span * (WIDEN / levels)).clamp_min(SMALLEST_SCALE)
    wanted = torch.where(finite & (span > 0), wanted, 0.0)
    bits = ((wanted.view(torch.int32) + 0xFFFF) >> 16) << 16
    stored = torch.where(finite, bits >> 16, _BFLOAT16_NAN).to(torch.int16).view(torch.bfloat16)
    scale = bits.view(torch.float32)
    inverse = torch.where(finite & (scale > 0), float(1 << FRACTION_BITS) / scale, 0.0)
    # + 0.0 turns -0 into +0, so that a group of mixed zeros has one offset whichever of them was found first.
    return stored, inverse, torch.where(finite, low + 0.0, 0.0)


def _pack_blocks(x: Tensor, first: int, packed: Packed, scratch: _Scratch, words: tuple[int, int]) -> None:
    """Packs whole blocks `x` [blocks, block] into `packed` from block `first` on."""
    spec, blocks, half = packed.spec, x.shape[0], x.shape[1] // 2
    values, keys, weyl = scratch.values[:blocks], scratch.keys[:blocks], scratch.weyl[:blocks]
    assert packed.scale is not None and packed.offset is not None
    rows = slice(first, first + blocks)
    if spec.group:
        values.copy_(x)
        low, high, places = _find_range(values, keys, spec, exact_keys=x.dtype is not torch.float32)
        scale, inverse, offset = _scale_up(low, high, spec.levels)
        packed.scale[rows].copy_(scale.view(-1))
        packed.offset[rows].copy_(offset.view(-1))
        if places is not None:
            assert packed.outlier_value is not None and packed.outlier_index is not None
            outliers = x.gather(1, places)
            packed.outlier_value[rows].copy_(outliers)
            packed.outlier_index[rows].copy_(places)
            values.scatter_(1, places, outliers.float())
        values.sub_(offset)
    else:
        inverse = scratch.whole_inverse
        torch.sub(x, packed.offset, out=values)
    fixed = values.mul_(inverse).add_(MAGIC).view(torch.int32)
    first_half, second_half = fixed[:, :half], fixed[:, half:]
    if spec.stochastic:
        noise, spare = keys.view(2, blocks, half)
        hash_pairs_(noise, spare, weyl, first * half, words)
        first_half.add_(torch.bitwise_and(noise, FRACTION_MASK, out=spare))
        second_half.add_(noise.bitwise_right_shift_(16).bitwise_and_(FRACTION_MASK))
    else:
        fixed.add_(HALF)
    if spec.name == "int4":
        first_half.bitwise_right_shift_(FRACTION_BITS).bitwise_and_(15)
        second_half.bitwise_right_shift_(FRACTION_BITS - 4).bitwise_and_(0xF0)
        packed.code.view(-1, half)[rows].copy_(first_half.bitwise_or_(second_half))
    else:
        packed.code.view(-1, 2 * half)[rows].copy_(fixed.bitwise_right_shift_(FRACTION_BITS))


class _Scratch:
    """Buffers of one chunk: 4 + 4 + 2 bytes an element."""

    def __init__(self, numel: int, block: int, device: torch.device) -> None:
        blocks = max(1, min(numel, CHUNK) // block)
        self.values = torch.empty(blocks, block, dtype=torch.float32, device=device)
        self.keys = torch.empty(blocks, block, dtype=torch.int32, device=device)
        self.weyl = torch.arange(blocks * block // 2, dtype=torch.int32, device=device).mul_(WEYL).view(blocks, -1)
        self.whole_inverse = self.values[:0]


def pack(x: Tensor, spec: CodecSpec, seed: int) -> Packed:
    """Compresses a flat tensor with an affine codec.

    Args:
        x: [numel], contiguous, float32, float16 or bfloat16.
        spec: "int4" or "int8".
        seed: of the stochastic rounding.

    Returns:
        The payload, on the device of `x`.
    """
    numel, block = x.numel(), spec.block
    packed = empty_packed(numel, x.dtype, spec, x.device)
    if numel == 0:
        return packed
    assert packed.scale is not None and packed.offset is not None
    scratch, words = _Scratch(numel, block, x.device), seed_words(seed)
    if not spec.group:
        low, high = (ends.float().view(1, 1) for ends in (x.amin(), x.amax()))
        scale, scratch.whole_inverse, offset = _scale_up(low, high, spec.levels)
        packed.scale.copy_(scale.view(-1))
        packed.offset.copy_(offset.view(-1))
    whole, step = numel // block, scratch.values.shape[0]
    blocks = x[: whole * block].view(whole, block)
    for first in range(0, whole, step):
        _pack_blocks(blocks[first : first + step], first, packed, scratch, words)
    if whole * block < numel:
        _pack_blocks(padded_tail(x, block), whole, packed, scratch, words)
    return packed


def _unpack_blocks(packed: Packed, first: int, out: Tensor, values: Tensor, nibbles: Tensor) -> None:
    """Decodes `out` [blocks, block] from block `first` on; `values` is float32 scratch, or `out` itself."""
    spec, (blocks, block) = packed.spec, out.shape
    assert packed.scale is not None and packed.offset is not None
    rows = slice(first, first + blocks)
    if spec.name == "int4":
        code = packed.code.view(-1, block // 2)[rows]
        values[:, : block // 2].copy_(torch.bitwise_and(code, 15, out=nibbles))
        values[:, block // 2 :].copy_(torch.bitwise_right_shift(code, 4, out=nibbles))
    else:
        values.copy_(packed.code.view(-1, block)[rows])
    pick = rows if spec.group else slice(0, 1)
    values.mul_(packed.scale[pick].float().view(-1, 1)).add_(packed.offset[pick].float().view(-1, 1))
    if out.dtype is not values.dtype:
        out.copy_(values)
    if packed.outlier_value is not None and packed.outlier_index is not None:
        out.scatter_(1, packed.outlier_index[rows].long(), packed.outlier_value[rows])


def workspace_nbytes(numel: int, spec: CodecSpec) -> int:
    """Upper bound of the transient bytes of `pack` and `unpack` here, beyond values and payload.

    Args:
        numel: elements of the tensor.
        spec: an affine codec.

    Returns:
        Bytes. 10 an element of one chunk; 20 words a group, and 10 more for each outlier, for the per-group columns.
    """
    blocks = max(1, min(numel, CHUNK) // spec.block)
    tail = 24 * spec.block
    return blocks * (10 * spec.block + 8 * (20 + 10 * spec.outliers)) + tail + 4096


def unpack(packed: Packed) -> Tensor:
    """Decodes an affine payload.

    Args:
        packed: from `pack`.

    Returns:
        [numel] in the original dtype, on the payload's device.
    """
    numel, block, device = packed.numel, packed.spec.block, packed.code.device
    out = torch.empty(numel, dtype=packed.dtype, device=device)
    if numel == 0:
        return out
    whole = numel // block
    step = max(1, min(numel, CHUNK) // block)
    nibbles = torch.empty(step, block // 2, dtype=torch.uint8, device=device)
    direct = packed.dtype is torch.float32
    values = torch.empty(1 if direct else step, block, dtype=torch.float32, device=device)
    blocks = out[: whole * block].view(whole, block)
    for first in range(0, whole, step):
        part = blocks[first : first + step]
        _unpack_blocks(packed, first, part, part if direct else values[: len(part)], nibbles[: len(part)])
    if whole * block < numel:
        tail = torch.empty(1, block, dtype=packed.dtype, device=device)
        _unpack_blocks(packed, whole, tail, tail if direct else values[:1], nibbles[:1])
        out[whole * block :].copy_(tail.view(-1)[: numel - whole * block])
    return out
