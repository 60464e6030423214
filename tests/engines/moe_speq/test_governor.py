"""Whether to draft, and how many tokens: the arithmetic by brute force, the choices on made-up machines."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from ygglight.engines.moe_speq.estimates import HOPE, Acceptance, Demand, Outlook
from ygglight.engines.moe_speq.governor import CLEAR, GAIN, PATIENCE, SEEN, VERDICT_EVERY, VERDICTS, Cycle, Governor
from ygglight.engines.moe_speq.machine import Machine, between, candidates, tokens_expected, widths

LAYERS, EXPERTS, TOP_K = 8, 64, 4


def machine(**changes: Any) -> Machine:
    values: dict[str, Any] = {
        "draft_token": 2e-3, "verify": {1: 0.010, 2: 0.011, 5: 0.014, 9: 0.020}, "expert": 1e-4, "copy": 1e-3,
        "layers": LAYERS, "top_k": TOP_K, "slots": 32, "staging": 4,
    }  # fmt: skip
    return Machine(**values | changes)


class World:
    """A machine as it truly is: cycles cost what ``Machine.cycle`` says, tokens are accepted with chance ``p``.

    Args:
        true: What things cost. p: See above. rate: Part of the experts that is missing beside a draft.
        alone: As ``rate``, of single tokens where all memory is slots. power: Of how unique experts grow with tokens.
        refused: Times as many experts are missed as the text alone would, for drafts are refused.
    """

    def __init__(
        self, true: Machine, p: float, rate: float, alone: float, power: float = 0.5, seed: int = 0,
        refused: float = 1.1,
    ) -> None:  # fmt: skip
        self.true, self.p, self.rate, self.alone, self.power, self.refused = true, p, rate, alone, power, refused
        self.random = random.Random(seed)

    @property
    def outlook(self) -> Outlook:
        unique = {n: min(EXPERTS, TOP_K * n**self.power) for n in widths(8)}
        return Outlook(unique, {n: u * self.rate for n, u in unique.items()}, TOP_K * self.alone)

    def cost(self, k: int, drafting: bool) -> float:
        unique = min(EXPERTS, TOP_K * (k + 1) ** self.power * (self.refused if k else 1.0))
        rate = self.rate if drafting else self.alone
        return self.true.cycle(k, unique, unique * rate)

    def run(self, k: int, drafting: bool) -> Cycle:
        accepted = 0
        while accepted < k and self.random.random() < self.p:
            accepted += 1
        unique = min(EXPERTS, TOP_K * (k + 1) ** self.power * (self.refused if k else 1.0))
        missing = round(LAYERS * unique * (self.rate if drafting else self.alone))
        seconds = self.cost(k, drafting) * self.random.uniform(0.95, 1.05)
        return Cycle(k, accepted, round(LAYERS * unique), missing, missing, seconds)

    def throughput(self, k: int) -> float:
        """Of k = 0 with all memory as slots; of others beside a draft."""
        return tokens_expected([self.p] * k) / self.cost(k, k > 0)


def play(governor: Governor, world: World, cycles: int, making: float = 0.0) -> tuple[list[int], float]:
    """The chosen k of each cycle, and tokens a second over all.

    Args:
        governor: Decides. world: Answers. cycles: How many. making: Seconds that a draft takes to make.
    """
    chosen, tokens, seconds = [], 0, 0.0
    for _ in range(cycles):
        cycle = world.run(governor.choose(100), governor.drafting)
        governor.observe(cycle, world.outlook if governor.due else None)
        chosen.append(cycle.k)
        tokens += cycle.accepted + 1
        seconds += cycle.seconds
        if governor.wants_draft():
            governor.begin(making)
            seconds += making
        elif governor.gives_up():
            governor.end()
    return chosen, tokens / seconds


# -- the arithmetic --------------------------------------------------------------------------------------------------
def brute_force(m: Machine, chances: list[float], unique: float, missing: float, foreseen: float, k: int) -> float:
    """Tokens a second, written down once more, token by token and copy by copy."""
    tokens = 1.0
    for i in range(1, k + 1):
        product = 1.0
        for j in range(i):
            product *= chances[j]
        tokens += product
    seconds = 0.0
    for _ in range(k):
        seconds += m.draft_token
    copies = missing * m.layers
    named = min(m.ahead, foreseen * copies) if k else 0.0
    left, drafting = named, (k - max(1, k // 5)) * m.draft_token
    places = m.staging - 1.0
    for _ in range(m.layers):
        places += max(0.0, m.slots - (unique - missing))  # slots whose experts the pass does not want
    while left > 0 and places > 0 and drafting >= m.copy * min(1.0, left, places):
        one = min(1.0, left, places)
        left, places, drafting = left - one, places - one, drafting - one * m.copy
    if left > 0 and places > 0:
        left -= drafting / m.copy
    computing = between(m.verify, k + 1) + m.layers * max(0.0, unique - m.top_k) * m.expert
    waited = (copies - named) * m.copy
    seconds += computing + waited + max(0.0, left * m.copy - computing)
    return tokens / seconds


def test_the_choice_is_that_of_an_exhaustive_search() -> None:
    random_ = random.Random(1)
    found = set()
    for _ in range(300):
        verify, table = random_.uniform(1e-3, 2e-2), {}
        for width in (1, 2, 5, 9, 17):
            table[width] = verify = verify * random_.uniform(1.0, 1.6)
        m = machine(
            draft_token=random_.uniform(1e-4, 1e-2), verify=table, expert=random_.choice([0.0, 1e-4]),
            copy=10 ** random_.uniform(-4.5, -2), ahead=random_.choice([0.0, 10.0, 1e9]),
            slots=random_.choice([1, 8, 32]),
        )  # fmt: skip
        governor = Governor(m, candidates(24))
        p, rate = random_.random(), random_.random()
        world = World(m, p, rate, rate * random_.random(), power=random_.random(), seed=random_.randrange(10**6))
        outlook = governor.outlook = world.outlook
        for _ in range(20):
            cycle = world.run(random_.choice([1, 4, 8]), True)
            governor.acceptance.observe(cycle.k, cycle.accepted)
            governor.demand.observe(cycle.k + 1, cycle.requests / LAYERS, cycle.missing / LAYERS, outlook)
        foreseen = 1.0 if m.ahead else 0.0
        scores = {
            k: brute_force(
                m, governor.acceptance.chances(k), governor.demand.unique(k + 1, outlook),
                governor.demand.missing(k + 1, outlook), foreseen, k,
            )
            for k in governor.choices
        }  # fmt: skip
        for k, score in scores.items():
            assert governor.theta(k) == pytest.approx(score, rel=1e-9)
        assert governor.theta(0) == pytest.approx(brute_force(m, [], TOP_K, outlook.alone, 0.0, 0), rel=1e-9)
        assert governor.best() == max(scores, key=lambda k: (round(scores[k], 9), -k))
        found.add(governor.best())
    assert 0 not in found and len(found) > 4, "the machines were all alike"


def test_a_cycle_counts_the_token_that_comes_for_free() -> None:
    assert tokens_expected([]) == 1.0
    assert tokens_expected([0.5, 0.5]) == 1.75


def test_widths_between_and_beyond_the_measured_ones() -> None:
    table = {1: 1.0, 3: 2.0, 5: 6.0}
    assert [between(table, n) for n in (1, 2, 3, 4, 5, 6)] == [1.0, 1.5, 2.0, 4.0, 6.0, 8.0]
    assert between({1: 1.0}, 9) == 1.0


def test_experts_beyond_those_of_one_token_take_time_too() -> None:
    m = machine(verify={1: 1.0}, expert=0.5)
    assert m.verifying(1, TOP_K) == 1.0 == m.verifying(9, 1.0)
    assert m.verifying(9, TOP_K + 2) == 1.0 + LAYERS * 2 * 0.5


def test_what_the_draft_names_comes_while_it_drafts_and_while_the_target_computes() -> None:
    m = machine(draft_token=1.0, verify={1: 8.0}, expert=0.0, copy=1.0, layers=2, slots=3, staging=2)
    assert m.cycle(0, 3.0, 3.0) == 8 + 6, "a layer learns what it misses when its router has run"
    assert m.cycle(4, 3.0, 3.0, foreseen=0.0) == 4 + 8 + 6
    assert m.cycle(4, 3.0, 3.0) == 4 + 8
    slow = machine(**vars(m) | {"verify": {1: 1.0}})
    assert slow.cycle(4, 3.0, 3.0) == 4 + 3  # observed one token, then three copies; the others hide the target
    assert slow.cycle(4, 5.0, 3.0) == 4 + 3  # in a slot a layer and a staging slab
    assert slow.cycle(4, 6.0, 3.0) == 4 + 5, "all slots hold what is wanted: there is only the staging slab"
    assert machine(**vars(slow) | {"staging": 1}).cycle(4, 6.0, 3.0) == 4 + 1 + 6, "and that one is the pass's"
    assert machine(**vars(m) | {"ahead": 1.0}).cycle(4, 3.0, 3.0) == 4 + 8 + 5


def test_only_tested_positions_are_learnt_from() -> None:
    acceptance = Acceptance()
    assert acceptance.chances(2) == [HOPE, HOPE]
    for _ in range(50):
        acceptance.observe(8, 1)  # the second is refused, what follows is never looked at
    first, second, third = acceptance.chances(3)
    assert first > 0.85 and second < 0.25
    assert 0.3 < third < 0.7, "unknown is not refused"


def test_candidates() -> None:
    assert candidates(0) == (0,) and candidates(4) == (0, 1, 2, 3, 4)
    assert candidates(20)[-3:] == (12, 16, 20)
    assert widths(8) == (1, 2, 3, 5, 9) and widths(10) == (1, 2, 3, 5, 9, 11)


def test_demand_is_what_the_text_says_times_what_passes_were_seen_to_ask_for() -> None:
    outlook = Outlook({1: 4.0, 9: 20.0}, {1: 2.0, 9: 10.0}, 1.0)
    demand = Demand()
    assert demand.unique(5, outlook) == 12.0 and demand.missing(5, outlook) == 6.0
    for _ in range(100):
        demand.observe(5, 18.0, 3.0, outlook)
    assert demand.unique(9, outlook) == pytest.approx(30.0, rel=0.01)
    assert demand.missing(9, outlook) == pytest.approx(5.0, rel=0.01)


# -- choosing --------------------------------------------------------------------------------------------------------
REGIMES = {  # machine, p, rate beside a draft, rate with all slots, power
    "small cache, slow link, experts shared": (machine(copy=4e-3), 0.9, 0.9, 0.7, 0.2),
    "small cache, slow link, none shared": (machine(copy=4e-3), 0.9, 0.9, 0.6, 0.95),
    "large cache": (machine(copy=1e-3), 0.85, 0.02, 0.01, 0.5),
    "noisy draft": (machine(copy=2e-3), 0.2, 0.5, 0.3, 0.7),
    "slow draft": (machine(draft_token=2e-2), 0.9, 0.3, 0.1, 0.5),
    "dear widths": (machine(verify={1: 0.01, 2: 0.02, 5: 0.05, 9: 0.09}), 0.8, 0.1, 0.05, 0.5),
}
PAYS = {"small cache, slow link, experts shared", "large cache"}


@pytest.mark.parametrize("regime", REGIMES)
def test_the_governor_is_near_the_best_fixed_k(regime: str) -> None:
    """Check 16 on made-up machines: 95 % of an exhaustive search, what it costs to find out included."""
    m, p, rate, alone, power = REGIMES[regime]
    world = World(m, p, rate, alone, power)
    governor = Governor(m, candidates(8))
    _, speed = play(governor, world, 600)
    scores = {k: world.throughput(k) for k in candidates(8)}
    assert speed >= 0.95 * max(scores.values())
    assert min(scores.values()) < 0.9 * max(scores.values()), "any k would have passed"
    assert (max(scores, key=scores.__getitem__) > 0) == (regime in PAYS) == governor.drafting


def test_a_wrong_table_is_put_right_by_what_cycles_take() -> None:
    """Passes over several tokens are thought five times as fast as they are; speculation loses, and goes."""
    true = machine(verify={1: 0.010, 2: 0.04, 5: 0.12, 9: 0.20})
    world = World(true, 0.6, 0.1, 0.05)
    assert max(candidates(8), key=world.throughput) == 0
    governor = Governor(machine(), candidates(8))
    chosen, speed = play(governor, world, 1000)
    assert any(chosen) and chosen[-500:].count(0) > 480
    assert speed > 0.95 * world.throughput(0)
    assert sorted(map(abs, governor.errors[-100:]))[50] < 0.15, "check 17"


def test_a_drop_in_acceptance_shrinks_k_at_once_and_k_recovers() -> None:
    """Check 18."""
    m = machine(copy=4e-3)
    world = World(m, 0.95, 0.6, 0.55, 0.3)
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
    play(governor, world, 2000)
    assert governor.k >= 6 > low


@pytest.mark.parametrize("regime", sorted(PAYS))
def test_k_changes_seldom_and_never_passes_its_bounds(regime: str) -> None:
    m, p, rate, alone, power = REGIMES[regime]
    governor = Governor(m, candidates(6))
    play(governor, World(m, p, rate, alone, power), 80)
    last, since = governor.k, PATIENCE
    world = World(m, p, rate, alone, power, seed=5)
    assert governor.drafting
    for most in [100] * 300 + [3, 2, 1, 0]:
        k = governor.choose(most)
        assert 0 <= k <= min(6, most)
        governor.observe(world.run(k, True))
        since += 1
        if governor.k != last:
            assert since >= PATIENCE
            last, since = governor.k, 0


def test_a_cycle_may_be_bounded_in_time() -> None:
    m, p, rate, alone, power = REGIMES["small cache, slow link, experts shared"]
    world = World(m, p, rate, alone, power)
    free, bounded = Governor(m, candidates(8)), Governor(m, candidates(8), world.cost(2, True) * 1.02)
    play(free, world, 100)
    play(bounded, world, 100)
    assert free.k > 4 and 1 <= bounded.k <= 3
    never = Governor(m, candidates(8), world.cost(1, True) / 2)
    assert not any(play(never, world, 100)[0])


# -- the draft's memory ----------------------------------------------------------------------------------------------
def test_no_draft_is_made_where_even_a_good_one_could_not_win() -> None:
    m, p, rate, alone, power = REGIMES["slow draft"]
    assert not any(play(Governor(m, candidates(8)), World(m, p, rate, alone, power), 1000)[0])


def test_a_draft_is_not_tried_before_enough_text_was_seen() -> None:
    m, p, rate, alone, power = REGIMES["small cache, slow link, experts shared"]
    chosen, _ = play(Governor(m, candidates(8)), World(m, p, rate, alone, power), 200)
    first = next(i for i, k in enumerate(chosen) if k)
    assert first >= SEEN + (VERDICTS - 1) * VERDICT_EVERY, "one good moment is no reason"


def test_a_draft_that_is_seldom_accepted_goes_and_is_paid_back_before_the_next_trial() -> None:
    """On a machine where a draft as good as hoped would win, and this one does not."""
    m, _, rate, alone, power = REGIMES["small cache, slow link, experts shared"]
    world, making = World(m, 0.1, rate, alone, power), 1.0
    assert World(m, HOPE, rate, alone, power).throughput(8) > world.throughput(0) > world.throughput(8)
    governor = Governor(m, candidates(8))
    chosen, speed = play(governor, world, 4000, making)
    trials = sum(bool(k) and not before for before, k in pairwise(chosen))
    assert trials >= 2, "texts change: it is tried again"
    assert sum(map(bool, chosen)) < 0.05 * len(chosen)
    assert speed > (1 - 2 * GAIN) * world.throughput(0)


def test_a_draft_goes_at_once_where_it_is_much_slower_and_else_after_several_verdicts() -> None:
    m, p, rate, alone, power = REGIMES["small cache, slow link, experts shared"]
    world, governor = World(m, p, rate, alone, power), Governor(m, candidates(8))
    play(governor, world, 200)
    assert governor.drafting
    world.alone = 0.02  # the text has changed, and the slots would do
    assert max(map(world.throughput, range(1, 9))) < CLEAR * world.throughput(0)
    chosen, _ = play(governor, world, 2 * VERDICT_EVERY)
    assert not governor.drafting and chosen[-1] == 0


def test_a_draft_that_cannot_be_made_is_not_asked_for_again() -> None:
    m, p, rate, alone, power = REGIMES["small cache, slow link, experts shared"]
    governor = Governor(m, candidates(8))
    governor.never()
    assert not any(play(governor, World(m, p, rate, alone, power), 300)[0])


def test_the_first_cycle_with_a_draft_compiles_and_tells_nothing() -> None:
    m, p, rate, alone, power = REGIMES["small cache, slow link, experts shared"]
    world, governor = World(m, p, rate, alone, power), Governor(m, candidates(8))
    while not governor.drafting:
        play(governor, world, 1)
    before = governor.theta(4)
    governor.observe(replace(world.run(0, True), k=0, accepted=0))  # the last token of a text
    assert not governor.warm
    governor.observe(replace(world.run(4, True), seconds=60.0))
    assert governor.warm and governor.theta(4) > before / 2


def test_a_trial_in_a_bad_moment_is_not_the_last() -> None:
    """Drafting was ten times slower than it is while another process ran; later it would win, and does."""
    m, p, rate, alone, power = REGIMES["small cache, slow link, experts shared"]
    world, governor = World(m, p, rate, alone, power), Governor(m, candidates(8))
    busy = World(replace(m, draft_token=20 * m.draft_token, verify={1: 0.2}), p, rate, alone, power)
    while not governor.drafting:
        play(governor, world, 1)
    while governor.drafting:
        play(governor, busy, 1)
    play(governor, world, 6000)
    assert governor.drafting and governor.k > 4


def test_it_says_so_if_drafting_was_never_worth_a_trial() -> None:
    m, p, rate, alone, power = REGIMES["slow draft"]
    governor = Governor(m, candidates(8))
    play(governor, World(m, p, rate, alone, power), SEEN)
    assert not governor.untried, "too early to say"
    play(governor, World(m, p, rate, alone, power), VERDICTS * VERDICT_EVERY)
    assert governor.untried
