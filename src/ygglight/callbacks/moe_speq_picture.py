"""A picture of a run with experts on demand: how fast, how many tokens were drafted, and what the cache did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ygglight.compat.figures import new_figure, save_figure

HIT, LATE, MISS, SPEED = "#2d4a8a", "#d9a441", "#c8553d", "#444444"
KINDS = (".png", ".svg", ".pdf")
SMOOTH = 8
"""Cycles that a rate is the mean of, in a long run."""


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
    figure = new_figure(9, 6)
    speed, experts, moved = figure.subplots(3, 1, sharex=True)
    smooth = max(1, min(SMOOTH, len(samples) // 16))
    starts = range(0, len(samples), smooth)
    groups = [samples[at : at + smooth] for at in starts]
    edges = [*starts, len(samples)]
    rates = [sum(s.tokens for s in group) / max(sum(s.seconds for s in group), 1e-9) for group in groups]
    speed.step(edges, [*rates, rates[-1]], where="post", color=SPEED, linewidth=1.5)
    speed.set_ylabel("tokens/s")
    drafted = speed.twinx()
    ks = [s.k for s in samples]
    drafted.step(range(len(ks) + 1), [*ks, ks[-1]], where="post", color=HIT, linewidth=1, alpha=0.6)
    drafted.set_ylabel("k", color=HIT)
    drafted.set_ylim(bottom=0)
    drafted.yaxis.get_major_locator().set_params(integer=True)
    drafted.spines["top"].set_visible(False)
    _stack(
        experts, edges, groups, {"hits": ("in a slot", HIT), "late": ("on the way", LATE), "misses": ("missing", MISS)}
    )
    experts.set_ylabel("experts a cycle")
    _stack(
        moved, edges, groups,
        {"prefetch_bytes": ("sent ahead", LATE), "demand_bytes": ("on demand", MISS)}, scale=2**-20,
    )  # fmt: skip
    moved.set_ylabel("MiB a cycle")
    moved.set_xlabel("cycle")
    for axes in (speed, experts, moved):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylim(bottom=0)
    return save_figure(figure, path)


def _stack(
    axes: Any, edges: Sequence[int], groups: Sequence[Sequence[Sample]], parts: dict[str, tuple[str, str]],
    scale: float = 1.0,
) -> None:  # fmt: skip
    means = [[scale * sum(s.counts[name] for s in group) / len(group) for group in groups] for name in parts]
    labels, colours = zip(*parts.values(), strict=True)
    heights = [[*each, each[-1]] for each in means]
    axes.stackplot(edges, heights, labels=labels, colors=colours, linewidth=0, alpha=0.85, step="post")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
