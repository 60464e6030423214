"""A picture of a co-located run: steps against the target, finetune rate, and how the arena was split."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ygglight.compat.figures import new_figure, save_figure
from ygglight.engines.harli.report import Report, Sample

KV, ACTIVATIONS, TARGET = "#2d4a8a", "#c8553d", "#444444"


def draw_run(path: Path, report: Report) -> Path:
    """Draw a run over time, in three rows.

    Args:
        path: .png, .svg or .pdf. report: Of a run, with its samples.

    Returns:
        ``path``.

    Raises:
        ModuleNotFoundError: without matplotlib, naming the extra.
    """
    samples = list(report.samples)
    worked = [s for s in samples if s.kind != "idle"]
    start = samples[0].time - samples[0].seconds if samples else 0.0
    figure = new_figure(9, 6)
    steps, rate, memory = figure.subplots(3, 1, sharex=True)
    _steps(steps, worked, report, start)
    _rate(rate, report, start)
    _memory(memory, samples, report.chunk_bytes, start)
    memory.set_xlabel("seconds")
    for axes in (steps, rate, memory):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylim(bottom=0)
    return save_figure(figure, path)


def _steps(axes: Any, samples: Sequence[Sample], report: Report, start: float) -> None:
    for label, colour, chosen in (
        ("decoding alone, or quanta after it", KV, [s for s in samples if not s.concurrent]),
        ("finetuning beside it", ACTIVATIONS, [s for s in samples if s.concurrent]),
    ):
        axes.plot([s.time - start for s in chosen], [s.seconds * 1000 for s in chosen], ".", color=colour, label=label,
                  markersize=3)  # fmt: skip
    for value, text in ((report.tpot_slo, "target a token"), (report.max_gap, "longest gap allowed")):
        if value == math.inf:
            continue
        axes.axhline(value * 1000, color=TARGET, linestyle="--", linewidth=1)
        axes.annotate(
            text, (1.0, value * 1000), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8
        )
    axes.set_ylabel("ms a step")
    axes.legend(frameon=False, fontsize=8, loc="upper left")


def _rate(axes: Any, report: Report, start: float) -> None:
    """Tokens are counted when a micro-batch is done: between two such moments the rate is their mean."""
    done = [(report.started or start, 0), *report.trainings]
    edges = [time - start for time, _ in done]
    rates = [tokens / max(later - earlier, 1e-9) for (earlier, _), (later, tokens) in itertools.pairwise(done)]
    axes.stairs(rates, edges, color=ACTIVATIONS, fill=True, alpha=0.8)
    axes.set_ylabel("finetune tokens/s")


def _memory(axes: Any, samples: Sequence[Sample], chunk_bytes: int, start: float) -> None:
    times = [s.time - start for s in samples]
    size = chunk_bytes / 2**20
    parts = [[s.kv * size for s in samples], [s.leased * size for s in samples]]
    if samples:
        axes.stackplot(times, parts, colors=[KV, ACTIVATIONS], labels=["keys and values", "activations"], linewidth=0)
        axes.axhline((samples[0].kv + samples[0].leased + samples[0].free) * size, color=TARGET, linewidth=1)
        axes.legend(frameon=False, fontsize=8, loc="upper left")
    axes.set_ylabel("arena, MiB")
