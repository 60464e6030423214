"""Interleaving, statistics, and what becomes of variants that fail."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from benchmarks.harness import (
    DoesNotFit,
    Incorrect,
    Options,
    Report,
    Result,
    Skip,
    Variant,
    measure,
    paired_ratio,
    quantile,
)

QUIET = Options(quick=True, repeats=3)


def silent(line: str) -> None:
    pass


@pytest.mark.parametrize(
    ("values", "q", "expected"),
    [([3.0], 0.2, 3.0), ([4, 1, 3, 2], 0.5, 2.5), ([5, 1, 2, 4, 3], 0.2, 1.8), ([5, 1, 2, 4, 3], 0.8, 4.2)],
)
def test_quantile(values: list[float], q: float, expected: float) -> None:
    assert quantile(values, q) == pytest.approx(expected)
    with pytest.raises(ValueError, match="no values"):
        quantile([], q)


def test_ratio_is_paired() -> None:
    # The whole machine is ten times slower in the second round; the ratio of medians would be wrong.
    assert paired_ratio([2.0, 20.0, 2.0], [1.0, 10.0, 1.0]) == 2.0
    assert paired_ratio([2.0, 20.0], [1.0, 10.0]) == 2.0
    with pytest.raises(ValueError):
        paired_ratio([1.0], [1.0, 2.0])


def test_variants_are_interleaved_and_warm_up_is_dropped() -> None:
    calls: list[str] = []
    variants = [Variant(name, lambda name=name: calls.append(name)) for name in "ABC"]
    results = measure(variants, QUIET, silent)
    assert "".join(calls) == "ABC" * (QUIET.warmup + QUIET.rounds)
    assert [len(r.seconds) for r in results] == [3, 3, 3]
    assert all(r.ok for r in results)


def test_around_is_entered_for_each_call_and_not_timed() -> None:
    events: list[str] = []

    @contextmanager
    def around() -> Iterator[None]:
        events.append("in")
        yield
        events.append("out")

    variant = Variant("A", lambda: events.append("step"), around=around, inner=2)
    measure([variant], Options(quick=True, repeats=1), silent)
    assert events == ["in", "step", "step", "out"] * 2


def raises(error: Exception) -> dict[str, object]:
    raise error


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (Incorrect("off by\n one"), "incorrect: off by one"),
        (DoesNotFit("too big"), "does not fit: too big"),
        (Skip("no compiler"), "skipped: no compiler"),
    ],
)
def test_what_fails_is_recorded_and_never_timed(error: Exception, status: str) -> None:
    timed: list[str] = []
    bad = Variant("bad", lambda: timed.append("bad"), lambda: raises(error))
    results = measure([bad, Variant("good", lambda: None)], QUIET, silent)
    assert [(r.name, r.status) for r in results] == [("bad", status), ("good", "ok")]
    assert not timed
    assert not results[0].seconds
    assert not results[0].ok


def test_an_unknown_error_is_a_failure_with_its_name() -> None:
    with pytest.warns(UserWarning, match="KeyError"):
        results = measure([Variant("bad", lambda: None, lambda: raises(KeyError("x")))], QUIET, silent)
    assert results[0].status == "failed: KeyError: 'x'"


def test_failing_mid_way_drops_the_timings_but_not_the_row() -> None:
    left = [1, 2, 3]
    variant = Variant("A", lambda: left.pop() or raises(DoesNotFit("memory is gone")))
    # One warm-up and two timed repeats pass, then pop() raises.
    with pytest.warns(UserWarning, match="IndexError"):
        results = measure([variant, Variant("B", lambda: None)], QUIET, silent)
    assert results[0].status.startswith("failed: IndexError")
    assert not results[0].seconds
    assert len(results[1].seconds) == 3


def test_only_and_repeats() -> None:
    options = Options(only=("plain", "adacc-*"), repeats=7)
    assert [options.wants(n) for n in ("plain", "full", "adacc-0.5")] == [True, False, True]
    assert (options.rounds, Options().rounds, Options(quick=True).rounds) == (7, 20, 3)


def test_report_compares_with_those_baselines_that_ran() -> None:
    plain, slow = Result("plain", seconds=[1.0, 2.0]), Result("slow", seconds=[3.0, 6.0])
    lost = Result("lost", status="failed: x")
    report = Report("b", "case", [plain, slow, lost], ("plain", "lost", "absent"))
    assert report.ratios(slow) == {"plain": 3.0}
    assert report.ratios(lost) == {}
    assert report.get("absent") is None
