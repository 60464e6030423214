"""A training step that is run again must not log again."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule


class LogsOnce:
    """Counts the calls of ``self.log`` in a micro-batch, and lets each through once.

    A replay computes the same and logs in the same order, so a call is known by its place. ``log_dict`` goes through
    ``log``.
    """

    def __init__(self) -> None:
        self._place = self._done = 0
        self._attached = False

    def attach(self, module: LightningModule) -> None:
        """A new micro-batch."""
        self._place = self._done = 0
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

    def begin(self) -> None:
        """A run of the training step begins, the first or a repeated one."""
        self._place = 0

    def detach(self, module: LightningModule) -> None:
        """Give the module its own method back."""
        if self._attached:
            module.__dict__.pop("log", None)
            self._attached = False
