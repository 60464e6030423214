"""How a machine is shared between decoding and finetuning at one moment."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Partition:
    """One rung of a ladder; the unit is a CPU thread or a streaming multiprocessor (SM).

    Args:
        decode: units that a decode step runs on. finetune: units that a quantum of finetuning runs on; 0: none runs.
        concurrent: both at once; otherwise in turn (time slices), and each may have the whole machine.
    """

    decode: int
    finetune: int
    concurrent: bool

    def __post_init__(self) -> None:
        if self.decode < 0 or self.finetune < 0 or (self.concurrent and not (self.decode and self.finetune)):
            raise ValueError(
                f"no such partition: decode={self.decode}, finetune={self.finetune}, concurrent={self.concurrent}; "
                "units are not negative, and two that run at once need one each"
            )

    @property
    def beside(self) -> int:
        """Units of finetuning that work while a decode step runs."""
        return self.finetune if self.concurrent else 0


def alone(units: int) -> Partition:
    """Decoding has the machine, finetuning waits."""
    return Partition(units, 0, False)


def slices(units: int) -> Partition:
    """Both have the whole machine, in turn."""
    return Partition(units, units, False)


def idle(units: int) -> Partition:
    """Nothing to decode: finetuning has the machine."""
    return Partition(0, units, False)
