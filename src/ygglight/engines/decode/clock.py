"""Where the time of a decoding loop went."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

STAGES = ("prefill", "draft", "verify", "host")


class Timed:
    """What a :class:`Clock` writes to.

    Args:
        seconds: By stage, the names of :data:`STAGES`.
    """

    seconds: dict[str, float]

    @property
    def decode_seconds(self) -> float:
        """Without the prompts."""
        return sum(s for stage, s in self.seconds.items() if stage != "prefill")


class Clock:
    """Times stages: by the wall on a CPU; on CUDA by events, resolved at the end, so that timing never waits.

    Args:
        report: whose ``seconds`` grow. device: where the work runs.
    """

    def __init__(self, report: Timed, device: torch.device) -> None:
        self._report, self._cuda = report, device.type == "cuda"
        self._events: list[tuple[str, Any, Any]] = []
        self._started = time.perf_counter()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what is inside."""
        if not self._cuda:
            start = time.perf_counter()
            try:
                yield
            finally:
                self._report.seconds[name] += time.perf_counter() - start
            return
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        try:
            yield
        finally:
            last.record()
            self._events.append((name, first, last))

    def close(self) -> None:
        """Resolve the events; all that was spent outside of stages is the host's."""
        if self._cuda:
            torch.cuda.synchronize()
            for name, first, last in self._events:
                self._report.seconds[name] += first.elapsed_time(last) / 1000
            self._events.clear()
        total = time.perf_counter() - self._started
        known = sum(self._report.seconds[stage] for stage in STAGES if stage != "host")
        self._report.seconds["host"] = max(0.0, total - known)
