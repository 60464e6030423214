"""Where finetuning waits for decoding: the training step comes here before every quantum of work.

Our design [R in the brief]: a training step is cut into quanta, one transformer layer each way, and the decode side
says how many may run. Nothing here touches the arithmetic: a thread that waits computes the same afterwards.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ygglight.compat.openmp import release_workers
from ygglight.engines.harli.stopwatch import HostStopwatch, Stopwatch

Phase = Literal["forward", "loss", "backward", "clip", "optimizer", "other"]
POLL_SECONDS = 0.002
"""How often a waiting training step looks whether the KV side is short of memory."""
EVENT_POLL_SECONDS = 0.0002
MAX_SPANS = 4096
"""Spans kept for whoever drains them; older ones are dropped."""


class Retreat(BaseException):
    """The micro-batch under way is given up, and replayed later.

    No ``Exception``, as ``asyncio.CancelledError`` is none: a training step that catches errors must not catch this.
    """


@dataclass(frozen=True)
class Quantum:
    """A piece of a training step that runs without interruption.

    Args:
        phase: What it does. "other" is what comes before the first block.
        index: Of the block ("backward": the number of blocks stands for the head), of the chunk of the loss, or of the
            slice of parameters.
        tokens: Tokens of the micro-batch that count in the loss.
    """

    phase: Phase
    index: int
    tokens: int


@dataclass
class _Running:
    quantum: Quantum
    start: Any
    threads: int
    concurrent: bool
    stop: Any = None


class Gate:
    """Between one thread that trains and one that decodes.

    The training thread calls :meth:`enter`, :meth:`boundary` before each quantum, and :meth:`leave`; autograd's device
    thread may call :meth:`boundary` for it. All else is for the decode thread. At first everything may pass.

    Args:
        clock: Seconds; for the spans on a CPU.
        stopwatch: Tells when a quantum is done; default: by the clock. On a GPU ``CudaStopwatch``: the host then
            launches at most one quantum more than the one that runs.

    Attributes:
        abortable: Whether :meth:`abort` may end what runs now. The training side sets it.
        relieve: Called on the training thread at every boundary, and again and again while it waits there: gives
            memory back that the decode side is short of. May raise :class:`Retreat`.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter, stopwatch: Stopwatch | None = None) -> None:
        self.abortable = False
        self.relieve: Callable[[], None] | None = None
        self._watch: Stopwatch = HostStopwatch(clock) if stopwatch is None else stopwatch
        self._changed = threading.Condition()
        self._granted: int | None = None
        self._threads: int | None = None
        self._closed = self._aborting = self._decoding = self._holding = False
        self._depth = 0
        self._owner = 0
        self._own_threads = 0
        self._waiting_for: Quantum | None = None
        self._running: _Running | None = None
        self._last_stop: Any = None
        self._spans: deque[_Running] = deque(maxlen=MAX_SPANS)

    # -- training thread ---------------------------------------------------------------------------------------------
    def enter(self) -> None:
        """A training step, or a part of one, begins. May be nested."""
        with self._changed:
            if self._depth == 0:
                self._owner = threading.get_ident()
                self._own_threads = torch.get_num_threads()
            self._depth += 1

    def leave(self) -> None:
        """It is over, or it raised. Torch's thread count is what it was.

        Raises:
            RuntimeError: there was no :meth:`enter`.
        """
        with self._changed:
            if self._depth == 0:
                raise RuntimeError("leave() without enter(): pair them, or use training()")
            self._depth -= 1
            if self._depth:
                return
            self._finish()
            self._last_stop = self._watch.mark()
            self._changed.notify_all()
        if torch.get_num_threads() != self._own_threads:
            torch.set_num_threads(self._own_threads)

    @contextmanager
    def training(self) -> Iterator[None]:
        """:meth:`enter` and :meth:`leave`, whatever happens."""
        self.enter()
        try:
            yield
        finally:
            self.leave()

    def boundary(self, quantum: Quantum) -> None:
        """End the quantum before, and wait until this one may run. Outside of training: nothing.

        Args:
            quantum: What comes next.

        Raises:
            Retreat: the micro-batch is to be given up.
        """
        with self._changed:
            if self._depth == 0:
                return
            stop = self._finish()
        if stop is not None:
            if self._last_stop is not None:
                self._watch.wait(self._last_stop)
            self._last_stop = stop
        self._wait(quantum)
        wanted = self._threads if threading.get_ident() == self._owner else None
        if wanted is not None and wanted != torch.get_num_threads():
            torch.set_num_threads(wanted)
        with self._changed:
            threads = torch.get_num_threads()
            self._running = _Running(quantum, self._watch.mark(), threads, self._decoding)

    def hold(self, until: Callable[[], bool], seconds: float, tokens: int = 0) -> bool:
        """Wait, as somebody whom nobody has to wait for, until something holds, time is up or the gate is closed.

        Args:
            until: Asked every ``POLL_SECONDS``, without the gate's lock. seconds: At most this long; 0 asks once.
            tokens: For :attr:`waiting_for`.

        Returns:
            Whether ``until`` held.
        """
        with self._changed:
            stop = self._finish()
            self._last_stop = self._last_stop if stop is None else stop
            self._waiting_for, self._holding = Quantum("other", 0, tokens), True
            self._changed.notify_all()
        try:
            for _ in range(round(seconds / POLL_SECONDS)):
                if until():
                    return True
                with self._changed:
                    if self._closed:
                        return False
                    self._changed.wait(POLL_SECONDS)
            return until()
        finally:
            with self._changed:
                self._waiting_for, self._holding = None, False

    def _wait(self, quantum: Quantum) -> None:
        with self._changed:
            self._waiting_for = quantum
            self._changed.notify_all()
        waits = 0
        try:
            while True:
                if self.relieve is not None:
                    self.relieve()
                if waits == 1:
                    release_workers()  # decoding has the cores now
                with self._changed:
                    if self._closed:
                        return
                    if self._aborting:
                        self._aborting = False
                        if self.abortable:
                            raise Retreat("the decode side needs what this micro-batch holds")
                    if self._granted is None:
                        return
                    if self._granted > 0:
                        self._granted -= 1
                        return
                    self._changed.wait(None if self.relieve is None else POLL_SECONDS)
                    waits += 1
        finally:
            with self._changed:
                self._waiting_for = None

    def _finish(self) -> Any:
        """End the span under way, with the lock held; the moment, or None if none was under way."""
        if self._running is None:
            return None
        running, self._running = self._running, None
        running.stop = self._watch.mark()
        self._spans.append(running)
        return running.stop

    # -- decode thread -----------------------------------------------------------------------------------------------
    def grant(self, quanta: int | None, threads: int | None = None) -> None:
        """Say how many quanta may begin from now on; what was granted before no longer counts.

        Args:
            quanta: None: any number. 0: pause at the next boundary.
            threads: Torch threads that the training thread takes at its next boundary; None: as they are.

        Raises:
            ValueError: a number is negative, or ``threads`` is 0.
        """
        if quanta is not None and quanta < 0:
            raise ValueError(f"quanta={quanta}: give 0 or more, or None to run freely")
        if threads is not None and threads < 1:
            raise ValueError(f"threads={threads}: give at least 1, and quanta=0 to pause")
        with self._changed:
            self._granted = quanta
            if threads is not None:
                self._threads = threads
            self._changed.notify_all()

    def wait_spent(self, timeout: float) -> bool:
        """Wait until what was granted is done, on the device too, or nothing is being trained.

        Args:
            timeout: Seconds, at most.

        Returns:
            Whether it is so. False under a grant of None, unless nothing is being trained.
        """
        deadline = time.monotonic() + timeout
        with self._changed:
            while not self._spent():
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                self._changed.wait(min(left, EVENT_POLL_SECONDS) if self._idle() else left)
        return True

    def _idle(self) -> bool:
        """Whether the training thread launches nothing until it is granted something."""
        if self._depth == 0 or self._holding:
            return True
        return self._waiting_for is not None and self._granted == 0 and not (self._aborting and self.abortable)

    def _spent(self) -> bool:
        if self._closed:
            return True
        if not self._idle():
            return False
        return self._last_stop is None or self._watch.passed(self._last_stop)

    def abort(self) -> None:
        """Have the micro-batch under way given up at its next boundary; nothing if none is, or it cannot be."""
        with self._changed:
            self._aborting = self._depth > 0 and not self._closed
            self._changed.notify_all()

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """Around a decode step: quanta that run meanwhile count as concurrent in :meth:`spans`."""
        with self._changed:
            self._decoding = True
            if self._running is not None:
                self._running.concurrent = True
        try:
            yield
        finally:
            with self._changed:
                self._decoding = False

    def spans(self) -> list[tuple[Quantum, float, int, bool]]:
        """The quanta that are done and were not returned yet: (quantum, seconds, torch threads, concurrent).

        Waiting at a boundary counts in none of them.
        """
        with self._changed:
            done = []
            while self._spans and self._watch.passed(self._spans[0].stop):
                span = self._spans.popleft()
                seconds = self._watch.seconds(span.start, span.stop)
                done.append((span.quantum, seconds, span.threads, span.concurrent))
            return done

    def close(self) -> None:
        """Let everything pass from now on: the decode side has ended. Nobody is aborted any more."""
        with self._changed:
            self._closed = True
            self._aborting = False
            self._changed.notify_all()

    # -- any thread --------------------------------------------------------------------------------------------------
    @property
    def inside(self) -> bool:
        """Whether a training step is under way."""
        return self._depth > 0

    @property
    def running(self) -> bool:
        """Whether it is at work, and not waiting here."""
        return self._depth > 0 and self._waiting_for is None

    @property
    def waiting_for(self) -> Quantum | None:
        """The quantum that would run next, if it waits here."""
        return self._waiting_for

    @property
    def threads(self) -> int | None:
        """Torch threads of the quantum that runs."""
        running = self._running
        return None if running is None else running.threads

    @property
    def current(self) -> Quantum | None:
        """The quantum that runs."""
        running = self._running
        return None if running is None else running.quantum
