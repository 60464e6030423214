"""How many tokens to draft: decided by numbers alone, from what a cycle costs here and what it brought so far.

A cycle that drafts k tokens gives ``1 + sum_i prod_{j <= i} p_j`` tokens, the target's own among them, and takes

    T(k) = T_draft(k) + sum over layers of max(T_compute(k + 1), T_copies that drafting did not hide)

k = 0 is one of the choices, with the cache's own miss rate. Differs from the paper's model (arXiv:2511.14102, section
3.2) in these: it counts the token that comes for free, knows k = 0, and lets copies overlap with the work they overlap
with.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ygglight.engines.moe_speq.lookahead import observed_steps

DECAY = 0.9
"""What a cycle leaves of the weight of those before: some ten cycles count."""
PATIENCE = 4
"""Cycles from one change of k to the next, at least."""
GAIN = 0.03
"""A change must promise so much more throughput."""
PROBES = (32, 512)
"""Cycles at k = 0 until drafting is tried again: first and at most; the pause doubles while it does not pay."""
STALE = 0.8
"""As ``DECAY``, of positions that the cycle did not come to."""
COMMON = 0.95
"""As ``DECAY``, by tested token and over all positions."""
PRIOR = 2.0
"""Cycles' worth of belief that a position is accepted as often as all positions are."""
LOSING = 3
"""Verdicts in a row against the draft before it goes."""
VERDICT_EVERY = 8
"""Cycles from one such verdict to the next."""


@dataclass(frozen=True)
class Machine:
    """What the parts of a cycle cost on this machine, measured while copies run.

    Args:
        draft_base: Seconds of drafting besides its tokens. draft_token: Seconds a drafted token.
        verify: Tokens of a target pass -> its seconds where no expert has to be waited for.
        copy: Seconds a copy of one expert.
        layers: Sparse layers. experts: Of a layer. top_k: Experts a token and layer.
        hideable: Most copies a cycle that may be sent ahead; 0: none is.
    """

    draft_base: float
    draft_token: float
    verify: Mapping[int, float]
    copy: float
    layers: int
    experts: int
    top_k: int
    hideable: float = math.inf

    def at(self, copy: float) -> Machine:
        """The same machine with another time for a copy."""
        return replace(self, copy=copy)

    def drafting(self, k: int) -> float:
        """Seconds of drafting k tokens."""
        return self.draft_base + k * self.draft_token if k else 0.0

    def verifying(self, tokens: int) -> float:
        """Seconds of a target pass over so many tokens: between measured widths a line, beyond them the last one."""
        widths = sorted(self.verify)
        if tokens in self.verify or len(widths) == 1:
            return self.verify.get(tokens, self.verify[widths[0]])
        right = min(max(1, next((i for i, w in enumerate(widths) if w > tokens), len(widths))), len(widths) - 1)
        low, high = widths[right - 1], widths[right]
        slope = (self.verify[high] - self.verify[low]) / (high - low)
        return max(0.0, self.verify[low] + slope * (tokens - low))

    def cycle(self, k: int, copies: Sequence[float], foreseen: float = 1.0) -> float:
        """Seconds of a cycle.

        Args:
            k: Drafted tokens. copies: A layer, experts that are not there when the cycle begins.
            foreseen: Part of them that the draft's routes name.
        """
        window = max(0.0, self.drafting(k) - self.draft_base - observed_steps(k) * self.draft_token) if k else 0.0
        hidden = min(window / self.copy if self.copy else math.inf, self.hideable, foreseen * sum(copies))
        compute = self.verifying(k + 1) / len(copies)
        seconds = self.drafting(k)
        for count in copies:  # the earliest layer's first: it is needed first
            left = max(0.0, count - hidden)
            hidden = max(0.0, hidden - count)
            seconds += max(compute, left * self.copy)
        return seconds


@dataclass(frozen=True)
class Cycle:
    """What one cycle brought.

    Args:
        k: Drafted tokens. accepted: Of them. requests: Unique (layer, expert) that the target asked for.
        missing: Of them, those that were not there when the cycle began. foreseen: Of the missing, those that were
            sent ahead. seconds: In all.
    """

    k: int
    accepted: int
    requests: int
    missing: int
    foreseen: int
    seconds: float


def tokens_expected(chances: Sequence[float]) -> float:
    """Tokens of a cycle: the accepted ones and the target's own.

    Args:
        chances: Of each drafted token to be accepted if those before it were.
    """
    total, survival = 1.0, 1.0
    for chance in chances:
        survival *= chance
        total += survival
    return total


def candidates(k_max: int) -> tuple[int, ...]:
    """The choices from 0 to ``k_max``; far ones in larger steps, where one token more changes little."""
    return (*(k for k in (*range(9), 12, 16, 24, 32, 48, 64) if k < k_max), k_max)


class Acceptance:
    """Chances of acceptance by position, from tested positions alone: the first refused token ends what is known.

    What a position was like fades sooner where it is not tested any more, and then it is thought to be like the tokens
    that were tested last, whatever their position.
    """

    def __init__(self) -> None:
        self._tested: defaultdict[int, float] = defaultdict(float)
        self._kept: defaultdict[int, float] = defaultdict(float)
        self._common = 0.8

    def observe(self, k: int, accepted: int) -> None:
        """Take a cycle in that drafted k tokens, of which so many were accepted."""
        if not k:
            return
        last = min(k, accepted + 1)
        for position in self._tested:
            fade = DECAY if position <= last else STALE
            self._tested[position] *= fade
            self._kept[position] *= fade
        for position in range(1, last + 1):
            kept = position <= accepted
            self._tested[position] += 1
            self._kept[position] += kept
            self._common += (1 - COMMON) * (kept - self._common)

    def chances(self, k: int) -> list[float]:
        """Of the first k positions."""
        return [
            (self._kept[j] + PRIOR * self._common) / (self._tested[j] + PRIOR) if j in self._tested else self._common
            for j in range(1, k + 1)
        ]


class Demand:
    """How many experts a pass asks for, and how many of them are missing.

    Unique experts grow as a power of the tokens: 0 where all tokens take the same, 1 where they share none.

    Args:
        machine: Gives layers, experts and top-k.
    """

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._power = 0.8
        self._rates: dict[int, float] = {}

    def observe(self, tokens: int, requests: int, missing: int) -> None:
        """Take a pass in."""
        if not requests:
            return
        if tokens > 1:
            growth = max(1.0, requests / (self._machine.layers * self._machine.top_k))
            self._power = DECAY * self._power + (1 - DECAY) * math.log(growth) / math.log(tokens)
        rate = missing / requests
        self._rates[tokens] = DECAY * self._rates.get(tokens, rate) + (1 - DECAY) * rate

    def unique(self, tokens: int) -> float:
        """Experts of one layer that a pass over so many tokens asks for."""
        return min(float(self._machine.experts), self._machine.top_k * tokens**self._power)

    def rate(self, tokens: int) -> float:
        """Part of them that is missing, as in the passes of the nearest width that were seen."""
        if not self._rates:
            return 1.0
        return self._rates[min(self._rates, key=lambda n: abs(math.log(n / tokens)))]


class Governor:
    """Chooses k, cycle by cycle.

    Args:
        machine: What things cost. choices: Values of k, ascending; 0 is one of them.
        longest: Seconds that a cycle may take; k = 0 may always.
    """

    def __init__(self, machine: Machine, choices: Iterable[int], longest: float = math.inf) -> None:
        self.machine, self.longest = machine, longest
        self.choices = tuple(choices)
        self.acceptance, self.demand = Acceptance(), Demand(machine)
        self.k = min(4, self.choices[-1])
        self.errors: list[float] = []
        """Predicted over measured seconds of each cycle, less 1; whoever reads it empties it."""
        self._foreseen = 1.0 if machine.hideable else 0.0
        self._off = {False: 1.0, True: 1.0}  # measured over modelled seconds, without a draft and with one
        self._own: dict[int, tuple[float, float]] = {}  # of one k: weight, measured over modelled
        self._since = 0
        self._trials = [k for k in (0, self.k, 0) if k in self.choices]  # before anything is concluded
        self._quiet, self._pause = 0, PROBES[0]
        self._cycles = self._lost = 0

    # -- the model ---------------------------------------------------------------------------------------------------
    def seconds(self, k: int, rate: float | None = None) -> float:
        """Predicted of a cycle.

        Args:
            k: Drafted tokens. rate: Part of the experts that is missing; None: what was seen.
        """
        weight, own = self._own.get(k, (0.0, 1.0))
        return self._modelled(k, rate) * (weight * own + PRIOR * self._off[k > 0]) / (weight + PRIOR)

    def _modelled(self, k: int, rate: float | None = None) -> float:
        missing = self.demand.unique(k + 1) * (self.demand.rate(k + 1) if rate is None else rate)
        return max(1e-12, self.machine.cycle(k, [missing] * self.machine.layers, self._foreseen))

    def theta(self, k: int, rate: float | None = None) -> float:
        """Predicted tokens a second; see :meth:`seconds`."""
        return tokens_expected(self.acceptance.chances(k)) / self.seconds(k, rate)

    def best(self) -> int:
        """The k of the highest throughput whose cycle is not too long; of equal ones the smallest."""
        allowed = [k for k in self.choices if not k or self.seconds(k) <= self.longest]
        return max(allowed, key=lambda k: (self.theta(k), -k))

    # -- cycle by cycle ----------------------------------------------------------------------------------------------
    def choose(self, most: int) -> int:
        """The k of the coming cycle.

        Args:
            most: Tokens that may still be drafted.
        """
        if self._trials:
            return min(self._trials.pop(0), most)
        self._since += 1
        best = self.best()
        better = self.theta(best) > (1 + GAIN) * self.theta(self.k) or self.seconds(self.k) > self.longest
        if best != self.k and better and self._since >= PATIENCE:
            self.k, self._since = best, 0
            self._quiet, self._pause = 0, PROBES[0] if best else self._pause
        self._quiet = 0 if self.k else self._quiet + 1
        if self._quiet >= self._pause:  # at k = 0 nothing is learnt about the draft
            self._quiet, self._pause = 0, min(2 * self._pause, PROBES[1])
            return min(1, most, self.choices[-1])
        return min(self.k, most)

    def observe(self, cycle: Cycle) -> None:
        """Learn from what a cycle brought."""
        predicted = self.seconds(cycle.k)
        self.errors.append(predicted / max(cycle.seconds, 1e-12) - 1)
        self.acceptance.observe(cycle.k, cycle.accepted)
        self.demand.observe(cycle.k + 1, cycle.requests, cycle.missing)
        if cycle.k and cycle.missing and self.machine.hideable:
            self._foreseen = DECAY * self._foreseen + (1 - DECAY) * cycle.foreseen / cycle.missing
        off = min(8.0, max(0.125, cycle.seconds / self._modelled(cycle.k)))
        kind = cycle.k > 0
        self._off[kind] = DECAY * self._off[kind] + (1 - DECAY) * off
        weight, own = self._own.get(cycle.k, (0.0, off))
        weight = DECAY * weight + 1
        self._own[cycle.k] = weight, own + (off - own) / weight

    # -- is the draft worth its memory? ------------------------------------------------------------------------------
    def gives_up(self, rate: float) -> bool:
        """Whether the draft has lost to plain decoding with the draft's memory as slots, several times in a row.

        To be asked once a cycle.

        Args:
            rate: Part of the experts that would be missing at k = 0 with those slots.
        """
        self._cycles += 1
        if self._trials or self._cycles % VERDICT_EVERY:
            return False
        lost = not worth_the_draft(self.theta(self.best()), self.theta(0, rate))
        self._lost = self._lost + 1 if lost else 0
        return self._lost >= LOSING

    def without_draft(self) -> None:
        """From now on nothing is drafted."""
        self.choices, self.k = (0,), 0


def worth_the_draft(speculating: float, plain: float) -> bool:
    """Whether speculation beats plain decoding at equal memory.

    Args:
        speculating: Tokens a second of the best k, 0 among them, beside the draft. plain: Of k = 0 with the draft's
            memory as slots.
    """
    return speculating * (1 + GAIN) >= plain
