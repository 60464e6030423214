"""Stage two of the predictor: how much slower than alone, from a table of what was seen (brief A.4 (i); our design)."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ygglight.engines.harli.solo import MIN_SAMPLES, Features, LevelRegression

WINDOW = 64
"""Newest samples of a cell: their largest is about the 98.5 % quantile of the next."""
FEW = 8
"""Samples below which a cell's bound is widened."""
SAFETY, FLOOR = 1.03, 1.05
"""A bound is SAFETY times the largest ratio seen, and FLOOR times the middle one at least."""
OUTLIER, OUTLIER_AFTER, OUTLIER_SHARE = 2.0, 5, 25
"""One sample in OUTLIER_SHARE (and one from OUTLIER_AFTER on) is left out if over OUTLIER times the cell's median."""
EXPIRY = 4096
"""Observations after which a cell that was not seen again is forgotten, so that one bad moment does not close it."""
DEFAULT_ALONE, DEFAULT_BESIDE = 1.25, 1.5
"""Bound of what was never seen. MuxWise saw at most 1.2 (A100) and 1.3 (H100) beside another job."""

Key = tuple[int, int, str]
"""(units of the job, units of the other that works beside it, phase of that other or "")."""


@dataclass
class Cell:
    """What one region of the load took: (features, seconds) and, derived from it, the factors over stage one."""

    samples: deque[tuple[Features, float]] = field(default_factory=lambda: deque(maxlen=WINDOW))
    stamp: int = 0
    factors: tuple[float, float] | None = None
    version: int = -1


class GuardTable:
    """Slowdown over the solo prediction: its middle and its bound, a cell of (partition, phase, load).

    Args:
        solo: ``(level, features [n, terms]) -> seconds [n]``, stage one.
    """

    def __init__(self, solo: Callable[[int, NDArray[np.float64]], NDArray[np.float64]]) -> None:
        self._solo = solo
        self.cells: dict[Key, dict[tuple[int, ...], Cell]] = {}

    def observe(self, key: Key, at: tuple[int, ...], features: Features, seconds: float, stamp: int) -> None:
        """Take a sample in; the bound of its cell follows at once."""
        cell = self.cells.setdefault(key, {}).setdefault(at, Cell())
        cell.samples.append((features, seconds))
        cell.stamp, cell.factors = stamp, None

    def forget(self, before: int) -> None:
        """Drop the cells that were last seen before this stamp."""
        for key, found in list(self.cells.items()):
            self.cells[key] = {at: cell for at, cell in found.items() if cell.stamp >= before}

    def factors(self, key: Key, at: tuple[int, ...], version: int, now: int) -> tuple[float, float]:
        """(middle, bound) of seconds / solo prediction.

        A cell that was not seen takes the largest bound of the cells that dominate it: no smaller load, no more units
        for the job, no fewer for the other. Where there is none, the default.

        Args:
            key: partition and phase. at: cell of the load. version: of the fit behind the solo predictions.
            now: the stamp of the present.
        """
        cell = self.cells.get(key, {}).get(at)
        if cell is not None and now - cell.stamp > EXPIRY:
            del self.cells[key][at]
            cell = None
        own = None if cell is None else self._own(cell, key[0], version)
        count = 0 if cell is None else len(cell.samples)
        if own is not None and count >= FEW:
            return own
        bound = self._dominating(key, at, version)
        if bound is None:
            bound = DEFAULT_BESIDE if key[1] else DEFAULT_ALONE
        if own is None:
            return bound if key[1] else 1.0, bound  # alone, stage one is the expectation
        return own[0], max(own[1], min(bound, own[1] * (1 + 1 / count)))

    def _own(self, cell: Cell, level: int, version: int) -> tuple[float, float] | None:
        if cell.factors is None or cell.version != version:
            predicted = self._solo(level, np.array([features for features, _ in cell.samples]))
            ratios = np.sort(np.array([seconds for _, seconds in cell.samples]) / predicted)
            middle, count = float(np.median(ratios)), len(ratios)
            for _ in range(max(count // OUTLIER_SHARE, int(count >= OUTLIER_AFTER))):
                if ratios[-1] > OUTLIER * middle:
                    ratios = ratios[:-1]
            cell.factors = middle, max(SAFETY * float(ratios[-1]), FLOOR * middle)
            cell.version = version
        return cell.factors if cell.factors[0] > 0 else None  # no solo prediction at all: nothing to be a factor of

    def _dominating(self, key: Key, at: tuple[int, ...], version: int) -> float | None:
        bounds = [
            factors[1]
            for (units, beside, phase), found in self.cells.items()
            if phase == key[2] and units <= key[0] and beside >= key[1] and bool(beside) == bool(key[1])
            for where, cell in found.items()
            if where != at and all(a >= b for a, b in zip(where, at, strict=True))
            if (factors := self._own(cell, units, version)) is not None
        ]
        return max(bounds, default=None)

    def state_dict(self) -> list[list[Any]]:
        """Every cell as primitives: ``[key, cell, stamp, [[features, seconds], ...]]``."""
        return [
            [list(key), list(at), cell.stamp, [[list(f), s] for f, s in cell.samples]]
            for key, found in self.cells.items()
            for at, cell in found.items()
        ]

    def load_state_dict(self, state: Sequence[Sequence[Any]]) -> None:
        """Take over what :meth:`state_dict` gave."""
        self.cells.clear()
        for key, at, stamp, samples in state:
            units, beside, phase = key
            for features, seconds in samples:
                self.observe((units, beside, phase), tuple(at), tuple(features), seconds, stamp)


class TwoStage:
    """Expected seconds of a job and their upper bound: a solo regression times a guard table.

    Args:
        terms: features of the regression.
    """

    REFIT_EVERY = 256
    """Solo samples between two fits, once 256 are there; before, a fit comes with every half more. A sample beyond all
    that was fitted brings one at once."""

    def __init__(self, terms: int) -> None:
        self.solo = LevelRegression(terms)
        self.guard = GuardTable(self.solo.predict_many)
        self._fresh = 0
        self._alone: Counter[int] = Counter()  # level -> samples that were alone indeed

    def observe(self, key: Key, at: tuple[int, ...], features: Features, seconds: float, stamp: int) -> None:
        """Take a sample in.

        Args:
            key: partition and phase. at: cell of the load. features: of the load. seconds: it took, > 0.
            stamp: rises from sample to sample.
        """
        self.guard.observe(key, at, features, seconds, stamp)
        # Where a job was hardly ever seen alone, what it took beside another stands in: too slow, so on the safe side.
        if key[1] and self._alone[key[0]] >= MIN_SAMPLES:
            return
        self._alone[key[0]] += not key[1]
        self.solo.observe(key[0], at, features, seconds, stamp)
        self._fresh += 1
        due = min(self.REFIT_EVERY, max(6, len(self.solo) // 2))
        if self._fresh >= due or self.solo.beyond(key[0], features):
            self.refit()

    def refit(self) -> None:
        """Fit stage one again; stage two follows when it is next asked."""
        self.solo.fit()
        self._fresh = 0

    def forget(self, before: int) -> None:
        """Drop what is older than a stamp, and fit to the rest."""
        self.solo.forget(before)
        self.guard.forget(before)
        self.refit()

    def predict(self, key: Key, at: tuple[int, ...], features: Features, now: int) -> tuple[float, float]:
        """(expected seconds, upper bound); both infinite when nothing was ever seen."""
        alone = self.solo.predict(key[0], features)
        if alone == float("inf"):
            return alone, alone
        middle, bound = self.guard.factors(key, at, self.solo.version, now)
        return alone * middle, alone * bound

    def state_dict(self) -> dict[str, Any]:
        """What was seen, as primitives."""
        alone = [[level, count] for level, count in self._alone.items()]
        return {"solo": self.solo.state_dict(), "guard": self.guard.state_dict(), "alone": alone}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave, and fit."""
        self._alone = Counter(dict(state["alone"]))
        self.solo.load_state_dict(state["solo"])
        self.guard.load_state_dict(state["guard"])
        self._fresh = 0
