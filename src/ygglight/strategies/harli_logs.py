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
    goes through ``log``). Attributes that the given-up run bound anew, such as counters, are what they were before it.
    Objects that it changed in place, such as lists and metrics, are not.
    """

    def __init__(self) -> None:
        self._place = self._done = 0
        self._attached = False
        self._before: dict[str, Any] = {}
        self._bound: dict[str, Any] = {}

    def attach(self, module: LightningModule) -> None:
        """A new micro-batch."""
        self._place = self._done = 0
        self._bound = {}
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
        for name in self._bound:
            if self._before[name] is _ABSENT:
                own.pop(name, None)
            else:
                own[name] = self._before[name]
        before = dict(own)
        place, self._place = self._place, 0
        try:
            yield
        finally:
            changed = {name for name, value in own.items() if before.get(name, _ABSENT) is not value}
            self._bound = {name: own[name] for name in changed}
            self._before = {name: before.get(name, _ABSENT) for name in changed}
            # Hooks may have logged between the step and its backward, and are not run again.
            self._place = max(self._place, place)

    def detach(self, module: LightningModule) -> None:
        """Give the module its own method back."""
        if self._attached:
            module.__dict__.pop("log", None)
            self._attached = False
