"""The bank of slack: what it allows keeps the mean and the gap of every request, and not a moment more."""

from __future__ import annotations

import random

import pytest

from ygglight.engines.harli.slack import Slack


def test_what_came_early_is_in_the_bank() -> None:
    slack = Slack(0.1, 10.0, margin=0.0)
    slack.token("a", 0.0)
    assert slack.allowance(0.0) == pytest.approx(0.1)
    assert slack.allowance(0.03) == pytest.approx(0.07)
    for k in range(1, 5):
        slack.token("a", 0.02 * k)
    assert slack.allowance(0.08) == pytest.approx(0.1 * 5 - 0.08)


def test_the_longest_gap_caps_the_bank() -> None:
    slack = Slack(0.1, 0.25, margin=0.0)
    for k in range(20):
        slack.token("a", 0.01 * k)
    assert slack.allowance(0.19) == pytest.approx(0.25)
    assert slack.allowance(0.24) == pytest.approx(0.20)


def test_the_poorest_request_decides() -> None:
    slack = Slack(0.1, 1.0, margin=0.0)
    slack.token("rich", 0.0)
    for k in range(1, 10):
        slack.token("rich", 0.01 * k)
    slack.token("poor", 0.09)
    assert slack.allowance(0.09) == pytest.approx(0.1)
    slack.finish("poor")
    assert slack.allowance(0.09) == pytest.approx(0.91)
    slack.finish("never admitted")
    assert len(slack) == 1


def test_a_request_that_is_late_allows_nothing() -> None:
    slack = Slack(0.1, 1.0)
    slack.token("a", 0.0)
    assert slack.allowance(0.5) < 0


def test_while_nobody_runs_the_longest_gap_is_allowed() -> None:
    assert Slack(0.1, 0.4, margin=0.0).allowance(123.0) == pytest.approx(0.4)


@pytest.mark.parametrize(("target", "gap"), [(0.05, 0.2), (0.02, 0.02), (0.1, 5.0)])
def test_whoever_spends_no_more_keeps_both_targets(target: float, gap: float) -> None:
    """Random steps within the allowance, requests that come and go: mean and gap hold at every token of each."""
    rng = random.Random(0)
    slack, now, times, used = Slack(target, gap), 0.0, {}, []
    for number in range(3000):
        if number % 7 == 0:
            times[number] = []
        allowed = slack.allowance(now)
        assert allowed > 0
        now += allowed * rng.choice([0.1, 0.5, 1.0])
        for request, tokens in list(times.items()):
            slack.token(request, now)
            tokens.append(now)
            if len(tokens) > 1:
                assert (tokens[-1] - tokens[0]) / (len(tokens) - 1) <= target
                assert tokens[-1] - tokens[-2] <= gap
                used.append(tokens[-1] - tokens[-2])
            if rng.random() < 0.1:
                slack.finish(request)
                del times[request]
    if gap > 2 * target:
        assert max(used) > 1.5 * target  # the bank was used


def test_margin_is_held_back() -> None:
    full, held = Slack(0.1, 1.0, margin=0.0), Slack(0.1, 1.0, margin=0.2)
    for slack in (full, held):
        slack.token("a", 0.0)
    assert held.allowance(0.0) == pytest.approx(0.8 * full.allowance(0.0))


@pytest.mark.parametrize(
    ("arguments", "what"), [((0.0, 1.0), "target"), ((0.2, 0.1), "gap"), ((0.1, 0.2, 1.0), "margin")]
)
def test_targets_that_cannot_be(arguments: tuple[float, ...], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        Slack(*arguments)
