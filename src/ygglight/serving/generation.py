"""One HTTP request in the engine: submitted, its events carried to the event loop, cancelled when the client leaves."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from enum import Enum

from starlette.types import Receive

from ygglight.engines.harli.requests import Request, TokenEvent
from ygglight.serving.backend import Backend
from ygglight.serving.errors import engine_failed, shutting_down

log = logging.getLogger(__name__)


class Mailbox:
    """Carries items from any thread to the event loop, in order.

    A decode step makes an event for each sequence of the batch; however many there are, the loop is woken once. The
    sender never waits: ``deque.append`` is atomic and the flag is put down before the items are taken, so an item that
    finds the flag up is taken by the delivery that is still to come.

    Args:
        loop: The event loop on which items are delivered.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._items: deque[Callable[[], None]] = deque()
        self._woken = False

    def post(self, deliver: Callable[[], None]) -> None:
        """Has a function called on the loop.

        Raises:
            RuntimeError: The loop is closed.
        """
        self._items.append(deliver)
        if not self._woken:
            self._woken = True
            try:
                self._loop.call_soon_threadsafe(self._deliver)
            except RuntimeError:
                self._woken = False  # so that the next sender is told too
                raise

    def _deliver(self) -> None:
        self._woken = False
        while self._items:
            self._items.popleft()()


class ClientGone(Exception):
    """The client closed the connection: there is nobody to answer."""


class _End(Enum):
    GONE = "gone"
    ABORTED = "aborted"


class Generation:
    """The choices of one HTTP request.

    Args:
        mailbox: Brings events to the loop.
        clock: Seconds; read when an event reaches the loop.

    Attributes:
        requests: What was submitted, by index of choice.
        first: When the first token of each choice came, or None. last: when its latest came. tokens: how many came.
    """

    def __init__(self, mailbox: Mailbox, clock: Callable[[], float] = time.perf_counter) -> None:
        self._mailbox = mailbox
        self._clock = clock
        self._events: asyncio.Queue[tuple[int, TokenEvent] | _End] = asyncio.Queue()
        self.requests: list[Request] = []
        self._running: set[int] = set()
        self.first: list[float | None] = []
        self.last: list[float] = []
        self.tokens: list[int] = []

    def submit(self, backend: Backend, requests: Sequence[Request]) -> None:
        """Hands requests to the engine: all or none.

        Args:
            backend: The engine.
            requests: One a choice, made with `listener(index)` as their ``on_event``.

        Raises:
            QueueFull: Too many wait; those already handed over are cancelled.
            ValueError: One of them can never be served; likewise.
        """
        self.requests = list(requests)
        self._running = set(range(len(requests)))
        self.first, self.last, self.tokens = [None] * len(requests), [0.0] * len(requests), [0] * len(requests)
        try:
            for request in requests:
                backend.submit(request)
        except BaseException:
            self.cancel()
            raise

    def listener(self, index: int) -> Callable[[TokenEvent], None]:
        """What the engine calls with the events of one choice, from a thread of its own; it returns at once."""

        def on_event(event: TokenEvent) -> None:
            try:
                self._mailbox.post(lambda: self._events.put_nowait((index, event)))
            except RuntimeError:  # the loop is closed: the server has stopped, and nobody reads this answer
                self.requests[index].cancel()

        return on_event

    def cancel(self) -> None:
        """Tells the engine to stop working on the choices that are not finished."""
        for index in self._running:
            self.requests[index].cancel()

    def abort(self) -> None:
        """Gives it up on the server's side, even if the engine says nothing any more."""
        self._events.put_nowait(_End.ABORTED)

    async def events(self, receive: Receive) -> AsyncGenerator[tuple[int, TokenEvent], None]:
        """Index of choice and event, until every choice is finished.

        Whatever ends it, the engine no longer works for this request afterwards.

        Args:
            receive: The connection, whose body has been read: it is watched for the client leaving.

        Raises:
            ClientGone: The client left.
            ApiError: 503 for an aborted request, 500 for one on which the engine failed.
        """
        watch = asyncio.create_task(self._watch(receive))
        try:
            while self._running:
                item = await self._events.get()
                if item is _End.GONE:
                    raise ClientGone
                if isinstance(item, _End):
                    raise shutting_down()
                index, event = item
                self._count(index, event)
                if event.finish_reason is not None:
                    self._running.discard(index)
                if event.finish_reason == "error":
                    log.error("request %s failed in the engine: %s", self.requests[index].id, event.error)
                    raise engine_failed()
                if event.finish_reason == "cancelled":
                    raise shutting_down()
                yield index, event
        finally:
            watch.cancel()
            self.cancel()

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._events.put_nowait(_End.GONE)

    def _count(self, index: int, event: TokenEvent) -> None:
        if event.token is None:
            return
        now = self._clock()
        if self.first[index] is None:
            self.first[index] = now
        self.last[index] = now
        self.tokens[index] += 1
