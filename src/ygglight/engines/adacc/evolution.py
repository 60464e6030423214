"""When to look at a plan again, and when a new one is worth having. Pure decisions on numbers.

The paper's rule is unknown; this one is ours, after section 4 of the brief: look every N steps, re-solve when the
gradient's sensitivity, the costs or the peak moved, adopt only what gains more than the hysteresis or had to change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ygglight.engines.adacc.simulate import simulate_step

if TYPE_CHECKING:
    from ygglight.engines.adacc.build import BuiltStep
    from ygglight.engines.adacc.plan import Plan

ERROR_GROWTH = 2.0
"""A codec's squared gradient error that more than doubled."""
NEGLIGIBLE = 1e-6
"""Squared errors below this are far under any limit, however much they grow."""
COST_DRIFT = 0.15
"""Recomputation against codec time, relative change."""
PEAK_HIGH, PEAK_LOW = 0.97, 0.85
"""Measured peak as a share of the budget."""
MIN_GAIN = 0.02
"""Share of the forward+backward time that a new plan must win to replace one that still holds."""
NOISE = 3
"""Times are medians over instances; of types with fewer instances the drift test would only see noise."""


@dataclass(frozen=True)
class Snapshot:
    """What one look found.

    Args:
        errors: "type/value/codec" -> squared relative gradient error.
        cost: type -> seconds of its operators relative to its codecs' (0 where it has none).
    """

    errors: Mapping[str, float]
    cost: Mapping[str, float]

    @classmethod
    def of(cls, built: BuiltStep) -> Snapshot:
        """The statistics in a built step."""
        errors: dict[str, float] = {}
        cost: dict[str, float] = {}
        for index, graph in enumerate(built.step.types):
            codec_time = 0.0
            for value in graph.values:
                for codec in value.codecs:
                    errors[f"{index}:{graph.name}/{value.name}/{codec.name}"] = codec.error
                    codec_time += codec.seconds
            if codec_time and built.step.sequence.count(index) >= NOISE:
                cost[f"{index}:{graph.name}"] = sum(op.seconds for op in graph.operators) / codec_time
        return cls(errors, cost)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"errors": dict(self.errors), "cost": dict(self.cost)}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Snapshot:
        """The inverse of :meth:`to_dict`."""
        return cls(dict(state["errors"]), dict(state["cost"]))


def reasons_to_replan(
    old: Snapshot, new: Snapshot, measured_peak: int | None, budget: int | None, *, all_keep: bool = False
) -> list[str]:
    """Why the plan should be solved again; empty when nothing moved.

    Args:
        measured_peak: of steps under the plan in force; None where it is not measured (a CPU between two looks).
        budget: the limit in bytes.
        all_keep: the plan keeps everything, so a low peak is no waste.
    """
    causes = []
    grown = [
        name for name, error in new.errors.items()
        if error > ERROR_GROWTH * old.errors.get(name, error) and error > NEGLIGIBLE
    ]  # fmt: skip
    if grown:
        more = f" and {len(grown) - 1} more" if len(grown) > 1 else ""
        causes.append(f"compressing {grown[0]}{more} now perturbs the gradient more than twice as much")
    if new.errors.keys() != old.errors.keys():
        causes.append("the model saves other tensors than before")
    for name, cost in new.cost.items():
        before = old.cost.get(name)
        if before and abs(cost / before - 1) > COST_DRIFT:
            causes.append(f"recomputing {name} against compressing it costs {cost / before:.2f} times what it did")
    if measured_peak is not None and budget:
        if measured_peak > PEAK_HIGH * budget:
            causes.append(f"the measured peak is {measured_peak / budget:.0%} of the budget")
        elif measured_peak < PEAK_LOW * budget and not all_keep:
            causes.append(f"the measured peak is only {measured_peak / budget:.0%} of the budget")
    return causes


def worth_adopting(old: Plan, new: Plan, error_limit: float) -> bool:
    """Whether ``new`` should replace ``old``: the old one broke a promise, or the new one gains enough.

    Args:
        error_limit: squared relative gradient error allowed.
    """
    step = new.built.step
    if len(old.policies) != len(step.sequence) or old.built.step.names != step.names:
        return True
    try:
        carried = simulate_step(step, old.policies)
    except (ValueError, KeyError, IndexError):
        return True
    if new.budget_bytes is not None and carried.peak_bytes > new.budget_bytes:
        return True
    if carried.error * old.error_factor > error_limit:
        return True
    work = 3 * sum(sum(op.seconds for op in step.instance(i).operators) for i in range(len(step.sequence)))
    return carried.added_seconds - new.profile.added_seconds > MIN_GAIN * work
