"""Copies of experts into slots, beside the computation: demand goes first, prefetches can be taken back."""

from __future__ import annotations

import threading
import time
import weakref
from collections import Counter, deque
from enum import Enum
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ygglight.engines.moe_speq.speed import Speed

PATIENCE = 10.0
"""Seconds that closing waits for the copy under way."""
CLOSED = "the link to the experts was closed: make a new runtime"


class Cause(Enum):
    """Why an expert is copied."""

    DEMAND = "demand"
    PREFETCH = "prefetch"
    PREFILL = "prefill"


class State(Enum):
    """How far a copy is. ``ISSUED``: the device knows of it, so work can be put behind it."""

    QUEUED = "queued"
    RUNNING = "running"
    ISSUED = "issued"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Source(Protocol):
    """Where the experts are read from: what a link needs of an ``ExpertStore``."""

    def slab(self, layer: int, expert: int) -> Tensor | None:
        """Its bytes in host memory, or None."""

    def read_into(self, layer: int, expert: int, out: Tensor) -> None:
        """Fill ``out``."""


class Ticket:
    """One copy; made by :meth:`Link.submit`.

    Args:
        layer: Of the expert. expert: Which. out: uint8 slab to fill. cause: Why.
        after: Moment (:meth:`Link.mark`) until which the slab is still read; None: it is not.
    """

    __slots__ = ("after", "began", "cause", "error", "expert", "layer", "out", "ready", "state")

    def __init__(self, layer: int, expert: int, out: Tensor, cause: Cause, after: Any = None) -> None:
        self.layer, self.expert, self.out, self.cause, self.after = layer, expert, out, cause, after
        self.state = State.QUEUED
        self.error: BaseException | None = None
        self.ready: Any = None
        self.began = 0.0


class Traffic:
    """Finished, failed and withdrawn copies by cause, and the bytes of the finished ones."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Count from zero."""
        self.copies: Counter[Cause] = Counter()
        self.nbytes: Counter[Cause] = Counter()
        self.failed: Counter[Cause] = Counter()
        self.cancelled: Counter[Cause] = Counter()


class Copier(Protocol):
    """Moves the bytes, on the link's thread."""

    depth: int
    """Copies that may be under way at once; they are done in order."""

    def start(self, ticket: Ticket) -> None:
        """Hand the copy to the device, or do it."""

    def finish(self, ticket: Ticket) -> None:
        """Wait until it is done."""

    def follow(self, ticket: Ticket) -> None:
        """Put what the calling thread computes next behind the copy."""

    def mark(self) -> Any:
        """The moment after all that the calling thread has computed so far."""

    def stop(self) -> None:
        """Wait for nothing any more."""


class HostCopier:
    """Host memory or disk to host memory.

    Args:
        source: The experts. bandwidth: Bytes a second to slow down to, or None. latency: Seconds more a copy.
    """

    depth = 1

    def __init__(self, source: Source, bandwidth: float | None = None, latency: float = 0.0) -> None:
        self._source = source
        self._second_a_byte, self._latency = 1 / bandwidth if bandwidth else 0.0, latency
        self._overslept = 0.0
        self._stopped = threading.Event()

    def start(self, ticket: Ticket) -> None:
        """Copy. Neither the read nor the sleep holds the interpreter's lock."""
        slab = self._source.slab(ticket.layer, ticket.expert)
        if slab is None:
            self._source.read_into(ticket.layer, ticket.expert, ticket.out)
        else:  # numpy: torch would start a pool of threads for this thread, beside that of the computation
            np.copyto(ticket.out.numpy(), slab.numpy())
        cost = self._latency + ticket.out.numel() * self._second_a_byte
        if cost:
            due = ticket.began + cost - self._overslept
            self._stopped.wait(max(0.0, due - time.perf_counter()))
            self._overslept = min(cost, max(0.0, time.perf_counter() - due))

    def finish(self, ticket: Ticket) -> None:
        """It is."""

    def follow(self, ticket: Ticket) -> None:
        """It does: it was waited for."""

    def mark(self) -> None:
        """What a CPU was told to compute is done when the call returns."""

    def stop(self) -> None:
        """Sleep no more."""
        self._stopped.set()


class Link:
    """A queue and one thread that serves it.

    Copies run one after the other, so one may be submitted into a slab that another, running or not, still fills: the
    later wins. All methods are for one thread, the one that computes.

    Args:
        copier: Moves the bytes.
        speed: Where to keep what copies take.
    """

    def __init__(self, copier: Copier, speed: Speed | None = None) -> None:
        self.speed = speed or Speed()
        self.traffic = Traffic()
        self._copier = copier
        self._queue = _Queue(self.traffic)
        # The thread knows the queue and not the link, so a link that nobody closes is still collected, and closed.
        arguments = (self._queue, copier, self.speed)
        self._thread = threading.Thread(target=_serve, args=arguments, name="ygglight-experts", daemon=True)
        self._thread.start()
        self._stop = weakref.finalize(self, _stop, self._queue, copier)

    def submit(self, layer: int, expert: int, out: Tensor, cause: Cause, after: Any = None) -> Ticket:
        """Queue a copy.

        Args:
            layer: See :class:`Ticket`. expert: As there. out: As there. cause: As there. after: As there.

        Raises:
            RuntimeError: the link is closed.
        """
        ticket = Ticket(layer, expert, out, cause, after)
        self._queue.put(ticket)
        return ticket

    def wait(self, ticket: Ticket) -> None:
        """What this thread computes next finds the expert in its slab; on a CPU: block until it is there.

        Args:
            ticket: Of the copy.

        Raises:
            BaseException: whatever the read raised, an ``OSError`` mostly. RuntimeError: it was withdrawn.
        """
        self._queue.wait(ticket)
        if ticket.error is not None:
            raise ticket.error
        if ticket.state is State.CANCELLED:
            raise RuntimeError(CLOSED)
        if ticket.state is not State.DONE:
            self._copier.follow(ticket)

    def cancel(self, ticket: Ticket) -> bool:
        """Withdraw a copy.

        Args:
            ticket: Of the copy.

        Returns:
            False if it has begun: then it goes on.
        """
        return self._queue.cancel(ticket)

    def mark(self) -> Any:
        """The moment after all that this thread has computed so far, for :class:`Ticket`."""
        return self._copier.mark()

    def close(self) -> None:
        """Withdraw what is queued and end the thread, after the copy under way; again: nothing.

        A read that does not come back, from a disk that is gone, say, is not waited for longer than :data:`PATIENCE`.
        """
        self._stop()
        if threading.current_thread() is not self._thread:
            self._thread.join(PATIENCE)


class ThreadLink(Link):
    """From host memory or disk into host memory.

    Args:
        source: The experts.
        bandwidth: Bytes a second to slow down to, so that a result can state them; None: as fast as it goes.
        latency: Seconds that a copy takes more.

    Raises:
        ValueError: ``bandwidth`` is not positive, or ``latency`` negative.
    """

    def __init__(self, source: Source, bandwidth: float | None = None, latency: float = 0.0) -> None:
        if (bandwidth is not None and bandwidth <= 0) or latency < 0:
            raise ValueError(f"a link of {bandwidth} bytes/s and {latency} s a copy: both must be positive")
        super().__init__(HostCopier(source, bandwidth, latency), Speed(bandwidth or 12e9, latency))


def open_link(source: Source, device: torch.device, bandwidth: float | None = None, latency: float = 0.0) -> Link:
    """The link for a device.

    Args:
        source: The experts. device: Of the slots. bandwidth: See :class:`ThreadLink`. latency: As there.

    Raises:
        ValueError: as :class:`ThreadLink`; or a GPU's link is to be slowed down; or the device is of another kind.
    """
    if device.type == "cpu":
        return ThreadLink(source, bandwidth, latency)
    if device.type != "cuda":
        raise ValueError(f"experts cannot be brought to {device}: use a CPU or an NVIDIA GPU")
    if bandwidth is not None or latency:
        raise ValueError("a GPU's link cannot be slowed down: leave out `link`, or run on a CPU")
    from ygglight.engines.moe_speq.link_cuda import StreamLink

    return StreamLink(source, device)


class _Queue:
    """Tickets in two lines; every change of a ticket's state happens under its lock."""

    def __init__(self, traffic: Traffic) -> None:
        self._traffic = traffic
        self._lock = threading.Lock()
        self._work, self._news = threading.Condition(self._lock), threading.Condition(self._lock)
        self._first: deque[Ticket] = deque()
        self._second: deque[Ticket] = deque()  # prefetches
        self._closed = False

    def put(self, ticket: Ticket) -> None:
        with self._lock:
            if self._closed:
                raise RuntimeError(CLOSED)
            (self._second if ticket.cause is Cause.PREFETCH else self._first).append(ticket)
            self._work.notify()

    def take(self, *, block: bool) -> Ticket | None:
        """The next ticket, running from now on; None: there is none, or, if it may block, there will be none."""
        with self._lock:
            while block and not self._closed and not self._first and not self._second:
                self._work.wait()
            line = self._first or self._second
            if not line:
                return None
            ticket = line.popleft()
            ticket.state = State.RUNNING
            return ticket

    def settle(self, ticket: Ticket, state: State, error: BaseException | None = None) -> None:
        with self._lock:
            ticket.state, ticket.error = state, error
            if state is State.DONE:
                self._traffic.copies[ticket.cause] += 1
                self._traffic.nbytes[ticket.cause] += ticket.out.numel()
            elif state is State.FAILED:
                self._traffic.failed[ticket.cause] += 1
            self._news.notify_all()

    def wait(self, ticket: Ticket) -> None:
        with self._lock:
            while ticket.state in (State.QUEUED, State.RUNNING):
                self._news.wait()

    def cancel(self, ticket: Ticket) -> bool:
        with self._lock:
            if ticket.state is not State.QUEUED:
                return False
            (self._second if ticket.cause is Cause.PREFETCH else self._first).remove(ticket)
            self._withdraw(ticket)
            return True

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for ticket in (*self._first, *self._second):
                self._withdraw(ticket)
            self._first.clear()
            self._second.clear()
            self._work.notify_all()
            self._news.notify_all()

    def _withdraw(self, ticket: Ticket) -> None:
        ticket.state = State.CANCELLED
        self._traffic.cancelled[ticket.cause] += 1


def _stop(queue: _Queue, copier: Copier) -> None:
    queue.close()
    copier.stop()


def _serve(queue: _Queue, copier: Copier, speed: Speed) -> None:
    """What the thread does: up to ``depth`` copies under way, finished in order."""
    flying: deque[Ticket] = deque()
    last = 0.0
    while True:
        ticket = queue.take(block=not flying)
        if ticket is None and not flying:
            return
        if ticket is not None:
            ticket.began = time.perf_counter()
            try:
                copier.start(ticket)
            except BaseException as error:  # whoever waits for it has to hear of it, and the thread has to live
                queue.settle(ticket, State.FAILED, error)
                continue
            queue.settle(ticket, State.ISSUED)
            flying.append(ticket)
            if len(flying) < copier.depth:
                continue
        oldest = flying.popleft()
        try:
            copier.finish(oldest)
        except BaseException as error:
            queue.settle(oldest, State.FAILED, error)
            continue
        now = time.perf_counter()
        speed.add(oldest.out.numel(), now - max(last, oldest.began))
        last = now
        queue.settle(oldest, State.DONE)
