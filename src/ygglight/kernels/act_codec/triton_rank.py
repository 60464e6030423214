# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Device functions that rank a group's values: integer keys, and the few largest and smallest of many.

About 7 min/max an element find the three largest and three smallest of a group of 128; six passes of argmax with
masking would be about 30.
"""

import triton
import triton.language as tl

_TOP = tl.constexpr((1 << 31) - 1)


@triton.jit
def key_of(value, place, PLACES: tl.constexpr, EXACT: tl.constexpr):
    """Bits of fp32 made monotone as int32, the place in the group in the low bits."""
    bits = value.to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & (_TOP & ~PLACES))
    if not EXACT:
        key = key & ~PLACES
    return key | place


@triton.jit
def value_of(key, PLACES: tl.constexpr):
    """The value that a key ranks, low bits zero."""
    key = key & ~PLACES
    return (key ^ ((key >> 31) & (_TOP & ~PLACES))).to(tl.float32, bitcast=True)


@triton.jit
def sorted4(a, b, c, d):
    """Four tiles in descending order, elementwise."""
    a, b = tl.maximum(a, b), tl.minimum(a, b)
    c, d = tl.maximum(c, d), tl.minimum(c, d)
    first, fourth = tl.maximum(a, c), tl.minimum(b, d)
    x, y = tl.minimum(a, c), tl.maximum(b, d)
    return first, tl.maximum(x, y), tl.minimum(x, y), fourth


@triton.jit
def merge_two(a1, a2, z1, z2, b1, b2, y1, y2):
    """Two largest (descending) and two smallest (ascending) of two such lists."""
    return (
        tl.maximum(a1, b1),
        tl.maximum(tl.minimum(a1, b1), tl.maximum(a2, b2)),
        tl.minimum(z1, y1),
        tl.minimum(tl.maximum(z1, y1), tl.minimum(z2, y2)),
    )


@triton.jit
def merge_three(a1, a2, a3, z1, z2, z3, b1, b2, b3, y1, y2, y3):
    """Three largest and three smallest; the k-th of a merge is the max over p + q = k of min(a_p, b_q)."""
    return (
        tl.maximum(a1, b1),
        tl.maximum(tl.minimum(a1, b1), tl.maximum(a2, b2)),
        tl.maximum(tl.maximum(a3, b3), tl.maximum(tl.minimum(a1, b2), tl.minimum(a2, b1))),
        tl.minimum(z1, y1),
        tl.minimum(tl.maximum(z1, y1), tl.minimum(z2, y2)),
        tl.minimum(tl.minimum(z3, y3), tl.minimum(tl.maximum(z1, y2), tl.maximum(z2, y1))),
    )


@triton.jit
def finite_span(high, low):
    """Difference of two values, Inf when it is Inf or NaN: comparisons with NaN would keep a poisoned choice."""
    span = high - low
    return tl.where(span < float("inf"), span, float("inf"))


@triton.jit
def kept_or(value, key, slot0, slot1, otherwise):
    """The value, or `otherwise` where its key is one of the two outliers'."""
    return tl.where((key == slot0[:, None]) | (key == slot1[:, None]), otherwise, value)
