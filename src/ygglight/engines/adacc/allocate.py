"""One policy per region instance out of a short list per region type, so that a whole step fits its budget.

While instance ``l`` runs, forward or backward, the instances before it hold what they store and the later ones nothing:

    sum_{j<l} stored_j + peak_l <= budget   for every l,   sum error <= error budget,   minimise sum seconds.

That nesting makes the choice a dynamic program over positions whose state is (bytes stored so far, error so far): exact
and quick where a program with one binary per (instance, policy) drowns in the symmetry of identical layers. Our design.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ygglight.engines.adacc.graph import Policy
from ygglight.engines.adacc.simulate import RegionProfile

MAX_LABELS, COARSE = 1500, 200
"""States kept per position in a final run, and while the price of error is sought."""
ERROR_LEVELS = 12
FEW = 24
"""Up to this many candidates per type, the final run under an error budget considers them all."""


@dataclass(frozen=True)
class Candidate:
    """A policy and what it does to one instance."""

    policy: Policy
    profile: RegionProfile

    @property
    def peak(self) -> int:
        """Largest live bytes of forward and backward (the instance's own)."""
        return max(self.profile.forward_peak, self.profile.backward_peak)


class Allocation(NamedTuple):
    """Index into the candidates of its type per instance; ``exact`` when no state had to be merged on the way."""

    choice: tuple[int, ...]
    exact: bool


def floor_peak(candidates: Sequence[Sequence[Candidate]], sequence: Sequence[int]) -> tuple[int, tuple[int, ...]]:
    """The smallest peak that any choice reaches, and such a choice; errors are not looked at.

    With ``r`` the least peak from instance ``l+1`` on if nothing was stored before, that from ``l`` on is
    ``min_p max(peak_p, stored_p + r)``: bytes stored before shift both alike.
    """
    least, choice = 0, []
    for kind in reversed(sequence):
        least, best = min(
            (max(c.peak, c.profile.stored_bytes + least), index) for index, c in enumerate(candidates[kind])
        )
        choice.append(best)
    return least, tuple(reversed(choice))


def allocate(
    candidates: Sequence[Sequence[Candidate]], sequence: Sequence[int], budget: int, error_budget: float
) -> Allocation | None:
    """The fastest choice within both budgets (``budget`` in bytes), or None when there is none.

    Where the error budget binds, its price is found first (Lagrange multiplier, a few coarse runs); the final run then
    tracks errors, for the candidates that were best at some price (or all, when they are few).

    Args:
        candidates: per region type. sequence: type per instance, in forward order.
    """
    program = _Program([_Columns(options) for options in candidates], sequence, budget)
    if program.ceilings[0] < 0:
        return None
    lossy = any(columns.error.any() for columns in program.table)
    dear = program.run(price=0.0, max_labels=COARSE if lossy else MAX_LABELS)
    if dear is not None and lossy and dear.error <= error_budget * _ROUNDING and not dear.exact:
        dear = program.run(price=0.0)
    if dear is None or dear.error <= error_budget * _ROUNDING:
        return dear and Allocation(dear.choice, dear.exact)
    safe = program.run(price=float("inf"))
    if safe is None or safe.error > error_budget * _ROUNDING:
        return None
    used = [set[int]() for _ in candidates]
    best, tried = safe, [dear, safe]
    for _ in range(12):
        price = (safe.seconds - dear.seconds) / (dear.error - safe.error)
        found = program.run(price=max(0.0, price), max_labels=COARSE)
        if found is None or found.seconds + price * found.error >= (dear.seconds + price * dear.error) * (1 - 1e-9):
            break
        tried.append(found)
        if found.error > error_budget * _ROUNDING:
            dear = found
        else:
            safe = found
            best = min(best, found, key=lambda run: run.seconds)
    for run in tried:
        for kind, option in zip(sequence, run.choice, strict=True):
            used[kind].add(option)
    for kind, options in enumerate(candidates):
        if len(options) <= FEW:
            used[kind] = set(range(len(options)))
    final = program.run(error_budget=error_budget, only=used)
    if final is not None and final.seconds <= best.seconds:
        exact = final.exact and all(len(u) == len(c) for u, c in zip(used, candidates, strict=True))
        return Allocation(final.choice, exact)
    return Allocation(best.choice, False)


_ROUNDING = 1 + 1e-9


class _Run(NamedTuple):
    choice: tuple[int, ...]
    seconds: float
    error: float
    exact: bool


class _Program:
    """The dynamic program; a state is (stored bytes, error, seconds), an array entry each."""

    def __init__(self, table: Sequence[_Columns], sequence: Sequence[int], budget: int) -> None:
        self.table, self.sequence, self.budget = table, sequence, budget
        self.ceilings = _ceilings(table, sequence, budget)

    def run(
        self,
        price: float = 0.0,
        error_budget: float | None = None,
        only: Sequence[set[int]] | None = None,
        max_labels: int = MAX_LABELS,
    ) -> _Run | None:
        """Minimise seconds + ``price`` * error (errors alone when infinite), or seconds within ``error_budget``."""
        stored, error, cost = np.zeros(1, np.int64), np.zeros(1), np.zeros(1)
        trail: list[tuple[np.ndarray, np.ndarray]] = []
        exact = True
        table = [
            (columns if only is None else columns.take(sorted(only[kind]))).priced(price, error_budget is not None)
            for kind, columns in enumerate(self.table)
        ]
        for kind, ceiling in zip(self.sequence, self.ceilings[1:], strict=True):
            columns = table[kind]
            # One row per candidate: states are sorted by bytes, so rows are too, which the sort below likes.
            next_stored = columns.stored[:, None] + stored
            fits = (columns.peak[:, None] + stored <= self.budget) & (next_stored <= ceiling)
            if error_budget is not None:
                fits &= columns.error[:, None] + error <= error_budget * _ROUNDING
            option, label = np.nonzero(fits)
            if not len(label):
                return None
            next_stored = next_stored[option, label]
            next_error = error[label] + columns.error[option]
            next_cost = cost[label] + columns.cost[option]
            if error_budget is None:
                keep, whole = _prune(next_stored, next_cost, max_labels)
            else:
                keep, whole = _prune_with_error(next_stored, next_error, next_cost, error_budget, max_labels)
            exact &= whole
            stored, error, cost = next_stored[keep], next_error[keep], next_cost[keep]
            trail.append((label[keep], columns.index[option[keep]]))
        best = int(np.lexsort((stored, cost))[0])
        choice: list[int] = []
        for label, option in reversed(trail):
            choice.append(int(option[best]))
            best = int(label[best])
        choice.reverse()
        picked = list(zip(self.sequence, choice, strict=True))
        return _Run(
            tuple(choice),
            float(sum(self.table[kind].seconds[option] for kind, option in picked)),
            float(sum(self.table[kind].error[option] for kind, option in picked)),
            exact,
        )


class _Columns:
    """Candidates of one type as arrays."""

    def __init__(self, options: Sequence[Candidate]) -> None:
        self.index = np.arange(len(options))
        self.stored = np.array([c.profile.stored_bytes for c in options], np.int64)
        self.peak = np.array([c.peak for c in options], np.int64)
        self.seconds = np.array([c.profile.added_seconds for c in options], np.float64)
        self.error = np.array([c.profile.error for c in options], np.float64)
        self.cost = self.seconds

    def priced(self, price: float, keep_errors: bool) -> _Columns:
        """Those worth having when an error costs ``price`` seconds (infinite: seconds count for nothing)."""
        part = self.take(range(len(self.index)))
        part.cost = part.error if price == float("inf") else part.seconds + price * part.error
        if keep_errors:
            return part
        order = np.lexsort((part.peak, part.stored, part.cost))
        part = part.take(order)
        worth = np.ones(len(order), bool)
        for i in range(1, len(order)):
            better = worth[:i] & (part.stored[:i] <= part.stored[i]) & (part.peak[:i] <= part.peak[i])
            worth[i] = not better.any()
        return part.take(np.nonzero(worth)[0])

    def take(self, which: Iterable[int]) -> _Columns:
        """These candidates only; ``index`` still numbers all."""
        part, rows = _Columns(()), np.fromiter(which, np.int64)
        for name, column in vars(self).items():
            setattr(part, name, column[rows])
        return part


def _ceilings(table: Sequence[_Columns], sequence: Sequence[int], budget: int) -> list[int]:
    """Per position, the most that may be stored before it so that the rest can still fit (errors aside)."""
    ceilings = [budget]
    for kind in reversed(sequence):
        columns = table[kind]
        ceilings.append(int(np.minimum(budget - columns.peak, ceilings[-1] - columns.stored).max()))
    return ceilings[::-1]


def _prune(stored: np.ndarray, cost: np.ndarray, max_labels: int) -> tuple[np.ndarray, bool]:
    """Indices of the states of which none stores less and costs less, thinned to ``max_labels``; whether none was
    thinned out."""
    order = np.argsort(stored, kind="stable")
    kept = order[_new_minimum(cost[order])]
    distinct = np.ones(len(kept), bool)
    distinct[:-1] = stored[kept[1:]] != stored[kept[:-1]]  # of equal ones the last is the cheapest
    kept = kept[distinct]
    if len(kept) <= max_labels:
        return kept, True
    return kept[_thin(stored[kept], max_labels)], False


def _prune_with_error(
    stored: np.ndarray, error: np.ndarray, cost: np.ndarray, error_budget: float, max_labels: int
) -> tuple[np.ndarray, bool]:
    """As :func:`_prune` for three criteria. Few states are compared exactly; of many, errors fall into levels, and
    within one level the smaller error protects no state."""
    order = np.lexsort((error, cost, stored))
    if len(order) <= max_labels:
        alive = np.ones(len(order), bool)
        e, c = error[order], cost[order]
        for i in range(len(order)):
            if alive[i]:  # later ones store no less
                alive[i + 1 :] &= (e[i + 1 :] < e[i]) | (c[i + 1 :] < c[i])
        return order[alive], True
    level = np.minimum((error * (ERROR_LEVELS / max(error_budget, 1e-300))).astype(np.int64), ERROR_LEVELS - 1)
    level[error == 0] = -1
    parts = []
    ranked = level[order]
    for this in range(-1, ERROR_LEVELS):
        up_to = order[ranked <= this]
        if len(up_to):
            kept = up_to[_new_minimum(cost[up_to]) & (level[up_to] == this)]
            if len(kept) > max_labels // 8:
                kept = kept[_thin(stored[kept], max_labels // 8)]
            parts.append(kept)
    kept = np.concatenate(parts)
    return kept[np.argsort(stored[kept], kind="stable")], False


def _new_minimum(values: np.ndarray) -> np.ndarray:
    """True where a value is below all values before it (by more than rounding)."""
    best = np.minimum.accumulate(values)
    first = np.ones(len(values), bool)
    first[1:] = values[1:] < best[:-1] * (1 - 1e-12)
    return first


def _thin(stored: np.ndarray, count: int) -> np.ndarray:
    """Positions of at most ``count`` states, the last (fastest) of each of as many equal stretches of bytes."""
    low, high = int(stored[0]), int(stored[-1])
    bucket = (stored - low) * (count - 1) // max(1, high - low)
    last = np.ones(len(stored), bool)
    last[:-1] = bucket[1:] != bucket[:-1]
    return np.nonzero(last)[0]
