"""A picture of a run with experts on demand: how fast, how many tokens were drafted, and what the cache did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ygglight.compat.extras import require

HIT, LATE, MISS, SPEED = "#2d4a8a", "#d9a441", "#c8553d", "#444444"
SMOOTH = 8
"""Cycles that a point of a rate is the mean of."""


@dataclass(frozen=True)
class Sample:
    """One cycle.

    Args:
        k: Drafted tokens. tokens: That the text grew by. seconds: It took. counts: What was new in the runtime's
            counters, and the bytes that moved, by cause.
    """

    k: int
    tokens: int
    seconds: float
    counts: Counter[str]


def draw_run(path: Path, samples: Sequence[Sample]) -> Path:
    """Draw a run, cycle by cycle, in three rows.

    Args:
        path: .png, .svg or .pdf. samples: Of the cycles in order, one or more.

    Returns:
        ``path``.

    Raises:
        ModuleNotFoundError: without matplotlib, naming the extra.
    """
    figure_module: Any = require("matplotlib.figure", "plot")
    agg: Any = require("matplotlib.backends.backend_agg", "plot")
    figure = figure_module.Figure(figsize=(9, 6), layout="constrained")
    agg.FigureCanvasAgg(figure)
    speed, experts, moved = figure.subplots(3, 1, sharex=True)
    groups = [samples[at : at + SMOOTH] for at in range(0, len(samples), SMOOTH)]
    cycles = [min(at + SMOOTH / 2, len(samples)) for at in range(0, len(samples), SMOOTH)]
    rates = [sum(s.tokens for s in group) / max(sum(s.seconds for s in group), 1e-9) for group in groups]
    speed.plot(cycles, rates, color=SPEED, linewidth=1.5, label="tokens a second")
    speed.set_ylabel("tokens/s")
    drafted = speed.twinx()
    drafted.step(range(len(samples)), [s.k for s in samples], where="post", color=HIT, linewidth=1, alpha=0.6)
    drafted.set_ylabel("k", color=HIT)
    drafted.set_ylim(bottom=0)
    _stack(
        experts, cycles, groups, {"hits": ("in a slot", HIT), "late": ("on the way", LATE), "misses": ("missing", MISS)}
    )
    experts.set_ylabel("experts a cycle")
    _stack(
        moved, cycles, groups,
        {"prefetch_bytes": ("sent ahead", LATE), "demand_bytes": ("on demand", MISS)}, scale=2**-20,
    )  # fmt: skip
    moved.set_ylabel("MiB a cycle")
    moved.set_xlabel("cycle")
    for axes in (speed, experts, moved):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylim(bottom=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


def _stack(
    axes: Any, cycles: Sequence[float], groups: Sequence[Sequence[Sample]], parts: dict[str, tuple[str, str]],
    scale: float = 1.0,
) -> None:  # fmt: skip
    heights = [[scale * sum(s.counts[name] for s in group) / len(group) for group in groups] for name in parts]
    labels, colours = zip(*parts.values(), strict=True)
    axes.stackplot(cycles, heights, labels=labels, colors=colours, linewidth=0, alpha=0.85)
    axes.legend(frameon=False, fontsize=8, loc="upper right")
