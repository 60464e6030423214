# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""The decode block as one Gluon kernel: a program is one cluster of thread blocks and serves the heads of one group.

Blocks of a cluster share the rows of the projections, the slots of the cache and the rows of the output projection.
What they hand to each other stays on the chip (`collectives.py`): queries, keys and values, largest scores and sums of
weights (ClusterGather), and weighted values (ClusterReduce).

The projections are split over their output rows and gathered, not over the hidden size and reduced: for the same rows
Eq. 3 of the paper (arXiv:2508.18850) makes a gather of parts 1/log2(blocks) or less of a reduction of sums, and each
block, which sees all of x, has the norm's sum of squares without asking. Rows are dealt to the blocks one by one, so
that a head of 80 in a tile of 128 leaves no block idle.

Sums are in float32 and in fixed orders: within a program as compiled, across programs by `sum_kernel`, which adds the
heads' parts of the output one after the other. Imported only when it is to run: Gluon crosses blocks from Triton 3.8.
Compiled ahead of time and emulated, not yet run or timed on a GPU.
"""

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ygglight.kernels.cluster_decode.cluster_steps import (
    VECTOR,
    attend,
    first_outputs,
    gather_rows,
    load_slots,
    merge,
    output,
    pick,
    project,
    rms,
    rotate,
    strip_layout,
    whole_layout,
)


@gluon.jit(do_not_specialize=["batches", "kv_heads", "window"])
def block_kernel(
    x_ptr,
    norm_ptr,
    q_ptr, k_ptr, v_ptr, o_ptr,
    q_bias_ptr, k_bias_ptr, v_bias_ptr,  # or None
    q_norm_ptr, k_norm_ptr,  # or None
    cos_ptr, sin_ptr,
    keys_ptr, values_ptr,
    lengths_ptr,
    slots_ptr,  # or None: then new_keys_ptr and new_values_ptr are the slot
    mask_ptr,  # uint8 [B, C], or None
    new_keys_ptr, new_values_ptr,
    parts_ptr,  # float32 [B, programs of a sequence, OUT], what the heads of each program add to the output
    x_b, q_r, k_r, v_r, o_r, cos_b, sin_b,
    keys_b, keys_h, keys_c,
    values_b, values_h, values_c,
    new_keys_b, new_keys_h, new_keys_c,
    new_values_b, new_values_h, new_values_c,
    mask_b, mask_c,
    batches, kv_heads, window,
    eps, offset,
    inner,  # scale * log2(e), or scale / softcap
    outer,  # softcap * log2(e)
    HIDDEN: gl.constexpr,
    OUT: gl.constexpr,
    HEAD: gl.constexpr,
    ROTARY: gl.constexpr,
    INTERLEAVED: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    GROUP: gl.constexpr,  # query heads of a program
    SHARES: gl.constexpr,  # programs that share a key head
    BLOCK_D: gl.constexpr,  # HEAD filled up to a power of two
    BLOCK_G: gl.constexpr,  # GROUP likewise
    HEADS: gl.constexpr,  # GROUP + 2 likewise
    BLOCK_K: gl.constexpr,
    LANES: gl.constexpr,
    WARPS: gl.constexpr,
    ROWS: gl.constexpr,
    BLOCK_O: gl.constexpr,
):  # fmt: skip
    """The block for GROUP query heads of one key head of one sequence; grid (kv_heads * SHARES * B).

    Sequences come first in the grid, so that those of one head read its weights at the same time, from L2 but once.
    """
    blocks: gl.constexpr = gl.num_ctas()
    lanes: gl.constexpr = BLOCK_D // VECTOR
    strips: gl.constexpr = 32 // lanes * gl.num_warps() * blocks
    batch = (gl.program_id(0) % batches).to(gl.int64)
    part = gl.program_id(0) // batches
    kv, share = part // SHARES, part % SHARES
    query_head = part * GROUP
    length = gl.load(lengths_ptr + batch)
    new_slot, skipped = 0, -1
    if slots_ptr is not None:
        new_slot = gl.load(slots_ptr + batch).to(gl.int64)
        skipped = new_slot.to(gl.int32)

    # Small things that are needed late are asked for early.
    whole: gl.constexpr = whole_layout(gl.num_warps(), blocks)
    place, heads = gl.arange(0, BLOCK_D, gl.SliceLayout(1, whole)), gl.arange(0, HEADS, gl.SliceLayout(0, whole))
    filled = place < HEAD
    bias = gl.zeros([BLOCK_D, HEADS], gl.float32, whole)
    if q_bias_ptr is not None:
        bias_at = q_bias_ptr + (query_head + heads[None, :]) * HEAD + place[:, None]
        bias += gl.load(bias_at, mask=filled[:, None] & (heads < GROUP)[None, :], other=0.0).to(gl.float32)
    if k_bias_ptr is not None:
        key_bias = gl.load(k_bias_ptr + kv * HEAD + place, mask=filled, other=0.0).to(gl.float32)
        bias += gl.where((heads == GROUP)[None, :], key_bias[:, None], 0.0)
    if v_bias_ptr is not None:
        value_bias = gl.load(v_bias_ptr + kv * HEAD + place, mask=filled, other=0.0).to(gl.float32)
        bias += gl.where((heads == GROUP + 1)[None, :], value_bias[:, None], 0.0)

    projected, squares = project(
        x_ptr + batch * x_b, norm_ptr, q_ptr + (query_head * HEAD).to(gl.int64) * q_r,
        k_ptr + (kv * HEAD).to(gl.int64) * k_r, v_ptr + (kv * HEAD).to(gl.int64) * v_r, q_r, k_r, v_r, offset,
        HIDDEN, HEAD, GROUP, 1, GROUP + 2, BLOCK_D, HEADS, BLOCK_K, LANES, WARPS,
    )  # fmt: skip

    # The first tile of the cache sets out before the blocks wait for each other.
    layout: gl.constexpr = strip_layout(BLOCK_G, lanes, ROWS, gl.num_warps(), blocks)
    cached: gl.constexpr = gl.SliceLayout(2, layout)
    first = gl.maximum(length - window + 1, 0)
    strip = gl.arange(0, strips, gl.SliceLayout(1, gl.SliceLayout(2, cached)))
    slot = first + strip[:, None] * ROWS + gl.arange(0, ROWS, gl.SliceLayout(0, gl.SliceLayout(2, cached)))[None, :]
    dim = gl.arange(0, BLOCK_D, gl.SliceLayout(0, gl.SliceLayout(1, cached)))
    far = kv.to(gl.int64)
    k_at, v_at = keys_ptr + batch * keys_b + far * keys_h, values_ptr + batch * values_b + far * values_h
    k, v = load_slots(k_at, slot, length, dim, keys_c, HEAD), load_slots(v_at, slot, length, dim, values_c, HEAD)

    qkv = gather_rows(projected, whole) * gl.rsqrt(squares / HIDDEN + eps) + bias
    if q_norm_ptr is not None:
        q_norm = gl.load(q_norm_ptr + place, mask=filled, other=0.0).to(gl.float32) + offset
        k_norm = gl.load(k_norm_ptr + place, mask=filled, other=0.0).to(gl.float32) + offset
        weight = gl.where((heads < GROUP)[None, :], q_norm[:, None], k_norm[:, None])
        qkv = rms(qkv, weight, eps, heads <= GROUP, HEAD)
    if ROTARY > 0:
        qkv = rotate(qkv, cos_ptr + batch * cos_b, sin_ptr + batch * sin_b, place, heads <= GROUP, ROTARY, INTERLEAVED)
    new_k = pick(qkv, heads == GROUP).to(keys_ptr.dtype.element_ty)
    new_v = pick(qkv, heads == GROUP + 1).to(keys_ptr.dtype.element_ty)
    if share == 0:
        key_at = new_keys_ptr + batch * new_keys_b + far * new_keys_h + new_slot * new_keys_c + place
        gl.store(key_at, new_k, mask=filled)
        value_at = new_values_ptr + batch * new_values_b + far * new_values_h + new_slot * new_values_c + place
        gl.store(value_at, new_v, mask=filled)
    # Query heads are the first of HEADS, and of heads BLOCK_G apart at most one is a query's.
    q = gl.where((heads < GROUP)[None, :], qkv, 0.0)
    q = gl.permute(gl.sum(gl.reshape(q, [BLOCK_D, HEADS // BLOCK_G, BLOCK_G]), 1), [1, 0])
    q = gl.convert_layout(q, gl.SliceLayout(0, gl.SliceLayout(1, layout)))

    mask_at = None
    if mask_ptr is not None:
        mask_at = mask_ptr + batch * mask_b
    top, total, acc = attend(
        q, new_k.to(gl.float32), new_v.to(gl.float32), slot, k, v, k_at, v_at, mask_at, keys_c, values_c, mask_c,
        gl.cdiv(length - first, strips * ROWS), length, skipped, inner, outer, HEAD, HAS_SOFTCAP, layout,
    )  # fmt: skip

    o_at = o_ptr + query_head * HEAD
    row, weight = first_outputs(o_at, o_r, OUT, GROUP, HEAD, BLOCK_O, BLOCK_G, BLOCK_D)
    part_at = parts_ptr + (batch * (kv_heads * SHARES) + part) * OUT
    output(merge(top, total, acc), row, weight, o_at, o_r, part_at, OUT, GROUP, HEAD)


@triton.jit
def sum_kernel(parts_ptr, bias_ptr, out_ptr, PARTS: tl.constexpr, OUT: tl.constexpr, BLOCK: tl.constexpr):
    """Adds the parts of the output in their order, and the bias; grid (B, tiles of the output)."""
    batch = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = at < OUT
    total = tl.zeros([BLOCK], tl.float32)
    for part in range(PARTS):
        total += tl.load(parts_ptr + (batch * PARTS + part) * OUT + at, mask=live, other=0.0)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + at, mask=live, other=0.0).to(tl.float32)
    tl.store(out_ptr + batch * OUT + at, total.to(out_ptr.dtype.element_ty), mask=live)
