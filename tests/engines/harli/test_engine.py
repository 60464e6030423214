"""The decode side by itself: what it says, its targets, how it ends, and what its death does."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from ygglight.engines.decode.sampling import SamplingParams
from ygglight.engines.harli.config import HarliConfig
from ygglight.engines.harli.engine import Engine
from ygglight.engines.harli.gate import Gate, Quantum
from ygglight.engines.harli.partitions import alone
from ygglight.engines.harli.requests import Closing, QueueFull, Request, TokenEvent
from ygglight.engines.harli.scheduler import Decision, Scheduler

from .conftest import generated, llama, prompts, shake, with_lora


class Words:
    """As much of a tokenizer as the engine asks for."""

    eos_token_id = None
    all_special_ids: tuple[int, ...] = ()

    def decode(self, ids: Any, **_: Any) -> str:
        return "".join(f"<{int(token)}>" for token in ids)


class Asked:
    def __init__(self, engine: Engine, prompt: list[int], tokens: int, model: str = "base") -> None:
        self.events: list[TokenEvent] = []
        self.ended = threading.Event()
        sampling = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        self.request = Request(prompt, self._on_event, sampling, model=model)
        engine.submit(self.request)

    def _on_event(self, event: TokenEvent) -> None:
        self.events.append(event)
        if event.finish_reason is not None:
            self.ended.set()

    def result(self) -> list[int]:
        assert self.ended.wait(30)
        return [event.token for event in self.events if event.token is not None]


Make = Callable[..., Engine]


@pytest.fixture
def make() -> Iterator[Make]:
    """Engines, stopped after the test."""
    made: list[Engine] = []

    def build(model: Any = None, **config: Any) -> Engine:
        options: dict[str, Any] = {"memory": "4MiB", "max_batch": 3, "prefill_chunk": 32, "max_context": 200}
        options |= {"tpot_slo": 0.02} | config
        policy = {"policy": options.pop("policy")} if "policy" in options else {}
        model = with_lora(llama()) if model is None else model
        made.append(Engine(model, Words(), HarliConfig(**options), Gate(), **policy))
        return made[-1]

    yield build
    for engine in made:
        engine.stop(0.0)


def test_it_says_what_each_model_says_alone(make: Make) -> None:
    model = with_lora(llama())
    engine = make(model)
    engine.start()
    asked = [Asked(engine, prompt, 24, ("base", "adapter")[i % 2]) for i, prompt in enumerate(prompts(5))]
    found = [a.result() for a in asked]
    expected = []
    for index, prompt in enumerate(prompts(5)):
        if index % 2:
            expected.append(generated(model, prompt, 24))
        else:
            with model.disable_adapter():
                expected.append(generated(model, prompt, 24))
    assert found == expected and found[0] != found[1]
    before = asked[1].request.adapter_version
    shake(model, seed=5)
    assert Asked(engine, prompts(2)[1], 24, "adapter").result() == found[1], "it serves what was not published"
    engine.publish(model)
    later = Asked(engine, prompts(2)[1], 24, "adapter")
    assert later.result() == generated(model, prompts(2)[1], 24) != found[1]
    assert (before, later.request.adapter_version) == (0, 1)
    assert engine.stop(10.0) and not engine.alive


def test_counts_for_probes(make: Make) -> None:
    engine = make()
    engine.start()
    assert engine.status()["finetuning"] is True and engine.status()["attainment"] is None
    assert len(Asked(engine, [3, 4], 6).result()) == 6
    engine.training_ended()
    status, metrics = engine.status(), engine.metrics()
    assert status["finetuning"] is False and status["tpot_slo_ms"] == 20 and status["executor"] == engine.executor.name
    assert engine.report.requests == 1 and engine.report.output_tokens == 6
    assert metrics["arena_bytes"] <= 4 << 20 and all(isinstance(value, int | float) for value in metrics.values())
    assert engine.models() == ["base", "adapter"]


def test_targets_that_are_left_open_come_from_measurements(make: Make) -> None:
    engine = make(tpot_slo=None)
    engine.start()
    solo = engine.predictor.solo(3, 3 * 200, alone(engine.units))
    assert engine.report.tpot_slo == pytest.approx(2 * solo, rel=0.5)
    assert engine.report.max_gap == pytest.approx(4 * engine.report.tpot_slo)
    assert engine.arena.counts().kv == engine.arena.chunks - engine.arena.counts().free < 3, "measuring kept pages"


def test_a_target_below_what_decoding_takes_is_said(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    engine = make(tpot_slo=1e-6, max_gap=1e-3)
    engine.start()
    assert "will miss it even without finetuning" in caplog.text
    assert len(Asked(engine, [3, 4], 3).result()) == 3


def test_a_gap_below_the_measured_target_is_an_error_of_start(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    engine = make(tpot_slo=None, max_gap=1e-9)
    with pytest.raises(ValueError, match="the longest gap no shorter"):
        engine.start()
    assert not engine.alive and "finetuning goes on" not in caplog.text


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"memory": "2KiB"}, "give more memory"),
        ({"memory": "100KiB", "max_context": 500}, "too little for max_context=500"),
        ({"max_context": 5000}, "made for 512 tokens"),
    ],
)
def test_an_arena_that_is_too_small(make: Make, config: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make(**config)


def test_the_longest_text_follows_from_model_and_memory(make: Make) -> None:
    assert make(max_context=None, memory="4MiB").max_context == 512
    small = make(max_context=None, memory="160KiB")
    assert small.max_context == small.arena.chunks // 2 * small.decoder.page < 512


def test_a_full_queue_is_counted(make: Make) -> None:
    engine = make(max_queue=1, max_batch=1)
    engine.start()
    hold = threading.Event()
    run = engine.batcher.run
    engine.batcher.run = lambda work: (hold.wait(30), run(work))[1]  # type: ignore[method-assign]
    first = Asked(engine, [1], 3)
    while engine.batcher.load().waiting:
        threading.Event().wait(0.001)
    second = Asked(engine, [1], 3)
    with pytest.raises(QueueFull):
        Asked(engine, [1], 3)
    hold.set()
    assert len(first.result()) == len(second.result()) == 3 and engine.report.rejected == 1


def test_stopping_finishes_what_is_here_or_cancels_it(make: Make) -> None:
    engine = make()
    engine.start()
    asked = Asked(engine, [3, 4], 150)
    assert engine.stop(30.0) and len(asked.result()) == 150
    with pytest.raises(Closing):
        Asked(engine, [3], 1)
    assert engine.stop(0.0), "stopping twice is harmless"
    other = make()
    other.start()
    run, step = other.batcher.run, threading.Event()
    other.batcher.run = lambda work: (step.wait(0.02), run(work))[1]  # type: ignore[method-assign]
    asked = Asked(other, [3, 4], 150)
    assert not other.stop(0.05) and not other.alive
    assert asked.ended.wait(1) and asked.events[-1].finish_reason == "cancelled"
    assert other.arena.counts().kv == other.arena.counts().chunks - other.arena.counts().free


def test_when_its_policy_fails_requests_are_told_and_finetuning_is_let_through(make: Make) -> None:
    class Broken(Scheduler):
        def decide(self, situation: Any) -> Any:
            if situation.batch:
                raise ZeroDivisionError("no idea")
            return Decision(alone(self.units), 0, 0.0, "paused")

    engine = make(policy=Broken)
    engine.start()
    asked = Asked(engine, [3, 4], 9)
    with engine.gate.training():
        engine.gate.boundary(Quantum("forward", 0, 1))  # would wait for ever
    assert asked.ended.wait(30) and asked.events[-1].finish_reason == "error"
    assert engine._thread is not None
    engine._thread.join(30)
    assert not engine.alive
    with pytest.raises(Closing):
        Asked(engine, [3], 1)
    assert engine.stop(1.0)


def test_a_failed_measurement_is_an_error_of_start(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make()

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("the model cannot decode")

    monkeypatch.setattr(engine.decoder, "decode", broken)
    with pytest.raises(RuntimeError, match="cannot decode"):
        engine.start()
    assert not engine.alive


def test_a_forward_that_fails_ends_its_requests_alone(make: Make) -> None:
    engine = make()
    engine.start()
    usual, left = engine.decoder.decode, [1]

    def once(*args: Any) -> Any:
        if left:
            left.pop()
            raise torch.OutOfMemoryError("injected")
        return usual(*args)

    engine.decoder.decode = once  # type: ignore[method-assign]
    asked = Asked(engine, [3, 4], 9)
    asked.result()
    assert asked.events[-1].finish_reason == "error" and "injected" in str(asked.events[-1].error)
    assert len(Asked(engine, [3, 4], 9).result()) == 9
    assert engine.report.requests == 2 and engine.report.attained <= 1
