"""The cache of a layer: what a window wants is not evicted, the coldest is, and prefetches keep to the rules."""

from __future__ import annotations

import random

import pytest

from ygglight.engines.moe_speq.cache import TRUST, LayerCache
from ygglight.engines.moe_speq.reuse import ReuseDistances

EXPERTS = 12


def window(cache: LayerCache, ranked: list[int]) -> tuple[int, int]:
    """One pass without tensors. Returns hits and copies."""
    hits = sum(expert in cache for expert in ranked)
    split = cache.split(ranked, prefill=False)
    cache.demand(ranked)
    stay = set(ranked[: cache.slots])
    spared = {*ranked}
    leaving = [e for e in cache.residents if e in spared - stay]
    for expert in split.slots:
        taken = cache.take(expert, spared)
        if taken is None:  # used by now
            spared.discard(leaving.pop())
            taken = cache.take(expert, spared)
        assert taken is not None and taken.evicted not in stay
    cache.touch(ranked)
    return hits, len(split.slots) + len(split.passing)


def consistent(cache: LayerCache) -> None:
    slots = [cache[expert] for expert in cache.residents]
    assert len(set(slots)) == len(slots) == cache.slots - cache.free and all(0 <= s < cache.slots for s in slots)


@pytest.mark.parametrize("slots", [1, 2, 3, 5, 8, 12])
def test_windows_cost_no_copy_too_many_and_leave_the_ranked_first(slots: int) -> None:
    draw, cache = random.Random(slots), LayerCache(slots)
    recent: list[int] = []  # the most recent first: a second book
    for _ in range(400):
        ranked = draw.sample(range(EXPERTS), draw.randint(1, 9))
        before = set(cache.residents)
        hits, copies = window(cache, ranked)
        assert hits == len(before & set(ranked)) and copies == len(ranked) - hits  # union - resident, no more
        recent = ranked + [e for e in recent if e not in ranked]
        assert cache.residents[::-1] == recent[:slots]
        consistent(cache)


@pytest.mark.parametrize("slots", [1, 3, 6, 12])
def test_reuse_distances_predict_the_misses_of_this_cache(slots: int) -> None:
    draw, cache, reuse = random.Random(7), LayerCache(slots), ReuseDistances(1, EXPERTS)
    misses = 0
    for _ in range(300):
        ranked = draw.sample(range(EXPERTS), draw.randint(1, 7))
        reuse.observe(0, ranked)
        misses += window(cache, ranked)[1]
    assert misses == reuse.misses(slots)
    assert slots == 12 or misses != reuse.misses(slots + 1)  # the check can fail


def test_prompt_fills_empty_slots_and_evicts_nothing() -> None:
    cache = LayerCache(4)
    window(cache, [1, 2])
    split = cache.split([5, 1, 6, 7], prefill=True)
    assert split == ([5, 6], [7])
    for expert in split.slots:
        assert cache.take(expert, {1, 2, 5, 6, 7}).evicted is None  # type: ignore[union-attr]
    cache.cool(split.slots)
    assert cache.residents == [6, 5, 2, 1]  # the prompt's go first, its last-ranked first of all
    assert cache.split([8, 9], prefill=True) == ([], [8, 9])


def test_prefetch_spares_what_the_plan_wants_and_evicts_the_coldest() -> None:
    cache = LayerCache(3)
    for expert in (1, 2, 3):
        window(cache, [expert])
    spared = cache.spared([1, 7, 8])
    assert cache.room(spared) == 2
    assert cache.take(7, spared, prefetch=True).evicted == 2  # type: ignore[union-attr]
    assert cache.take(8, spared, prefetch=True).evicted == 3  # type: ignore[union-attr]
    assert cache.take(9, spared, prefetch=True) is None and cache.room(spared) == 0  # 1, 7 and 8 are all wanted


def test_wrong_prefetches_go_first_and_are_counted() -> None:
    cache = LayerCache(3)
    window(cache, [1, 2])
    cache.take(7, cache.spared([7]), prefetch=True)
    assert cache.demand([1]).unused == 1 and cache.residents[0] == 7  # wanted: 1, so 7 was unused
    taken = cache.take(3, {1})
    assert taken is not None and (taken.evicted, taken.wasted) == (7, True)
    cache.take(8, {1}, prefetch=True)
    assert cache.demand([8]).unused == 0  # it was used: no waste, now or later
    assert cache.take(9, {1, 3}).wasted is False  # type: ignore[union-attr]


def test_a_layer_that_guesses_badly_may_not_evict_what_was_just_used() -> None:
    cache = LayerCache(2)
    window(cache, [1, 2])
    assert cache.room(cache.spared([7])) == 2
    rounds = 0
    while cache.precision >= TRUST:
        cache.take(7 + rounds % 4, cache.spared([7 + rounds % 4]), prefetch=True)
        window(cache, [1, 2])
        rounds += 1
    assert rounds == 3  # 1, 0.75, 0.56, 0.42
    assert cache.room(cache.spared([7])) == 0  # 1 and 2 were used by the last window
    window(cache, [1])
    assert cache.room(cache.spared([7])) == 1  # 2 was not


@pytest.mark.parametrize("slots", [1, 2, 5, 9])
def test_resize_keeps_the_most_recent(slots: int) -> None:
    cache = LayerCache(4)
    window(cache, [4, 3, 2, 1])
    old = {expert: cache[expert] for expert in cache.residents}
    stay = cache.residents[-slots:]
    moves = cache.resize(slots)
    assert cache.residents == stay and moves == [(old[e], cache[e]) for e in stay]
    consistent(cache)
