"""From a profiled step to a plan: budget, solver, agreement between ranks, plans out of checkpoints."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ygglight.engines.adacc.build import BuiltStep
from ygglight.engines.adacc.config import AdaccConfig
from ygglight.engines.adacc.graph import Action, Policy
from ygglight.engines.adacc.plan import Plan, keep_all, recompute_all
from ygglight.engines.adacc.planner import InfeasibleBudget, Solution
from ygglight.engines.adacc.planner import plan as solve
from ygglight.engines.adacc.schedule import validate_policy
from ygglight.engines.adacc.simulate import simulate_step
from ygglight.engines.memory.sizes import format_bytes

log = logging.getLogger(__name__)

ATTEMPTS = 5
"""Plans whose codecs are measured together; if none keeps the error limit, one without lossy codecs is made."""
AIM = 0.8
"""Share of the squared error limit that is used: rounding is drawn anew every step, and draws differ by some 10 %."""
JointError = Callable[[BuiltStep, Sequence[Policy]], float]
"""(step, policy per instance) -> squared relative error of the whole gradient, all codecs together."""


class Planning:
    """Makes plans for one model on one device.

    Args:
        module: whose parameters the device must leave room for. config: what the user said. device: where it trains.
        agree: given (instance names, policies), returns rank 0's (collective); None on a single device.
    """

    def __init__(
        self, module: nn.Module, config: AdaccConfig, device: torch.device, agree: Callable[[Any], Any] | None
    ) -> None:
        self._module, self._config, self._device, self._agree = module, config, device, agree

    def make(self, built: BuiltStep, version: int, reason: str, joint: JointError | None = None) -> Plan:
        """The plan for ``built`` under the configured budget; rank 0's when there are several ranks.

        Args:
            joint: measures a plan's codecs together; None: nothing lossy is offered, or their errors are taken to add.

        Raises:
            InfeasibleBudget: no plan fits the budget and the error limit.
        """
        plain = simulate_step(built.step, keep_all(built))
        budget = self._config.budget_bytes(plain.peak_bytes, free_bytes(self._module, self._device, first=version == 1))
        solution, factor, failure = None, 1.0, None
        try:
            solution, factor = self._solve(built, budget, joint)
        except InfeasibleBudget as error:
            failure = error
        policies = () if solution is None else solution.policies
        # Only the first plan is agreed on: every rank makes it at the same step, later ones need not come together,
        # and no plan changes which collectives run. A rank without a plan comes too, or the others would wait for it.
        if self._agree is not None and version == 1:
            names, theirs = self._agree((built.step.names, policies))
            if names == built.step.names and theirs and _is_valid(built, theirs):
                policies = theirs
        if solution is None:
            assert failure is not None
            raise failure
        return self.complete(built, policies, solution.solve_seconds, version, reason, factor)

    def _solve(self, built: BuiltStep, budget: int | None, joint: JointError | None) -> tuple[Solution, float]:
        """The fastest plan that keeps the error limit as measured, and by what its squared error exceeds the sum."""
        limit = allowed = AIM * self._config.error_budget
        for _ in range(ATTEMPTS):
            solution = self._solve_within(built, budget, allowed)
            added = solution.profile.error
            if joint is None or not added:
                return solution, 1.0
            together = joint(built, solution.policies)
            if together <= limit:
                return solution, together / added
            log.info(
                "adacc: together the codecs perturb the gradient by %.2g, one by one %.2g, allowed %.2g: planning anew",
                together**0.5, added**0.5, limit**0.5,
            )  # fmt: skip
            allowed = added * limit / together if together < math.inf else 0.0
        return self._solve_within(built, budget, 0.0), 1.0

    def _solve_within(self, built: BuiltStep, budget: int | None, error_budget: float) -> Solution:
        return solve(
            built.step,
            budget,
            error_budget=error_budget,
            allow=self._config.allowed_actions,
            time_limit=self._config.time_limit,
        )

    def complete(
        self,
        built: BuiltStep,
        policies: tuple[Policy, ...],
        solve_seconds: float,
        version: int,
        reason: str,
        error_factor: float = 1.0,
    ) -> Plan:
        """The plan with ``policies``, simulated, beside its two reference points."""
        plain = simulate_step(built.step, keep_all(built))
        budget = self._config.budget_bytes(plain.peak_bytes, free_bytes(self._module, self._device, first=version == 1))
        return Plan(
            built=built,
            policies=policies,
            profile=simulate_step(built.step, policies),
            budget_bytes=budget,
            plain_peak_bytes=plain.peak_bytes,
            full_seconds=simulate_step(built.step, recompute_all(built)).added_seconds,
            solve_seconds=solve_seconds,
            version=version,
            reason=reason,
            error_factor=error_factor,
        )

    def resume(self, built: BuiltStep, state: dict[str, Any]) -> Plan | None:
        """The plan of the checkpoint that training resumed from, if it fits this step and the budget."""
        if state["plan"] is None or set(state["policies"]) != set(built.step.names):
            return None
        shared: dict[str, Policy] = {}
        policies = []
        for position, name in enumerate(built.step.names):
            policy = policy_from_dict(state["policies"][name])
            key = f"{built.step.sequence[position]} {policy}"
            policies.append(shared.setdefault(key, policy))
        try:
            for position, policy in enumerate(policies):
                validate_policy(built.step.instance(position), policy)
        except ValueError as error:
            log.warning("adacc: the plan in the checkpoint does not fit this model (%s): planning anew", error)
            return None
        version, reason = int(state["plan"]["version"]), str(state["plan"]["reason"])
        factor = float(state["plan"].get("error_factor", 1.0))
        made = self.complete(built, tuple(policies), 0.0, version, reason, factor)
        if made.budget_bytes is not None and made.predicted_peak_bytes > made.budget_bytes:
            return None
        return made


def _is_valid(built: BuiltStep, policies: tuple[Policy, ...]) -> bool:
    try:
        for position, policy in enumerate(policies):
            validate_policy(built.step.instance(position), policy)
    except ValueError:
        return False
    return True


def policy_from_dict(state: dict[str, Any]) -> Policy:
    """The inverse of what ``Plan.policies_dict`` writes for one instance."""
    return Policy(
        {int(v): Action(a) for v, a in state["actions"].items()}, {int(v): c for v, c in state["codecs"].items()}
    )


def free_bytes(module: nn.Module, device: torch.device, *, first: bool) -> int | None:
    """What a CUDA device could give to activations, less 5 %; None elsewhere.

    ``first``: before the first optimizer step, when two optimizer moments a trained parameter have yet to be made.
    Gradients exist by then: this is asked after a backward.
    """
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    moments = sum(8 * p.numel() for p in module.parameters() if p.requires_grad) if first else 0
    usable = int(0.95 * (free + cached - moments))
    log.info("adacc: %s free for activations", format_bytes(usable))
    return max(usable, 1)
