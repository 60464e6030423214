"""Stage one of the predictor: a latency that is linear in the load, one set of coefficients a partition size.

``seconds(level, x) = sum_j c_j(level) x_j``, with c_j >= 0 and c_j not increasing in the level: more load never takes
less time, and more of the machine never takes more. Both hold by construction, as all levels are fitted together with
non-negative increments. (Brief A.4, stage 1; the form is that of MuxWise, the paper's own is not public. Our design.)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Features = tuple[float, ...]

MIN_SAMPLES = 6
"""Samples of one level before its coefficients are fitted."""
CELL_SAMPLES = 16
"""Samples kept a level and cell: the newest, of every load that was seen. A refit of 100 cells takes milliseconds."""
FAR = 1.25
ROUNDS, HUBER, FINEST = 6, 1.5, 0.01
"""Rounds of reweighting; relative residuals over HUBER deviations count linearly; a deviation is FINEST at least."""


def nonnegative_least_squares(gram: NDArray[np.float64], moment: NDArray[np.float64]) -> NDArray[np.float64]:
    """The x >= 0 that minimises ``x' gram x / 2 - moment' x`` (Lawson and Hanson, 1974, on the normal equations).

    Args:
        gram: float64 ``[n, n]``, A'A. moment: float64 ``[n]``, A'b.

    Returns:
        float64 ``[n]``.
    """
    scale = np.sqrt(np.maximum(np.diag(gram), 1e-300))  # unit columns: features differ by six orders of magnitude
    gram, moment = gram / np.outer(scale, scale), moment / scale
    x, free = np.zeros(len(moment)), np.zeros(len(moment), dtype=bool)
    for _ in range(10 * len(moment)):
        gradient = np.where(free, -np.inf, moment - gram @ x)
        best = int(np.argmax(gradient))
        if gradient[best] <= 1e-10:
            break
        free[best] = True
        while True:
            trial = np.zeros_like(x)
            trial[free] = np.linalg.lstsq(gram[np.ix_(free, free)], moment[free], rcond=1e-12)[0]
            if np.all(trial[free] > 0):
                x = trial
                break
            below = free & (trial <= 0)
            step = np.min(x[below] / np.maximum(x[below] - trial[below], 1e-300))
            x = x + step * (trial - x)
            free &= x > 1e-12
            x[~free] = 0.0
            if not free.any():
                break
    return x / scale


class LevelRegression:
    """Seconds from features, for every size of partition, robust to outliers and careful where nothing was seen.

    What is used where there is no sample follows from the form alone. A load that exceeds all that was seen by a
    factor takes at most so many times the time (no coefficient is negative); a part of the machine that is so many
    times smaller takes at most so many times longer.

    Args:
        terms: features. The first may be a constant 1.
    """

    def __init__(self, terms: int) -> None:
        self.terms = terms
        self.version = 0
        """Fits so far: what was derived from a prediction is stale when this changes."""
        self.coefficients: dict[int, NDArray[np.float64]] = {}
        """Level -> float64 ``[terms]``, seconds a unit of each feature."""
        self._samples: dict[int, dict[tuple[int, ...], deque[tuple[Features, float, int]]]] = {}
        # Of the fitted levels, ascending: units [n], coefficients and largest feature seen [n, terms].
        self._levels, self._rates, self._reach = np.zeros(0), np.zeros((0, terms)), np.zeros((0, terms))

    def __len__(self) -> int:
        return sum(len(cell) for cells in self._samples.values() for cell in cells.values())

    def observe(self, level: int, cell: tuple[int, ...], features: Features, seconds: float, stamp: int) -> None:
        """Keep a sample for the next fit.

        Args:
            level: units it ran on. cell: the region of the load; each keeps its newest samples. features: of the load.
            seconds: it took, > 0. stamp: rises from sample to sample.
        """
        cells = self._samples.setdefault(level, {})
        cells.setdefault(cell, deque(maxlen=CELL_SAMPLES)).append((features, seconds, stamp))

    def forget(self, before: int) -> None:
        """Drop samples with a stamp below this: the machine is no longer what it was."""
        for level, cells in list(self._samples.items()):
            kept = {name: deque((s for s in cell if s[2] >= before), CELL_SAMPLES) for name, cell in cells.items()}
            self._samples[level] = {name: cell for name, cell in kept.items() if cell}
            if not self._samples[level]:
                del self._samples[level]

    def fit(self) -> None:
        """Fit every level that has enough samples, all together."""
        samples = {level: [s for cell in cells.values() for s in cell] for level, cells in self._samples.items()}
        levels = sorted(level for level, found in samples.items() if len(found) >= MIN_SAMPLES)
        self.version += 1
        self.coefficients = {}
        if not levels:
            return
        blocks, reach = [], []
        for at, level in enumerate(levels):
            x = np.array([s[0] for s in samples[level]]) / np.array([[s[1]] for s in samples[level]])
            # Coefficients of a level are the sum of the increments of it and of all larger levels.
            blocks.append(np.concatenate([x * (other >= at) for other in range(len(levels))], axis=1))
            reach.append(np.max(np.array([s[0] for s in samples[level]]), axis=0))
        rows = np.concatenate(blocks)  # [samples, levels * terms], each divided by its seconds: residuals are relative
        weight = np.ones(len(rows))
        for _ in range(ROUNDS):
            weighted = rows * weight[:, None]
            increments = nonnegative_least_squares(weighted.T @ rows, weighted.sum(0))
            residual = np.abs(rows @ increments - 1.0)
            deviation = max(1.4826 * float(np.median(residual)), FINEST)
            weight = np.minimum(1.0, HUBER * deviation / np.maximum(residual, 1e-12))
        steps = increments.reshape(len(levels), self.terms)
        self._levels, self._reach = np.array(levels, dtype=np.float64), np.array(reach)
        self._rates = steps[::-1].cumsum(0)[::-1]
        self.coefficients = dict(zip(levels, self._rates, strict=True))

    def predict(self, level: int, features: Features) -> float:
        """Seconds of a load on so many units; infinity if nothing like it was ever seen.

        Args:
            level: units. features: of the load.
        """
        if not self.coefficients:
            return self._scaled_sample(level, features)
        return float(self.predict_many(level, np.array([features]))[0])

    def predict_many(self, level: int, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """:meth:`predict` of several loads.

        Args:
            level: units. x: float64 ``[n, terms]``.

        Returns:
            float64 ``[n]``.
        """
        if not self.coefficients:
            return np.array([self._scaled_sample(level, tuple(row)) for row in x])
        levels, reach = self._levels, self._reach
        inside = (np.minimum(x[:, None], reach) * self._rates).sum(-1)  # [n, levels]: each at the edge of what it saw
        with np.errstate(divide="ignore", invalid="ignore"):
            excess = np.where(x[:, None] > reach, x[:, None] / reach, 1.0).max(-1)
        # Unit-seconds of a load, the least that this level or a larger one promises: a smaller part takes no more.
        work = np.minimum.accumulate((inside * excess * levels)[:, ::-1], axis=1)[:, ::-1]
        each = np.maximum(inside, work / levels)
        count = int(np.searchsorted(levels, level, side="right"))
        best = each[:, :count].min(1, initial=np.inf)
        if count < len(levels) and level not in self.coefficients:
            best = np.minimum(best, each[:, count] * (levels[count] / max(level, 1)))
        return best

    def beyond(self, level: int, features: Features) -> bool:
        """Whether a load is far (FAR) outside of what the coefficients of a fitted level were made from."""
        if level not in self.coefficients:
            return False
        reach = self._reach[int(np.searchsorted(self._levels, level))]
        return any(value > FAR * most for value, most in zip(features, reach, strict=True))

    def _scaled_sample(self, level: int, features: Features) -> float:
        found = float("inf")
        for known, cells in self._samples.items():
            for seen, seconds, _ in (sample for cell in cells.values() for sample in cell):
                times = max(1.0, known / max(level, 1), *(_ratio(a, b) for a, b in zip(features, seen, strict=True)))
                found = min(found, seconds * times)
        return found

    def state_dict(self) -> list[list[Any]]:
        """The samples, as primitives: ``[level, cell, features, seconds, stamp]`` each."""
        return [
            [level, list(name), list(features), seconds, stamp]
            for level, cells in self._samples.items()
            for name, cell in cells.items()
            for features, seconds, stamp in cell
        ]

    def load_state_dict(self, state: Sequence[Sequence[Any]]) -> None:
        """Take samples over and fit to them."""
        self._samples.clear()
        for level, cell, features, seconds, stamp in state:
            self.observe(level, tuple(cell), tuple(features), seconds, stamp)
        self.fit()


def _ratio(value: float, seen: float) -> float:
    return 1.0 if value <= seen else float("inf") if seen <= 0 else float(value / seen)
