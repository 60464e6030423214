"""From a profiled step to a plan: budget, solver, agreement between ranks, plans out of checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from ygglight.engines.adacc.planner import plan as solve

from ygglight.engines.adacc.build import BuiltStep
from ygglight.engines.adacc.config import AdaccConfig
from ygglight.engines.adacc.graph import Action, Policy
from ygglight.engines.adacc.plan import Plan, keep_all, recompute_all
from ygglight.engines.adacc.schedule import validate_policy
from ygglight.engines.adacc.simulate import simulate_step
from ygglight.engines.memory.sizes import format_bytes

log = logging.getLogger(__name__)


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

    def make(self, built: BuiltStep, version: int, reason: str) -> Plan:
        """The plan for ``built`` under the configured budget; rank 0's when there are several ranks."""
        plain = simulate_step(built.step, keep_all(built))
        budget = self._config.budget_bytes(plain.peak_bytes, free_bytes(self._module, self._device))
        allow = frozenset(Action) if self._config.compress else frozenset({Action.KEEP, Action.RECOMPUTE})
        solution = solve(
            built.step,
            budget,
            error_budget=self._config.max_gradient_error**2,
            allow=allow,
            time_limit=self._config.time_limit,
        )
        policies = solution.policies
        # Only the first plan is agreed on: every rank makes it at the same step, later ones need not come together,
        # and no plan changes which collectives run.
        if self._agree is not None and version == 1:
            names, theirs = self._agree((built.step.names, policies))
            if names == built.step.names and _is_valid(built, theirs):
                policies = theirs
        return self.complete(built, policies, solution.solve_seconds, version, reason)

    def complete(
        self, built: BuiltStep, policies: tuple[Policy, ...], solve_seconds: float, version: int, reason: str
    ) -> Plan:
        """The plan with ``policies``, simulated, beside its two reference points."""
        plain = simulate_step(built.step, keep_all(built))
        budget = self._config.budget_bytes(plain.peak_bytes, free_bytes(self._module, self._device))
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
        made = self.complete(built, tuple(policies), 0.0, version, reason)
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


def free_bytes(module: nn.Module, device: torch.device) -> int | None:
    """What a CUDA device could still give to activations, less 5 % of it; None elsewhere.

    Gradients exist when this is asked (after the first backward); two optimizer moments a parameter may not yet.
    """
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    moments = sum(8 * p.numel() for p in module.parameters() if p.requires_grad)
    usable = free + cached - moments - total // 20
    log.info("adacc: %s free for activations", format_bytes(usable))
    return max(usable, 1)
