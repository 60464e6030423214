"""The pool of OpenMP workers that each Python thread gets from torch's libgomp (Linux)."""

from __future__ import annotations

import ctypes
import functools
import sys
from pathlib import Path
from typing import Any

import torch

__all__ = ["release_workers"]

_SOFT = 1
"""``omp_pause_soft`` (OpenMP 5.0): settings are kept."""


def release_workers() -> bool:
    """Give up the workers of the calling thread; its next parallel operator makes them anew, in some 0.1 ms.

    While more workers exist than cores, those that sleep among them, libgomp lets none spin between two operators
    (``gomp_throttled_spin_count_var``), and small matrix products take up to twice as long: on two cores a training
    step of SmolLM2 (1x128 tokens) 1.1 s instead of 0.6, for the sake of a thread that does nothing.

    Returns:
        False where torch's OpenMP is another, or too old.
    """
    pause = _pause()
    return pause is not None and pause(_SOFT) == 0


@functools.cache
def _pause() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    for path in (Path(torch.__file__).parent / "lib").glob("libgomp*.so*"):
        try:
            # Only if torch has loaded it: a second libgomp would have pools of its own.
            library = ctypes.CDLL(str(path), mode=ctypes.DEFAULT_MODE | getattr(ctypes, "RTLD_NOLOAD", 4))
            return library.omp_pause_resource_all
        except (OSError, AttributeError):
            continue
    return None
