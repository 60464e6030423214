"""Request traces: files, and what is drawn from a seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ygglight.engines.harli.trace import Trace, TracedRequest, bursts, heavy_tailed, load_step, phases, poisson


def arrivals(trace: Trace) -> np.ndarray:
    return np.array([request.arrival for request in trace.requests])


def variation(trace: Trace) -> float:
    """Standard deviation over mean of the times between arrivals."""
    between = np.diff(arrivals(trace))
    return float(between.std() / between.mean())


def test_a_file_is_read_sorted_and_written_back(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(
        '{"arrival": 2, "prompt_tokens": 30, "max_tokens": 5, "model": "adapter"}\n\n'
        '{"arrival": 0.5, "prompt": "Once upon", "max_tokens": 9}\n'
    )
    trace = Trace.load(path)
    assert trace.requests == (
        TracedRequest(0.5, 9, prompt="Once upon"),
        TracedRequest(2, 5, prompt_tokens=30, model="adapter"),
    )
    assert trace.seconds == 2
    trace.save(tmp_path / "again.jsonl")
    assert Trace.load(tmp_path / "again.jsonl") == trace
    drawn = poisson(5, 4, [3, 8], 6, seed=1)
    drawn.save(path)
    assert Trace.load(path).requests == drawn.requests


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"arrival": -1, "prompt": "a", "max_tokens": 1}, "arrival"),
        ({"arrival": "soon", "prompt": "a", "max_tokens": 1}, "arrival"),
        ({"arrival": 0, "prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"arrival": 0, "prompt": "a", "max_tokens": True}, "max_tokens"),
        ({"arrival": 0, "prompt": "a", "prompt_tokens": 3, "max_tokens": 1}, "either prompt"),
        ({"arrival": 0, "max_tokens": 1}, "either prompt"),
        ({"arrival": 0, "prompt": "", "max_tokens": 1}, "prompt"),
        ({"arrival": 0, "prompt_tokens": 2.5, "max_tokens": 1}, "prompt_tokens"),
        ({"arrival": 0, "prompt": "a", "max_tokens": 1, "model": "gpt"}, "base or adapter"),
        ({"arrival": 0, "prompt": "a", "max_tokens": 1, "lenght": 3}, "lenght: no such field"),
        ({"prompt": "a"}, "arrival and max_tokens is missing"),
        ([1], "not an object"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, row: Any, why: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"arrival": 0, "prompt": "a", "max_tokens": 1}\n' + json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=f"line 2: .*{why}"):
        Trace.load(path)


def test_a_file_that_is_missing_empty_or_no_json(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    with pytest.raises(ValueError, match="cannot be read"):
        Trace.load(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="no request"):
        Trace.load(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="line 1"):
        Trace.load(path)


def test_poisson_arrivals_have_their_rate_and_know_nothing_of_each_other() -> None:
    trace = poisson(50, 100, 7, 9, model="adapter")
    # 5000 expected; the standard deviation is 71, so five of them are a bound that no seed is likely to break.
    assert abs(len(trace.requests) - 5000) < 355
    assert abs(variation(trace) - 1) < 0.1
    assert (np.diff(arrivals(trace)) >= 0).all() and trace.seconds == 100
    assert {(row.prompt_tokens, row.max_tokens, row.model) for row in trace.requests} == {(7, 9, "adapter")}


def test_a_seed_makes_the_same_trace_and_another_seed_another() -> None:
    for draw in (poisson, bursts):
        assert draw(5, 20, [1, 2, 3], [4, 5], seed=3) == draw(5, 20, [1, 2, 3], [4, 5], seed=3)
        assert draw(5, 20, [1, 2, 3], [4, 5], seed=3) != draw(5, 20, [1, 2, 3], [4, 5], seed=4)
    assert heavy_tailed(100, 1.0, 4000, seed=1) == heavy_tailed(100, 1.0, 4000, seed=1)


def test_lengths_are_drawn_from_those_given() -> None:
    trace = poisson(50, 20, [3, 30, 300], (1, 2))
    assert {row.prompt_tokens for row in trace.requests} == {3, 30, 300}
    assert {row.max_tokens for row in trace.requests} == {1, 2}
    with pytest.raises(ValueError, match="no lengths"):
        poisson(50, 20, [], 1)


def test_a_load_step_is_quiet_before_and_after() -> None:
    trace = load_step(peak=20, before=5, during=10, after=30, prompt_tokens=1, max_tokens=1)
    times = arrivals(trace)
    assert times.min() >= 5 and times.max() <= 15
    assert 100 < len(times) < 300
    assert trace.seconds == 45, "the quiet after the step is part of the trace"


def test_the_rate_changes_from_part_to_part() -> None:
    times = arrivals(phases([(10, 10), (10, 100)], 1, 1))
    assert (times < 10).sum() < 200 < 800 < (times >= 10).sum()


def test_bursts_cluster_and_have_their_rate() -> None:
    calm, bursty = bursts(20, 500, 1, 1, variation=1.0), bursts(20, 500, 1, 1, variation=3.0)
    assert abs(variation(calm) - 1) < 0.1
    assert abs(variation(bursty) - 3) < 0.4
    for trace in (calm, bursty):
        assert abs(len(trace.requests) / 500 - 20) < 3
        assert arrivals(trace).max() < 500 == trace.seconds


def test_heavy_tailed_lengths_have_their_median_and_end() -> None:
    lengths = np.array(heavy_tailed(100, 1.0, 2000, count=5000))
    assert 90 < np.median(lengths) < 110
    assert lengths.max() == 2000 and lengths.min() >= 1 and lengths.mean() > 120
    assert set(heavy_tailed(100, 0.0, 2000)) == {100}


def test_what_cannot_be_drawn() -> None:
    with pytest.raises(ValueError, match="negative"):
        phases([(1, -1)], 1, 1)
    with pytest.raises(ValueError, match="no request"):
        phases([(10, 0)], 1, 1)
    for arguments in ({"rate": 0}, {"seconds": 0}, {"variation": 0}):
        with pytest.raises(ValueError, match="above 0"):
            bursts(**({"rate": 1, "seconds": 5, "variation": 2} | arguments), prompt_tokens=1, max_tokens=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_tokens"):
        poisson(50, 20, 1, 0)
