"""What the training step would do next, foretold from the step before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ygglight.engines.harli.gate import Quantum

LOOKAHEAD = 64
"""Quanta foretold at most: more than fit beside any decode step."""


class Upcoming:
    """Learns the order of the quanta of a training step; steps of one model repeat it.

    Decode thread only.
    """

    def __init__(self) -> None:
        self._pattern: list[tuple[str, int]] = []
        self._seen: list[tuple[str, int]] = []

    def done(self, quanta: Sequence[Quantum]) -> None:
        """Quanta that ended, in order."""
        for quantum in quanta:
            key = (quantum.phase, quantum.index)
            # A new step begins where the same quantum as at its beginning comes after the last phases.
            if self._seen and key == self._seen[0]:
                self._pattern, self._seen = self._seen, []
            self._seen.append(key)

    def after(self, quantum: Quantum) -> list[Quantum]:
        """``quantum`` and those that would follow it up to the end of the step; alone while nothing is known."""
        key = (quantum.phase, quantum.index)
        if key not in self._pattern:
            return [quantum]
        start = self._pattern.index(key)
        following = self._pattern[start + 1 : start + LOOKAHEAD]
        return [quantum, *(type(quantum)(phase, index, quantum.tokens) for phase, index in following)]  # type: ignore[arg-type]
