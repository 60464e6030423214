"""Variants of one piece of work, interleaved in one process: A B C A B C ..., so that drift hits all of them alike.

A variant first proves itself (``prepare``: its result is right, its bytes are counted); only then is it timed. One that
raises is recorded with the reason, never dropped; one that is wrong (:class:`Incorrect`) gets no timing at all.
"""

from __future__ import annotations

import gc
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch

QUICK_REPEATS, FULL_REPEATS = 3, 20


class BadInput(ValueError):
    """The command line asks for something that there is not; the text says what there is."""


class Incorrect(Exception):
    """A correctness check failed: the timing would be of something else."""


class DoesNotFit(Exception):
    """The variant cannot do the work within the memory it is meant for."""


class Skip(Exception):
    """The variant cannot run on this machine; the text says what is missing."""


@dataclass(frozen=True)
class Options:
    """What the command line said.

    Args:
        device: "cpu" or "cuda". quick: small sizes and few repeats, to see that it works.
        repeats: timed rounds; None: 20 (quick: 3). size: a name of the benchmark's size table; None: its default.
        only: patterns of the names of variants to run; empty: all.
    """

    device: str = "cpu"
    quick: bool = False
    repeats: int | None = None
    size: str | None = None
    only: tuple[str, ...] = ()

    @property
    def rounds(self) -> int:
        """Timed repeats."""
        return self.repeats or (QUICK_REPEATS if self.quick else FULL_REPEATS)

    @property
    def warmup(self) -> int:
        """Rounds that are run and dropped."""
        return 1 if self.quick else 2

    def wants(self, name: str) -> bool:
        """Whether a variant of this name shall run."""
        return not self.only or any(fnmatchcase(name, pattern) for pattern in self.only)


@dataclass(frozen=True)
class Variant:
    """One way of doing the work.

    Args:
        name: short and stable: it is a key in ``results.csv``.
        step: what is timed.
        prepare: run once before: checks the result and returns metrics (a ``peak_bytes`` among them fills that column).
        around: made and entered anew for each call, outside the timing (switches the variant on and off).
        inner: how often ``step`` is called within one timed repeat (for work of microseconds); times are per call.
    """

    name: str
    step: Callable[[], Any]
    prepare: Callable[[], Mapping[str, Any]] = dict
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    inner: int = 1


@dataclass
class Result:
    """What came of a variant.

    Args:
        name: of the variant. status: "ok", or "incorrect: ...", "does not fit: ...", "skipped: ...", "failed: ...".
        seconds: one per repeat, in order, so that two variants of one run can be paired; empty unless ok.
        metrics: plain values.
    """

    name: str
    status: str = "ok"
    seconds: list[float] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether it has timings."""
        return self.status == "ok" and bool(self.seconds)

    @property
    def p50(self) -> float:
        """Median seconds."""
        return quantile(self.seconds, 0.5)


@dataclass(frozen=True)
class Goal:
    """A line of the report: what was aimed at, and whether it was met (None: cannot be told here)."""

    text: str
    met: bool | None


@dataclass
class Report:
    """One case of one benchmark.

    Args:
        benchmark: its name in the registry. case: model and sizes, in one line.
        results: one per variant. baselines: names of those to which all others are compared.
        columns: metrics that a table shows, in order. goals: what was aimed at. notes: what a reader must know.
    """

    benchmark: str
    case: str
    results: list[Result]
    baselines: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    goals: list[Goal] = field(default_factory=list)
    notes: tuple[str, ...] = ()

    def get(self, name: str) -> Result | None:
        """The result of a variant, if it was run."""
        return next((result for result in self.results if result.name == name), None)

    def ratios(self, result: Result) -> dict[str, float]:
        """Baseline -> how many times as long ``result`` took (median of paired repeats)."""
        found = {}
        for name in self.baselines:
            baseline = self.get(name)
            if baseline is not None and baseline.ok and result.ok:
                found[name] = paired_ratio(result.seconds, baseline.seconds)
        return found


# -- statistics ------------------------------------------------------------------------------------------------------
def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile, linear between order statistics."""
    if not values:
        raise ValueError("no values")
    ranked = sorted(values)
    position = q * (len(ranked) - 1)
    low = int(position)
    high = min(low + 1, len(ranked) - 1)
    return ranked[low] + (ranked[high] - ranked[low]) * (position - low)


def paired_ratio(seconds: Sequence[float], baseline: Sequence[float]) -> float:
    """Median over repeats of the ratio within one round: what slowed the whole round down cancels."""
    return quantile([a / b for a, b in zip(seconds, baseline, strict=True)], 0.5)


# -- running ---------------------------------------------------------------------------------------------------------
def measure(variants: Iterable[Variant], options: Options, say: Callable[[str], None] | None = None) -> list[Result]:
    """Prepare every variant, then time those that passed, interleaved.

    Args:
        variants: made lazily if it is a generator: the next one is asked for when the one before is prepared.
        options: how often, where, which.
        say: told of progress; stderr by default.
    """
    say = say or (lambda line: print(line, file=sys.stderr, flush=True))
    results: list[Result] = []
    running: list[tuple[Variant, Result]] = []
    for variant in variants:
        if not options.wants(variant.name):
            continue
        result = Result(variant.name)
        results.append(result)
        start = time.perf_counter()
        try:
            result.metrics.update(variant.prepare())
            running.append((variant, result))
        except Exception as error:
            result.status = _status(error)
        if result.status != "ok":  # out here, where the error no longer holds what was alive when it was raised
            _recover(options.device)
        say(f"  {variant.name}: {result.status}, prepared in {time.perf_counter() - start:.1f} s")
    gc.collect()
    gc.freeze()
    try:
        for number in range(-options.warmup, options.rounds):
            start = time.perf_counter()
            for variant, result in list(running):
                try:
                    seconds = _time(variant, options.device)
                    if number >= 0:
                        result.seconds.append(seconds)
                except Exception as error:
                    result.status, result.seconds = _status(error), []
                if result.status != "ok":
                    running.remove((variant, result))
                    _recover(options.device)
                    say(f"  {variant.name}: {result.status}")
            kind = "warm-up" if number < 0 else f"round {number + 1}/{options.rounds}"
            say(f"  {kind}: {time.perf_counter() - start:.1f} s")
    finally:
        gc.unfreeze()
    return results


def _time(variant: Variant, device: str) -> float:
    with variant.around():
        synchronize(device)
        start = time.perf_counter()
        for _ in range(variant.inner):
            variant.step()
        synchronize(device)
        return (time.perf_counter() - start) / variant.inner


def _status(error: Exception) -> str:
    kinds = {Incorrect: "incorrect", DoesNotFit: "does not fit", Skip: "skipped"}
    kind = next((text for cls, text in kinds.items() if isinstance(error, cls)), None)
    if kind is None and isinstance(error, torch.OutOfMemoryError):
        kind = "does not fit"
    text = " ".join(str(error).split()) or type(error).__name__
    if kind is None:
        warnings.warn(f"{type(error).__name__}: {text}", stacklevel=2)
        kind, text = "failed", f"{type(error).__name__}: {text}"
    return f"{kind}: {text[:300]}"


def _recover(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def synchronize(device: str) -> None:
    """Wait until the device has done all that it was told to."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
