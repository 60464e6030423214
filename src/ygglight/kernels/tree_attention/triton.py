# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Split-KV decode attention under any mask: one kernel over (key head, tile of rows, split of the slots), one to merge.

Rows are the queries of all heads that share a key head, head by head, so keys and values are read once a tile and not
once a head. Slots are cut into blocks, and split s takes the blocks s, s + splits, ...: a static cache is filled from
its front, so splits of consecutive blocks would leave most programs without work. Each program first finds the first
and last of its blocks that any of its rows attends to and reads keys and values of those alone: the mask of the unused
end of the cache, or of what lies before a sliding window, costs a byte a query and slot, the slots themselves nothing.
Softmax is online, in float32 with base 2; the weights are rounded to the dtype of the values for the second product,
as in FlashAttention 2 (arXiv:2307.08691); the split is Flash-Decoding's (pytorch.org/blog/flash-decoding).

With a block table (PagedAttention, arXiv:2309.06180) slot s of a sequence is slot s % PAGE of page table[s // PAGE]; a
page may be larger or smaller than a block, and PAGE = 0 compiles all of that away.

The merge adds the splits in a fixed order, so the same input gives the same bits. Nothing reads from the device, and
all sizes follow from shapes, so calls can be recorded in a CUDA graph. Not yet timed on a GPU.
"""

from __future__ import annotations

import contextlib
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = math.log2(math.e)
_LOG2E = tl.constexpr(LOG2E)
PROGRAMS_PER_SM = 2
"""Enough to hide the latency of one program behind another; more splits only write more partial results."""
MAX_SPLITS = 128
MERGE_SPLITS = 16
"""Splits that the merge reads at once."""


@triton.jit
def _tanh(x):
    # libdevice has one, but not in the interpreter. Absolute error 1e-7: a score is off by that times the softcap.
    return 1.0 - 2.0 / (tl.exp2(x * 2.8853900817779268) + 1.0)


@triton.jit
def _look_up(table_row, t_n, block, slots, BLOCK_N: tl.constexpr, PAGE: tl.constexpr):
    # Page ids of a block: one where a page holds all of it, else one a slot.
    slot = block * BLOCK_N
    if PAGE < BLOCK_N:
        slot += tl.arange(0, BLOCK_N)
    return tl.load(table_row + slot // PAGE * t_n, mask=slot < slots, other=0)


@triton.jit(do_not_specialize=["t_b", "key_heads", "width", "rows", "slots", "splits"])
def split_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,  # uint8 [B or 1, W, C]
    table_ptr,  # int32 or int64 [B, C / PAGE]; None, as its strides, without PAGE
    sink_ptr,  # [Hq], unread without HAS_SINKS
    out_ptr,  # [B, W, Hq, Dv], written when there is one split
    acc_ptr,  # float32 [B * Hk, splits, rows, Dv]: sums of weighted values, relative to the split's largest score
    max_ptr,  # float32 [B * Hk, splits, rows]: the largest score (base 2), -inf for a row that attends to nothing
    sum_ptr,  # float32 [B * Hk, splits, rows]: sums of weights
    q_b, q_h, q_w, q_d,
    k_b, k_h, k_c, k_d,
    v_b, v_h, v_c, v_d,
    m_b, m_w, m_c,
    t_b, t_n,
    key_heads, width, rows, slots, splits,
    inner,  # scale * log2(e), or scale / softcap
    outer,  # softcap * log2(e)
    HEAD: tl.constexpr,
    VALUE: tl.constexpr,
    BLOCK_H: tl.constexpr,  # HEAD and VALUE filled up to powers of two
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE: tl.constexpr,  # slots of a page, a power of two; 0: keys and values are [B, Hk, C, D] and not pages
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    ONE_SPLIT: tl.constexpr,
):  # fmt: skip
    """Attends from BLOCK_M rows to the blocks of one split; grid (B * Hk, tiles of rows, splits)."""
    pair = tl.program_id(0).to(tl.int64)
    batch, head = pair // key_heads, pair % key_heads
    split = tl.program_id(2)
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    live_row = row < rows
    query_head, token = head * (rows // width) + row // width, row % width
    at_h, at_v, at_n = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_N)

    mask_row = mask_ptr + batch * m_b + token[:, None].to(tl.int64) * m_w
    blocks = (tl.cdiv(slots, BLOCK_N) - split + splits - 1) // splits
    first = tl.full([BLOCK_M, BLOCK_N], 2147483647, tl.int32)
    last = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    for i in range(blocks):
        slot = (split + i * splits) * BLOCK_N + at_n
        seen = tl.load(mask_row + slot[None, :] * m_c, mask=live_row[:, None] & (slot < slots)[None, :], other=0) != 0
        first = tl.minimum(first, tl.where(seen, i, 2147483647))
        last = tl.where(seen, i + 1, last)
    begin, end = tl.min(tl.min(first, 1), 0), tl.max(tl.max(last, 1), 0)

    q_at = q_ptr + batch * q_b + query_head[:, None] * q_h + token[:, None] * q_w + at_h[None, :] * q_d
    q = tl.load(q_at, mask=live_row[:, None] & (at_h < HEAD)[None, :], other=0.0)
    if PAGE > 0:
        k_first, v_first = k_ptr, v_ptr
    else:
        k_first, v_first = k_ptr + batch * k_b, v_ptr + batch * v_b
    k_row = k_first + head * k_h + at_h[:, None] * k_d
    v_row = v_first + head * v_h + at_v[None, :] * v_d
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    if PAGE > 0:
        # What lies before or behind all that is attended to may be memory of others and hold NaN, which a weight of
        # zero does not hide: it is not read.
        unseen = last == 0
        front = tl.where(unseen, 2147483647, (split + first * splits) * BLOCK_N + at_n[None, :])
        back = tl.where(unseen, 0, (split + (last - 1) * splits) * BLOCK_N + at_n[None, :] + 1)
        front, back = tl.min(tl.min(front, 1), 0), tl.max(tl.max(back, 1), 0)
        # Pages are looked up a block ahead: the compiler gives a load whose address was loaded in the same round fewer
        # stages, and then nothing overlaps.
        table_row = table_ptr + batch * t_b
        page = _look_up(table_row, t_n, split + tl.where(end > 0, begin, 0) * splits, slots, BLOCK_N, PAGE)
    # Counted from zero: of a loop that starts at a reduced value the compiler (3.9) knows no alignment, and then loads
    # keys and values element by element, without stages.
    for i in range(end - begin):
        slot = (split + (begin + i) * splits) * BLOCK_N + at_n
        live = slot < slots
        far = slot.to(tl.int64)
        seen = tl.load(mask_row + slot[None, :] * m_c, mask=live_row[:, None] & live[None, :], other=0) != 0
        if PAGE > 0:
            owner, inside = page.to(tl.int64), (slot % PAGE).to(tl.int64)
            k_at = k_row + (owner * k_b + inside * k_c)[None, :]
            v_at = v_row + (owner * v_b + inside * v_c)[:, None]
            live = (slot >= front) & (slot < back)
            page = _look_up(table_row, t_n, split + (begin + i + 1) * splits, slots, BLOCK_N, PAGE)
        else:
            k_at, v_at = k_row + far[None, :] * k_c, v_row + far[:, None] * v_c
        k = tl.load(k_at, mask=live[None, :] & (at_h < HEAD)[:, None], other=0.0)
        v = tl.load(v_at, mask=live[:, None] & (at_v < VALUE)[None, :], other=0.0)
        scores = tl.dot(q, k, input_precision="ieee") * inner
        if HAS_SOFTCAP:
            scores = _tanh(scores) * outer
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        # -inf minus -inf is NaN: a row that has attended to nothing yet is taken from zero.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        top = higher

    if ONE_SPLIT:
        base = tl.where(top == float("-inf"), 0.0, top)
        if HAS_SINKS:
            sink = tl.load(sink_ptr + query_head, mask=live_row, other=0.0).to(tl.float32) * _LOG2E
            joint = tl.maximum(base, sink)
            shrink = tl.exp2(base - joint)
            acc, total = acc * shrink[:, None], total * shrink + tl.exp2(sink - joint)
        acc = acc / tl.where(total > 0, total, 1.0)[:, None]
        heads = key_heads * (rows // width)
        at = out_ptr + ((batch * width + token) * heads + query_head)[:, None] * VALUE + at_v[None, :]
        tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=live_row[:, None] & (at_v < VALUE)[None, :])
    else:
        at_row = (pair * splits + split) * rows + row
        tl.store(max_ptr + at_row, top, mask=live_row)
        tl.store(sum_ptr + at_row, total, mask=live_row)
        some = live_row & (top > float("-inf"))  # the merge does not read what is not written here
        at = acc_ptr + at_row[:, None] * VALUE + at_v[None, :]
        tl.store(at, acc, mask=some[:, None] & (at_v < VALUE)[None, :])


@triton.jit(do_not_specialize=["key_heads", "width", "rows", "splits"])
def merge_kernel(
    acc_ptr, max_ptr, sum_ptr, sink_ptr, out_ptr,
    key_heads, width, rows, splits,
    VALUE: tl.constexpr,
    BLOCK_V: tl.constexpr,
    SPLITS: tl.constexpr,  # splits filled up to a power of two
    CHUNK: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """Merges the splits of one row; grid (B * Hk, rows)."""
    pair = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1)
    batch, head = pair // key_heads, pair % key_heads
    query_head, token = head * (rows // width) + row // width, row % width
    split = tl.arange(0, SPLITS)
    at = (pair * splits + split) * rows + row
    tops = tl.load(max_ptr + at, mask=split < splits, other=float("-inf"))
    top = tl.max(tops, 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    extra = 0.0
    if HAS_SINKS:
        sink = tl.load(sink_ptr + query_head).to(tl.float32) * _LOG2E
        base = tl.maximum(base, sink)
        extra = tl.exp2(sink - base)
    total = tl.sum(tl.load(sum_ptr + at, mask=split < splits, other=0.0) * tl.exp2(tops - base), 0) + extra
    at_v = tl.arange(0, BLOCK_V)
    acc = tl.zeros([BLOCK_V], tl.float32)
    for begin in range(0, splits, CHUNK):
        # Names of their own: a name that a loop carries must keep its shape, though the interpreter does not mind.
        some = begin + tl.arange(0, CHUNK)
        some_at = (pair * splits + some) * rows + row
        some_tops = tl.load(max_ptr + some_at, mask=some < splits, other=float("-inf"))
        written = (some_tops > float("-inf"))[:, None] & (at_v < VALUE)[None, :]
        part = tl.load(acc_ptr + some_at[:, None] * VALUE + at_v[None, :], mask=written, other=0.0)
        acc += tl.sum(part * tl.exp2(some_tops - base)[:, None], 0)
    acc = acc / tl.where(total > 0, total, 1.0)
    heads = key_heads * (rows // width)
    to = out_ptr + ((batch * width + token) * heads + query_head) * VALUE + at_v
    tl.store(to, acc.to(out_ptr.dtype.element_ty), mask=at_v < VALUE)


class Blocks(NamedTuple):
    """Sizes of a launch, from shapes and dtype alone."""

    rows: int
    slots: int
    head: int
    value: int
    num_warps: int
    num_stages: int


def choose_blocks(rows: int, head: int, value: int, itemsize: int) -> Blocks:
    """Tile sizes: keys and values of one stage take 16 or 32 KiB where they can, so that three stages fit on Ampere.

    Args:
        rows: queries x heads of a group. head, value: head sizes. itemsize: bytes of an element.
    """
    block_h, block_v = (max(16, triton.next_power_of_2(size)) for size in (head, value))
    slot_bytes = (block_h + block_v) * itemsize
    # Products in float32 run without tensor cores from registers, which larger tiles would spill (so says cuobjdump).
    stage, widest = (16384, 16) if itemsize == 4 else (32768, 64 if slot_bytes <= 1024 else 16)
    block_n = min(128, max(16, 1 << (max(stage // slot_bytes, 1).bit_length() - 1)))
    block_m = min(widest, max(16, triton.next_power_of_2(rows)))  # tl.dot takes 16 rows or more
    num_warps = 8 if block_m * max(block_n, block_v) > 16 * 128 else 4
    return Blocks(block_m, block_n, block_h, block_v, num_warps, 3 if block_n * slot_bytes <= 32768 else 2)


def choose_splits(programs: int, blocks: int, processors: int) -> int:
    """How many programs share the slots of one tile of rows.

    Args:
        programs: tiles of rows of all key heads. blocks: blocks of slots. processors: SMs of the device.
    """
    return max(1, min(blocks, MAX_SPLITS, processors * PROGRAMS_PER_SM // programs))


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


def launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    table: Tensor | None = None,
    splits: int | None = None,
) -> Tensor:
    """Runs one kernel (one split) or two on the current stream; inputs are not checked.

    Args:
        query: See :func:`ygglight.kernels.tree_attention.tree_attention`, as for all others.
        splits: at most 128; by default from shapes and the number of SMs.

    Returns:
        ``[B, Hq, W, Dv]``, a view of a contiguous ``[B, W, Hq, Dv]``, which is what the caller makes of it.
    """
    batch, heads, width, head = query.shape
    key_heads, slots, size = key.shape[1], mask.shape[3], value.shape[3]
    rows, pairs = heads // key_heads * width, batch * key_heads
    block = choose_blocks(rows, head, size, query.element_size())
    tiles = triton.cdiv(rows, block.rows)
    splits = splits or choose_splits(pairs * tiles, triton.cdiv(slots, block.slots), _processors(query.device))
    out = torch.empty(batch, width, heads, size, dtype=query.dtype, device=query.device)
    parts = 0 if splits == 1 else pairs * splits * rows
    acc = torch.empty(parts * size, dtype=torch.float32, device=query.device)
    tops, sums = (torch.empty(parts, dtype=torch.float32, device=query.device) for _ in range(2))
    seen = mask.view(torch.uint8)
    used = query if sinks is None else sinks
    m_b = seen.stride(0) if mask.shape[0] > 1 else 0
    t_b, t_n = (None, None) if table is None else table.stride()
    scales = (scale * LOG2E, 1.0) if softcap is None else (scale / softcap, softcap * LOG2E)
    on_device = torch.cuda.device(query.device) if query.is_cuda else contextlib.nullcontext()
    with on_device:  # Triton launches on the current device, whatever its arguments
        split_kernel[(pairs, tiles, splits)](
            query, key, value, seen, table, used, out, acc, tops, sums,
            *query.stride(), *key.stride(), *value.stride(), m_b, seen.stride(2), seen.stride(3),
            t_b, t_n, key_heads, width, rows, slots, splits, *scales,
            HEAD=head, VALUE=size, BLOCK_H=block.head, BLOCK_V=block.value, BLOCK_M=block.rows, BLOCK_N=block.slots,
            PAGE=0 if table is None else key.shape[2], HAS_SOFTCAP=softcap is not None, HAS_SINKS=sinks is not None,
            ONE_SPLIT=splits == 1, num_warps=block.num_warps, num_stages=block.num_stages,
        )  # fmt: skip
        if splits > 1:
            merge_kernel[(pairs, rows)](
                acc, tops, sums, used, out, key_heads, width, rows, splits,
                VALUE=size, BLOCK_V=block.value, SPLITS=triton.next_power_of_2(splits), CHUNK=MERGE_SPLITS,
                HAS_SINKS=sinks is not None, num_warps=4,
            )  # fmt: skip
    return out.transpose(1, 2)


@torch.library.custom_op("ygglight::tree_attention", mutates_args=())
def operator(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    table: Tensor | None = None,
) -> Tensor:
    """:func:`launch` as an operator that torch.compile does not look into."""
    return launch(query, key, value, mask, scale, softcap, sinks, table)


@operator.register_fake
def _shape_of_result(query, key, value, mask, scale, softcap=None, sinks=None, table=None):
    batch, heads, width, _ = query.shape
    return query.new_empty(batch, width, heads, value.shape[-1]).transpose(1, 2)
