"""The latency-aware objective: tokens a second and not tokens a step (Yggdrasil, Eq. 3, with the fixed term it drops).

    speedup = tokens(Wd, Dd, Wv) * Tver(1) / (Tdraft(head) + (Dd - 1) * Tdraft(Wd) + Tver(Wv) + Tfix)

The paper charges Dd * Tdraft(Wd). The first of the draft's passes has one or two rows, not Wd, and we charge that.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ygglight.engines.yggdrasil.acceptance import expected_tree


@dataclass(frozen=True)
class Latency:
    """Seconds of one forward by the number of its rows, measured at some and interpolated between.

    Args:
        widths: rows, ascending. seconds: of each.
    """

    widths: tuple[int, ...]
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.widths or len(self.widths) != len(self.seconds) or list(self.widths) != sorted(set(self.widths)):
            raise ValueError(f"widths {self.widths} must ascend and have one time each, got {len(self.seconds)}")

    def __call__(self, width: int) -> float:
        """Seconds for ``width`` rows: the first time below the table, the last slope above it."""
        widths, seconds = self.widths, self.seconds
        if width <= widths[0] or len(widths) == 1:
            return seconds[0]
        right = min(bisect.bisect_left(widths, width), len(widths) - 1)
        left = right - 1
        slope = (seconds[right] - seconds[left]) / (widths[right] - widths[left])
        return max(seconds[left] + slope * (width - widths[left]), min(seconds))

    def to_dict(self) -> dict[str, Any]:
        """Primitives."""
        return {"widths": list(self.widths), "seconds": list(self.seconds)}

    @staticmethod
    def from_dict(state: dict[str, Any]) -> Latency:
        """The inverse."""
        return Latency(tuple(state["widths"]), tuple(state["seconds"]))


FREE = Latency((1,), (0.0,))
"""Of a draft that costs nothing."""


@dataclass(frozen=True)
class Costs:
    """What a machine takes for one model and draft at one length of text.

    Args:
        target: of one verification. draft: of one draft pass. fixed: seconds an iteration besides, whatever its shape.
    """

    target: Latency
    draft: Latency
    fixed: float = 0.0


@dataclass(frozen=True, order=True)
class Shape:
    """Numbers of one iteration: draft rows and new nodes a step, steps, and nodes that are verified (the root too)."""

    width: int
    depth: int
    verify: int


def iteration_seconds(shape: Shape, costs: Costs, *, tail: bool = False) -> float:
    """Seconds of one iteration.

    Args:
        shape: its numbers. costs: of the machine. tail: whether the last nodes go through the draft ahead of time.
    """
    passes = shape.depth - 1 + tail
    return costs.draft(2) + passes * costs.draft(shape.width) + costs.target(shape.verify) + costs.fixed


def speedup(tokens: float, shape: Shape, costs: Costs, *, tail: bool = False) -> float:
    """How many times as fast as plain decoding by the same compiled target.

    Args:
        tokens: expected an iteration, the bonus token among them.
    """
    return tokens * (costs.target(1) + costs.fixed) / iteration_seconds(shape, costs, tail=tail)


def choose_verify(
    expected: Sequence[float], width: int, depth: int, costs: Costs, buckets: Sequence[int]
) -> tuple[Shape, float]:
    """How many nodes of this very tree to verify.

    The draft's cost is spent, but stays in the ratio: what is maximised is the long-run rate of tokens, and the best
    ratio of a sum depends on its constant part (renewal reward).

    Args:
        expected: tokens if the best k nodes are verified, k = 1... width, depth: of the tree. buckets: sizes that
            there are; 1 is always one of them, for a tree may turn out not to be worth verifying.

    Returns:
        The best shape and its speedup.
    """
    sizes = sorted({1, *(min(bucket, len(expected)) for bucket in buckets)})
    found = [(speedup(expected[size - 1], shape := Shape(width, depth, size), costs), -size, shape) for size in sizes]
    best = max(found)
    return best[2], best[0]


@dataclass(frozen=True)
class Choice:
    """The outcome of :func:`choose_shape`.

    Args:
        shape: None when plain decoding is the fastest. speedup: of the best tree over plain decoding. tokens: expected
            with it. table: (shape, tokens, speedup) of everything considered.
    """

    shape: Shape | None
    speedup: float
    tokens: float
    table: tuple[tuple[Shape, float, float], ...]


def choose_shape(
    rates: Sequence[float],
    costs: Costs,
    widths: Sequence[int],
    depths: Sequence[int],
    buckets: Sequence[int],
    margin: float = 1.02,
) -> Choice:
    """The best numbers of all that there are, or plain decoding.

    Args:
        rates: chances of the draft's candidates by rank. costs: of the machine. widths, depths, buckets: compiled
            sizes.
        margin: speedup that a tree must promise to be worth its while.
    """
    table = []
    for width, depth in itertools.product(widths, depths):
        values = expected_tree(tuple(rates), width, depth)
        sums = list(itertools.accumulate(values))
        for size in sorted({min(bucket, len(values)) for bucket in buckets if bucket > 1}):
            shape = Shape(width, depth, size)
            table.append((shape, sums[size - 1], speedup(sums[size - 1], shape, costs)))
    # Of equals the smallest: it asks least of the estimate.
    best = max(table, key=lambda row: (row[2], -row[0].verify, -row[0].depth, -row[0].width))
    return Choice(best[0] if best[2] >= margin else None, best[2], best[1], tuple(table))


def choose_depth(survival: Sequence[float], width: int, verify: int, costs: Costs, depths: Sequence[int]) -> int:
    """The depth that a predictor's survival curve makes the fastest (brief A.3).

    Args:
        survival: P(accepted length >= d), d = 1... width, verify: of the tree.
    """

    def rate(depth: int) -> float:
        tokens = 1 + sum(survival[:depth])
        return speedup(tokens, Shape(width, depth, min(verify, 1 + width * depth)), costs)

    return max((d for d in depths if d <= len(survival)), key=lambda d: (rate(d), -d))
