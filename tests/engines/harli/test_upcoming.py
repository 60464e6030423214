"""What comes next, from the step before."""

from __future__ import annotations

from ygglight.engines.harli.gate import Quantum
from ygglight.engines.harli.upcoming import LOOKAHEAD, Upcoming


def step(tokens: int, blocks: int = 3) -> list[Quantum]:
    forward = [Quantum("forward", i, tokens) for i in range(blocks)]
    backward = [Quantum("backward", i, tokens) for i in range(blocks, -1, -1)]
    return [Quantum("other", 0, tokens), *forward, Quantum("loss", 0, tokens), *backward]


def test_nothing_is_foretold_before_a_whole_step_was_seen() -> None:
    upcoming = Upcoming()
    assert upcoming.after(step(7)[1]) == step(7)[1:2]
    upcoming.done(step(7))
    assert upcoming.after(step(7)[1]) == step(7)[1:2], "the step may have more to come"


def test_a_step_repeats_the_one_before_with_the_tokens_of_its_own() -> None:
    upcoming = Upcoming()
    upcoming.done(step(7))
    upcoming.done(step(9)[:1])
    left, last = step(9)[2:], step(9)[-1:]
    assert upcoming.after(step(9)[2])[: len(left)] == left
    # And the next one after it: what runs in turn does not end with a step.
    assert upcoming.after(step(9)[-1])[: 1 + len(step(9))] == [*last, *step(9)]
    assert upcoming.after(Quantum("clip", 5, 9)) == [Quantum("clip", 5, 9)]


def test_between_two_steps_the_next_one_is_foretold() -> None:
    upcoming = Upcoming()
    assert upcoming.after(None) == []
    upcoming.done([*step(7), *step(9)])
    assert upcoming.after(None)[: len(step(9))] == step(9)


def test_a_step_that_was_broken_off_is_forgotten_by_the_next() -> None:
    upcoming = Upcoming()
    for quanta in (step(7), step(7)[:3], step(7), step(7)[:1]):
        upcoming.done(quanta)
    assert upcoming.after(step(7)[0])[: len(step(7)) + 1] == [*step(7), step(7)[0]]


def test_no_more_than_can_be_used_are_foretold() -> None:
    upcoming = Upcoming()
    upcoming.done(step(1, blocks=200))
    upcoming.done(step(1)[:1])
    assert len(upcoming.after(step(1)[0])) == LOOKAHEAD
