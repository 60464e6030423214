"""A picture of a co-located run: steps against the target, finetune rate, and how the arena was split."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ygglight.compat.extras import require
from ygglight.engines.harli.report import Report, Sample

KV, ACTIVATIONS, TARGET = "#2d4a8a", "#c8553d", "#444444"
WINDOW_SECONDS = 2.0
"""Over which the finetune rate is taken."""


def draw_run(path: Path, report: Report) -> Path:
    """Draw a run over time, in three rows.

    Args:
        path: .png, .svg or .pdf. report: Of a run, with its samples.

    Returns:
        ``path``.

    Raises:
        ModuleNotFoundError: without matplotlib, naming the extra.
    """
    figure_module: Any = require("matplotlib.figure", "plot")
    agg: Any = require("matplotlib.backends.backend_agg", "plot")
    samples = list(report.samples)
    start = samples[0].time - samples[0].seconds if samples else 0.0
    figure = figure_module.Figure(figsize=(9, 6), layout="constrained")
    agg.FigureCanvasAgg(figure)
    steps, rate, memory = figure.subplots(3, 1, sharex=True)
    _steps(steps, samples, report, start)
    _rate(rate, samples, start)
    _memory(memory, samples, report.chunk_bytes, start)
    memory.set_xlabel("seconds")
    for axes in (steps, rate, memory):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylim(bottom=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


def _steps(axes: Any, samples: Sequence[Sample], report: Report, start: float) -> None:
    for label, colour, chosen in (
        ("decoding alone, or quanta after it", KV, [s for s in samples if not s.concurrent]),
        ("finetuning beside it", ACTIVATIONS, [s for s in samples if s.concurrent]),
    ):
        axes.plot([s.time - start for s in chosen], [s.seconds * 1000 for s in chosen], ".", color=colour, label=label,
                  markersize=3)  # fmt: skip
    for value, text in ((report.tpot_slo, "target a token"), (report.max_gap, "longest gap allowed")):
        axes.axhline(value * 1000, color=TARGET, linestyle="--", linewidth=1)
        axes.annotate(
            text, (1.0, value * 1000), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8
        )
    axes.set_ylabel("ms a step")
    axes.legend(frameon=False, fontsize=8, loc="upper left")


def _rate(axes: Any, samples: Sequence[Sample], start: float) -> None:
    times, rates = [], []
    first = 0
    for last, sample in enumerate(samples):
        while first < last and sample.time - samples[first].time > WINDOW_SECONDS:
            first += 1
        span = sample.time - samples[first].time
        if span > WINDOW_SECONDS / 4:
            times.append(sample.time - start)
            rates.append((sample.finetune_tokens - samples[first].finetune_tokens) / span)
    axes.plot(times, rates, color=ACTIVATIONS, linewidth=1.2)
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
