"""Which tree to grow next: from measured latencies and from what was accepted so far."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ygglight.engines.yggdrasil.acceptance import RankAcceptance
from ygglight.engines.yggdrasil.calibration import Calibration
from ygglight.engines.yggdrasil.config import BUCKETS, WIDTHS, Config
from ygglight.engines.yggdrasil.objective import Costs, Shape, choose_depth, choose_shape, choose_verify

REVIEW = 8
"""Iterations between two looks at the shape: the search takes milliseconds, and acceptance moves slowly."""
PROBE = 24
"""Plain iterations after which a tree is tried again: text changes, and only drafting shows it."""


class Selector:
    """Chooses the shape of each iteration's tree.

    Args:
        config: what the user said. costs: measured latencies; None with a fixed tree. greedy: whether the best token is
            always taken. free: whether drafting costs nothing: then the largest tree is always grown, and how much of
            it is verified is all that there is to choose.
    """

    def __init__(self, config: Config, costs: Costs | None, *, greedy: bool = True, free: bool = False) -> None:
        self.config, self.costs = config, costs
        self.widths = tuple(w for w in WIDTHS if w <= config.max_width) or (config.max_width,)
        self.depths = tuple(range(1, config.max_depth + 1))
        self.buckets = tuple(b for b in BUCKETS if b <= config.max_verify) or (config.max_verify,)
        self.acceptance = RankAcceptance(max(self.widths))
        self.calibration = Calibration(greedy=greedy)
        fixed = config.fixed_tree()
        if fixed is None and free:
            width, depth = max(self.widths), config.max_depth
            fixed = (width, depth, min(max(self.buckets), 1 + width * depth))
        self._fixed = None if fixed is None else Shape(*fixed)
        self._shape: Shape | None = self._fixed
        self._since_review = REVIEW
        self._plain = 0
        self.promised: float | None = None
        """Speedup that the objective promised for the best tree at its last look."""

    @property
    def chose_plain(self) -> bool:
        """Whether at its last look the objective chose plain decoding."""
        return self.promised is not None and self._shape is None

    def next(self, survival: Sequence[float] | None = None) -> Shape | None:
        """The shape to grow now; None: plain decoding is faster.

        Args:
            survival: P(accepted length >= d), d = 1.., of a depth predictor.
        """
        if self._fixed is not None:
            return self._fixed
        assert self.costs is not None
        self._since_review += 1
        if self._since_review >= REVIEW:
            self._since_review = 0
            choice = choose_shape(self.acceptance.rates, self.costs, self.widths, self.depths, self.buckets)
            self._shape, self.promised = choice.shape, choice.speedup
        if self._shape is None:
            self._plain += 1
            if self._plain <= PROBE:
                return None
            self._plain = 0
            return Shape(width=self.widths[min(1, len(self.widths) - 1)], depth=1, verify=self.buckets[0])
        self._plain = 0
        if survival is not None:
            depth = choose_depth(survival, self._shape.width, self._shape.verify, self.costs, self.depths)
            return Shape(self._shape.width, depth, min(self._shape.verify, 1 + self._shape.width * depth))
        return self._shape

    def verify(self, expected: Sequence[float], shape: Shape) -> int:
        """How many nodes of a tree to verify.

        Args:
            expected: tokens expected if the best k nodes are verified, k = 1.. (:func:`prune.expected`).
        """
        if self.costs is None:
            return min(shape.verify, len(expected))
        chosen, _ = choose_verify(expected, shape.width, shape.depth, self.costs, self.buckets)
        return chosen.verify

    def observe(
        self, ranks: Sequence[int | None], edges: Sequence[float], firsts: Sequence[bool], accepted: Sequence[bool]
    ) -> None:
        """Learn from an iteration.

        Args:
            ranks: for each visited node, the draft's rank of the token that the target drew there (None: not among the
                candidates). edges: draft log-probabilities of children of visited nodes. firsts: which of these were
                the draft's best candidates. accepted: which were accepted.
        """
        for rank in ranks:
            self.acceptance.observe(rank)
        if edges:
            self.calibration.observe(edges, firsts, accepted)

    def state_dict(self) -> dict[str, Any]:
        """What was learnt, as primitives."""
        return {"acceptance": self.acceptance.state_dict(), "calibration": self.calibration.state_dict()}
