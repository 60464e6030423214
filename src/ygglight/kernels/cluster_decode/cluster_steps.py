# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Device functions of the cluster block: projection, norm of heads, rotary embedding, attention, merge.

Layouts say which block, warp and lane holds what. Loops wait for no other thread: a thread sums what it loads itself,
and lanes, warps and blocks are summed once, behind the loop. Each round loads what the next one needs, because at one
block an SM nothing else would hide the latency of memory.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ygglight.kernels.cluster_decode.collectives import cluster_gather, cluster_sum, repeated, spread

VECTOR = gl.constexpr(8)
"""Elements of 16 bits that a thread loads at once: 16 bytes."""


@gluon.constexpr_function
def projection_layout(lanes: int, warps: int, num_warps: int, blocks: int) -> gl.BlockedLayout:
    """Of weights [rows, vectors, VECTOR]: rows over blocks, over `warps` warps and over `lanes` lanes."""
    return gl.BlockedLayout(
        [1, 1, 8], [lanes, 32 // lanes, 1], [warps, num_warps // warps, 1], [2, 1, 0], spread(3, 0, blocks)
    )


@gluon.constexpr_function
def whole_layout(num_warps: int, blocks: int) -> gl.BlockedLayout:
    """Of projected rows [HEAD, heads], the same in each block."""
    return gl.BlockedLayout([1, 1], [32, 1], [num_warps, 1], [0, 1], repeated(2, blocks))


@gluon.constexpr_function
def strip_layout(group: int, lanes: int, rows: int, num_warps: int, blocks: int) -> gl.BlockedLayout:
    """Of keys times queries [strips, rows, group, HEAD]: a strip is `lanes` lanes, which no other thread waits for."""
    return gl.BlockedLayout(
        [1, rows, group, 8], [32 // lanes, 1, 1, lanes], [num_warps, 1, 1, 1], [3, 2, 1, 0], spread(4, 0, blocks)
    )


@gluon.constexpr_function
def repeated_layout(rank: int, num_warps: int, blocks: int) -> gl.BlockedLayout:
    """Of a few numbers, the same in each block."""
    ones = [1] * (rank - 1)
    return gl.BlockedLayout([*ones, 2], [*ones, 32], [*ones, num_warps], [*range(rank)][::-1], repeated(rank, blocks))


@gluon.constexpr_function
def flat_layout(size: int, num_warps: int, blocks: int) -> gl.BlockedLayout:
    """Of numbers [blocks, size], one row a block, spread over all threads."""
    each = max(1, min(4, size // (32 * num_warps)))
    return gl.BlockedLayout([1, each], [1, 32], [1, num_warps], [1, 0], spread(2, 0, blocks))


@gluon.constexpr_function
def output_layout(group: int, lanes: int, num_warps: int, blocks: int) -> gl.BlockedLayout:
    """Of weights [outputs, group, HEAD]."""
    return gl.BlockedLayout([1, group, 8], [32 // lanes, 1, lanes], [num_warps, 1, 1], [2, 1, 0], spread(3, 0, blocks))


@gluon.jit
def _load_rows(step, steps, q_at, k_at, v_at, q_r, k_r, v_r, GROUP: gl.constexpr, KEYS: gl.constexpr,
               TOTAL: gl.constexpr, HIDDEN: gl.constexpr, HEAD: gl.constexpr, row, column):  # fmt: skip
    # Step `step` of the weights of GROUP heads of queries, then KEYS of keys, then one of values.
    head, begin = step // steps, step % steps * (column.shape[0] * column.shape[1])
    if head < GROUP:
        first = q_at + (head * HEAD).to(gl.int64) * q_r
        stride = q_r
    elif head < GROUP + KEYS:
        first = k_at + ((head - GROUP) * HEAD).to(gl.int64) * k_r
        stride = k_r
    else:
        first = v_at
        stride = v_r
    live = (row < HEAD)[:, None, None] & (begin + column < HIDDEN)[None] & (head < TOTAL)
    return gl.load(first + (row * stride)[:, None, None] + (begin + column)[None], mask=live, other=0.0)


@gluon.jit
def _load_hidden(at, step, steps, HIDDEN: gl.constexpr, column):
    column = step % steps * (column.shape[0] * column.shape[1]) + column
    return gl.load(at + column, mask=column < HIDDEN, other=0.0)


@gluon.jit
def project(x_at, norm_ptr, q_at, k_at, v_at, q_r, k_r, v_r, offset,
            HIDDEN: gl.constexpr, HEAD: gl.constexpr, GROUP: gl.constexpr, KEYS: gl.constexpr, TOTAL: gl.constexpr,
            BLOCK_D: gl.constexpr, HEADS: gl.constexpr, BLOCK_K: gl.constexpr, LANES: gl.constexpr,
            WARPS: gl.constexpr):  # fmt: skip
    """Rows of normed x times weights, [BLOCK_D, HEADS] spread over the blocks, not yet divided by x's size; and that.

    TOTAL heads of HEAD rows each: GROUP of queries, KEYS of keys, then values. Loads are issued one step ahead.
    """
    blocks: gl.constexpr = gl.num_ctas()
    layout: gl.constexpr = projection_layout(LANES, WARPS, gl.num_warps(), blocks)
    totals: gl.constexpr = gl.SliceLayout(2, layout)
    place = gl.arange(0, BLOCK_D, gl.SliceLayout(1, totals))
    row = place % (BLOCK_D // blocks) * blocks + place // (BLOCK_D // blocks)
    vector = gl.arange(0, BLOCK_K // VECTOR, gl.SliceLayout(1, gl.SliceLayout(0, layout)))
    column = vector[:, None] * VECTOR + gl.arange(0, VECTOR, gl.SliceLayout(0, gl.SliceLayout(0, layout)))[None, :]
    heads = gl.arange(0, HEADS, gl.SliceLayout(0, totals))

    steps: gl.constexpr = (HIDDEN + BLOCK_K - 1) // BLOCK_K
    weight = _load_rows(0, steps, q_at, k_at, v_at, q_r, k_r, v_r, GROUP, KEYS, TOTAL, HIDDEN, HEAD, row, column)
    x, norm = _load_hidden(x_at, 0, steps, HIDDEN, column), _load_hidden(norm_ptr, 0, steps, HIDDEN, column)
    result = gl.zeros([BLOCK_D, HEADS], gl.float32, totals)
    sums = gl.zeros([BLOCK_D, BLOCK_K // VECTOR], gl.float32, totals)
    squares = gl.zeros([BLOCK_K // VECTOR, VECTOR], gl.float32, gl.SliceLayout(0, layout))
    for step in range(TOTAL * steps):
        ahead = step + 1
        next_weight = _load_rows(
            ahead, steps, q_at, k_at, v_at, q_r, k_r, v_r, GROUP, KEYS, TOTAL, HIDDEN, HEAD, row, column
        )
        next_x = _load_hidden(x_at, ahead, steps, HIDDEN, column)
        next_norm = _load_hidden(norm_ptr, ahead, steps, HIDDEN, column)
        wide = x.to(gl.float32)
        squares += gl.where(step < steps, wide * wide, 0.0)
        scaled = wide * (norm.to(gl.float32) + offset)
        sums += gl.sum(weight.to(gl.float32) * scaled[None], 2)
        if ahead % steps == 0:
            result = gl.where(heads[None, :] == step // steps, gl.sum(sums, 1)[:, None], result)
            sums = gl.zeros([BLOCK_D, BLOCK_K // VECTOR], gl.float32, totals)
        weight, x, norm = next_weight, next_x, next_norm
    return result, gl.sum(gl.sum(squares, 1), 0)


@gluon.jit
def gather_rows(projected, layout: gl.constexpr):
    """What `project` has dealt out, row r to block r % blocks, whole and in order on each block: a ClusterGather."""
    blocks: gl.constexpr = gl.num_ctas()
    size: gl.constexpr = projected.shape[0]
    heads: gl.constexpr = projected.shape[1]
    dealt = gl.permute(gl.reshape(projected, [blocks, size // blocks, heads]), [1, 0, 2])
    return cluster_gather(gl.reshape(dealt, [size, heads]), layout)


@gluon.jit
def rms(x, weight, eps, live, HEAD: gl.constexpr):
    """RMSNorm over the first axis of the columns of `live`; others go through."""
    size = gl.sum(x * x, 0) / HEAD
    return gl.where(live[None, :], x * gl.rsqrt(size + eps)[None, :] * weight, x)


@gluon.jit
def rotate(x, cos_at, sin_at, at, live, ROTARY: gl.constexpr, INTERLEAVED: gl.constexpr):
    """Rotary embedding of the columns of `live`: element `at` turns with its partner by the angle of their pair."""
    half: gl.constexpr = ROTARY // 2
    if INTERLEAVED:
        pair, first, partner = at // 2, at % 2 == 0, at ^ 1
    else:
        pair, first, partner = at % half, at < half, gl.where(at < half, at + half, at - half)
    turned = at < ROTARY
    partner = gl.where(turned, partner, at)
    cos = gl.load(cos_at + pair, mask=turned, other=1.0).to(gl.float32)
    sin = gl.load(sin_at + pair, mask=turned, other=0.0).to(gl.float32)
    sin = gl.where(first, -sin, sin)
    other = gl.gather(x, partner[:, None] + gl.zeros_like(x).to(gl.int32), 0)
    return gl.where(live[None, :], x * cos[:, None] + other * sin[:, None], x)


@gluon.jit
def pick(x, chosen):
    """The one column of [HEAD, heads] that is chosen."""
    return gl.sum(gl.where(chosen[None, :], x, 0.0), 1)


@gluon.jit
def _capped(scores, outer, HAS_SOFTCAP: gl.constexpr):
    # tanh from exp2; its absolute error is 1e-7.
    if HAS_SOFTCAP:
        scores = (1.0 - 2.0 / (gl.exp2(scores * 2.8853900817779268) + 1.0)) * outer
    return scores


@gluon.jit
def load_slots(cache_at, slot, length, dim, stride, HEAD: gl.constexpr):
    """Keys or values [strips, rows, HEAD] of the slots below the length."""
    live = (slot < length)[:, :, None] & (dim < HEAD)[None, None, :]
    return gl.load(cache_at + (slot.to(gl.int64) * stride)[:, :, None] + dim[None, None, :], mask=live, other=0.0)


@gluon.jit
def attend(q, new_k, new_v, slot, k, v, k_at, v_at, mask_at, k_c, v_c, m_c, steps, length, skipped, inner, outer,
           HEAD: gl.constexpr, HAS_SOFTCAP: gl.constexpr, layout: gl.constexpr):  # fmt: skip
    """Attention of each strip to its share of the slots, the first one's to the new token too, as `merge` takes it.

    Args:
        q: [group, HEAD]. new_k, new_v: [HEAD].
        slot: [strips, rows], of the first tile. k, v: [strips, rows, HEAD], the first tile, already on its way.
        steps: tiles. skipped: a slot that is about to be overwritten, or -1.
        layout: [strips, rows, group, HEAD].
    """
    strips: gl.constexpr = slot.shape[0]
    group: gl.constexpr = q.shape[0]
    size: gl.constexpr = q.shape[1]
    scored: gl.constexpr = gl.SliceLayout(3, layout)  # [strips, rows, group]
    topped: gl.constexpr = gl.SliceLayout(1, scored)  # [strips, group]
    summed: gl.constexpr = gl.SliceLayout(1, layout)  # [strips, group, HEAD]
    seeing: gl.constexpr = gl.SliceLayout(2, scored)  # [strips, rows]
    dim = gl.arange(0, size, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, layout))))

    begins = gl.arange(0, strips, gl.SliceLayout(1, topped)) == 0
    own = _capped(gl.sum(q * gl.convert_layout(new_k, gl.SliceLayout(0, q.type.layout))[None, :], 1) * inner, outer,
                  HAS_SOFTCAP)  # fmt: skip
    own = gl.convert_layout(own, gl.SliceLayout(0, topped))[None, :]
    top = gl.where(begins[:, None], own, float("-inf"))
    total = gl.where(begins[:, None], gl.full([strips, group], 1.0, gl.float32, topped), 0.0)
    begins = gl.arange(0, strips, gl.SliceLayout(1, gl.SliceLayout(2, summed))) == 0
    first = gl.convert_layout(new_v, gl.SliceLayout(0, gl.SliceLayout(1, summed)))[None, None, :]
    acc = gl.where(begins[:, None, None], first + gl.zeros([strips, group, size], gl.float32, summed), 0.0)
    for _ in range(steps):
        next_slot = slot + strips * slot.shape[1]
        next_k = load_slots(k_at, next_slot, length, dim, k_c, HEAD)
        next_v = load_slots(v_at, next_slot, length, dim, v_c, HEAD)
        seen = (slot < length) & (slot != skipped)
        if mask_at is not None:
            seen = seen & (gl.load(mask_at + slot.to(gl.int64) * m_c, mask=seen, other=0) != 0)
        # A weight of zero does not hide what a slot that is not attended to may hold.
        wide_v = gl.where(seen[:, :, None], v.to(gl.float32), 0.0)
        seen = gl.convert_layout(seen, seeing)
        scores = _capped(gl.sum(k.to(gl.float32)[:, :, None, :] * q[None, None, :, :], 3) * inner, outer, HAS_SOFTCAP)
        scores = gl.where(seen[:, :, None], scores, float("-inf"))
        higher = gl.maximum(top, gl.max(scores, 1))
        # -inf minus -inf is NaN: a strip that has attended to nothing yet is taken from zero.
        base = gl.where(higher == float("-inf"), 0.0, higher)
        weights, shrink = gl.exp2(scores - base[:, None, :]), gl.exp2(top - base)
        total = total * shrink + gl.sum(weights, 1)
        acc = acc * gl.convert_layout(shrink, gl.SliceLayout(2, summed))[:, :, None]
        acc += gl.sum(weights[:, :, :, None] * wide_v[:, :, None, :], 1)
        top, slot, k, v = higher, next_slot, next_k, next_v
    return top, total, acc


@gluon.jit
def merge(top, total, acc):
    """Attention of all strips of all blocks, [group, HEAD] on each block: a ClusterGather and a ClusterReduce.

    Largest scores and sums of weights are a few numbers, for which barriers are the cost: all blocks gather those of
    all and reduce them alike, which takes two, where ClusterReduce(max) and then (sum) would take six.

    Args:
        top: [strips, group], the largest scores. total: sums of weights. acc: [strips, group, HEAD], weighted values.
    """
    blocks: gl.constexpr = gl.num_ctas()
    strips: gl.constexpr = acc.shape[0] // blocks
    group: gl.constexpr = acc.shape[1]
    head: gl.constexpr = acc.shape[2]
    # Within the block first: then one number of each block crosses, and not one of each strip.
    strip_top = gl.reshape(top, [blocks, strips, group])
    top = gl.max(strip_top, 1)
    scale = gl.exp2(strip_top - gl.where(top == float("-inf"), 0.0, top)[:, None, :])
    total = gl.sum(gl.reshape(total, [blocks, strips, group]) * scale, 1)
    scale = gl.convert_layout(gl.reshape(scale, [blocks * strips, group]), gl.SliceLayout(2, acc.type.layout))
    acc = gl.sum(gl.reshape(acc * scale[:, :, None], [blocks, strips, group, head]), 1)

    both = cluster_gather(gl.join(top, total), repeated_layout(3, gl.num_warps(), blocks))
    tops, totals = gl.split(both)
    scale = gl.exp2(tops - gl.max(tops, 0)[None, :])
    scale = scale / gl.sum(totals * scale, 0)[None, :]
    acc = acc * gl.convert_layout(scale, gl.SliceLayout(2, acc.type.layout))[:, :, None]
    # The sum over strips is with each warp. Spread over all of them it crosses in one round and not in one a register.
    flat: gl.constexpr = flat_layout(group * head, gl.num_warps(), blocks)
    acc = cluster_sum(gl.convert_layout(gl.reshape(acc, [blocks, group * head]), flat))
    return gl.reshape(acc, [group, head])


@gluon.jit
def _load_outputs(o_at, row, head, dim, stride, OUT: gl.constexpr, GROUP: gl.constexpr, HEAD: gl.constexpr):
    live = (row < OUT)[:, None, None] & ((head < GROUP)[:, None] & (dim < HEAD)[None, :])[None]
    place = (row.to(gl.int64) * stride)[:, None, None] + (head[:, None] * HEAD + dim[None, :])[None]
    return gl.load(o_at + place, mask=live, other=0.0)


@gluon.jit
def first_outputs(o_at, stride, OUT: gl.constexpr, GROUP: gl.constexpr, HEAD: gl.constexpr, BLOCK_O: gl.constexpr,
                  BLOCK_G: gl.constexpr, BLOCK_D: gl.constexpr):  # fmt: skip
    """The first tile of `output`: its rows, and the weights [BLOCK_O, BLOCK_G, BLOCK_D], already on their way."""
    layout: gl.constexpr = output_layout(BLOCK_G, BLOCK_D // VECTOR, gl.num_warps(), gl.num_ctas())
    row = gl.arange(0, BLOCK_O, gl.SliceLayout(1, gl.SliceLayout(2, layout)))
    head = gl.arange(0, BLOCK_G, gl.SliceLayout(1, gl.SliceLayout(0, layout)))
    dim = gl.arange(0, BLOCK_D, gl.SliceLayout(0, gl.SliceLayout(0, layout)))
    return row, _load_outputs(o_at, row, head, dim, stride, OUT, GROUP, HEAD)


@gluon.jit
def output(attended, row, weight, o_at, stride, part_at, OUT: gl.constexpr, GROUP: gl.constexpr, HEAD: gl.constexpr):
    """Writes the output projection of [group, HEAD], OUT numbers in float32; rows are shared out among the blocks."""
    layout: gl.constexpr = weight.type.layout
    tile: gl.constexpr = weight.shape[0]
    head = gl.arange(0, weight.shape[1], gl.SliceLayout(1, gl.SliceLayout(0, layout)))
    dim = gl.arange(0, weight.shape[2], gl.SliceLayout(0, gl.SliceLayout(0, layout)))
    attended = gl.convert_layout(attended, gl.SliceLayout(0, layout))
    for _ in range((OUT + tile - 1) // tile):
        next_weight = _load_outputs(o_at, row + tile, head, dim, stride, OUT, GROUP, HEAD)
        added = gl.sum(gl.sum(weight.to(gl.float32) * attended[None], 1), 1)
        at = gl.convert_layout(row, gl.SliceLayout(1, gl.SliceLayout(1, layout)))
        gl.store(part_at + at, added, mask=at < OUT)
        row, weight = row + tile, next_weight
