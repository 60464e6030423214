"""A plan: what happens to every saved tensor of a training step, and what it is predicted to cost."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ygglight.engines.adacc.build import BuiltStep, slot_name
from ygglight.engines.adacc.codecs import SPECS
from ygglight.engines.adacc.graph import Action, Policy, RegionGraph
from ygglight.engines.adacc.handles import RegionPlan
from ygglight.engines.adacc.schedule import build_schedule, masks_of
from ygglight.engines.adacc.simulate import StepProfile, simulate_step
from ygglight.engines.memory.sizes import format_bytes


@dataclass(frozen=True)
class Plan:
    """One policy per region instance, for one shape of the batch.

    Args:
        built: the step that it was made for.
        policies: per instance, in forward order.
        profile: its simulated bytes.
        budget_bytes: the limit on live bytes above state; None when there was none.
        plain_peak_bytes: simulated peak without Adacc.
        full_seconds: added time of recomputing all that can be, for comparison.
        solve_seconds: of the MILP.
        version: counts the plans of one run.
        reason: why it was made.
        error_factor: squared gradient error of all its codecs together, as measured, over the sum of theirs one by one.
    """

    built: BuiltStep
    policies: tuple[Policy, ...]
    profile: StepProfile
    budget_bytes: int | None
    plain_peak_bytes: int
    full_seconds: float
    solve_seconds: float = 0.0
    version: int = 0
    reason: str = "first micro-batch"
    notes: tuple[str, ...] = field(default=())
    error_factor: float = 1.0

    @property
    def predicted_peak_bytes(self) -> int:
        """Largest live bytes above parameters, gradients, optimizer state, buffers and batch."""
        return self.profile.peak_bytes

    @property
    def gradient_error(self) -> float:
        """Relative error of the whole gradient (2-norm) that its codecs cause together."""
        return float((self.error_factor * self.profile.error) ** 0.5)

    @property
    def added_seconds(self) -> float:
        """Predicted time per step beyond plain training."""
        return self.profile.added_seconds

    @cached_property
    def actions(self) -> dict[str, str]:
        """Slot name -> "keep" | "compress" | "recompute", in forward order; the same for the same fingerprint."""
        found: dict[str, str] = {}
        for position, policy in enumerate(self.policies):
            graph = self.built.step.instance(position)
            instance = self.built.step.names[position]
            for value in graph.actionable:
                found[slot_name(instance, value.name)] = policy.actions[value.id].value
        return found

    @cached_property
    def saved_bytes(self) -> dict[str, int]:
        """Bytes that autograd would save per action, by unique storage."""
        found = {action.value: 0 for action in Action}
        for position, policy in enumerate(self.policies):
            for value in self.built.step.instance(position).actionable:
                found[policy.actions[value.id].value] += value.nbytes
        return found

    @property
    def stored_bytes(self) -> int:
        """What is held between forward and backward under this plan, metadata of codes included."""
        return sum(self.profile.stored_bytes)

    @cached_property
    def plain_stored_bytes(self) -> int:
        """What plain autograd would hold."""
        return sum(simulate_step(self.built.step, keep_all(self.built)).stored_bytes)

    @cached_property
    def regions(self) -> dict[str, RegionPlan | None]:
        """What the runtime carries out, by instance name; None: plain autograd."""
        made: dict[tuple[int, int], RegionPlan | None] = {}
        regions: dict[str, RegionPlan | None] = {}
        for position, policy in enumerate(self.policies):
            index = self.built.step.sequence[position]
            key = (index, id(policy))
            if key not in made:
                made[key] = region_plan(self.built, index, policy)
            regions[self.built.step.names[position]] = made[key]
        return regions

    @property
    def all_keep(self) -> bool:
        """True when training runs exactly as it would without Adacc."""
        return all(policy.all_keep for policy in self.policies)

    def timeline(self) -> tuple[tuple[str, int], ...]:
        """(label, live bytes) in the order of one step, for a picture."""
        return self.profile.timeline

    def plain_timeline(self) -> tuple[tuple[str, int], ...]:
        """The same without Adacc."""
        return simulate_step(self.built.step, keep_all(self.built)).timeline

    def to_dict(self) -> dict[str, Any]:
        """Plain values only."""
        return {
            "version": self.version,
            "reason": self.reason,
            "budget_bytes": self.budget_bytes,
            "predicted_peak_bytes": self.predicted_peak_bytes,
            "plain_peak_bytes": self.plain_peak_bytes,
            "added_seconds": self.added_seconds,
            "full_recompute_seconds": self.full_seconds,
            "solve_seconds": self.solve_seconds,
            "gradient_error": self.gradient_error,
            "error_factor": self.error_factor,
            "saved_bytes": self.saved_bytes,
            "peak_at": self.profile.peak_at,
            "actions": self.actions,
        }

    def policies_dict(self) -> dict[str, dict[str, Any]]:
        """Per instance: actions and codecs by value id, as plain values (for checkpoints)."""
        return {
            name: {
                "actions": {str(v): a.value for v, a in policy.actions.items()},
                "codecs": {str(v): c for v, c in policy.codecs.items()},
            }
            for name, policy in zip(self.built.step.names, self.policies, strict=True)
        }

    def to_json(self) -> str:
        """:meth:`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=2)

    def table(self) -> str:
        """A short table for a terminal."""
        budget = "none" if self.budget_bytes is None else format_bytes(self.budget_bytes)
        share = self.saved_bytes
        total = max(1, sum(share.values()))
        rows = [
            ("budget (live bytes above state)", budget),
            ("predicted peak", f"{format_bytes(self.predicted_peak_bytes)} at {self.profile.peak_at}"),
            ("peak without Adacc", format_bytes(self.plain_peak_bytes)),
            *((f"{name} of what autograd saves", f"{format_bytes(size)} ({size / total:.0%})")
              for name, size in share.items()),
            ("added time a step", f"{self.added_seconds * 1e3:.1f} ms (recomputing everything: "
                                  f"{self.full_seconds * 1e3:.1f} ms)"),
            ("plan", f"version {self.version}, {self.reason}; solved in {self.solve_seconds:.2f} s"),
            *(("note", note) for note in self.notes),
        ]  # fmt: skip
        width = max(len(left) for left, _ in rows)
        return "\n".join(f"  {left:<{width}}  {right}" for left, right in rows)


def keep_all(built: BuiltStep) -> tuple[Policy, ...]:
    """Plain training as policies."""
    kinds = [Policy({v.id: Action.KEEP for v in graph.actionable}) for graph in built.step.types]
    return tuple(kinds[i] for i in built.step.sequence)


def recompute_all(built: BuiltStep) -> tuple[Policy, ...]:
    """Everything recomputed that can be: what the profiled step did."""
    kinds = []
    for graph in built.step.types:
        rebuildable = [value.producer is None for value in graph.values]
        for op in graph.operators:  # forward order, so inputs are settled
            for value in op.outputs:
                rebuildable[value] = op.replayable and all(rebuildable[v] for v in op.inputs)
            for value in op.outputs:
                if graph.values[value].saved and (graph.values[value].pinned or not rebuildable[value]):
                    rebuildable[value] = True  # kept, so there
        actions = {}
        for saved in graph.actionable:
            producer = graph.operators[saved.producer]  # type: ignore[index]
            free = not saved.pinned and producer.replayable and all(rebuildable[v] for v in producer.inputs)
            actions[saved.id] = Action.RECOMPUTE if free else Action.KEEP
        kinds.append(Policy(actions))
    return tuple(kinds[i] for i in built.step.sequence)


def region_plan(built: BuiltStep, index: int, policy: Policy) -> RegionPlan | None:
    """The executable form of ``policy`` for region type ``index``; None when it keeps everything."""
    if policy.all_keep:
        return None
    kind = built.kinds[index]
    return RegionPlan(
        policy=policy,
        schedule=build_schedule(kind.graph, policy),
        slots=kind.slots,
        reads=kind.reads,
        signature=kind.signature,
        specs={value: SPECS[name] for value, name in policy.codecs.items()},
        bases=_bases(kind.graph, policy),
    )


def _bases(graph: RegionGraph, policy: Policy) -> frozenset[int]:
    """Stored values that could not be made again from the leaves (dropout noise, say)."""
    masks = masks_of(graph)
    stored = (value for value, action in policy.actions.items() if action is not Action.RECOMPUTE)
    return frozenset(
        v for v in stored if not all(graph.operators[op].replayable for op in masks.cut(1 << v, masks.leaf)[0])
    )
