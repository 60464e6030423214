"""Objective, acceptance and calibration: check A13 of the brief, by exhaustion, and limits known beforehand."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

from ygglight.engines.yggdrasil.acceptance import RankAcceptance, expected_tree
from ygglight.engines.yggdrasil.calibration import Calibration, isotonic
from ygglight.engines.yggdrasil.config import Config
from ygglight.engines.yggdrasil.objective import (
    FREE,
    Costs,
    Latency,
    Shape,
    choose_depth,
    choose_shape,
    choose_verify,
    iteration_seconds,
    speedup,
)
from ygglight.engines.yggdrasil.selector import PROBE, Selector

WIDTHS, DEPTHS, BUCKETS = (1, 2, 4, 8), (1, 2, 3, 4, 5, 6), (2, 4, 8, 16, 32, 64)
GOOD = (0.7, 0.1, 0.05, 0.02, 0.01, 0.01, 0.01, 0.01)
FLAT = Latency((1, 64), (1.0, 1.0))
LINEAR = Latency((1, 64), (1.0, 64.0))
GPU = Latency((1, 8, 16, 64), (1.0, 1.02, 1.05, 1.4))
SMALL = Latency((1, 8), (0.05, 0.06))


def test_latency_interpolates_and_goes_on() -> None:
    latency = Latency((2, 4, 8), (1.0, 2.0, 6.0))
    assert [latency(w) for w in (1, 2, 3, 4, 6, 8, 10)] == [1.0, 1.0, 1.5, 2.0, 4.0, 6.0, 8.0]
    assert Latency.from_dict(latency.to_dict()) == latency
    with pytest.raises(ValueError, match="ascend"):
        Latency((4, 2), (1.0, 2.0))


def test_the_formula_term_by_term() -> None:
    costs = Costs(Latency((1, 8), (2.0, 3.0)), Latency((1, 2, 4), (0.1, 0.2, 0.4)), fixed=0.05)
    shape = Shape(width=4, depth=3, verify=8)
    assert iteration_seconds(shape, costs) == pytest.approx(0.2 + 2 * 0.4 + 3.0 + 0.05)
    assert iteration_seconds(shape, costs, tail=True) == pytest.approx(0.2 + 3 * 0.4 + 3.0 + 0.05)
    assert speedup(2.5, shape, costs) == pytest.approx(2.5 * 2.05 / 4.05)


@pytest.mark.parametrize("target", [FLAT, LINEAR, GPU])
def test_the_choice_is_the_best_of_all(target: Latency) -> None:
    costs = Costs(target, SMALL, 0.01)
    choice = choose_shape(GOOD, costs, WIDTHS, DEPTHS, BUCKETS)
    best = 0.0
    for width, depth, size in itertools.product(WIDTHS, DEPTHS, BUCKETS):
        values = expected_tree(GOOD, width, depth)
        size = min(size, len(values))
        best = max(best, speedup(sum(values[:size]), Shape(width, depth, size), costs))
    assert choice.speedup == pytest.approx(best)
    assert (choice.shape is None) == (best < 1.02)


def test_flat_costs_verify_everything_and_linear_costs_little() -> None:
    wide = choose_shape(GOOD, Costs(FLAT, FREE), WIDTHS, DEPTHS, BUCKETS).shape
    assert wide is not None and wide.verify == min(64, 1 + wide.width * wide.depth) and wide.verify > 32
    assert choose_shape(GOOD, Costs(LINEAR, FREE), WIDTHS, DEPTHS, BUCKETS).shape is None
    narrow = choose_shape((0.95, 0.01), Costs(Latency((1, 64), (1.0, 20.0)), FREE), WIDTHS, DEPTHS, BUCKETS).shape
    assert narrow is not None and narrow.verify <= 8


def test_where_a_tree_wins_it_runs_and_where_nothing_wins_it_does_not() -> None:
    wins = choose_shape(GOOD, Costs(GPU, SMALL, 0.01), WIDTHS, DEPTHS, BUCKETS)
    assert wins.shape is not None and wins.shape.width > 1 and wins.speedup > 2
    loses = choose_shape(GOOD, Costs(GPU, Latency((1, 8), (1.0, 1.1)), 0.01), WIDTHS, DEPTHS, BUCKETS)
    assert loses.shape is None and loses.speedup < 1.02


def test_a_tree_that_turned_out_bad_is_not_verified() -> None:
    costs = Costs(LINEAR, FREE)
    shape, rate = choose_verify([1.0, 1.01, 1.02, 1.03], 1, 3, costs, (2, 4))
    assert shape.verify == 1 and rate == pytest.approx(1.0)
    shape, _ = choose_verify([1.0, 1.99, 2.97, 3.9], 1, 3, Costs(FLAT, FREE), (2, 4))
    assert shape.verify == 4


def test_spent_draft_cost_stays_in_the_ratio() -> None:
    expected, target = [1.0, 1.5, 1.6], Latency((1, 2, 3), (1.0, 1.3, 1.5))
    cheap, _ = choose_verify(expected, 1, 2, Costs(target, FREE), (2, 3))
    dear, _ = choose_verify(expected, 1, 2, Costs(target, Latency((1,), (2.0,))), (2, 3))
    assert (cheap.verify, dear.verify) == (2, 3)


def test_depth_follows_the_survival_curve() -> None:
    costs = Costs(GPU, Latency((1,), (0.3,)))
    assert choose_depth([0.9, 0.85, 0.8, 0.1, 0.05], 1, 8, costs, range(1, 6)) == 3
    assert choose_depth([0.3, 0.1, 0.0, 0.0, 0.0], 1, 8, costs, range(1, 6)) == 1
    assert choose_depth([1.0] * 5, 1, 8, costs, range(1, 6)) == 5


def test_expected_tree_by_hand() -> None:
    assert expected_tree((0.5, 0.2), 1, 3) == (1.0, 0.5, 0.25, 0.125)
    # width 2: children .5 and .2; then the best two of .25 and .1 (below .5) and .1 and .04 (below .2)
    assert expected_tree((0.5, 0.2), 2, 2) == pytest.approx((1.0, 0.5, 0.25, 0.2, 0.1))


def test_rank_acceptance_learns_and_forgets() -> None:
    acceptance = RankAcceptance(4)
    for _ in range(2000):
        acceptance.observe(0)
    assert acceptance.rates[0] > 0.97
    for _ in range(4000):
        acceptance.observe(None)
    assert acceptance.rates[0] < 0.02
    rng = random.Random(0)
    for _ in range(4000):
        acceptance.observe(rng.choices([0, 1, 2, None], [0.5, 0.2, 0.1, 0.2])[0])
    assert acceptance.rates == pytest.approx((0.5, 0.2, 0.1, 0.0), abs=0.08)
    again = RankAcceptance(4)
    again.load_state_dict(acceptance.state_dict())
    assert again.rates == acceptance.rates
    with pytest.raises(ValueError, match="more than 1"):
        RankAcceptance(2, prior=(0.9, 0.3))


def test_isotonic_against_brute_force() -> None:
    rng = random.Random(1)
    for _ in range(50):
        size = rng.randint(1, 6)
        values, weights = [rng.random() for _ in range(size)], [rng.randint(1, 5) for _ in range(size)]
        found = isotonic(values, weights)
        assert all(a <= b + 1e-12 for a, b in itertools.pairwise(found))
        cost = sum(w * (f - v) ** 2 for f, v, w in zip(found, values, weights, strict=True))
        best = math.inf
        for cuts in itertools.product([False, True], repeat=size - 1):  # the best fit is means over runs
            fit, start = [], 0
            for end in [i + 1 for i, cut in enumerate(cuts) if cut] + [size]:
                w = sum(weights[start:end])
                fit += [sum(a * b for a, b in zip(values[start:end], weights[start:end], strict=True)) / w] * (
                    end - start
                )
                start = end
            if all(a <= b + 1e-12 for a, b in itertools.pairwise(fit)):
                best = min(best, sum(w * (f - v) ** 2 for f, v, w in zip(fit, values, weights, strict=True)))
        assert cost == pytest.approx(best)


def test_calibration_starts_at_the_drafts_own_word_and_learns() -> None:
    edges = torch.tensor([[-0.05, -1.0, -3.0, -torch.inf]])
    sampled = Calibration()
    start = sampled(edges)
    assert torch.allclose(start[:, :3], edges[:, :3], atol=0.15) and torch.isinf(start[0, 3])
    rng = random.Random(0)
    for _ in range(3000):  # over-confident: what it gives 95 % comes half the time
        sampled.observe([-0.05], [True], [rng.random() < 0.5])
    assert float(sampled(edges)[0, 0].exp()) == pytest.approx(0.5, abs=0.08)
    assert float(sampled(torch.tensor([[-9.0, -0.05]]))[0, 1].exp()) > 0.85, "others have a map of their own"
    logs = sampled(torch.linspace(-12, 0, 200)[:, None])[:, 0]
    assert (logs.diff() >= -1e-6).all() and (logs <= 0).all()
    again = Calibration()
    again.load_state_dict(sampled.state_dict())
    assert torch.equal(again(edges), sampled(edges))


def test_greedy_calibration_trusts_the_best_candidate_more() -> None:
    edges = torch.tensor([[-1.5, -1.5]])
    best, rest = Calibration(greedy=True)(edges).exp()[0].tolist()
    assert best > 0.5 > 0.22 > rest


def test_the_selector_tries_again_after_plain_stretches() -> None:
    selector = Selector(Config(), Costs(LINEAR, LINEAR))
    shapes = [selector.next() for _ in range(3 * (PROBE + 1))]
    tried = [shape for shape in shapes if shape is not None]
    assert len(tried) == 3 and all(shape.depth == 1 for shape in tried)
    assert selector.promised is not None and selector.promised < 1
    for _ in range(300):
        selector.observe([0], [], [], [])
    selector.costs = Costs(GPU, SMALL)
    assert any(selector.next() is not None and selector.next().depth > 3 for _ in range(20))  # type: ignore[union-attr]


def test_fixed_numbers_are_never_overruled() -> None:
    selector = Selector(Config(tree={"width": 2, "depth": 3, "verify": 5}), None)
    assert all(selector.next() == Shape(2, 3, 5) for _ in range(50))
    assert selector.verify([1.0] * 7, Shape(2, 3, 5)) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tree": "big"}, "neither 'auto'"),
        ({"tree": {"width": 2}}, "neither 'auto'"),
        ({"tree": {"width": 0, "depth": 2}}, "width=0"),
        ({"tree": {"width": 2, "depth": 2.5}}, "depth=2.5"),
        ({"plan": {"head": True}}, "needs tail"),
        ({"plan": {"prune": "often"}}, "neither 'tree'"),
        ({"plan": "fast"}, "neither 'auto'"),
        ({"max_depth": 0}, "max_depth=0"),
        ({"max_tokens": 1}, "no room"),
    ],
)
def test_options_that_cannot_be(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**options)  # type: ignore[arg-type]
