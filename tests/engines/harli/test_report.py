"""The books of a run."""

from __future__ import annotations

import math
from typing import Any

import pytest

from ygglight.engines.harli.report import KEPT, Outcome, Report, Sample


def outcome(**changes: Any) -> Outcome:
    fields: dict[str, Any] = {
        "model": "base", "reason": "length", "tokens": 10, "ttft": 0.1, "tpot": 0.01, "gap": 0.02, "ended": 1.0
    }  # fmt: skip
    return Outcome(**fields | changes)


def sample(**changes: Any) -> Sample:
    fields: dict[str, Any] = {
        "time": 1.0, "seconds": 0.01, "kind": "decode", "batch": 2, "reason": "why", "concurrent": False,
        "kv": 3, "leased": 4, "free": 5,
    }  # fmt: skip
    return Sample(**fields | changes)


@pytest.mark.parametrize(
    ("changes", "attains"),
    [
        ({}, True),
        ({"tpot": 0.02, "gap": 0.05}, True),
        ({"tpot": 0.021}, False),
        ({"gap": 0.051}, False),
        ({"tpot": None, "gap": None, "tokens": 1}, True),
        ({"reason": "error"}, False),
        ({"reason": "error", "tpot": None, "gap": None}, False),
    ],
)
def test_a_request_attains_by_its_mean_and_its_longest_gap(changes: dict[str, Any], attains: bool) -> None:
    assert outcome(**changes).attains(0.02, 0.05) is attains


def test_requests_that_were_given_up_count_in_no_share() -> None:
    report = Report(tpot_slo=0.02, max_gap=0.05)
    assert report.attainment is None and report.tpot(0.5) is None and report.longest_gap is None
    for changes in ({}, {"tpot": 0.03, "gap": 0.04}, {"reason": "cancelled", "tpot": 9.0, "gap": 9.0}, {"tpot": None}):
        report.finished(outcome(**changes))
    assert report.requests == 3 and report.attainment == pytest.approx(2 / 3)
    assert report.output_tokens == 40, "what a client did not wait for was work all the same"
    assert report.longest_gap == 0.04 and report.tpot(1.0) == 0.03 and report.tpot(0.5) == pytest.approx(0.02)
    assert report.ttft(0.5) == 0.1


def test_finetune_tokens_a_second_are_over_the_run() -> None:
    report = Report()
    report.trained(100, 2.0)
    report.trained(50, 3.0)
    assert report.finetune_tokens_per_second is None
    report.started, report.ended = 1.0, 4.0
    assert report.finetune_tokens_per_second == 50.0 and report.micro_batches == 2


def test_the_oldest_are_dropped_and_counts_go_on() -> None:
    report = Report(tpot_slo=1.0, max_gap=1.0)
    for _ in range(KEPT + 5):
        report.finished(outcome())
        report.sample(sample())
    assert len(report.outcomes) == len(report.samples) == KEPT
    assert report.requests == report.attained == KEPT + 5 == report.reasons["why"]


def test_peaks_and_reasons_of_steps() -> None:
    report = Report()
    report.sample(sample(kv=7, leased=1))
    report.sample(sample(kv=2, leased=9))
    report.sample(sample(kind="idle", reason="nobody asks"))
    assert (report.peak_kv, report.peak_leased) == (7, 9) and dict(report.reasons) == {"why": 2}


def test_the_table_says_what_there_is_and_none_of_what_there_is_not() -> None:
    empty = Report().table()
    assert "none of them" in empty and "no rate" in empty and "not run" in empty
    report = Report(tpot_slo=0.02, max_gap=0.05, chunk_bytes=1024, executor="time_slices", started=0.0, ended=2.0)
    report.finished(outcome())
    report.trained(64, 1.0)
    report.sample(sample())
    report.rejected, report.seconds["decode"], report.seconds["idle"] = 3, 3.0, 1.0
    table = report.table()
    told = [
        "1 answered, 3 refused", "100.0%", "20 ms a token", "p50 10 ms", "64 loss tokens in 1 micro-batches",
        "32 a second", "time_slices; decode thread: decode 75%, idle 25%", "3.0 KiB", "1 steps: why",
    ]  # fmt: skip
    assert [text for text in told if text not in table] == []
    assert math.isinf(Report().tpot_slo)
