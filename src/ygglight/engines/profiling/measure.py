"""Timing forwards of different sizes side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

ROUNDS = 7


def measure_widths(
    run: Callable[[int], None],
    widths: Sequence[int],
    device: torch.device,
    *,
    budget_seconds: float = 10.0,
    give_up: float = float("inf"),
) -> dict[int, float]:
    """Median seconds of ``run(width)`` for each width, made non-decreasing.

    Rounds go over all widths in turn, so that drift (clocks, other processes) hits all alike; as many rounds as the
    budget allows, at least two of each width that is kept.

    Args:
        run: does the work; on CUDA it may return before the work is done. widths: ascending. device: where it works.
        budget_seconds: to spend in all. give_up: the first width that takes more than so many times the first ends the
            table: it stays in, or what lies beyond would be thought as cheap as what lies before, and wider ones are
            left out.

    Returns:
        Width -> seconds; the first width is always there.
    """
    started = time.perf_counter()
    kept: list[int] = []
    seconds: dict[int, list[float]] = {}
    for width in widths:
        timed(run, width, device)  # warm-up: records graphs, fills caches
        seconds[width] = [timed(run, width, device)]
        kept.append(width)
        spent = time.perf_counter() - started
        if seconds[width][0] > give_up * seconds[kept[0]][0] or (len(kept) > 1 and spent > budget_seconds):
            break
    for _ in range(ROUNDS - 1):
        if time.perf_counter() - started > budget_seconds and all(len(s) > 1 for s in seconds.values()):
            break
        for width in kept:
            seconds[width].append(timed(run, width, device))
    found, floor = {}, 0.0
    for width in kept:
        floor = max(floor, statistics.median(seconds[width]))
        found[width] = floor
    return found


def timed(run: Callable[[int], None], width: int, device: torch.device) -> float:
    """Seconds of one call: by events on CUDA, by the clock elsewhere."""
    if device.type != "cuda":
        start = time.perf_counter()
        run(width)
        return time.perf_counter() - start
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    run(width)
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1000
