"""A training step that is run again must neither log nor count again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule

_ABSENT = object()


class StepOnce:
    """Lets what a training step does to its module happen once, however often the step is run.

    A replay computes the same and logs in the same order, so a call of ``self.log`` is known by its place (``log_dict``
    goes through ``log``). Attributes that the given-up run bound anew, such as counters, are first what they were
    before it; objects that it changed in place, such as lists and metrics, are not.
    """

    def __init__(self) -> None:
        self._place = self._done = 0
        self._at_backward: int | None = None
        self._before: dict[str, Any] = {}
        self._attached = False

    def attach(self, module: LightningModule) -> None:
        """A new micro-batch."""
        self._place = self._done = 0
        self._at_backward = None
        self._before = {}
        if self._attached:
            return
        self._attached = True
        log = module.log

        def once(*args: Any, **kwargs: Any) -> None:
            self._place += 1
            if self._place > self._done:
                self._done = self._place
                log(*args, **kwargs)

        module.__dict__["log"] = once

    @contextmanager
    def run(self, module: LightningModule) -> Iterator[None]:
        """Around a run of the training step, the first or a repeated one."""
        own = module.__dict__
        for name, value in self._before.items():
            if value is _ABSENT:
                own.pop(name, None)
            else:
                own[name] = value
        before = dict(own)
        self._place = 0
        try:
            yield
        finally:
            self._before = {
                name: before.get(name, _ABSENT) for name in own if own[name] is not before.get(name, _ABSENT)
            }
            if self._at_backward is not None:
                self._place = self._at_backward

    def backward(self) -> None:
        """The step is over and its backward begins. Hooks in between may have logged, and are not run again."""
        self._at_backward = self._place

    def detach(self, module: LightningModule) -> None:
        """Give the module its own method back."""
        if self._attached:
            module.__dict__.pop("log", None)
            self._attached = False
