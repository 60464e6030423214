"""Replaying a trace, on a clock that is set by hand and once from the thread."""

from __future__ import annotations

import threading

import pytest

from ygglight.engines.harli.replay import Replayer
from ygglight.engines.harli.requests import QueueFull, Request, TokenEvent
from ygglight.engines.harli.trace import Trace, TracedRequest, poisson


class Clock:
    """Shows what it is set to."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class Target:
    """Takes requests, up to a number, and answers when it is told to."""

    def __init__(self, room: int = 100) -> None:
        self.taken: list[Request] = []
        self.room = room

    def submit(self, request: Request) -> None:
        if len(self.taken) >= self.room:
            raise QueueFull(1.0)
        if len(request.prompt) > 50:
            raise ValueError("the prompt is too long")
        self.taken.append(request)


TRACE = Trace.of(
    [
        TracedRequest(1.0, 3, prompt_tokens=4),
        TracedRequest(1.0, 2, prompt="ab", model="adapter"),
        TracedRequest(3.0, 2, prompt_tokens=5),
    ],
    seconds=10.0,
)


def replayer(trace: Trace, target: Target, clock: Clock) -> Replayer:
    return Replayer(trace, target, encode=lambda text: [ord(letter) for letter in text], vocabulary=20, clock=clock)


def test_requests_are_submitted_when_due_and_not_before() -> None:
    clock, target = Clock(100.0), Target()
    replay = replayer(TRACE, target, clock)
    with pytest.raises(RuntimeError, match="begin"):
        replay.poll()
    replay.begin()
    assert replay.poll() == 1.0 and target.taken == []
    clock.now = 100.9
    assert replay.poll() == pytest.approx(0.1) and target.taken == []
    clock.now = 101.0
    assert replay.poll() == 2.0
    first, second = target.taken
    assert (len(first.prompt), first.model, first.arrival) == (4, "base", 101.0)
    assert all(0 <= token < 20 for token in first.prompt)
    assert (second.prompt, second.model) == ([97, 98], "adapter")
    sampling = first.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.ignore_eos) == (3, 0.0, True)
    clock.now = 105.0
    assert replay.poll() is None and len(target.taken) == 3
    assert replay.poll() is None and len(target.taken) == 3
    # It fell behind by 2 s, which the latency must show: it counts from when the request was due.
    assert target.taken[2].arrival == 103.0 and replay.results[2].submitted == 5.0


def test_latencies_are_counted_from_the_events() -> None:
    clock, target = Clock(100.0), Target()
    replay = replayer(TRACE, target, clock)
    replay.begin()
    clock.now = 103.0
    replay.poll()
    first, second, third = target.taken
    for now, last in ((103.5, None), (103.75, None), (104.5, "length")):
        clock.now = now
        first.on_event(TokenEvent(7, "x", last))  # type: ignore[arg-type]
    served = replay.results[0]
    assert (served.ttft, served.tpot, served.gaps) == (2.5, 0.5, [0.25, 0.75])
    assert (served.tokens, served.times, served.finish_reason) == ([7, 7, 7], [3.5, 3.75, 4.5], "length")
    assert not replay.wait(0)
    second.on_event(TokenEvent(None, "", "cancelled"))
    assert (replay.results[1].ttft, replay.results[1].tpot, replay.results[1].gaps) == (None, None, [])
    third.on_event(TokenEvent(3, "y", "stop"))
    assert (replay.results[2].ttft, replay.results[2].tpot) == (1.5, None)
    assert replay.wait(0)
    # All are answered, but the trace goes on, with nothing.
    assert not replay.done
    clock.now = 110.0
    assert replay.done


def test_what_the_target_refuses_is_a_result() -> None:
    clock, target = Clock(), Target(room=1)
    trace = Trace.of([TracedRequest(float(index), 1, prompt_tokens=60 if index == 0 else 5) for index in range(3)])
    replay = replayer(trace, target, clock)
    replay.begin()
    clock.now = 5.0
    assert replay.poll() is None
    assert [result.finish_reason for result in replay.results] == ["error", None, "rejected"]
    assert replay.results[0].error == "the prompt is too long" and not replay.wait(0)
    target.taken[0].on_event(TokenEvent(1, "", "length"))
    assert replay.wait(0)


def test_prompts_are_the_same_for_a_seed_whatever_the_target() -> None:
    prompts = []
    for seed in (0, 0, 1):
        target, clock = Target(), Clock()
        replay = Replayer(poisson(5, 10, [3, 9], 2), target, vocabulary=1000, seed=seed, clock=clock)
        replay.begin()
        clock.now = 20.0
        replay.poll()
        prompts.append([request.prompt for request in target.taken])
    assert prompts[0] == prompts[1] != prompts[2]
    assert len({tuple(prompt) for prompt in prompts[0]}) > 10


def test_what_a_trace_needs_is_asked_for_at_once() -> None:
    with pytest.raises(ValueError, match="give encode"):
        Replayer(TRACE, Target(), vocabulary=20)
    with pytest.raises(ValueError, match="vocabulary"):
        Replayer(TRACE, Target(), encode=lambda text: [1])


class Answering(Target):
    """Answers from a thread of its own, as a decode thread does."""

    def submit(self, request: Request) -> None:
        super().submit(request)
        reasons = [None] * (request.sampling.max_tokens - 1) + ["length"]

        def answer() -> None:
            for reason in reasons:
                request.on_event(TokenEvent(1, "", reason))  # type: ignore[arg-type]

        threading.Thread(target=answer).start()


def test_the_thread_submits_everything_and_ends() -> None:
    target = Answering()
    trace = poisson(200, 0.2, 5, 4)
    replay = Replayer(trace, target, vocabulary=20)
    replay.start()
    assert replay.wait(30)
    replay.stop()
    assert [len(result.tokens) for result in replay.results] == [4] * len(trace.requests)
    assert all(result.ttft is not None and result.ttft > 0 for result in replay.results)
    submitted = [result.submitted for result in replay.results]
    assert all(late is not None and late >= row.arrival for late, row in zip(submitted, trace.requests, strict=True))


def test_stop_submits_no_more_and_cancels_what_is_under_way() -> None:
    target = Target()
    trace = Trace.of([TracedRequest(0.0, 5, prompt_tokens=3), TracedRequest(3600.0, 5, prompt_tokens=3)])
    replay = Replayer(trace, target, vocabulary=20)
    replay.start()
    while not target.taken:
        threading.Event().wait(0.005)
    replay.stop()
    assert len(target.taken) == 1 and target.taken[0].cancelled


def test_a_target_that_breaks_is_told_to_who_waits() -> None:
    class Broken(Target):
        def submit(self, request: Request) -> None:
            raise KeyError("broken")

    replay = Replayer(Trace.of([TracedRequest(0.0, 5, prompt_tokens=3)]), Broken(), vocabulary=20)
    replay.start()
    with pytest.raises(KeyError, match="broken"):
        replay.wait(10)
    replay.stop()
