"""What a run says about itself: counts that add up, and a table that can be read."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch

from ygglight.engines.yggdrasil.config import PLANS, StagePlan
from ygglight.engines.yggdrasil.generate import TreeGenerate
from ygglight.engines.yggdrasil.plans import ROUNDS, TURN, PlanTrial
from ygglight.engines.yggdrasil.report import Report

from .conftest import plain, prompts

pytestmark = pytest.mark.usefixtures("own_cache")


def made(factor: int = 1) -> Report:
    report = Report(
        tokens=101 * factor, iterations=40 * factor, drafted=36 * factor, accepted=60 * factor, verified=300 * factor,
        reads=50 * factor, generations=factor,
    )  # fmt: skip
    report.seconds.update(prefill=0.5 * factor, draft=1.0 * factor, verify=2.5 * factor, host=0.5 * factor)
    report.shapes.update({(2, 4): 30 * factor, (1, 3): 6 * factor})
    return report


def text_of(report: Report) -> dict[str, str]:
    return dict(report.rows())


# -- adding ----------------------------------------------------------------------------------------------------------
def test_reports_add_up() -> None:
    total, other = made(1), made(2)
    total.fallbacks.update({"a streamer": 1})
    other.fallbacks.update({"a streamer": 2, "num_beams=2": 1})
    total.notes, other.notes = ["one"], ["two", "one"]
    before = other.to_dict()
    total.add(other)
    expected = made(3).to_dict() | {
        "fallbacks": {"a streamer": 3, "num_beams=2": 1}, "notes": ["one", "two"],
    }  # fmt: skip
    assert total.to_dict() == expected
    total.add(Report())
    assert total.to_dict() == expected
    total.shapes[9, 9] += 1
    total.seconds["host"] += 1
    assert other.to_dict() == before, "the parts are left alone"


def test_tokens_a_step_leave_out_what_the_prompt_gave() -> None:
    """The first token of a text comes out of the prompt's own pass."""
    assert made().tokens_per_step == pytest.approx((101 - 1) / 40)
    both = made(1)
    both.add(made(2))
    assert both.tokens_per_step == pytest.approx((303 - 3) / 120)
    assert Report(tokens=3, generations=3).tokens_per_step == 0


def test_primitives_only() -> None:
    assert json.loads(json.dumps(made().to_dict())) == made().to_dict()
    assert made().to_dict()["shapes"] == {"2x4": 30, "1x3": 6}


# -- the table -------------------------------------------------------------------------------------------------------
def test_the_table_says_how_fast_and_why() -> None:
    rows = text_of(made())
    assert rows["new tokens"] == "101 (25.2 a second, prompts apart)"  # 101 tokens in 1 + 2.5 + 0.5 s
    assert rows["accepted a step"].startswith("2.50 tokens") and "40 steps" in rows["accepted a step"]
    assert rows["time"] == "draft 25%, verify 62%, host 12% of 4.0 s; prompts 0.5 s"
    assert rows["trees, width x depth"] == "2x4 (30), 1x3 (6), none (4)"
    table = made().table()
    assert all(name in table and text in table for name, text in rows.items())
    assert len({re.match(r"  .{22}", line).end() for line in table.splitlines()}) == 1  # type: ignore[union-attr]


def shares(report: Report) -> dict[str, int]:
    return {name: int(share) for name, share in re.findall(r"(\w+) (\d+)%", text_of(report)["time"])}


@pytest.mark.parametrize("seconds", [(1.0, 1.0, 2.0), (0.0, 3.0, 1.0), (0.123, 4.56, 0.7), (1e-3, 1e-3, 1e-3)])
def test_shares_are_of_the_whole(seconds: tuple[float, float, float]) -> None:
    report = made()
    report.seconds = dict(zip(("draft", "verify", "host"), seconds, strict=True)) | {"prefill": 99.0}
    found = shares(report)
    assert set(found) == {"draft", "verify", "host"}
    assert abs(sum(found.values()) - 100) <= 1  # each is rounded by itself
    for name, share in found.items():
        assert abs(share - 100 * report.seconds[name] / sum(seconds)) <= 0.5


def test_fallbacks_and_notes_have_lines_of_their_own() -> None:
    report = made()
    report.fallbacks.update({"a streamer": 2})
    report.notes.append("look out")
    lines = report.table().splitlines()
    assert any("a streamer: 2" in line for line in lines) and any("look out" in line for line in lines)
    assert text_of(report)["prompts"] == "1 (+ 2 by transformers' own loop)"


def test_an_empty_report_has_a_table() -> None:
    rows = text_of(Report())
    assert rows["new tokens"] == "0" and "time" not in rows and rows["trees, width x depth"] == "none"


# -- a run -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("draft", "static"), [("noisy", False), ("noisy", True), ("lookup", False), ("lookup", True), ("wrong", False)]
)
def test_the_counts_of_a_run_agree(target: Any, drafts: dict[str, Any], draft: str, static: bool) -> None:
    method = TreeGenerate(drafts[draft], tree={"width": 2, "depth": 3})
    method.engine(target).static = static
    seen: list[Any] = []
    method.watch = seen.append
    new = 0
    for ids in prompts(2):
        new += plain(target, ids, 14, custom_generate=method).shape[1] - ids.shape[1]
    report = method.report
    assert (report.tokens, report.generations, report.iterations) == (new, 2, len(seen)) and new == 28
    assert report.drafted == sum(i.shape is not None for i in seen) == sum(report.shapes.values())
    assert report.accepted == sum(len(i.verdict.path) - 1 for i in seen)
    assert report.verified == sum(len(i.tree.tokens) for i in seen)
    assert report.tokens == report.generations + report.iterations + report.accepted, "a bonus token a step"
    assert all(seconds >= 0 for seconds in report.seconds.values())
    assert report.seconds["verify"] > 0 and report.seconds["prefill"] > 0
    assert abs(sum(shares(report).values()) - 100) <= 1


# -- the trial of stage plans ----------------------------------------------------------------------------------------
def test_a_fixed_plan_and_a_cpu_need_no_trial() -> None:
    fixed = StagePlan(tail=True, prune="fixed")
    assert PlanTrial(fixed, torch.device("cuda"), of_model=True).next() == fixed
    assert PlanTrial(None, torch.device("cpu"), of_model=True).next() == StagePlan()
    assert PlanTrial(None, torch.device("cuda"), of_model=False).next() == StagePlan()


@pytest.mark.parametrize("best", PLANS, ids=str)
def test_the_fastest_plan_is_frozen(best: StagePlan, monkeypatch: pytest.MonkeyPatch) -> None:
    """By seconds a token, whatever the first turn of each took: graphs are recorded then."""
    now = [0.0]
    monkeypatch.setattr(PlanTrial, "_now", lambda self: now[0])
    trial = PlanTrial(None, torch.device("cuda"), of_model=True)
    given: dict[StagePlan, int] = dict.fromkeys(PLANS, 0)
    while trial.frozen is None:
        plan = trial.next()
        given[plan] += 1
        first = given[plan] <= TURN
        # The best takes longer a step than the rest, and gives more tokens; and it is the slowest to start.
        now[0] += (9.0 if first else 1.5) if plan == best else 1.0
        trial.done(3 if plan == best else 1)
        assert sum(given.values()) <= len(PLANS) * TURN * (ROUNDS + 1)
    assert set(given.values()) == {TURN * (ROUNDS + 1)}, "every plan got as many turns"
    assert trial.frozen == best == trial.next()
    assert trial.seconds_per_token[best] == pytest.approx(0.5)
