"""Whether the server takes requests in, which ones it is answering, and how it comes to an end."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Abortable(Protocol):
    """A request under way that can be told to give up."""

    def abort(self) -> None:
        """Gives it up; its client gets a 503."""


class Lifecycle:
    """Counts the requests under way and drains them. All methods run on the event loop, so there is no lock.

    Attributes:
        draining: New requests are refused with a 503.
        in_flight: Requests whose answer is not complete.
    """

    def __init__(self) -> None:
        self.draining = False
        self.in_flight = 0
        self._generations: set[Abortable] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Counts one HTTP request for as long as its answer takes."""
        self.in_flight += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.in_flight -= 1
            if not self.in_flight:
                self._idle.set()

    @contextmanager
    def generating(self, generation: Abortable) -> Iterator[None]:
        """Makes a generation known to `drain`."""
        self._generations.add(generation)
        try:
            yield
        finally:
            self._generations.discard(generation)

    async def drain(self, seconds: float, grace: float = 2.0) -> bool:
        """Refuses new requests, lets those under way finish, and gives up what is left.

        Args:
            seconds: How long they may take.
            grace: How long those given up may take to say so to their clients, in seconds.

        Returns:
            Whether all of them finished by themselves.
        """
        self.draining = True
        if await self._wait(seconds):
            return True
        for generation in list(self._generations):
            generation.abort()
        await self._wait(grace)
        return False

    async def _wait(self, seconds: float) -> bool:
        try:
            await asyncio.wait_for(self._idle.wait(), seconds)
        except TimeoutError:
            return False
        return True
