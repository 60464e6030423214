"""The base under every strategy that runs on one device: it knows its device, and refuses what it cannot do.

Two things that Lightning's `SingleDeviceStrategy` does not do for a subclass chosen by name or handed over as an
object (https://github.com/Lightning-AI/pytorch-lightning/issues/18902): it stays on the CPU even with
`accelerator="gpu"`, and it takes `devices=2` in silence and runs on one. Both are mended by a settable
`parallel_devices`, which the Trainer fills.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy

from ygglight.compat.lightning import attached_trainer, foreign_lightning_objects


def check_lightning_objects(trainer: Trainer) -> None:
    """Raises when a callback, logger, profiler, data module or module comes from `pytorch_lightning`.

    The two packages have the same source but different classes. Lightning takes a foreign callback in silence (and then
    misses it in its isinstance tests) and answers a foreign data module with "Expected a parent".

    Args:
        trainer: A Trainer with its module and data attached, that is, from `Strategy.connect` on.

    Raises:
        TypeError: Names each such object and the import that mends it.
    """
    found = foreign_lightning_objects(trainer)
    if found:
        raise TypeError(
            f"{', '.join(found)}: built on `pytorch_lightning`, but this Trainer is `lightning.pytorch`'s, and the two "
            "do not share classes. Import from `lightning.pytorch` instead (`import lightning.pytorch as pl`)."
        )


class RefusesPytorchLightning:
    """Mixin, before any Lightning strategy: refuses `pytorch_lightning` objects before setup starts.

    In `connect` because it is the first moment at which the Trainer has the module and the data: already the checks
    that follow it would stumble over a foreign data module.
    """

    def connect(self, model: LightningModule) -> None:
        """Takes the module in, once everything around it is found to be of one package."""
        trainer = attached_trainer(model)
        if trainer is not None:
            check_lightning_objects(trainer)
        super().connect(model)  # type: ignore[misc]


class OneDeviceStrategy(RefusesPytorchLightning, SingleDeviceStrategy):
    """A strategy on exactly one device, the one that the Trainer chose.

    Subclasses set two class attributes:

    - `resident`: whether the module stays on its device when a run ends. Lightning moves it to the CPU after every
      fit and predict, which costs an inference engine about 245 ms a call (ku-nlp/kwja PR 255). Off for training.
    - `several_devices_name`: the strategy to name to someone who asked for more than one device, e.g. `"adacc_ddp"`.

    Args:
        accelerator: Set by the Trainer.
        checkpoint_io: Set by the Trainer.
        precision_plugin: Set by the Trainer.
    """

    resident: ClassVar[bool] = False
    several_devices_name: ClassVar[str | None] = None

    def __init__(self, accelerator: Any = None, checkpoint_io: Any = None, precision_plugin: Any = None) -> None:
        super().__init__(accelerator=accelerator, checkpoint_io=checkpoint_io, precision_plugin=precision_plugin)

    @property
    def parallel_devices(self) -> list[torch.device]:
        """What this strategy itself asks for: nothing, always.

        The Trainer fills the property only when it reads it as empty. If it returned the device of an earlier Trainer,
        the same strategy handed to a second Trainer would keep that device and swallow another `devices=`.
        """
        return []

    @parallel_devices.setter
    def parallel_devices(self, devices: Sequence[torch.device]) -> None:
        if len(devices) != 1:
            raise ValueError(
                f"{type(self).__name__} runs on one device, but the Trainer was given {len(devices)}: "
                f"set devices=1{self._or_else()}."
            )
        self._root_device = devices[0]

    @property
    def num_nodes(self) -> int:
        """Always 1; the Trainer sets what the user asked for, and anything else is refused."""
        return 1

    @num_nodes.setter
    def num_nodes(self, count: int) -> None:
        if count != 1:
            raise ValueError(
                f"{type(self).__name__} runs on one device, but the Trainer was given num_nodes={count}: "
                f"set num_nodes=1{self._or_else()}."
            )

    def _or_else(self) -> str:
        return f", or use strategy={self.several_devices_name!r}" if self.several_devices_name else ""

    def teardown(self) -> None:
        """Ends a run; a resident strategy leaves module and optimizer state where they are."""
        if not self.resident:
            super().teardown()
            return
        assert self.accelerator is not None
        self.precision_plugin.teardown()
        self.accelerator.teardown()
        self.checkpoint_io.teardown()
