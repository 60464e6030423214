"""Reuse distances against brute force, and what is counted."""

from __future__ import annotations

import random
from itertools import chain

import pytest

from ygglight.engines.moe_speq.link import Traffic
from ygglight.engines.moe_speq.reuse import ReuseDistances
from ygglight.engines.moe_speq.stats import Stats

EXPERTS = 10


def lru_misses(requests: list[int], slots: int) -> int:
    """Plain LRU, one request after the other."""
    held: list[int] = []
    misses = 0
    for expert in requests:
        if expert in held:
            held.remove(expert)
        else:
            misses += 1
            del held[: max(0, len(held) + 1 - slots)]
        if slots:
            held.append(expert)
    return misses


def zipf(draw: random.Random) -> int:
    return min(EXPERTS - 1, int(draw.paretovariate(0.8)) - 1)


@pytest.mark.parametrize("seed", range(3))
def test_single_requests_are_textbook_lru(seed: int) -> None:
    draw, reuse = random.Random(seed), ReuseDistances(1, EXPERTS)
    requests = [zipf(draw) for _ in range(500)]
    for expert in requests:
        reuse.observe(0, [expert])
    predicted = [reuse.misses(slots) for slots in range(EXPERTS + 1)]
    assert predicted == [lru_misses(requests, slots) for slots in range(EXPERTS + 1)]
    assert predicted == sorted(predicted, reverse=True) and predicted[0] == 500 and predicted[-1] == len(set(requests))
    assert reuse.miss_rate(4) == predicted[4] / 500


def test_layers_are_apart() -> None:
    reuse = ReuseDistances(2, EXPERTS)
    for _ in range(3):
        reuse.observe(0, [1, 2])
        reuse.observe(1, [3])
    assert reuse.misses(2) == 3 and reuse.misses(1, 0) == 4 and reuse.misses(1, 1) == 1
    assert reuse.requests() == 9 and reuse.groups == [3, 3]


def test_a_prompt_is_remembered_below_all_else_and_not_counted() -> None:
    reuse = ReuseDistances(1, EXPERTS)
    assert reuse.miss_rate(5) == 1.0
    reuse.observe(0, [1])
    reuse.warm(0, [2, 1, 3])
    assert reuse.requests() == 1
    reuse.observe(0, [3])
    assert reuse.misses(2) == 2 and reuse.misses(3) == 1  # the stack was 1, 2, 3


def test_counts_add_up_and_reset() -> None:
    stats = Stats(2, EXPERTS, Traffic())
    stats.demand(0, [1, 2, 3], late=1, misses=1)
    stats.demand(1, [4], late=0, misses=0)
    stats.compare(0, {1, 2, 9, 8}, [1, 2, 3])
    counts = stats.to_dict()
    assert (counts["requests"], counts["hits"], counts["late"], counts["misses"]) == (4, 2, 1, 1)
    assert stats.recall == [2 / 3, 0.0] and stats.precision == [0.5, 0.0]
    stats.reset()
    assert not any(stats.experts.values()) and stats.recall == [0.0, 0.0] and stats.miss_rate(3) == 1.0


def test_tokens_of_the_text_predict_plain_decoding() -> None:
    draw, stats = random.Random(1), Stats(1, EXPERTS, Traffic())
    rows = [draw.sample(range(EXPERTS), 2) for _ in range(200)]
    for start in range(0, 200, 4):  # windows of four rows, of which three become text
        window = rows[start : start + 4]
        stats.demand(0, list(dict.fromkeys(chain(*window))), 0, 0)
        stats.committed(0, list(chain(*window[:3])), 2)
    alone = ReuseDistances(1, EXPERTS)
    for position, row in enumerate(rows):
        if position % 4 < 3:
            alone.observe(0, row)
    assert [stats.miss_rate(m) for m in range(11)] == [alone.miss_rate(m) for m in range(11)]
    assert stats.miss_rate(3) != stats.passes.miss_rate(3)
