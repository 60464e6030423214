"""What a run says about itself."""

from __future__ import annotations

import json
from typing import Any

from ygglight.engines.moe_speq.config import STAGING
from ygglight.engines.moe_speq.report import KEPT, Report

from .conftest import tiny_moe, tokens
from .speculation import CopyDraft, method, plain


def run(**options: Any) -> Report:
    model = tiny_moe("olmoe")
    made = method(model, 3, CopyDraft(model, 0.1), **options)
    for seed in (3, 4):
        plain(model, tokens(9, seed=seed), 16, custom_generate=made)
    made.release()
    return made.report


def test_the_counts_of_a_run_agree() -> None:
    report = run()
    assert report.tokens == 32 and report.generations == 2
    assert report.tokens == report.generations + report.cycles + report.accepted, "the target's own token a cycle"
    assert sum(report.drafting.values()) == report.cycles == sum(n for _, n in report.choices)
    assert sum(k * n for k, n in report.drafting.items()) == report.drafted
    experts = report.experts
    assert experts["hits"] + experts["late"] + experts["misses"] == experts["requests"] > 0
    slab = report.memory["staging"] // STAGING
    assert all(moved % slab == 0 for moved in report.moved.values()) and report.moved["demand"] > 0
    assert report.moved["prefetch"] == experts["prefetched"] * slab
    assert report.memory["slots"] == 3 * 2 * slab and report.memory["draft"] == CopyDraft.nbytes
    assert report.bandwidth and all(s >= 0 for s in report.seconds.values()) and report.seconds["draft"] > 0


def test_reports_add_up() -> None:
    one, other, total = run(k=2), run(k=1), Report()
    total.add(one)
    total.add(other)
    for name in ("tokens", "cycles", "drafted", "accepted", "generations"):
        assert getattr(total, name) == getattr(one, name) + getattr(other, name)
    assert total.moved == one.moved + other.moved and total.experts["requests"] == 0 + sum(
        r.experts["requests"] for r in (one, other)
    )
    assert total.memory == other.memory
    json.dumps(total.to_dict())


def test_the_table_says_what_matters() -> None:
    report = run()
    report.notes.append("look out")
    report.fallbacks["a streamer"] += 2
    rows = dict(report.rows())
    assert rows["prompts"] == "2 (+ 2 by transformers' own loop)"
    assert rows["experts asked for"].startswith(f"{report.experts['requests']}: hits ")
    assert "demand" in rows["bytes moved"] and "a new token" in rows["bytes moved"]
    assert "draft 64.0 KiB" in rows["memory"] and rows["note"] == "look out" and rows["fallback"] == "a streamer: 2"
    assert len(report.table().splitlines()) == len(report.rows())


def test_an_empty_report_has_a_table() -> None:
    rows = dict(Report().rows())
    assert rows["new tokens"] == "0" and "time" not in rows and "bytes moved" not in rows
    assert Report().median_error is None and Report().bytes_per_token == 0.0


def test_lists_do_not_grow_for_ever() -> None:
    report = Report()
    for cycle in range(3 * KEPT):
        report.chose(cycle % 2)
        report.add(Report(errors=[0.5]))
    assert len(report.choices) == KEPT == len(report.errors) and report.median_error == 0.5
    report.chose(1, 5)
    assert report.choices[-1] == (1, 6)
