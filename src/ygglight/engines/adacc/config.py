"""What a user may say about Adacc."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ygglight.engines.adacc.graph import Action
from ygglight.engines.memory.sizes import parse_bytes


@dataclass(frozen=True)
class AdaccConfig:
    """Adacc (arXiv 2508.00806): activation memory by keep / compress / recompute for each tensor.

    The paper's text gives the three modules and no formulas; what stands behind each field is our design
    (docs/systems/adacc.md says which).

    Args:
        memory_budget: bytes that may be alive at any instant of a training step above parameters, gradients, optimizer
            state, buffers and the batch: an int, text such as ``"8GiB"``, or a float in (0, 1] as the share of the
            peak without Adacc. None: what the CUDA device has free, less 5 %; on a CPU it must be given.
        enabled: "auto" switches itself off, with a warning, where it cannot act (compiled modules); True raises there;
            False does nothing.
        compress: whether lossy codecs may be used. Off, every plan is exact.
        max_gradient_error: largest relative error of the whole gradient that compression may cause.
        monitor_every: optimizer steps between two looks at the statistics (each costs one recomputed step); 0: never.
        time_limit: seconds that one MILP solve may take.
        seed: of the stochastic rounding.
    """

    memory_budget: int | float | str | None = None
    enabled: bool | Literal["auto"] = "auto"
    compress: bool = True
    max_gradient_error: float = 0.03
    monitor_every: int = 500
    time_limit: float = 5.0
    seed: int = 0

    def __post_init__(self) -> None:
        budget = self.memory_budget
        if isinstance(budget, float):
            if not 0 < budget <= 1:
                raise ValueError(
                    f"memory_budget={budget} is a share of the unmanaged peak and must lie in (0, 1]; "
                    "for bytes write an int or text such as '8GiB'"
                )
        elif budget is not None:
            size = parse_bytes(budget)
            if size < 1024:
                raise ValueError(
                    f"memory_budget={budget!r} means {size} bytes: write a size such as '600MiB', or a float such as "
                    "0.5 for a share of the unmanaged peak (in YAML 1 is an integer, 1.0 the share)"
                )
            object.__setattr__(self, "memory_budget", size)
        if self.enabled not in (True, False, "auto"):
            raise ValueError(f"enabled must be true, false or 'auto', not {self.enabled!r}")
        if not 0 <= self.max_gradient_error < 1:
            raise ValueError(f"max_gradient_error must lie in [0, 1), not {self.max_gradient_error}")
        if self.monitor_every < 0:
            raise ValueError(f"monitor_every must not be negative, not {self.monitor_every}")

    @property
    def allowed_actions(self) -> frozenset[Action]:
        """What a plan may do with a tensor."""
        return frozenset(Action) if self.compress else frozenset({Action.KEEP, Action.RECOMPUTE})

    @property
    def error_budget(self) -> float:
        """Squared relative gradient error that a plan's codecs may cause together."""
        return self.max_gradient_error**2

    def budget_bytes(self, plain_peak: int, free: int | None) -> int | None:
        """The limit in bytes, given the unmanaged peak and what the device has free (None: unknown)."""
        if isinstance(self.memory_budget, float):
            return int(self.memory_budget * plain_peak)
        return free if self.memory_budget is None else int(self.memory_budget)
