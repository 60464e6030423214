"""Counting the draft's routes and planning from them."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch

from ygglight.engines.moe_speq.lookahead import LayerView, Lookahead, observed_steps, plan_prefetch, steps_until_sent


def test_counts_are_those_of_the_routes() -> None:
    lookahead = Lookahead(3, 8, torch.device("cpu"))
    assert lookahead.read() == [{}, {}, {}]
    expected: list[Counter[int]] = [Counter() for _ in range(3)]
    lookahead.empty = False
    with torch.inference_mode():
        for _ in range(5):
            for layer in (0, 2):
                index = torch.rand(2, 8).topk(3).indices
                lookahead.note(layer, index)
                expected[layer].update(index.flatten().tolist())
    assert lookahead.read() == [dict(counter) for counter in expected]
    lookahead.clear()
    assert lookahead.empty and lookahead.read() == [{}, {}, {}]
    lookahead.empty = False
    assert lookahead.read() == [{}, {}, {}]  # not only by the flag


@pytest.mark.parametrize("seed", range(20))
def test_plan_takes_the_most_wanted_that_fit(seed: int) -> None:
    draw = random.Random(seed)
    counts = [{e: draw.randint(1, 5) for e in draw.sample(range(10), draw.randint(0, 8))} for _ in range(4)]
    views = [LayerView(draw.sample(range(10), 4), draw.randint(0, 4), 100) for _ in range(4)]
    cap = draw.choice([0, 99, 100, 350, 10_000])
    plan = plan_prefetch(counts, views, cap)
    assert len(plan) == len(set(plan)) and 100 * len(plan) <= cap
    assert [layer for layer, _ in plan] == sorted(layer for layer, _ in plan)  # the earliest layer's go first
    for layer, view in enumerate(views):
        chosen = [e for each, e in plan if each == layer]
        missing = set(counts[layer]) - set(view.residents)
        assert len(chosen) <= view.room and set(chosen) <= missing
        left = [counts[layer][e] for e in missing - set(chosen)]
        assert not chosen or not left or max(left) <= min(counts[layer][e] for e in chosen)
        if cap == 10_000:
            assert len(chosen) == min(view.room, len(missing))
    possible = sum(min(v.room, len(set(c) - set(v.residents))) for c, v in zip(counts, views, strict=True))
    assert len(plan) == min(possible, cap // 100)


def test_a_tight_cap_goes_to_the_surest() -> None:
    plan = plan_prefetch([{1: 1, 2: 3}, {4: 3, 5: 2}], [LayerView([], 2, 10)] * 2, 30)
    assert plan == [(0, 2), (1, 4), (1, 5)]


def test_chunks() -> None:
    assert [observed_steps(k) for k in (1, 4, 5, 16)] == [1, 1, 1, 3]
    assert steps_until_sent(0.0, 1e-3) == 1 and steps_until_sent(3.2e-3, 1e-3) == 4 and steps_until_sent(1.0, 0.0) == 1
