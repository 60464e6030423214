"""How large may the batch be? Asked of the profiler and the planner, not of an out-of-memory error."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ygglight.engines.adacc.plan import Plan
from ygglight.engines.adacc.planner import InfeasibleBudget, smallest_peak

if TYPE_CHECKING:
    from ygglight.engines.adacc.runtime import Runtime

MAX_TRIES = 6
"""Profiled steps that a search may take."""


@dataclass(frozen=True)
class PlanReport:
    """What ``ygglight plan`` shows.

    Args:
        plan: for the batch at hand.
        max_batch: samples of the largest batch that fits the budget; None when it was not searched.
    """

    plan: Plan
    max_batch: int | None

    @property
    def predicted_peak_bytes(self) -> int:
        """Of the plan for the batch at hand."""
        return self.plan.predicted_peak_bytes

    def table(self) -> str:
        """For a terminal."""
        more = "" if self.max_batch is None else f"\n  largest batch that fits the budget: {self.max_batch} samples"
        return self.plan.table() + more

    def to_json(self) -> str:
        """The plan, and the largest batch."""
        return json.dumps({**self.plan.to_dict(), "max_batch": self.max_batch}, indent=2)


def search_max_batch(
    runtime: Runtime, training_step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> PlanReport:
    """Find the largest batch that some plan fits into the budget, by profiled steps at two sizes and a straight line.

    The floor of a step grows linearly with its samples (what does not, such as unfused attention, makes the guess too
    large, and it is then verified and lowered).

    Raises:
        InfeasibleBudget: when not even one sample fits.
        ValueError: when the batch holds no tensors, or the budget is a share of the unmanaged peak (which grows along).
    """
    if isinstance(runtime.config.memory_budget, float):
        raise ValueError(
            "the largest batch needs a budget in bytes: with a share of the unmanaged peak every batch fits"
        )
    batch = args[0]
    given = batch_size(batch)

    def attempt(samples: int) -> tuple[Plan | None, int]:
        """The plan for so many samples (None: infeasible), and the smallest peak possible."""
        resized = resize_batch(batch, samples)
        try:
            with runtime.forward(resized):
                output = training_step(resized, *args[1:], **kwargs)
            loss = output["loss"] if isinstance(output, dict) else output
            loss.backward()
            runtime.module.zero_grad(set_to_none=True)
            runtime.after_backward()
        except InfeasibleBudget as error:
            return None, error.floor_bytes
        except torch.OutOfMemoryError:
            runtime.abort()
            torch.cuda.empty_cache()
            return None, 0
        assert runtime.plan is not None
        config = runtime.config
        floor = smallest_peak(runtime.plan.built.step, error_budget=config.error_budget, allow=config.allowed_actions)
        return runtime.plan, floor

    plan, floor = attempt(given)
    first = plan
    budget = plan.budget_bytes if plan is not None else runtime.config.budget_bytes(0, None)
    assert budget is not None
    tried = {given: floor}
    feasible = given if plan is not None else 0
    infeasible = None if plan is not None else given
    guess = 2 * given if plan is not None else max(1, given // 2)
    for _ in range(MAX_TRIES):
        if guess in tried or guess < 1:
            break
        plan, floor = attempt(guess)
        tried[guess] = floor
        if plan is not None:
            feasible, first = max(feasible, guess), first or plan
        else:
            infeasible = guess if infeasible is None else min(infeasible, guess)
        known = sorted((n, f) for n, f in tried.items() if f)
        if len(known) < 2:
            guess = feasible * 2 if infeasible is None else (feasible + infeasible) // 2
            continue
        (n0, f0), (n1, f1) = known[0], known[-1]
        slope = max(1.0, (f1 - f0) / (n1 - n0))
        guess = n0 + int((budget - f0) / slope)
        if infeasible is not None:
            guess = min(guess, infeasible - 1)
        guess = max(guess, feasible)
    if first is None:
        raise InfeasibleBudget(budget, min(tried.values()), (), f"a batch of {min(tried)}")
    return PlanReport(first, feasible)


def batch_size(batch: Any) -> int:
    """Samples in a batch: the first dimension of its first tensor."""
    for leaf in pytree.tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.dim():
            return leaf.shape[0]
    raise ValueError("cannot search the largest batch: the batch holds no tensor with a first dimension")


def resize_batch(batch: Any, samples: int) -> Any:
    """``batch`` cut or repeated to ``samples`` samples along the first dimension of every tensor that has them all."""
    given = batch_size(batch)

    def resize(tensor: Tensor) -> Tensor:
        if not tensor.dim() or tensor.shape[0] != given:
            return tensor
        repeats = -(-samples // given)
        return torch.cat([tensor] * repeats)[:samples]

    return pytree.tree_map_only(Tensor, resize, batch)
