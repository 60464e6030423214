"""Ctrl-C within an optimizer step: half of the weights would be old, and no checkpoint of them worth saving."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Interrupts:
    """Holds a Ctrl-C back until the batch is over, so that weights, optimizer and step count of a checkpoint agree.

    Attributes:
        half_done: An optimizer step was left in the middle: by a second Ctrl-C, or under a handler of the user's own.
    """

    def __init__(self) -> None:
        self.half_done = False
        self._came = False

    @contextmanager
    def held_back(self, hurry: Callable[[], None]) -> Iterator[None]:
        """Around the optimizer step; a second Ctrl-C gets through.

        Args:
            hurry: Called at the first one: whatever is waited for inside must come now.
        """
        usual = signal.getsignal(signal.SIGINT)

        def later(number: int, frame: Any) -> None:
            self._came = True
            signal.signal(signal.SIGINT, usual)
            hurry()

        mine = usual is signal.default_int_handler and threading.current_thread() is threading.main_thread()
        if mine:
            signal.signal(signal.SIGINT, later)
        self.half_done = True
        try:
            yield
            self.half_done = False
        except Exception:
            self.half_done = False
            raise
        finally:
            if mine:
                signal.signal(signal.SIGINT, usual)

    def check(self) -> None:
        """Between two batches: raise what was held back.

        Raises:
            KeyboardInterrupt: there was one.
        """
        if self._came:
            self._came = False
            raise KeyboardInterrupt
