"""What ran fused, by which path, and why the rest did not: as plain values and as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ModelReport:
    """What became of one model.

    Args:
        name: Of the model in its module.
        way: How steps of one token ran: "plain", or the path of the fused block.
        reason: Why so.
        layers: For each decoder layer why it is not fused, or None where it is; empty for plain steps.
        calls: How often a layer ran fused, on the host's side.
    """

    name: str
    way: str
    reason: str
    layers: tuple[str | None, ...] = ()
    calls: int = 0


def table(reports: Sequence[ModelReport]) -> str:
    """A few lines a model: layers by how they ran, the same reasons together.

    Args:
        reports: Of the models of a module.
    """
    return "\n".join(line for report in reports for line in _lines(report))


def _lines(report: ModelReport) -> Iterator[str]:
    if not report.layers:
        yield f"  {report.name}: steps as they were: {report.reason}"
        return
    yield f"  {report.name}: {report.reason}"
    counts = Counter(report.layers)
    fused = counts.pop(None, 0)
    steps = f"{report.calls / fused:.0f} times each"
    if not report.calls:
        steps = "but never: there was no plain step of one token (autocast, torch.compile, hooks or another decoder?)"
    yield f"    {_layers(fused)} fused by {report.way}, {steps}"
    for reason, count in counts.most_common():
        yield f"    {_layers(count)} as they were: {reason}"


def _layers(count: int) -> str:
    return f"{count} layer" if count == 1 else f"{count} layers"
