"""How many tokens to draft: the arithmetic against brute force, and the choices on machines that are made up."""

from __future__ import annotations

import random
from typing import Any

import pytest

from ygglight.engines.moe_speq.governor import (
    GAIN,
    LOSING,
    PATIENCE,
    VERDICT_EVERY,
    Acceptance,
    Cycle,
    Demand,
    Governor,
    Machine,
    candidates,
    tokens_expected,
    worth_the_draft,
)

LAYERS, EXPERTS, TOP_K = 8, 64, 4


def machine(**changes: Any) -> Machine:
    values: dict[str, Any] = {
        "draft_base": 1e-3, "draft_token": 2e-3, "verify": {1: 0.010, 2: 0.011, 5: 0.014, 9: 0.020}, "copy": 1e-3,
        "layers": LAYERS, "experts": EXPERTS, "top_k": TOP_K,
    }  # fmt: skip
    return Machine(**values | changes)


class World:
    """A machine as it truly is: cycles cost what ``Machine.cycle`` says, tokens are accepted with chance ``p``."""

    def __init__(self, true: Machine, p: float, rate: float, power: float = 0.5, seed: int = 0) -> None:
        self.true, self.p, self.rate, self.power = true, p, rate, power
        self.random = random.Random(seed)

    def missing(self, k: int) -> float:
        return min(EXPERTS, TOP_K * (k + 1) ** self.power) * self.rate

    def run(self, k: int) -> Cycle:
        accepted = 0
        while accepted < k and self.random.random() < self.p:
            accepted += 1
        missing = self.missing(k)
        seconds = self.true.cycle(k, [missing] * LAYERS) * self.random.uniform(0.95, 1.05)
        requests = round(LAYERS * missing / self.rate)
        return Cycle(k, accepted, requests, round(LAYERS * missing), round(LAYERS * missing), seconds)

    def throughput(self, k: int) -> float:
        return tokens_expected([self.p] * k) / self.true.cycle(k, [self.missing(k)] * LAYERS)


def play(governor: Governor, world: World, cycles: int) -> tuple[list[int], float]:
    """The chosen k of each cycle, and tokens a second over all."""
    chosen, tokens, seconds = [], 0, 0.0
    for _ in range(cycles):
        cycle = world.run(governor.choose(100))
        governor.observe(cycle)
        chosen.append(cycle.k)
        tokens += cycle.accepted + 1
        seconds += cycle.seconds
    return chosen, tokens / seconds


# -- the arithmetic --------------------------------------------------------------------------------------------------
def brute_force(m: Machine, chances: list[float], copies: float, foreseen: float, k: int) -> float:
    """Tokens a second, written down once more from the brief, copy by copy."""
    tokens = 1.0
    for i in range(1, k + 1):
        product = 1.0
        for j in range(i):
            product *= chances[j]
        tokens += product
    drafting = m.draft_base + k * m.draft_token if k else 0.0
    window = (k - max(1, k // 5)) * m.draft_token if k else 0.0
    hidden = min(window / m.copy, m.hideable, foreseen * copies * m.layers)
    seconds = drafting
    for layer in range(m.layers):
        behind = min(max(layer * copies, hidden), (layer + 1) * copies)  # of the copies in order, the first are hidden
        seconds += max(m.verifying(k + 1) / m.layers, ((layer + 1) * copies - behind) * m.copy)
    return tokens / seconds


def test_the_choice_is_that_of_an_exhaustive_search() -> None:
    random_ = random.Random(1)
    found = set()
    for _ in range(300):
        verify, table = random_.uniform(1e-3, 2e-2), {}
        for width in (1, 2, 5, 9, 17):
            table[width] = verify = verify * random_.uniform(1.0, 1.6)
        m = machine(
            draft_base=random_.uniform(0, 5e-3), draft_token=random_.uniform(1e-4, 1e-2), verify=table,
            copy=10 ** random_.uniform(-5, -2), hideable=random_.choice([0.0, 10.0, 1e9]),
        )  # fmt: skip
        governor = Governor(m, candidates(24))
        p = random_.random()
        world = World(m, p, rate=random_.random(), power=random_.random(), seed=random_.randrange(10**6))
        for _ in range(20):
            cycle = world.run(random_.choice([0, 1, 4, 8]))
            governor.acceptance.observe(cycle.k, cycle.accepted)
            governor.demand.observe(cycle.k + 1, cycle.requests, cycle.missing)
        scores = {
            k: brute_force(
                m, governor.acceptance.chances(k), governor.demand.unique(k + 1) * governor.demand.rate(k + 1),
                1.0 if m.hideable else 0.0, k,
            )
            for k in governor.choices
        }  # fmt: skip
        for k, score in scores.items():
            assert governor.theta(k) == pytest.approx(score, rel=1e-9)
        assert governor.best() == max(scores, key=lambda k: (round(scores[k], 9), -k))
        found.add(governor.best())
    assert 0 in found and len(found) > 4, "the machines were all alike"


def test_a_cycle_counts_the_token_that_comes_for_free() -> None:
    assert tokens_expected([]) == 1.0
    assert tokens_expected([0.5, 0.5]) == 1.75


def test_widths_between_and_beyond_the_measured_ones() -> None:
    m = machine(verify={1: 1.0, 3: 2.0, 5: 6.0})
    assert [m.verifying(n) for n in (1, 2, 3, 4, 5, 6)] == [1.0, 1.5, 2.0, 4.0, 6.0, 8.0]
    assert machine(verify={1: 1.0}).verifying(9) == 1.0


def test_drafting_hides_copies_but_not_those_it_did_not_foresee() -> None:
    m = machine(draft_token=1.0, draft_base=0.0, verify={1: 0.0}, copy=1.0, layers=2)
    assert m.cycle(0, [3.0, 3.0]) == 6.0
    assert m.cycle(4, [3.0, 3.0]) == 4 + 3  # observed one token, hid three copies
    assert m.cycle(4, [3.0, 3.0], foreseen=0.0) == 4 + 6
    assert machine(**vars(m) | {"hideable": 1.0}).cycle(4, [3.0, 3.0]) == 4 + 5
    assert machine(**vars(m) | {"verify": {1: 8.0}}).cycle(0, [3.0, 3.0]) == 8.0, "copies overlap with computing"


def test_only_tested_positions_are_learnt_from() -> None:
    acceptance = Acceptance()
    for _ in range(50):
        acceptance.observe(8, 1)  # the second is refused, what follows is never looked at
    first, second, third = acceptance.chances(3)
    assert first > 0.85 and second < 0.25
    assert 0.3 < third < 0.7, "unknown is not refused"


def test_candidates() -> None:
    assert candidates(0) == (0,) and candidates(4) == (0, 1, 2, 3, 4)
    assert candidates(20)[-3:] == (12, 16, 20)


def test_unique_experts_grow_as_they_were_seen_to() -> None:
    demand = Demand(machine())
    for _ in range(100):
        demand.observe(5, LAYERS * TOP_K, LAYERS)  # all tokens take the same
    assert demand.unique(9) == pytest.approx(TOP_K, rel=0.01) and demand.rate(9) == pytest.approx(0.25)
    for _ in range(100):
        demand.observe(5, LAYERS * 5 * TOP_K, 0)
    assert demand.unique(9) == pytest.approx(9 * TOP_K, rel=0.01) and demand.unique(1) == TOP_K
    assert demand.unique(100) == EXPERTS


# -- choosing --------------------------------------------------------------------------------------------------------
REGIMES = {
    "small cache, slow link, experts shared": (machine(copy=4e-3), 0.9, 0.9, 0.2),
    "small cache, slow link, none shared": (machine(copy=4e-3), 0.9, 0.9, 0.95),
    "large cache": (machine(copy=1e-3), 0.85, 0.02, 0.5),
    "noisy draft": (machine(copy=2e-3), 0.2, 0.5, 0.7),
    "slow draft": (machine(draft_token=2e-2), 0.9, 0.3, 0.5),
    "dear widths": (machine(verify={1: 0.01, 2: 0.02, 5: 0.05, 9: 0.09}), 0.8, 0.1, 0.5),
}


@pytest.mark.parametrize("regime", REGIMES)
def test_the_governor_is_near_the_best_fixed_k(regime: str) -> None:
    """Check 16 on made-up machines: 95 % of an exhaustive search, what it costs to find out included."""
    m, p, rate, power = REGIMES[regime]
    world = World(m, p, rate, power)
    _, speed = play(Governor(m, candidates(8)), world, 600)
    best = max(world.throughput(k) for k in candidates(8))
    worst = min(world.throughput(k) for k in candidates(8))
    assert speed >= 0.95 * best
    assert worst < 0.9 * best, "any k would have passed"


def test_a_wrong_table_is_put_right_by_what_cycles_take() -> None:
    """The stored draft is thought five times as fast as it is; speculation loses, and the governor finds out."""
    true = machine(draft_token=1.5e-2)
    world = World(true, 0.6, 0.1)
    assert max(candidates(8), key=world.throughput) == 0
    governor = Governor(machine(draft_token=3e-3), candidates(8))
    chosen, _ = play(governor, world, 200)
    assert chosen[-150:].count(0) > 140
    assert sorted(map(abs, governor.errors[-100:]))[50] < 0.15, "check 17"


def test_a_drop_in_acceptance_shrinks_k_at_once_and_k_recovers() -> None:
    """Check 18."""
    m = machine(copy=2e-3)
    world = World(m, 0.95, 0.3, 0.3)
    governor = Governor(m, candidates(8))
    play(governor, world, 100)
    assert governor.k >= 6
    world.p = 0.05
    before = governor.k
    play(governor, world, 10)
    assert governor.k < before
    play(governor, world, 30)
    low = governor.k
    assert low <= 1
    world.p = 0.95
    play(governor, world, 400)
    assert governor.k >= 6 > low


@pytest.mark.parametrize("regime", REGIMES)
def test_k_changes_seldom_and_never_passes_its_bounds(regime: str) -> None:
    m, p, rate, power = REGIMES[regime]
    governor = Governor(m, candidates(6))
    play(governor, World(m, p, rate, power), 50)
    last, since = governor.k, PATIENCE
    world = World(m, p, rate, power, seed=5)
    for most in [100] * 300 + [3, 2, 1, 0]:
        k = governor.choose(most)
        assert 0 <= k <= min(6, most)
        governor.observe(world.run(k))
        since += 1
        if governor.k != last:
            assert since >= PATIENCE
            last, since = governor.k, 0


def test_a_cycle_may_be_bounded_in_time() -> None:
    m, p, rate, power = REGIMES["small cache, slow link, experts shared"]
    world = World(m, p, rate, power)
    longest = m.cycle(2, [world.missing(2)] * LAYERS)
    free, bounded = Governor(m, candidates(8)), Governor(m, candidates(8), longest)
    play(free, world, 100)
    play(bounded, world, 100)
    assert free.k > 4 and bounded.k <= 3


# -- the draft's memory ----------------------------------------------------------------------------------------------
def test_the_draft_goes_where_its_memory_as_slots_wins_every_time() -> None:
    m = machine(draft_token=2e-2, copy=4e-3)
    governor, world = Governor(m, candidates(8)), World(m, p=0.9, rate=0.6)
    asked = 0
    while not governor.gives_up(0.0):
        play(governor, world, 1)
        asked += 1
        assert asked < 200
    assert asked >= VERDICT_EVERY * (LOSING - 1), "one bad moment is no reason"
    governor.without_draft()
    assert play(governor, world, 100)[0] == [0] * 100


def test_the_draft_stays_where_it_wins() -> None:
    m, p, rate, power = REGIMES["small cache, slow link, experts shared"]
    governor, world = Governor(m, candidates(8)), World(m, p, rate, power)
    for _ in range(300):
        play(governor, world, 1)
        assert not governor.gives_up(rate * 0.7)


def test_equal_memory_is_compared_with_a_margin() -> None:
    assert worth_the_draft(10.0, 10.0) and worth_the_draft(10.0, 10.0 * (1 + GAIN / 2))
    assert not worth_the_draft(10.0, 11.0)
