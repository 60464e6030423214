"""Which stages run ahead of time: the plans are tried in turn on real work, and the fastest is frozen (brief A.4)."""

from __future__ import annotations

import time

import torch

from ygglight.engines.yggdrasil.config import PLANS, StagePlan

ROUNDS = 4
"""Turns that each plan gets."""
TURN = 8
"""Iterations a turn: long enough that reading the clock, which waits for the device, does not count."""


class PlanTrial:
    """Hands out the plan of each iteration, and settles for one.

    All plans give the same text, so the trial is done on the user's own: only its speed varies while it lasts.

    Args:
        fixed: the plan that was asked for; None tries them all. device: where the work runs. On a CPU nothing overlaps
            and reads cost nothing, so the plan without work ahead of time, which prunes every tree, is taken untried.
        of_model: whether the draft is a model; copied text has no stages to move, and is made and pruned on the host.
    """

    def __init__(self, fixed: StagePlan | None, device: torch.device, *, of_model: bool) -> None:
        self._device = device
        self.frozen: StagePlan | None = fixed
        if (fixed is None and device.type == "cpu") or (fixed is None and not of_model):
            self.frozen = StagePlan()
        self.seconds_per_token: dict[StagePlan, float] = {}
        self._spent = {plan: [0.0, 0] for plan in PLANS}
        self._turn = self._count = 0
        self._started: float | None = None

    def next(self) -> StagePlan:
        """The plan of the coming iteration."""
        if self.frozen is not None:
            return self.frozen
        if self._started is None:
            self._started = self._now()
        return PLANS[self._turn % len(PLANS)]

    def done(self, tokens: int) -> None:
        """An iteration under :meth:`next` gave so many tokens."""
        if self.frozen is not None or self._started is None:
            return
        self._spent[PLANS[self._turn % len(PLANS)]][1] += tokens
        self._count += 1
        if self._count < TURN:
            return
        now = self._now()
        if self._turn >= len(PLANS):  # the first turn of each records its graphs
            self._spent[PLANS[self._turn % len(PLANS)]][0] += now - self._started
        else:
            self._spent[PLANS[self._turn % len(PLANS)]][1] = 0
        self._turn, self._count, self._started = self._turn + 1, 0, now
        if self._turn >= len(PLANS) * (ROUNDS + 1):
            self.seconds_per_token = {plan: s / max(1, n) for plan, (s, n) in self._spent.items()}
            self.frozen = min(self.seconds_per_token, key=self.seconds_per_token.__getitem__)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
