"""What the training step would do next, foretold from the step before."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from ygglight.engines.harli.gate import Phase, Quantum

LOOKAHEAD = 64
"""Quanta foretold at most: more than fit beside any decode step."""


class Upcoming:
    """Learns the order of the quanta of a training step; steps of one model repeat it.

    Decode thread only.
    """

    def __init__(self) -> None:
        self._pattern: list[tuple[Phase, int]] = []
        self._seen: list[tuple[Phase, int]] = []
        self._tokens = 0

    def done(self, quanta: Sequence[Quantum]) -> None:
        """Quanta that ended, in order."""
        for quantum in quanta:
            key = (quantum.phase, quantum.index)
            # A new step begins where the same quantum as at its beginning comes after the last phases.
            if self._seen and key == self._seen[0]:
                self._pattern, self._seen = self._seen, []
            self._seen.append(key)
            self._tokens = quantum.tokens

    def after(self, quantum: Quantum | None) -> list[Quantum]:
        """``quantum`` and those that would follow it, step after step; alone while nothing is known.

        Args:
            quantum: None: the training thread is between two steps.
        """
        first = [] if quantum is None else [quantum]
        tokens = self._tokens if quantum is None else quantum.tokens
        following = self._pattern
        if quantum is not None:
            key = (quantum.phase, quantum.index)
            if key not in following:
                return first
            following = following[following.index(key) + 1 :]
        cycle = itertools.islice(itertools.chain(following, itertools.cycle(self._pattern)), LOOKAHEAD - len(first))
        return [*first, *(Quantum(phase, index, tokens) for phase, index in cycle)]
