"""Reuse distances against brute force, and what is counted."""

from __future__ import annotations

import random
from itertools import chain

import pytest

from ygglight.engines.moe_speq.link import Traffic
from ygglight.engines.moe_speq.reuse import REMEMBERED, ReuseDistances, WindowReuse
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


def test_layers_are_apart() -> None:
    reuse = ReuseDistances(2, EXPERTS)
    for _ in range(3):
        reuse.observe(0, [1, 2])
        reuse.observe(1, [3])
    assert reuse.misses(2) == 3 and reuse.misses(1, 0) == 4 and reuse.misses(1, 1) == 1
    assert reuse.requests() == 9 and reuse.groups == [3, 3]


def test_a_prompt_is_remembered_below_all_else_and_not_counted() -> None:
    reuse = ReuseDistances(1, EXPERTS)
    assert reuse.misses(5) == 0
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
    assert not any(stats.experts.values()) and stats.recall == [0.0, 0.0]
    assert stats.text.missing(1, 3, 2) == 2.0, "a cache begins empty"


def test_tokens_of_the_text_predict_plain_decoding() -> None:
    draw, stats = random.Random(1), Stats(1, EXPERTS, Traffic())
    rows = [draw.sample(range(EXPERTS), 2) for _ in range(200)]
    for start in range(0, 200, 4):  # windows of four rows, of which three become text
        window = rows[start : start + 4]
        stats.committed(0, list(chain(*window[:3])), 2)
    alone = ReuseDistances(1, EXPERTS)
    for position, row in enumerate(rows):
        if position % 4 < 3:
            alone.observe(0, row)
    assert [stats.text.missing(1, m, 2) for m in range(11)] == [alone.misses(m) / 150 for m in range(11)]


def test_a_text_is_taken_in_passes_of_several_widths_at_once() -> None:
    draw, text = random.Random(2), WindowReuse(1, EXPERTS, (1, 3))
    rows = [draw.sample(range(EXPERTS), 2) for _ in range(99)]
    assert text.unique(3, 2) == 6 and text.missing(3, 9, 2) == 6, "before anything is seen, the worst"
    for row in rows:
        text.observe(0, row)
    unions = [set(chain(*rows[start : start + 3])) for start in range(0, 99, 3)]
    assert text.unique(3, 2) == sum(map(len, unions)) / 33 and text.unique(1, 2) == 2
    held: list[int] = []
    missed = 0
    for start, union in zip(range(0, 99, 3), unions, strict=True):
        missed += len(union - set(held[:4]))
        ranked = list(dict.fromkeys(chain(*reversed(rows[start : start + 3]))))
        held = ranked + [expert for expert in held if expert not in union]
    assert text.missing(3, 4, 2) == missed / 33


def test_old_text_weighs_less_and_texts_share_no_window() -> None:
    text = WindowReuse(1, EXPERTS, (1, 2))
    for _ in range(20 * REMEMBERED):
        text.observe(0, [1])
    for turn in range(4 * REMEMBERED):
        text.observe(0, [2 + turn % 8])
    assert text.missing(1, 4, 1) > 0.9, "what long texts before were like is nearly forgotten"
    text.observe(0, [1])
    text.warm(0, [5])
    groups = text.unique(2, 1)
    text.observe(0, [3])
    assert text.unique(2, 1) == groups, "half a window was left of the text before"
