"""Moments of the finetune side: of the host's clock, or events on its stream, for a GPU works after its launches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch


class Stopwatch(Protocol):
    """Marks moments and tells the time between two of them."""

    def mark(self) -> Any:
        """This moment in the work that the calling thread has given out."""

    def passed(self, mark: Any) -> bool:
        """Whether the work before ``mark`` is done. Does not wait."""

    def wait(self, mark: Any) -> None:
        """Wait until the work before ``mark`` is done."""

    def seconds(self, start: Any, stop: Any) -> float:
        """Seconds between two marks that have passed."""


class HostStopwatch:
    """For a CPU: what a thread has called is done when the call returns.

    Args:
        clock: Seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock

    def mark(self) -> float:
        """Now."""
        return self._clock()

    def passed(self, mark: float) -> bool:
        """Always."""
        return True

    def wait(self, mark: float) -> None:
        """Nothing to wait for."""

    def seconds(self, start: float, stop: float) -> float:
        """The difference."""
        return stop - start


class CudaStopwatch:
    """For a GPU: events on the stream that is current where a moment is marked.

    Args:
        device: Whose streams.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> torch.cuda.Event:
        """An event after all that the current stream was given."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def passed(self, mark: torch.cuda.Event) -> bool:
        """Whether the stream came past it."""
        return mark.query()

    def wait(self, mark: torch.cuda.Event) -> None:
        """Block this thread, and no other: the interpreter's lock is free meanwhile."""
        mark.synchronize()

    def seconds(self, start: torch.cuda.Event, stop: torch.cuda.Event) -> float:
        """Device time between them."""
        return start.elapsed_time(stop) / 1e3
