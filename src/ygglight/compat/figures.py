"""Pictures without a window system and without matplotlib's global state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ygglight.compat.extras import require

__all__ = ["new_figure", "save_figure"]


def new_figure(width: float, height: float) -> Any:
    """A matplotlib figure to draw on.

    Args:
        width: Inches. height: Inches.

    Raises:
        ModuleNotFoundError: without matplotlib, naming the extra.
    """
    figure: Any = require("matplotlib.figure", "plot")
    agg: Any = require("matplotlib.backends.backend_agg", "plot")
    made = figure.Figure(figsize=(width, height), layout="constrained")
    agg.FigureCanvasAgg(made)
    return made


def save_figure(figure: Any, path: Path) -> Path:
    """Write a figure; folders are made.

    Args:
        figure: Of :func:`new_figure`. path: .png, .svg or .pdf.

    Returns:
        ``path``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path
