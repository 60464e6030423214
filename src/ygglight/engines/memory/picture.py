"""A picture of live bytes over one training step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ygglight.compat.figures import new_figure, save_figure

COLOURS = ("#0b6e4f", "#c8553d", "#2d4a8a", "#8a6d2d")


def draw_memory(
    path: Path,
    curves: Mapping[str, Sequence[int]],
    *,
    plain: Sequence[int] | None = None,
    budget: int | None = None,
    title: str = "Live bytes above state over one training step",
) -> Path:
    """Draw curves of live bytes, each stretched over one step, with the budget as a line.

    Args:
        path: .png, .svg or .pdf.
        curves: label -> bytes in the order of one step.
        plain: the curve without Adacc, drawn in grey behind the others.
        budget: bytes.

    Raises:
        ModuleNotFoundError: without matplotlib, naming the extra.
    """
    figure = new_figure(8, 4)
    axes = figure.add_subplot()
    if plain:
        axes.fill_between(_positions(plain), _mebibytes(plain), color="#d9d9d9", label="without Adacc", linewidth=0)
    for (label, sizes), colour in zip(curves.items(), COLOURS * 3, strict=False):
        axes.plot(_positions(sizes), _mebibytes(sizes), color=colour, label=label, linewidth=1.4)
    if budget is not None:
        axes.axhline(budget / 2**20, color="black", linestyle="--", linewidth=1)
        axes.annotate("budget", (1.0, budget / 2**20), ha="right", va="bottom", fontsize=9)
    axes.set_xlim(0, 1)
    axes.set_ylim(bottom=0)
    axes.set_xticks([0, 1], ["forward starts", "optimizer stepped"])
    axes.set_ylabel("MiB")
    axes.set_title(title, fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    return save_figure(figure, path)


def _positions(sizes: Sequence[int]) -> list[float]:
    return [i / max(1, len(sizes) - 1) for i in range(len(sizes))]


def _mebibytes(sizes: Sequence[int]) -> list[float]:
    return [size / 2**20 for size in sizes]
