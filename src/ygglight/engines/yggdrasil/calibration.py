"""From the draft's probability to the chance of acceptance: small drafts are over-confident (brief, trap 3)."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

# Bin edges in log-probability: finer where drafts are sure, for that is where trees grow.
EDGES = (-8.0, -6.0, -5.0, -4.0, -3.2, -2.5, -2.0, -1.5, -1.1, -0.8, -0.5, -0.3, -0.15, -0.06, -0.02)
PRIOR_WEIGHT = 8.0


class Calibration:
    """A monotone map from an edge's draft log-probability to the log of how often such edges were accepted.

    One map for the draft's best candidates and one for the rest: greedy text follows the best candidate far more often
    than its probability says. Each is made of counts in bins, drawn to a prior of a few observations, made
    non-decreasing by pooling neighbours (isotonic regression), and interpolated between the centres of the bins.

    Args:
        greedy: whether the target takes its best token. Then the prior of a best candidate of probability p is (1 + p)
            / 2 and that of any other p / 2; for sampled text it is p.
        memory: observations of a bin after which an old one counts 1/e.
    """

    def __init__(self, *, greedy: bool = False, memory: float = 500.0) -> None:
        bounds = (-10.0, *EDGES, 0.0)
        self._centres = [0.5 * (a + b) for a, b in pairwise(bounds)]
        p = [math.exp(c) for c in self._centres]
        priors = ([(1 + x) / 2 for x in p], [x / 2 for x in p]) if greedy else (p, p)
        self._hits = [[x * PRIOR_WEIGHT for x in prior] for prior in priors]
        self._totals = [[PRIOR_WEIGHT] * len(p) for _ in priors]
        self._decay = 1 - 1 / memory
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def observe(self, edges: Sequence[float], firsts: Sequence[bool], accepted: Sequence[bool]) -> None:
        """Learn.

        Args:
            edges: the draft's log-probabilities of children of accepted nodes. firsts: whether each was the draft's
                best candidate. accepted: whether it was accepted.
        """
        for edge, first, hit in zip(edges, firsts, accepted, strict=True):
            table, index = 0 if first else 1, bisect.bisect_left(EDGES, edge)
            self._hits[table][index] = self._hits[table][index] * self._decay + hit
            self._totals[table][index] = self._totals[table][index] * self._decay + 1
        if edges:
            self._tables.clear()

    @property
    def rates(self) -> tuple[list[float], list[float]]:
        """Share accepted in each bin, non-decreasing: of best candidates, and of others."""
        best, rest = (
            isotonic([h / t for h, t in zip(hits, totals, strict=True)], totals)
            for hits, totals in zip(self._hits, self._totals, strict=True)
        )
        return best, rest

    def __call__(self, log_probabilities: Tensor) -> Tensor:
        """Calibrated log-values, at most 0.

        Args:
            log_probabilities: float ``[n, k]`` of candidates in order of rank; -inf stays -inf.
        """
        centres, logs = self._table(log_probabilities.device)
        place = torch.bucketize(log_probabilities.contiguous(), centres).clamp(1, len(centres) - 1)
        low, high = centres[place - 1], centres[place]
        share = ((log_probabilities - low) / (high - low)).clamp(max=1.0)
        table = torch.ones_like(place)
        table[..., 0] = 0
        value = logs[table, place - 1] + share * (logs[table, place] - logs[table, place - 1])
        return torch.where(torch.isinf(log_probabilities), log_probabilities, value)

    def _table(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._tables:
            logs = [[math.log(min(max(rate, 1e-6), 0.999)) for rate in table] for table in self.rates]
            self._tables[device] = (torch.tensor(self._centres, device=device), torch.tensor(logs, device=device))
        return self._tables[device]

    def state_dict(self) -> dict[str, Any]:
        """Primitives."""
        return {"hits": [list(h) for h in self._hits], "totals": [list(t) for t in self._totals]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse."""
        self._hits, self._totals = [list(h) for h in state["hits"]], [list(t) for t in state["totals"]]
        self._tables.clear()


def isotonic(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """The non-decreasing sequence nearest to ``values`` in weighted squares (pool adjacent violators)."""
    blocks: list[list[float]] = []  # mean, weight, length
    for value, weight in zip(values, weights, strict=True):
        blocks.append([value, weight, 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            mean, heavy, length = blocks.pop()
            last = blocks[-1]
            last[0] = (last[0] * last[1] + mean * heavy) / (last[1] + heavy)
            last[1] += heavy
            last[2] += length
    return [mean for mean, _, length in blocks for _ in range(int(length))]
