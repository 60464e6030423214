"""What the scheduler is asked: prompts held back, time kept for those that may come, what finetuning does next."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ygglight.engines.harli.executors import ThreadPools, TimeSlices
from ygglight.engines.harli.foresight import HELD_MOST, LEAST_CHUNK, RESERVE_MOST, RESERVED, WORTH_CHUNK, Foresight
from ygglight.engines.harli.gate import Gate, Quantum
from ygglight.engines.harli.partitions import alone
from ygglight.engines.harli.predictor import LatencyPredictor
from ygglight.engines.harli.slack import Slack
from ygglight.engines.harli.work import Load

CHUNK = 128


def predictor() -> LatencyPredictor:
    """Decoding 50 ms; prompts 1 ms a token."""
    made = LatencyPredictor(2)
    for _ in range(8):
        for batch in (1, 2, 4):
            made.observe_decode(batch, 64 * batch, alone(2), 0.05, None)
        for tokens in (16, 64, 128):
            made.observe_prefill(tokens, 0, alone(2), tokens * 1e-3, None)
    return made


class Batcher:
    """As much of one as is asked."""

    def __init__(self, running: int = 1, prompt: int = 0) -> None:
        self.arena = SimpleNamespace(chunks=100, kv_watermark=0)
        self.decoder = SimpleNamespace(pages_for=lambda tokens: -(-tokens // 16))
        self.running, self.next_prompt = running, prompt

    def load(self) -> Load:
        return Load(self.running, 64 * self.running, 0, self.next_prompt)


def foresight(
    batcher: Batcher, gate: Gate | None = None, slices: bool = False, holds: bool = True, slow: float = 0.0
) -> Foresight:
    executor, learnt = TimeSlices(2) if slices else ThreadPools(2), predictor()
    if slow:  # one bad moment
        learnt.observe_prefill(60, 0, alone(2), slow, None)
    made: Any = batcher
    return Foresight(gate or Gate(), made, executor, learnt, chunk=CHUNK, units=2, cuda=False, holds=holds)


def slack(first: float = 0.0, tpot: float = 0.2) -> Slack:
    made = Slack(tpot, 4 * tpot, margin=0.0)
    made.token("running", first)
    return made


def work(kind: str = "decode", prompt: int = 0) -> Any:
    sequence = SimpleNamespace(cached=0)
    request = SimpleNamespace(prompt=[1] * prompt)
    return SimpleNamespace(
        kind=kind, requests=(request,), tokens=min(prompt, CHUNK) or 1, context_tokens=64, sequences=(sequence,)
    )


def test_a_prompt_goes_whole_where_those_who_run_can_bear_it() -> None:
    assert foresight(Batcher(prompt=60)).prefill_chunk(slack(), now=0.0) == 60
    assert foresight(Batcher(prompt=500)).prefill_chunk(slack(first=10.0), now=10.0) == pytest.approx(128, abs=20)
    assert foresight(Batcher(running=0, prompt=500)).prefill_chunk(Slack(0.2, 0.8), now=5.0) == CHUNK


def test_a_prompt_that_does_not_fit_is_held_back_for_some_steps_and_not_for_ever() -> None:
    ahead = foresight(Batcher(prompt=60))
    late = slack()
    sizes = [ahead.prefill_chunk(late, now=0.12) for _ in range(2 * HELD_MOST + 2)]  # 80 ms left, 50 of them decode's
    assert sizes == [*[0] * HELD_MOST, LEAST_CHUNK, *[0] * HELD_MOST, LEAST_CHUNK]
    late.token("running", 0.12)  # and as soon as it fits it goes
    assert ahead.prefill_chunk(late, now=0.12) >= WORTH_CHUNK


def test_fixed_rules_hold_nothing_back() -> None:
    ahead = foresight(Batcher(prompt=60), holds=False)
    assert ahead.prefill_chunk(slack(), now=0.12) == LEAST_CHUNK


def test_one_slow_moment_holds_no_prompts_back() -> None:
    assert foresight(Batcher(prompt=60), slow=0.3).prefill_chunk(slack(), now=0.02) > 0


def test_a_short_prompt_needs_no_more_than_it_has() -> None:
    assert foresight(Batcher(prompt=10)).prefill_chunk(slack(), now=0.11) >= 10
    assert foresight(Batcher(prompt=60)).prefill_chunk(slack(), now=0.11) == 0


def test_time_is_kept_for_prompts_as_long_as_late_ones() -> None:
    ahead = foresight(Batcher())
    assert ahead.situation(work(), slack(), 0.0).reserve_seconds == 0, "nobody knows how long prompts are"
    for length in [20] * 9 + [100] * 9:
        ahead.situation(work("prefill", length), slack(), 0.0)
    kept = ahead.situation(work(), slack(), 0.0).reserve_seconds
    assert kept == pytest.approx(RESERVED * 0.1, rel=0.2)
    assert ahead.situation(work(), slack(tpot=0.06), 0.0).reserve_seconds == pytest.approx(RESERVE_MOST * 0.24)


def test_the_decode_step_of_those_who_run_comes_after_a_prompt() -> None:
    asked = foresight(Batcher(prompt=60)).situation(work("prefill", 60), slack(), 0.0)
    assert (asked.batch, asked.prefill_tokens) == (0, 60)
    assert asked.allowed_seconds == pytest.approx(0.2 - 0.05, rel=0.1)


def test_quanta_of_the_next_training_step_are_foretold_between_two() -> None:
    gate = Gate()
    ahead = foresight(Batcher(), gate)
    with gate.training():
        for index in (0, 1, 0, 1, 0):
            gate.boundary(Quantum("forward", index, 8))
    ahead.learn()
    asked = ahead.situation(work(), slack(), 0.0)
    assert [q.index for q in asked.next_quanta[:4]] == [0, 1, 0, 1]
    assert asked.running is None and asked.held is None and asked.afterwards == 2
    assert foresight(Batcher(), gate, slices=True).situation(work(), slack(), 0.0).afterwards == 0
