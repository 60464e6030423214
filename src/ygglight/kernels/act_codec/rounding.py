"""Random numbers for stochastic rounding: a counter-based hash that touches no global generator.

Element pairs share one 32-bit hash (15 bits each), because the hash is among the largest costs of a fused kernel: it is
about 10 integer instructions, where an H100 has about 15 for each 16-bit element at copy bandwidth. All arithmetic is
wrapping int32 with arithmetic right shifts (the same in torch, Triton and its interpreter; each step is a bijection),
so that both implementations agree bit for bit.
Multipliers: the "lowbias32" search of the hash-prospector project (bias 0.107), preceded by a Weyl step.
"""

from __future__ import annotations

import torch
from torch import Tensor

WEYL = 0x9E3779B9 - (1 << 32)
MULTIPLIER_1 = 0x21F0AAAD
MULTIPLIER_2 = 0xD35A2D97 - (1 << 32)
# Fraction bits of the fixed-point quotient: 255 * 2^15 is the largest int8 value below 2^23, the exact-integer range
# that the add-2^23 trick needs.
FRACTION_BITS = 15
FRACTION_MASK = (1 << FRACTION_BITS) - 1
HALF = 1 << (FRACTION_BITS - 1)


def as_int32(value: int) -> int:
    """The signed 32-bit integer with the low 32 bits of `value`."""
    return ((value + (1 << 31)) & 0xFFFFFFFF) - (1 << 31)


def seed_words(seed: int) -> tuple[int, int]:
    """Spreads a seed over two signed 32-bit words (splitmix64), so that seeds 0, 1, 2, ... give unrelated streams.

    Args:
        seed: any integer; the low 64 bits count.

    Returns:
        The word that starts the counter and the word that enters between the rounds.
    """
    z = (seed + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    z ^= z >> 31
    return as_int32(z), as_int32(z >> 32)


def hash_pairs_(out: Tensor, scratch: Tensor, weyl: Tensor, first_pair: int, words: tuple[int, int]) -> Tensor:
    """Fills `out` with one 32-bit hash a pair; the period over pair numbers is 2^32 (8.6e9 elements).

    Args:
        out: int32, any shape, overwritten.
        scratch: int32, shape of `out`, overwritten.
        weyl: int32, shape of `out`: `arange * WEYL`, wrapping.
        first_pair: pair number of the first entry.
        words: from `seed_words`.

    Returns:
        `out`.
    """
    torch.add(weyl, as_int32(first_pair * WEYL + words[0]), out=out)
    torch.bitwise_right_shift(out, 16, out=scratch)
    out.bitwise_xor_(scratch).mul_(MULTIPLIER_1).bitwise_xor_(words[1])
    torch.bitwise_right_shift(out, 15, out=scratch)
    out.bitwise_xor_(scratch).mul_(MULTIPLIER_2)
    torch.bitwise_right_shift(out, 16, out=scratch)
    return out.bitwise_xor_(scratch)
