"""Bytes of one step as torch's own allocators saw them: nothing watches the step, so nothing changes what it does.

On a CPU they come from the profiler's allocation events. (A dispatch mode such as ``LiveBytes`` makes autograd add
gradients out of place, so that it counts more than runs without it take.)
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

_FORWARD = "ygglight benchmark forward"
Between = Callable[[Callable[[], Any]], AbstractContextManager[Any]]


def allocated(step: Callable[[], Any], device: torch.device, between: Between) -> tuple[int, int]:
    """Peak of ``step``, and what is held between its forward and its backward, in bytes above what existed before it.

    Args:
        step: what is run. device: where. between: makes a context in which a callable is called between the two.
    """
    return _on_cuda(step, device, between) if device.type == "cuda" else _on_cpu(step, between)


def _on_cuda(step: Callable[[], Any], device: torch.device, between: Between) -> tuple[int, int]:
    held = [0]
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    with between(lambda: held.__setitem__(0, torch.cuda.memory_allocated(device) - before)):
        step()
    return torch.cuda.max_memory_allocated(device) - before, held[0]


def _on_cpu(step: Callable[[], Any], between: Between) -> tuple[int, int]:
    from torch.profiler import ProfilerActivity, profile, record_function

    def mark() -> None:
        with record_function(_FORWARD):
            pass

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler, between(mark):
        step()
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    over = next(event.start_ns() for event in events if event.name() == _FORWARD)
    live = peak = held = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
        if event.start_ns() <= over:
            held = live
    return peak, held
