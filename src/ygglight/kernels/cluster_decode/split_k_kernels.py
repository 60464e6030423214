# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""The kernels of the decode block in plain Triton; :mod:`split_k` launches them.

Not yet timed on a GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ygglight.kernels.tree_attention.triton import LOG2E, _tanh

_LOG2E = tl.constexpr(LOG2E)


@triton.jit
def _product(
    x_ptr, x_b, norm_ptr, w_ptr, w_r, first, rows, first_batch, batch, eps, offset,
    K: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
):  # fmt: skip
    # Rows first.. of w times the (normed) rows first_batch.. of x, float32 [BLOCK_R, BLOCK_B].
    row = first + tl.arange(0, BLOCK_R)
    at_k = tl.arange(0, BLOCK_K)
    w_at = w_ptr + row.to(tl.int64)[:, None] * w_r + at_k[None, :]
    live_row = (row < rows)[:, None]
    if BLOCK_B == 1:
        x_at = x_ptr + first_batch * x_b + at_k
        acc = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
        squares = tl.zeros([BLOCK_K], tl.float32)
        for k in range(0, K, BLOCK_K):
            live = at_k < K - k
            x = tl.load(x_at + k, mask=live, other=0.0).to(tl.float32)
            if NORM:
                # The factor of the norm is the same for all of x, so it can be multiplied by in the end.
                squares += x * x
                x *= tl.load(norm_ptr + k + at_k, mask=live, other=0.0).to(tl.float32) + offset
            w = tl.load(w_at + k, mask=live_row & live[None, :], other=0.0)
            acc += w.to(tl.float32) * x[None, :]
        result = tl.sum(acc, 1)[:, None]
        if NORM:
            result *= tl.rsqrt(tl.sum(squares, 0) / K + eps)
    else:
        sequence = first_batch + tl.arange(0, BLOCK_B)
        live_b = (sequence < batch)[None, :]
        x_at = x_ptr + (sequence * x_b)[None, :] + at_k[:, None]
        factor = tl.full([BLOCK_B], 1.0, tl.float32)
        if NORM:
            # Before the products, whose factors are rounded: unnormed ones could be beyond float16.
            squares = tl.zeros([BLOCK_B], tl.float32)
            for k in range(0, K, BLOCK_K):
                x = tl.load(x_at + k, mask=live_b & (at_k < K - k)[:, None], other=0.0).to(tl.float32)
                squares += tl.sum(x * x, 0)
            factor = tl.rsqrt(squares / K + eps)
        result = tl.zeros([BLOCK_R, BLOCK_B], tl.float32)
        for k in range(0, K, BLOCK_K):
            live = at_k < K - k
            x = tl.load(x_at + k, mask=live_b & live[:, None], other=0.0)
            w = tl.load(w_at + k, mask=live_row & live[None, :], other=0.0)
            if NORM:
                gain = tl.load(norm_ptr + k + at_k, mask=live, other=0.0).to(tl.float32) + offset
                x = (x.to(tl.float32) * factor[None, :] * gain[:, None]).to(w.dtype)
            result = tl.dot(w, x, result, input_precision="ieee")
    return result


@triton.jit
def _store_rows(
    result, bias_ptr, out_ptr, out_b, first, rows, first_batch, batch,
    HAS_BIAS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_B: tl.constexpr,
):  # fmt: skip
    row = first + tl.arange(0, BLOCK_R)
    sequence = first_batch + tl.arange(0, BLOCK_B)
    if HAS_BIAS:
        result += tl.load(bias_ptr + row, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    at = out_ptr + sequence[None, :] * out_b + row[:, None]
    tl.store(at, result.to(out_ptr.dtype.element_ty), mask=(row < rows)[:, None] & (sequence < batch)[None, :])


@triton.jit(do_not_specialize=["batch"])
def project_kernel(
    x_ptr,  # [B, K], rows x_b apart
    norm_ptr,  # [K]
    q_ptr, k_ptr, v_ptr,  # [rows, K], rows q_r, k_r and v_r apart
    q_bias_ptr, k_bias_ptr, v_bias_ptr,  # [rows], unread without their HAS_
    out_ptr,  # float32 [B, Q_ROWS + 2 * KV_ROWS]
    x_b, q_r, k_r, v_r, batch, eps, offset,
    K: tl.constexpr,
    Q_ROWS: tl.constexpr,
    KV_ROWS: tl.constexpr,
    HAS_Q_BIAS: tl.constexpr,
    HAS_K_BIAS: tl.constexpr,
    HAS_V_BIAS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
):  # fmt: skip
    """Norm, projections and bias; grid (tiles of q, then of k, then of v, tiles of sequences)."""
    tile = tl.program_id(0)
    first_batch = tl.program_id(1) * BLOCK_B
    Q_TILES: tl.constexpr = (Q_ROWS + BLOCK_R - 1) // BLOCK_R
    KV_TILES: tl.constexpr = (KV_ROWS + BLOCK_R - 1) // BLOCK_R
    ROWS: tl.constexpr = Q_ROWS + 2 * KV_ROWS
    # Three calls and not one with a pointer chosen here, of which the compiler would know no alignment.
    if tile < Q_TILES:
        first = tile * BLOCK_R
        result = _product(
            x_ptr, x_b, norm_ptr, q_ptr, q_r, first, Q_ROWS, first_batch, batch, eps, offset,
            K, True, BLOCK_R, BLOCK_K, BLOCK_B,
        )  # fmt: skip
        _store_rows(result, q_bias_ptr, out_ptr, ROWS, first, Q_ROWS, first_batch, batch, HAS_Q_BIAS, BLOCK_R, BLOCK_B)
    elif tile < Q_TILES + KV_TILES:
        first = (tile - Q_TILES) * BLOCK_R
        result = _product(
            x_ptr, x_b, norm_ptr, k_ptr, k_r, first, KV_ROWS, first_batch, batch, eps, offset,
            K, True, BLOCK_R, BLOCK_K, BLOCK_B,
        )  # fmt: skip
        out_ptr += Q_ROWS
        _store_rows(result, k_bias_ptr, out_ptr, ROWS, first, KV_ROWS, first_batch, batch, HAS_K_BIAS, BLOCK_R, BLOCK_B)
    else:
        first = (tile - Q_TILES - KV_TILES) * BLOCK_R
        result = _product(
            x_ptr, x_b, norm_ptr, v_ptr, v_r, first, KV_ROWS, first_batch, batch, eps, offset,
            K, True, BLOCK_R, BLOCK_K, BLOCK_B,
        )  # fmt: skip
        out_ptr += Q_ROWS + KV_ROWS
        _store_rows(result, v_bias_ptr, out_ptr, ROWS, first, KV_ROWS, first_batch, batch, HAS_V_BIAS, BLOCK_R, BLOCK_B)


@triton.jit(do_not_specialize=["rows", "batch"])
def output_kernel(
    x_ptr,  # [B, K]
    w_ptr,  # [rows, K], rows w_r apart
    bias_ptr,  # [rows], unread without HAS_BIAS
    out_ptr,  # [B, rows]
    w_r, rows, batch,
    K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
):  # fmt: skip
    """Output projection and bias; grid (tiles of rows, tiles of sequences)."""
    first, first_batch = tl.program_id(0) * BLOCK_R, tl.program_id(1) * BLOCK_B
    result = _product(
        x_ptr, K, x_ptr, w_ptr, w_r, first, rows, first_batch, batch, 0.0, 0.0, K, False, BLOCK_R, BLOCK_K, BLOCK_B
    )
    _store_rows(result, bias_ptr, out_ptr, rows, first, rows, first_batch, batch, HAS_BIAS, BLOCK_R, BLOCK_B)


@triton.jit
def _turned(
    x_ptr, norm_ptr, cos_ptr, sin_ptr, live_row, eps, offset,
    D: tl.constexpr,
    ROT: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    QK_NORM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    # Norm and rotary of the heads at x_ptr [M, 1], float32 [M, BLOCK_D]. What an element is rotated with is loaded
    # again and not exchanged between threads.
    d = tl.arange(0, BLOCK_D)[None, :]
    live = live_row & (d < D)
    x = tl.load(x_ptr + d, mask=live, other=0.0)
    if QK_NORM:
        factor = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
        x *= factor * (tl.load(norm_ptr + d, mask=d < D, other=0.0).to(tl.float32) + offset)
    if ROT > 0:
        HALF: tl.constexpr = ROT // 2
        if INTERLEAVED:
            pair, partner, sign = d // 2, d ^ 1, tl.where(d % 2 == 0, -1.0, 1.0)
        else:
            pair, partner, sign = d % HALF, tl.where(d < HALF, d + HALF, d - HALF), tl.where(d < HALF, -1.0, 1.0)
        inside = d < ROT
        other = tl.load(x_ptr + partner, mask=live & inside, other=0.0)
        if QK_NORM:
            other *= factor * (tl.load(norm_ptr + partner, mask=inside, other=0.0).to(tl.float32) + offset)
        cos = tl.load(cos_ptr + pair, mask=inside, other=1.0).to(tl.float32)
        sin = tl.load(sin_ptr + pair, mask=inside, other=0.0).to(tl.float32)
        x = x * cos + sign * other * sin
    return x


@triton.jit(do_not_specialize=["slots", "splits"])
def attend_kernel(
    qkv_ptr,  # float32 [B, (heads + 2 * kv_heads) * D]
    q_norm_ptr, k_norm_ptr,  # [D], unread without QK_NORM
    cos_ptr, sin_ptr,  # [B, ROT], rows cos_b and sin_b apart
    k_ptr, v_ptr,  # [B, kv_heads, slots, D]
    length_ptr,  # int32 [B]
    mask_ptr,  # uint8 or floating [B or 1, slots], unread without MASK
    own_ptr,  # int [B], the slot to write; unread without OWN
    new_k_ptr, new_v_ptr,  # [B, kv_heads, slots, D], of which one slot is written
    out_ptr,  # [B, heads * D], written when there is one split
    acc_ptr, max_ptr, sum_ptr,  # as in tree attention's split kernel
    cos_b, sin_b,
    k_b, k_h, k_c, k_d,
    v_b, v_h, v_c, v_d,
    m_b, m_c,
    nk_b, nk_h, nk_c, nk_d,
    nv_b, nv_h, nv_c, nv_d,
    slots, splits, inner, outer, eps, offset,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    ROT: tl.constexpr,
    WINDOW: tl.constexpr,  # 0 for none
    INTERLEAVED: tl.constexpr,
    QK_NORM: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    MASK: tl.constexpr,  # 0 for none, 1 for bool, 2 for numbers to add
    OWN: tl.constexpr,
    ONE_SPLIT: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Norm of the heads, rotary, append and attention over a split of the slots; grid (B * kv_heads, splits)."""
    pair = tl.program_id(0)
    split = tl.program_id(1)
    head = pair % KV_HEADS
    batch = (pair // KV_HEADS).to(tl.int64)
    kind = k_ptr.dtype.element_ty
    at_d, at_n, at_g = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_G)
    live_d, live_g = at_d < D, at_g < GROUP

    row_ptr = qkv_ptr + batch * ((GROUP + 2) * KV_HEADS * D)
    cos_ptr += batch * cos_b
    sin_ptr += batch * sin_b
    q_at = row_ptr + (head * GROUP + at_g)[:, None] * D
    q = _turned(
        q_at, q_norm_ptr, cos_ptr, sin_ptr, live_g[:, None], eps, offset, D, ROT, INTERLEAVED, QK_NORM, BLOCK_D
    ).to(kind)

    length = tl.minimum(tl.load(length_ptr + batch), slots)
    own = -1
    if OWN:
        own = tl.load(own_ptr + batch).to(tl.int32)
    top = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    if split == 0:
        k_at = row_ptr + (GROUP * KV_HEADS + head) * D + tl.zeros([1, 1], tl.int32)
        new_k = _turned(
            k_at,
            k_norm_ptr,
            cos_ptr,
            sin_ptr,
            (tl.arange(0, 1) == 0)[:, None],
            eps,
            offset,
            D,
            ROT,
            INTERLEAVED,
            QK_NORM,
            BLOCK_D,
        ).to(kind)
        v_at = row_ptr + ((GROUP + 1) * KV_HEADS + head) * D + at_d[None, :]
        new_v = tl.load(v_at, mask=live_d[None, :], other=0.0).to(kind)
        place = tl.maximum(own, 0).to(tl.int64)
        k_to = new_k_ptr + batch * nk_b + head * nk_h + place * nk_c + at_d[None, :] * nk_d
        v_to = new_v_ptr + batch * nv_b + head * nv_h + place * nv_c + at_d[None, :] * nv_d
        tl.store(k_to, new_k, mask=live_d[None, :])
        tl.store(v_to, new_v, mask=live_d[None, :])
        top = tl.sum(q.to(tl.float32) * new_k.to(tl.float32), 1) * inner
        if HAS_SOFTCAP:
            top = _tanh(top) * outer
        total += 1.0
        acc += new_v.to(tl.float32)

    # Split s takes the blocks s, s + splits, ... of those with committed slots in the window.
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(length - WINDOW + 1, 0) // BLOCK_N
    rounds = tl.maximum((length + BLOCK_N - 1) // BLOCK_N - begin - split + splits - 1, 0) // splits
    begin += split
    if MASK > 0:
        mask_row = mask_ptr + batch * m_b
    if MASK == 1:
        # Rounds before the first and behind the last slot that the mask allows are left out: of a static cache that
        # comes with its mask for a length, this is all that is not in use.
        front, back = 2147483647, 0
        for i in range(rounds):
            slot = (begin + i * splits) * BLOCK_N + at_n
            some = tl.max((tl.load(mask_row + slot * m_c, mask=slot < length, other=0) != 0).to(tl.int32), 0)
            front = tl.where(some > 0, tl.minimum(front, i), front)
            back = tl.where(some > 0, i + 1, back)
        front = tl.minimum(front, back)
        begin += front * splits
        rounds = back - front

    k_row = k_ptr + batch * k_b + head * k_h + at_d[:, None] * k_d
    v_row = v_ptr + batch * v_b + head * v_h + at_d[None, :] * v_d
    for i in range(rounds):
        slot = (begin + i * splits) * BLOCK_N + at_n
        live = (slot < length) & (slot != own)
        if WINDOW > 0:
            live &= slot > length - WINDOW
        far = slot.to(tl.int64)
        k = tl.load(k_row + far[None, :] * k_c, mask=live[None, :] & live_d[:, None], other=0.0)
        v = tl.load(v_row + far[:, None] * v_c, mask=live[:, None] & live_d[None, :], other=0.0)
        scores = tl.dot(q, k, input_precision="ieee") * inner
        if HAS_SOFTCAP:
            scores = _tanh(scores) * outer
        seen = live
        if MASK == 1:
            seen &= tl.load(mask_row + slot * m_c, mask=live, other=0) != 0
        if MASK == 2:
            # At least the lowest float32: -inf as an addend would be lost in the where below, not in a difference.
            added = tl.load(mask_row + slot * m_c, mask=live, other=0.0).to(tl.float32)
            scores += tl.maximum(added, -1e30)[None, :] * _LOG2E
        scores = tl.where(seen[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # -inf minus -inf is NaN
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(kind), v, acc * shrink[:, None], input_precision="ieee")
        top = higher

    if ONE_SPLIT:
        at = out_ptr + (batch * KV_HEADS + head) * (GROUP * D) + at_g[:, None] * D + at_d[None, :]
        tl.store(at, (acc / total[:, None]).to(kind), mask=live_g[:, None] & live_d[None, :])
    else:
        at_row = (pair * splits + split) * GROUP + at_g
        tl.store(max_ptr + at_row, top, mask=live_g)
        tl.store(sum_ptr + at_row, total, mask=live_g)
        some_rows = live_g & (top > float("-inf"))  # the merge does not read what is not written here
        at = acc_ptr + at_row[:, None] * D + at_d[None, :]
        tl.store(at, acc, mask=some_rows[:, None] & live_d[None, :])
