"""Sizes as people write them: ``"8GiB"`` in, ``"8.00 GiB"`` out."""

from __future__ import annotations

import re

_UNITS = {
    "": 1, "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_bytes(text: str | int) -> int:
    """Bytes meant by ``text``.

    Args:
        text: an int (bytes), or a number with a unit: B, kB, MB, GB, TB (powers of 1000) or KiB, MiB, GiB, TiB.

    Raises:
        ValueError: when it does not parse, or is not positive.
    """
    if isinstance(text, bool) or not isinstance(text, (int, str)):
        raise ValueError(f"a size is an integer of bytes or text such as '8GiB', not {text!r}")
    if isinstance(text, int):
        size = text
    else:
        match = _SIZE.fullmatch(text)
        if match is None or match[2].lower() not in _UNITS:
            raise ValueError(f"cannot read the size {text!r}: write it like '600MiB' or '8GiB'")
        size = int(float(match[1]) * _UNITS[match[2].lower()])
    if size <= 0:
        raise ValueError(f"a size must be positive, got {text!r}")
    return size


def format_bytes(size: int | float) -> str:
    """``size`` bytes for a reader: ``"612.4 MiB"``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024 or unit == "GiB":
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError("unreachable")
