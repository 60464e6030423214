"""Whether to draft, and how many tokens: decided by numbers alone, from what cycles cost here and brought so far.

A cycle that drafts k tokens gives ``1 + sum_i prod_{j <= i} p_j`` tokens, the target's own among them, and takes what
:class:`~ygglight.engines.moe_speq.machine.Machine` says. Decoding begins without a draft, and all memory is slots. The
text so far tells what passes over several tokens would miss in the slots that a draft leaves; where even so drafting
promises more, the draft is tried, and it stays as long as it is better than those slots would be.

Differs from the paper's governor (arXiv:2511.14102, section 3.2) in these: it counts the token that comes for free,
knows k = 0, compares it at equal memory, and a trial that fails must be paid back before there is another.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from ygglight.engines.moe_speq.estimates import DECAY, PRIOR, Acceptance, Demand, Outlook
from ygglight.engines.moe_speq.machine import Machine, tokens_expected

PATIENCE = 4
"""Cycles from one change of k to the next, at least."""
GAIN = 0.03
"""A change must promise so much more throughput; and failed trials may take so much of the time."""
SEEN = 32
"""Tokens of text until the first comparison."""
VERDICT_EVERY = 4
"""Cycles from one comparison with the other split of the memory to the next."""
VERDICTS = 3
"""Comparisons in a row for a draft before it is made."""
LEAVING = 6
"""Comparisons in a row against it before it goes. What plain decoding takes is not measured meanwhile: a machine that
other work slows down by a fifth for some seconds looks as if the draft did."""
PAUSE = 256
"""Tokens from the end of a draft to the next one, at least, though it paid while it was there."""
CLEAR = 0.6
"""A draft this much slower than its memory as slots goes at once."""


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
    requests: float
    missing: float
    foreseen: float
    seconds: float


class Governor:
    """Chooses the split of the memory, and k, cycle by cycle.

    Args:
        machine: What things cost. choices: Values of k.
        longest: Seconds that a cycle may take; k = 0 may always.
    """

    def __init__(self, machine: Machine, choices: Iterable[int], longest: float = math.inf) -> None:
        self.machine, self.longest = machine, longest
        self.choices = tuple(k for k in choices if k)
        self.acceptance, self.demand = Acceptance(), Demand()
        self.outlook: Outlook | None = None
        self.drafting = False
        """Whether there is a draft now; see :meth:`begin` and :meth:`end`."""
        self.k = 0
        self._refused, self._tried = 0, False
        self.errors: list[float] = []
        """Predicted over measured seconds of each cycle, less 1; whoever reads it empties it."""
        self._foreseen = 1.0 if machine.ahead else 0.0
        self._off: dict[bool, float] = {}  # measured over modelled seconds, without a draft and with one
        self._own: dict[int, tuple[float, float]] = {}  # of one k: weight, measured over modelled
        self._since = self._cycles = self._verdicts = 0
        self._spent, self._brought = 0.0, 0  # seconds and tokens of the present trial
        self._debt = 0.0  # seconds that trials have cost and that are not paid back yet
        self.warm = True
        """Not so: the coming cycle with a draft is the first, which compiles and records, and tells nothing."""

    # -- the model ---------------------------------------------------------------------------------------------------
    def seconds(self, k: int) -> float:
        """Predicted of a cycle: k = 0 with all memory as slots, others beside a draft.

        Raises:
            ValueError: nothing was observed yet.
        """
        weight, own = self._own.get(k, (0.0, 1.0))
        general = self._off.get(k > 0, self._off.get(k == 0, 1.0))
        return self._modelled(k) * (weight * own + PRIOR * general) / (weight + PRIOR)

    def _modelled(self, k: int) -> float:
        if self.outlook is None:
            raise ValueError("no cycle was observed yet")
        if k:
            unique, missing = self.demand.unique(k + 1, self.outlook), self.demand.missing(k + 1, self.outlook)
        else:
            unique, missing = float(self.machine.top_k), self.outlook.alone
        return max(1e-12, self.machine.cycle(k, unique, missing, self._foreseen))

    def theta(self, k: int) -> float:
        """Predicted tokens a second; see :meth:`seconds`."""
        return tokens_expected(self.acceptance.chances(k)) / self.seconds(k)

    def best(self) -> int:
        """Tokens to draft for the highest throughput beside a draft, in cycles not too long; of equal ones the fewest.

        0 if all cycles with a draft are too long.
        """
        allowed = [k for k in self.choices if self.seconds(k) <= self.longest]
        return max(allowed, key=lambda k: (self.theta(k), -k), default=0)

    # -- cycle by cycle ----------------------------------------------------------------------------------------------
    def choose(self, most: int) -> int:
        """The k of the coming cycle.

        Args:
            most: Tokens that may still be drafted.
        """
        if not self.drafting:
            return 0
        self._since += 1
        best = self.best()
        better = self.theta(best) > (1 + GAIN) * self.theta(self.k) or self.seconds(self.k) > self.longest
        if best != self.k and better and self._since >= PATIENCE:
            self.k, self._since = best, 0
        return min(self.k, most)

    @property
    def due(self) -> bool:
        """Whether the next call of :meth:`observe` shall bring an outlook: the last one is some cycles old."""
        return self.outlook is None or not (self._cycles + 1) % VERDICT_EVERY

    def observe(self, cycle: Cycle, outlook: Outlook | None = None) -> None:
        """Learn from what a cycle brought.

        Args:
            cycle: That one. outlook: On the coming ones; None: as before. See :attr:`due`.
        """
        before = self.outlook
        # The last cycle of a text may draft nothing: beside a draft it says nothing about all memory as slots.
        odd = self.drafting and (not cycle.k or not self.warm)
        self.warm = self.warm or cycle.k > 0
        if before is not None and not odd:
            self.errors.append(self.seconds(cycle.k) / max(cycle.seconds, 1e-12) - 1)
        outlook = self.outlook = outlook or before
        if outlook is None:
            raise ValueError("the first cycle needs an outlook")
        self.acceptance.observe(cycle.k, cycle.accepted)
        if cycle.k:
            layers = self.machine.layers
            self.demand.observe(cycle.k + 1, cycle.requests / layers, cycle.missing / layers, before or outlook)
            if cycle.missing and self.machine.ahead:
                self._foreseen = DECAY * self._foreseen + (1 - DECAY) * min(1.0, cycle.foreseen / cycle.missing)
        if not odd:
            self._correct(cycle)
        self._cycles += 1
        if self.drafting:
            self._spent += cycle.seconds
            self._brought += cycle.accepted + 1
        elif self._debt:
            self._debt = max(0.0, self._debt - GAIN * cycle.seconds)
            if not self._debt:
                self._forget()

    def _correct(self, cycle: Cycle) -> None:
        off = min(8.0, max(0.125, cycle.seconds / self._modelled(cycle.k)))
        kind = cycle.k > 0
        self._off[kind] = DECAY * self._off.get(kind, off) + (1 - DECAY) * off
        weight, own = self._own.get(cycle.k, (0.0, off))
        weight = DECAY * weight + 1
        self._own[cycle.k] = weight, own + (off - own) / weight

    # -- is the draft worth its memory? ------------------------------------------------------------------------------
    def wants_draft(self) -> bool:
        """Whether drafting promised more than all memory as slots, several times in a row. To be asked once a cycle."""
        if self.drafting or not self.choices or self._cycles < SEEN or self._debt or self._cycles % VERDICT_EVERY:
            return False
        best = self.best()
        won = best > 0 and self.theta(best) > (1 + GAIN) * self.theta(0)
        self._verdicts = self._verdicts + 1 if won else 0
        self._refused += not won
        return self._verdicts >= VERDICTS

    def gives_up(self) -> bool:
        """Whether the draft is slower than its memory as slots would be: clearly, or several times in a row.

        To be asked once a cycle.
        """
        if not self.drafting or self._cycles % VERDICT_EVERY:
            return False
        best = self.best()
        share = self.theta(best) / self.theta(0) if best else 0.0
        self._verdicts = self._verdicts + 1 if (1 + GAIN) * share < 1 else 0
        return self._verdicts >= LEAVING or (self._verdicts > 0 and share < CLEAR)

    @property
    def untried(self) -> bool:
        """Whether drafting was never tried, though it could have been, and lost most comparisons."""
        return not self._tried and bool(self.choices) and self.longest == math.inf and self._refused >= VERDICTS

    def begin(self, seconds: float = 0.0) -> None:
        """There is a draft from now on.

        Args:
            seconds: That it took to make.
        """
        self._tried = self.drafting = True
        self.k, self._since = self.best() or self.choices[0], 0
        self._spent, self._brought, self._verdicts, self._cycles, self.warm = seconds, 0, 0, 0, False

    def end(self) -> None:
        """There is no draft any more. What the trial took too long is to be paid back before the next one."""
        self._debt = max(self._spent - self._brought / self.theta(0), GAIN * PAUSE / self.theta(0))
        self.drafting, self.k, self._verdicts, self._cycles = False, 0, 0, 0

    def _forget(self) -> None:
        """Texts and machines change: what was learnt of drafting is not held against it for ever."""
        self.acceptance, self.demand = Acceptance(), Demand()
        self._foreseen = 1.0 if self.machine.ahead else 0.0
        self._off.pop(True, None)
        self._own = {k: own for k, own in self._own.items() if not k}

    def never(self) -> None:
        """There is no draft, and there will be none."""
        self.choices = ()
        self.drafting, self.k = False, 0
