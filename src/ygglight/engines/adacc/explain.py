"""Why a plan looks as it does: rows for a table, and what is alive at the peak. Pure data; our design."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ygglight.engines.adacc.graph import Action, Policy, RegionGraph, StepGraph, Value
from ygglight.engines.adacc.schedule import action_mask, codec_of, executable, masks_of
from ygglight.engines.adacc.simulate import StepProfile, items_at_peak, stored_items

if TYPE_CHECKING:
    from ygglight.engines.adacc.planner import Solution


@dataclass(frozen=True)
class Row:
    """One saved value under one policy.

    Args:
        region: name of the region type. instances: names of the instances that share this policy.
        slot: name of the value within the region. nbytes: its size.
        action, codec: what is done with it.
        stored_bytes: what one instance holds of it between forward and backward.
        seconds: what the action costs one instance (codec, or the replay that keeping it would save).
        replay_seconds: what recomputing it costs, or would cost with all else as it is; None: cannot be.
        why_not_compressed: None for compressed values and those without codec; else ``"not allowed"``,
            ``"not needed"`` (kept, and it fits), ``"cost"`` (replay is no slower), ``"error"`` (the error budget) or
            ``"memory"`` (replay takes longer, but the bytes of a code were wanted elsewhere).
        detail: the figures behind that.
    """

    region: str
    instances: tuple[str, ...]
    slot: str
    nbytes: int
    action: Action
    codec: str | None
    stored_bytes: int
    seconds: float
    replay_seconds: float | None
    why_not_compressed: str | None
    detail: str


def explain(step: StepGraph, solution: Solution) -> list[Row]:
    """One row per saved value and distinct policy, in the order of forward; largest values first."""
    groups: dict[tuple[int, int], list[int]] = {}
    for position, policy in enumerate(solution.policies):
        groups.setdefault((step.sequence[position], id(policy)), []).append(position)
    rows: list[Row] = []
    for (kind, _), positions in groups.items():
        graph, policy = step.types[kind], solution.policies[positions[0]]
        names = tuple(step.names[p] for p in positions)
        for value in sorted(graph.actionable, key=lambda v: (-v.nbytes, v.id)):
            rows.append(_row(graph, policy, value, names, solution))
    return rows


def _row(graph: RegionGraph, policy: Policy, value: Value, instances: tuple[str, ...], solution: Solution) -> Row:
    action = policy.actions[value.id]
    codec = codec_of(graph, policy, value.id) if action is Action.COMPRESS else None
    replay = _marginal_replay(graph, policy, value.id)
    stored = {Action.KEEP: value.nbytes, Action.RECOMPUTE: 0}.get(action, codec.nbytes if codec else 0)
    seconds = codec.seconds if codec else (replay or 0.0) if action is Action.RECOMPUTE else 0.0
    why, detail = _why_not_compressed(value, action, replay, len(instances), solution)
    return Row(
        region=graph.name,
        instances=instances,
        slot=value.name or f"value {value.id}",
        nbytes=value.nbytes,
        action=action,
        codec=codec.name if codec else None,
        stored_bytes=stored,
        seconds=seconds,
        replay_seconds=replay,
        why_not_compressed=why,
        detail=detail,
    )


def _marginal_replay(graph: RegionGraph, policy: Policy, value: int) -> float | None:
    """Seconds of replay with ``value`` recomputed less those with it kept; all other actions as they are."""
    again = Policy({**policy.actions, value: Action.RECOMPUTE})
    if graph.values[value].pinned or not executable(graph, again):
        return None
    return _replay(graph, again) - _replay(graph, Policy({**policy.actions, value: Action.KEEP}))


def _replay(graph: RegionGraph, policy: Policy) -> float:
    masks, again = masks_of(graph), action_mask(policy, Action.RECOMPUTE)
    return sum(graph.operators[op].seconds for op in masks.cut(again, masks.leaf | masks.saved & ~again)[0])


def _why_not_compressed(
    value: Value, action: Action, replay: float | None, count: int, solution: Solution
) -> tuple[str | None, str]:
    if action is Action.COMPRESS or not value.codecs:
        return None, ""
    if Action.COMPRESS not in solution.allow:
        return "not allowed", "compression is switched off"
    if action is Action.KEEP:
        return "not needed", "kept: the budget has room for it"
    assert replay is not None, "what is recomputed can be"
    quickest = min(value.codecs, key=lambda c: c.seconds)
    if quickest.seconds >= replay:
        return "cost", f"{quickest.name} takes {quickest.seconds * 1e6:.1f} us, recomputing {replay * 1e6:.1f} us"
    gentlest = min((c for c in value.codecs if c.seconds < replay), key=lambda c: c.error)
    left = solution.error_budget - solution.profile.error
    if gentlest.error * count > left:
        return "error", (
            f"{gentlest.name} perturbs the squared gradient by {gentlest.error:.2g} per instance, {max(0.0, left):.2g} "
            f"of {solution.error_budget:.2g} is left for {count}"
        )
    smallest = min(c.nbytes for c in value.codecs)
    return "memory", f"a code would hold {smallest} bytes of every instance, recomputing it none"


def live_items(step: StepGraph, policies: Sequence[Policy], profile: StepProfile) -> tuple[tuple[str, int], ...]:
    """("instance/slot", bytes) that are alive at the peak of ``profile``, largest first; slots of earlier instances of
    one type are added up."""
    if profile.peak_instance < 0:
        return (("outside the regions (optimizer step)", step.floor_workspace),)
    position = profile.peak_instance
    own = items_at_peak(step.instance(position), policies[position], profile.peak_phase)
    items = {f"{step.names[position]}/{name}": 0 for name, _ in own}
    for name, nbytes in own:
        items[f"{step.names[position]}/{name}"] += nbytes
    earlier: dict[tuple[str, str], tuple[int, int, str]] = {}
    cache: dict[tuple[int, int], list[tuple[str, int]]] = {}
    for p in range(position):
        key = (step.sequence[p], id(policies[p]))
        if key not in cache:
            cache[key] = stored_items(step.instance(p), policies[p])
        for name, nbytes in cache[key]:
            total, count, first = earlier.get((step.instance(p).name, name), (0, 0, step.names[p]))
            earlier[step.instance(p).name, name] = (total + nbytes, count + 1, first)
    for (_, name), (total, count, first) in earlier.items():
        others = f" and {count - 1} like it" if count > 1 else ""
        items[f"{first}/{name}{others}"] = total
    return tuple(sorted(((n, b) for n, b in items.items() if b), key=lambda item: (-item[1], item[0])))
