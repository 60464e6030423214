# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""The decode block of multi-head latent attention on clusters: a program is one head of one sequence.

As the block of `cluster_kernels.py`, with absorbed weights (`mla.py`): what attention reads is the latent of a token,
as key and as value, and its rotated key part. All heads need the new token's latent, and each program projects it anew
from weights that the others have brought to L2. Rows of the projections come in tiles of `ROPE`, which divides all
three parts of them, so that one loop runs through them all.

Between blocks go the projected rows, the absorbed query, largest scores and sums of weights, the head's value
(ClusterGather), and weighted latents (ClusterReduce). Compiled ahead of time and emulated, not
yet run or timed on a GPU.
"""

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ygglight.kernels.cluster_decode.cluster_steps import (
    first_outputs,
    gather_rows,
    load_slots,
    merge,
    output,
    pick,
    project,
    rotate,
    strip_layout,
    whole_layout,
)
from ygglight.kernels.cluster_decode.collectives import cluster_gather, repeated, spread


@gluon.constexpr_function
def up_layout(latent: int, num_warps: int, blocks: int) -> gl.BlockedLayout:
    """Of the query's half of `kv_b` [NOPE, LATENT]: columns over blocks, rows over warps."""
    lanes = min(32, max(1, latent // (8 * blocks)))
    return gl.BlockedLayout([1, 8], [32 // lanes, lanes], [num_warps, 1], [1, 0], spread(2, 1, blocks))


@gluon.constexpr_function
def down_layout(num_warps: int, blocks: int) -> gl.BlockedLayout:
    """Of the value's half of `kv_b` [VALUE, LATENT]: rows over blocks and warps."""
    return gl.BlockedLayout([1, 8], [1, 32], [num_warps, 1], [1, 0], spread(2, 0, blocks))


@gluon.constexpr_function
def turned_strip_layout(rope: int, rows: int, num_warps: int, blocks: int) -> gl.BlockedLayout:
    """Of rotated keys [strips, rows, 1, ROPE]: the strips of `strip_layout` for latents, a warp each."""
    each = max(1, rope // 32)
    return gl.BlockedLayout([1, rows, 1, each], [1, 1, 1, 32], [num_warps, 1, 1, 1], [3, 2, 1, 0], spread(4, 0, blocks))


@gluon.constexpr_function
def number_layout(num_warps: int, blocks: int) -> gl.BlockedLayout:
    """Of tiles of numbers [tiles, ROPE], the same in each block."""
    return gl.BlockedLayout([1, 1], [1, 32], [num_warps, 1], [1, 0], repeated(2, blocks))


@gluon.jit
def _tiles(x, FIRST: gl.constexpr, COUNT: gl.constexpr):
    # COUNT tiles of [ROPE, tiles], one after the other.
    layout: gl.constexpr = number_layout(gl.num_warps(), gl.num_ctas())
    size: gl.constexpr = x.shape[0]
    index = gl.arange(0, COUNT, gl.SliceLayout(1, layout))[:, None] + gl.zeros([COUNT, size], gl.int32, layout)
    picked = gl.gather(gl.convert_layout(gl.permute(x, [1, 0]), layout), index + FIRST, 0)
    return gl.reshape(picked, [COUNT * size])


@gluon.jit
def absorb_query(query, up_at, stride, NOPE: gl.constexpr, LATENT: gl.constexpr, BLOCK: gl.constexpr,
                 target: gl.constexpr):  # fmt: skip
    """A query [NOPE] in the latent space: [LATENT] on each block, whose columns the blocks share; a ClusterGather."""
    layout: gl.constexpr = up_layout(LATENT, gl.num_warps(), gl.num_ctas())
    row = gl.arange(0, BLOCK, gl.SliceLayout(1, layout))
    column = gl.arange(0, LATENT, gl.SliceLayout(0, layout))
    sums = gl.zeros([BLOCK, LATENT], gl.float32, layout)
    query = gl.convert_layout(gl.reshape(query, [NOPE // BLOCK, BLOCK]), number_layout(gl.num_warps(), gl.num_ctas()))
    for step in gl.static_range(NOPE // BLOCK):
        weight = gl.load(up_at + (row + step * BLOCK)[:, None] * stride + column[None, :])
        rows = gl.arange(0, NOPE // BLOCK, gl.SliceLayout(1, query.type.layout))
        piece = gl.sum(gl.where((rows == step)[:, None], query, 0.0), 0)
        sums += weight.to(gl.float32) * gl.convert_layout(piece, gl.SliceLayout(1, layout))[:, None]
    return cluster_gather(gl.sum(sums, 0), target)


@gluon.jit
def expand_value(attended, down_at, stride, VALUE: gl.constexpr, LATENT: gl.constexpr, BLOCK: gl.constexpr,
                 target: gl.constexpr):  # fmt: skip
    """What a head adds up in the latent space [LATENT] as its value [VALUE] on each block; a ClusterGather."""
    layout: gl.constexpr = down_layout(gl.num_warps(), gl.num_ctas())
    row = gl.arange(0, BLOCK, gl.SliceLayout(1, layout))
    column = gl.arange(0, LATENT, gl.SliceLayout(0, layout))
    step_of = gl.arange(0, VALUE // BLOCK, gl.SliceLayout(0, layout))
    attended = gl.convert_layout(attended, gl.SliceLayout(0, layout))
    values = gl.zeros([BLOCK, VALUE // BLOCK], gl.float32, layout)
    for step in gl.static_range(VALUE // BLOCK):
        weight = gl.load(down_at + (row + step * BLOCK)[:, None] * stride + column[None, :])
        piece = gl.sum(weight.to(gl.float32) * attended[None, :], 1)
        values = gl.where((step_of == step)[None, :], piece[:, None], values)
    return cluster_gather(gl.reshape(gl.permute(values, [1, 0]), [VALUE]), target)


@gluon.jit
def _column(element, ROPE: gl.constexpr, UNZIPPED: gl.constexpr):
    # Where the cache has an element of a rotated key, whose pairs are side by side here.
    if UNZIPPED:
        element = element % 2 * (ROPE // 2) + element // 2
    return element


@gluon.jit
def attend_latents(q, q_turned, new, new_turned, slot, k, turned, k_at, turned_at, mask_at, k_c, turned_c, m_c, steps,
                   length, skipped, inner, LATENT: gl.constexpr, ROPE: gl.constexpr, UNZIPPED: gl.constexpr,
                   layout: gl.constexpr, turned_layout: gl.constexpr):  # fmt: skip
    """As `attend`, of one query to latents [strips, rows, LATENT] and rotated keys [strips, rows, ROPE].

    Args:
        q: [1, LATENT]. q_turned: [1, ROPE]. new: [LATENT]. new_turned: [ROPE]. k, turned: the first tiles.
        skipped: a slot that is about to be overwritten, or -1.
    """
    strips: gl.constexpr = slot.shape[0]
    scored: gl.constexpr = gl.SliceLayout(3, layout)
    topped: gl.constexpr = gl.SliceLayout(1, scored)
    summed: gl.constexpr = gl.SliceLayout(1, layout)
    dim = gl.arange(0, LATENT, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, layout))))
    turned_dim = gl.arange(0, ROPE, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, turned_layout))))
    turned_dim = _column(turned_dim, ROPE, UNZIPPED)

    own = gl.sum(q * gl.convert_layout(new, gl.SliceLayout(0, q.type.layout))[None, :], 1)
    own_turned = gl.sum(q_turned * gl.convert_layout(new_turned, gl.SliceLayout(0, q_turned.type.layout))[None, :], 1)
    own = gl.convert_layout(own, gl.SliceLayout(0, topped)) + gl.convert_layout(own_turned, gl.SliceLayout(0, topped))
    begins = gl.arange(0, strips, gl.SliceLayout(1, topped)) == 0
    top = gl.where(begins[:, None], (own * inner)[None, :], float("-inf"))
    total = gl.where(begins[:, None], gl.full([strips, 1], 1.0, gl.float32, topped), 0.0)
    begins = gl.arange(0, strips, gl.SliceLayout(1, gl.SliceLayout(2, summed))) == 0
    first = gl.convert_layout(new, gl.SliceLayout(0, gl.SliceLayout(1, summed)))[None, None, :]
    acc = gl.where(begins[:, None, None], first + gl.zeros([strips, 1, LATENT], gl.float32, summed), 0.0)
    turned_slot = gl.convert_layout(slot, gl.SliceLayout(2, gl.SliceLayout(2, turned_layout)))
    for _ in range(steps):
        next_slot, next_turned_slot = slot + strips * slot.shape[1], turned_slot + strips * slot.shape[1]
        next_k = load_slots(k_at, next_slot, length, dim, k_c, LATENT)
        next_turned = load_slots(turned_at, next_turned_slot, length, turned_dim, turned_c, ROPE)
        seen = (slot < length) & (slot != skipped)
        if mask_at is not None:
            seen = seen & (gl.load(mask_at + slot.to(gl.int64) * m_c, mask=seen, other=0) != 0)
        wide = gl.where(seen[:, :, None], k.to(gl.float32), 0.0)
        scores = gl.sum(turned.to(gl.float32)[:, :, None, :] * q_turned[None, None, :, :], 3)
        scores = gl.convert_layout(scores, scored) + gl.sum(wide[:, :, None, :] * q[None, None, :, :], 3)
        seen = gl.convert_layout(seen, gl.SliceLayout(2, scored))
        scores = gl.where(seen[:, :, None], scores * inner, float("-inf"))
        higher = gl.maximum(top, gl.max(scores, 1))
        base = gl.where(higher == float("-inf"), 0.0, higher)
        weights, shrink = gl.exp2(scores - base[:, None, :]), gl.exp2(top - base)
        total = total * shrink + gl.sum(weights, 1)
        acc = acc * gl.convert_layout(shrink, gl.SliceLayout(2, summed))[:, :, None]
        acc += gl.sum(weights[:, :, :, None] * wide[:, :, None, :], 1)
        top, slot, turned_slot, k, turned = higher, next_slot, next_turned_slot, next_k, next_turned
    return top, total, acc


@gluon.jit(do_not_specialize=["batches", "heads"])
def latent_kernel(
    x_ptr,
    norm_ptr,
    query_ptr,  # float32 [B, QUERY], the query latent before its norm, or None
    query_norm_ptr,  # or None
    q_ptr, kv_a_ptr, kv_a_norm_ptr, kv_b_ptr, o_ptr,
    kv_a_bias_ptr,  # or None
    cos_ptr, sin_ptr,
    latents_ptr, rotated_ptr,
    lengths_ptr,
    slots_ptr,  # or None: then new_latents_ptr and new_rotated_ptr are the slot
    mask_ptr,  # uint8 [B, C], or None
    new_latents_ptr, new_rotated_ptr,
    parts_ptr,  # float32 [B, heads, OUT]
    x_b, query_b, q_r, kv_a_r, kv_b_r, o_r, cos_b, sin_b,
    latents_b, latents_c, rotated_b, rotated_c,
    new_latents_b, new_latents_c,
    new_rotated_b, new_rotated_c,
    mask_b, mask_c,
    batches, heads,
    eps, latent_eps,
    inner,  # scale * log2(e)
    HIDDEN: gl.constexpr,
    QUERY: gl.constexpr,  # size of the query latent; 0: queries are projected from x
    OUT: gl.constexpr,
    NOPE: gl.constexpr,
    ROPE: gl.constexpr,
    VALUE: gl.constexpr,
    LATENT: gl.constexpr,
    INTERLEAVED: gl.constexpr,  # pairs of the rotary embedding are side by side in what is projected
    UNZIPPED: gl.constexpr,  # and in the cache they are half a vector apart
    BLOCK_K: gl.constexpr,
    LANES: gl.constexpr,
    WARPS: gl.constexpr,
    ROWS: gl.constexpr,
    BLOCK_B: gl.constexpr,  # rows of kv_b at once
    BLOCK_O: gl.constexpr,
):  # fmt: skip
    """The block for one head of one sequence; grid (heads * B)."""
    blocks: gl.constexpr = gl.num_ctas()
    q_tiles: gl.constexpr = NOPE // ROPE + 1
    states: gl.constexpr = LATENT // ROPE
    count: gl.constexpr = 2 * states  # tiles filled up to a power of two
    first: gl.constexpr = q_tiles if QUERY == 0 else 0  # the tile where latents begin
    batch = (gl.program_id(0) % batches).to(gl.int64)
    head = gl.program_id(0) // batches
    length = gl.load(lengths_ptr + batch)
    new_slot, skipped = 0, -1
    if slots_ptr is not None:
        new_slot = gl.load(slots_ptr + batch).to(gl.int64)
        skipped = new_slot.to(gl.int32)
    whole: gl.constexpr = whole_layout(gl.num_warps(), blocks)
    place, tile = gl.arange(0, ROPE, gl.SliceLayout(1, whole)), gl.arange(0, count, gl.SliceLayout(0, whole))
    cos_at, sin_at = cos_ptr + batch * cos_b, sin_ptr + batch * sin_b

    q_at, x_at = q_ptr + (head * (NOPE + ROPE)).to(gl.int64) * q_r, x_ptr + batch * x_b
    if QUERY == 0:
        rows, squares = project(
            x_at, norm_ptr, q_at, kv_a_ptr, kv_a_ptr, q_r, kv_a_r, kv_a_r, 0.0, HIDDEN, ROPE, q_tiles, states + 1,
            q_tiles + states + 1, ROPE, count, BLOCK_K, LANES, WARPS,
        )  # fmt: skip
    else:
        rows, squares = project(
            query_ptr + batch * query_b, query_norm_ptr, q_at, q_at, q_at, q_r, q_r, q_r, 0.0, QUERY, ROPE, q_tiles, 0,
            q_tiles, ROPE, count, BLOCK_K, LANES, WARPS,
        )  # fmt: skip
        query = gather_rows(rows, whole) * gl.rsqrt(squares / QUERY + latent_eps)
        query = rotate(query, cos_at, sin_at, place, tile == q_tiles - 1, ROPE, INTERLEAVED)
        rows, squares = project(
            x_at, norm_ptr, kv_a_ptr, kv_a_ptr, kv_a_ptr, kv_a_r, kv_a_r, kv_a_r, 0.0, HIDDEN, ROPE, states + 1, 0,
            states + 1, ROPE, count, BLOCK_K, LANES, WARPS,
        )  # fmt: skip

    # The first tile of the cache sets out before the blocks wait for each other.
    layout: gl.constexpr = strip_layout(1, 32, ROWS, gl.num_warps(), blocks)
    turned_layout: gl.constexpr = turned_strip_layout(ROPE, ROWS, gl.num_warps(), blocks)
    cached: gl.constexpr = gl.SliceLayout(2, layout)
    turned_cached: gl.constexpr = gl.SliceLayout(2, turned_layout)
    strip = gl.arange(0, gl.num_warps() * blocks, gl.SliceLayout(1, gl.SliceLayout(2, cached)))
    slot = strip[:, None] * ROWS + gl.arange(0, ROWS, gl.SliceLayout(0, gl.SliceLayout(2, cached)))[None, :]
    k_at, turned_at = latents_ptr + batch * latents_b, rotated_ptr + batch * rotated_b
    dim = gl.arange(0, LATENT, gl.SliceLayout(0, gl.SliceLayout(1, cached)))
    k = load_slots(k_at, slot, length, dim, latents_c, LATENT)
    dim = _column(gl.arange(0, ROPE, gl.SliceLayout(0, gl.SliceLayout(1, turned_cached))), ROPE, UNZIPPED)
    turned_slot = gl.convert_layout(slot, gl.SliceLayout(2, turned_cached))
    turned = load_slots(turned_at, turned_slot, length, dim, rotated_c, ROPE)

    state = gather_rows(rows, whole) * gl.rsqrt(squares / HIDDEN + eps)
    element = (tile - first)[None, :] * ROPE + place[:, None]
    is_latent = (tile >= first) & (tile < first + states)
    if kv_a_bias_ptr is not None:
        live = (is_latent | (tile == first + states))[None, :] & (element >= 0)
        state += gl.load(kv_a_bias_ptr + element, mask=live, other=0.0).to(gl.float32)
    if QUERY == 0:
        both = (tile == q_tiles - 1) | (tile == first + states)
        state = rotate(state, cos_at, sin_at, place, both, ROPE, INTERLEAVED)
        query = state
    else:
        state = rotate(state, cos_at, sin_at, place, tile == first + states, ROPE, INTERLEAVED)
    size = gl.sum(gl.sum(gl.where(is_latent[None, :], state * state, 0.0), 1), 0) / LATENT
    weight = gl.load(kv_a_norm_ptr + element, mask=is_latent[None, :] & (element >= 0), other=0.0).to(gl.float32)
    latent = _tiles(state * gl.rsqrt(size + latent_eps) * weight, first, states).to(latents_ptr.dtype.element_ty)
    new_turned = pick(state, tile == first + states).to(latents_ptr.dtype.element_ty)
    vector: gl.constexpr = gl.SliceLayout(0, number_layout(gl.num_warps(), blocks))
    latent = gl.convert_layout(latent, vector)
    if head == 0:
        new_at = new_latents_ptr + batch * new_latents_b + new_slot * new_latents_c
        gl.store(new_at + gl.arange(0, LATENT, vector), latent)
        new_at = new_rotated_ptr + batch * new_rotated_b + new_slot * new_rotated_c
        gl.store(new_at + _column(place, ROPE, UNZIPPED), new_turned)

    narrow: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, layout))  # [1, LATENT]
    kv_b_at = kv_b_ptr + (head * (NOPE + VALUE)).to(gl.int64) * kv_b_r
    nope = _tiles(query, 0, q_tiles - 1)
    q = absorb_query(nope, kv_b_at, kv_b_r, NOPE, LATENT, BLOCK_B, gl.SliceLayout(0, narrow))
    turned_narrow: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, turned_layout))
    q_turned = gl.convert_layout(pick(query, tile == q_tiles - 1), gl.SliceLayout(0, turned_narrow))
    mask_at = None
    if mask_ptr is not None:
        mask_at = mask_ptr + batch * mask_b
    top, total, acc = attend_latents(
        q[None, :], q_turned[None, :], latent.to(gl.float32), new_turned.to(gl.float32), slot, k, turned, k_at,
        turned_at, mask_at, latents_c, rotated_c, mask_c, gl.cdiv(length, gl.num_warps() * blocks * ROWS), length,
        skipped, inner, LATENT, ROPE, UNZIPPED, layout, turned_layout,
    )  # fmt: skip

    o_at = o_ptr + head * VALUE
    row, weight = first_outputs(o_at, o_r, OUT, 1, VALUE, BLOCK_O, 1, VALUE)
    attended = gl.reshape(merge(top, total, acc), [LATENT])
    target: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(0, weight.type.layout))
    value = expand_value(attended, kv_b_at + NOPE * kv_b_r, kv_b_r, VALUE, LATENT, BLOCK_B, target)
    output(value[None, :], row, weight, o_at, o_r, parts_ptr + (batch * heads + head) * OUT, OUT, 1, VALUE)


@triton.jit
def query_latent_kernel(
    x_ptr, norm_ptr, weight_ptr, bias_ptr, out_ptr,
    x_b, weight_r, eps,
    HIDDEN: tl.constexpr,
    QUERY: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The query latent of one sequence before its norm, in float32, for all heads; grid (tiles of rows, B)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    batch = tl.program_id(1).to(tl.int64)
    sums = tl.zeros([ROWS], tl.float32)
    squares = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, HIDDEN, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + batch * x_b + column, mask=column < HIDDEN, other=0.0).to(tl.float32)
        scaled = x * tl.load(norm_ptr + column, mask=column < HIDDEN, other=0.0).to(tl.float32)
        live = (row < QUERY)[:, None] & (column < HIDDEN)[None, :]
        weight = tl.load(weight_ptr + row[:, None] * weight_r + column[None, :], mask=live, other=0.0)
        sums += tl.sum(weight.to(tl.float32) * scaled[None, :], 1)
        squares += x * x
    sums *= tl.rsqrt(tl.sum(squares, 0) / HIDDEN + eps)
    if bias_ptr is not None:
        sums += tl.load(bias_ptr + row, mask=row < QUERY, other=0.0).to(tl.float32)
    tl.store(out_ptr + batch * QUERY + row, sums, mask=row < QUERY)
