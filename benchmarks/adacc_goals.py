"""What the Adacc benchmark is held against (issue 2, must show 5), and whether a run met it."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.harness import Goal, Report, Result, paired_ratio
from ygglight.engines.adacc.config import AdaccConfig

RECOVER = {0.5: 0.50, 0.7: 0.75, 0.9: 0.90}
"""Budget -> share of the time between full recomputation and plain to be won back."""
KEEP_OVERHEAD, GPU_SPEEDUP = 0.02, 1.37


def recovered(report: Report, result: Result) -> float | None:
    """(t_full - t) / (t_full - t_plain) with all times as paired ratios to ``full``, so plain is 1 and full 0.

    None where full recomputation costs nothing over plain, or one of the three has no timing.
    """
    plain = report.get("plain")
    mine, least = report.ratios(result).get("full"), report.ratios(plain).get("full") if plain is not None else None
    return None if mine is None or least is None else recovered_share(mine, least)


def recovered_share(ratio: float, plain_ratio: float) -> float | None:
    """Share of the gap between full recomputation (1.0) and plain that a variant wins back.

    Args:
        ratio: time of the variant over that of full recomputation. plain_ratio: likewise for plain training.
    """
    return (1 - ratio) / (1 - plain_ratio) if plain_ratio < 1 else None


def goals(report: Report, device: str) -> list[Goal]:
    """What was aimed at (issue 2, must show 5), and whether this run met it.

    Args:
        report: with all results. device: where.
    """
    found: list[Goal] = []
    ours = [r for r in report.results if r.name.startswith("adacc-") and "budget_bytes" in r.metrics]
    for result in ours:
        peak, budget = result.metrics["peak_bytes"], result.metrics["budget_bytes"]
        if result.name != "adacc-keep":
            found.append(Goal(f"{result.name}: peak {peak / budget:.1%} of its budget", peak <= budget))
        share = float(result.name.split("-")[1]) if result.name[6].isdigit() else None
        won = result.metrics.get("recovered")
        if share in RECOVER and won is not None:
            found.append(Goal(f"{result.name}: recovers {won:.0%} (goal {RECOVER[share]:.0%})", won >= RECOVER[share]))
        if share is not None and result.ok:
            found.append(_against_best(report, result, _rivals(report, budget)))
    keep = report.get("adacc-keep")
    if keep is not None and "plain" in report.ratios(keep):
        over = report.ratios(keep)["plain"] - 1
        found.append(Goal(f"adacc-keep: {over:+.1%} over plain (goal 2%)", over <= KEEP_OVERHEAD))
    if device == "cuda":
        found.append(_gpu_goal(report, ours))
    else:
        found.append(Goal(f"{GPU_SPEEDUP}x over full recomputation: a goal for GPUs only", None))
    return found


def _rivals(report: Report, budget: int) -> list[Result]:
    """Everything else that ran within the budget, with a gradient error that Adacc would be allowed too."""
    return [
        r for r in report.results
        if r.ok and not r.name.startswith("adacc") and r.metrics["peak_bytes"] <= budget
        and r.metrics["gradient_error"] <= AdaccConfig.max_gradient_error
    ]  # fmt: skip


def _against_best(report: Report, result: Result, rivals: Sequence[Result]) -> Goal:
    if not rivals:
        return Goal(f"{result.name}: nothing else fits its budget", True)
    best = min(rivals, key=lambda r: r.p50)
    ratio = paired_ratio(result.seconds, best.seconds)
    return Goal(f"{result.name}: {ratio:.3f} of the time of the best other that fits ({best.name})", ratio <= 1.0)


def _gpu_goal(report: Report, ours: Sequence[Result]) -> Goal:
    ratios = {r.name: 1 / report.ratios(r)["full"] for r in ours if "full" in report.ratios(r) and r.name[6].isdigit()}
    if not ratios:
        return Goal(f"{GPU_SPEEDUP}x over full recomputation: nothing to compare", None)
    best = max(ratios, key=lambda name: ratios[name])
    plain = report.get("plain")
    possible = 1 / report.ratios(plain)["full"] if plain is not None and plain.ok else float("nan")
    text = f"{GPU_SPEEDUP}x over full recomputation: {ratios[best]:.3f}x ({best}); plain itself is {possible:.3f}x"
    return Goal(text, ratios[best] >= GPU_SPEEDUP if possible >= GPU_SPEEDUP else None)
