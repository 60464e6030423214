"""Replaying a trace: requests submitted when they are due, and what became of each."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from ygglight.engines.decode.sampling import SamplingParams
from ygglight.engines.harli.requests import QueueFull, Request, TokenEvent
from ygglight.engines.harli.trace import Trace, TracedRequest


class Target(Protocol):
    """Anything that takes requests."""

    def submit(self, request: Request) -> None:
        """Takes a request; QueueFull when too many wait, ValueError when it can never be served."""


@dataclass
class Served:
    """What became of one request. All times are seconds after the start of the replay.

    Args:
        index: Its place in the trace.
        arrival: When it was due. Latencies count from here and not from the submission: a replay that falls behind
            would hide the waiting.
        prompt_tokens: Length of its prompt.
        model: Which model was asked.
        submitted: When it was submitted, or None.
        times: When each token came.
        tokens: The tokens.
        finish_reason: ``stop``, ``length``, ``cancelled`` or ``error``, or ``rejected``: the queue was full; None:
            not finished.
        error: Why the target refused it.
    """

    index: int
    arrival: float
    prompt_tokens: int
    model: str
    submitted: float | None = None
    times: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None

    @property
    def ttft(self) -> float | None:
        """Time to first token in seconds; None without one."""
        return self.times[0] - self.arrival if self.times else None

    @property
    def tpot(self) -> float | None:
        """Mean time per output token after the first, in seconds; None below two tokens."""
        return (self.times[-1] - self.times[0]) / (len(self.times) - 1) if len(self.times) > 1 else None

    @property
    def gaps(self) -> list[float]:
        """Seconds between neighbouring tokens."""
        return [later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False)]


class Replayer:
    """Submits the requests of a trace on a clock.

    Either `start` a thread that does it, or call `begin` and then `poll` from a loop of your own (a simulation with a
    clock of its own).

    Args:
        trace: The requests.
        target: Where they go.
        encode: Tokens of a text; needed when the trace has texts.
        vocabulary: Size of the vocabulary; needed when it has lengths, whose tokens are drawn at random.
        seed: Of those tokens.
        clock: Seconds; the target's, for ``Request.arrival`` is read from it.
        temperature: Of sampling; 0 is greedy.
        ignore_eos: Answers have the length that the trace says, so that all systems do the same work.

    Raises:
        ValueError: The trace needs ``encode`` or ``vocabulary`` and there is none.
    """

    def __init__(
        self,
        trace: Trace,
        target: Target,
        *,
        encode: Callable[[str], Sequence[int]] | None = None,
        vocabulary: int | None = None,
        seed: int = 0,
        clock: Callable[[], float] = time.perf_counter,
        temperature: float = 0.0,
        ignore_eos: bool = True,
    ) -> None:
        self.trace = trace
        self._target = target
        self._clock = clock
        self._sampling: dict[str, Any] = {"temperature": temperature, "ignore_eos": ignore_eos}
        self._prompts = [
            _prompt(request, encode, vocabulary, [seed, index]) for index, request in enumerate(trace.requests)
        ]
        self.results = [
            Served(index, request.arrival, len(prompt), request.model)
            for index, (request, prompt) in enumerate(zip(trace.requests, self._prompts, strict=True))
        ]
        self._origin: float | None = None
        self._next = 0
        self._requests: list[Request] = []
        self._unfinished = len(self.results)
        self._lock = threading.Lock()
        self._finished = threading.Event()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None

    def begin(self) -> None:
        """Sets the start of the trace to now."""
        self._origin = self._clock()

    def poll(self) -> float | None:
        """Submits what is due.

        Returns:
            Seconds until the next request is due, or None when all are submitted.

        Raises:
            RuntimeError: `begin` was not called.
        """
        if self._origin is None:
            raise RuntimeError("call begin() first: it sets the start of the trace")
        while self._next < len(self.results):
            now = self._clock() - self._origin
            due = self.trace.requests[self._next].arrival
            if due > now:
                return due - now
            self._submit(self._next, now)
            self._next += 1
        return None

    @property
    def done(self) -> bool:
        """All requests are finished and the time of the trace is over."""
        over = self._origin is not None and self._clock() - self._origin >= self.trace.seconds
        return over and self._finished.is_set()

    def start(self) -> None:
        """Begins, and submits from a thread."""
        self.begin()
        self._thread = threading.Thread(target=self._run, name="ygglight-replay", daemon=True)
        self._thread.start()

    def wait(self, timeout: float | None = None) -> bool:
        """Waits until every request is finished; says whether they are.

        Args:
            timeout: Seconds.

        Raises:
            Exception: What the target raised besides QueueFull and ValueError: nothing was submitted after it.
        """
        finished = self._finished.wait(timeout)
        if self._failure is not None:
            raise self._failure
        return finished

    def stop(self) -> None:
        """Submits no more, cancels what is under way and ends the thread."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()
        for request, result in zip(self._requests, self.results, strict=False):
            if result.finish_reason is None:
                request.cancel()

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                delay = self.poll()
                if delay is None:
                    return
                self._stopping.wait(delay)
        except Exception as error:  # raised again where somebody waits
            self._failure = error
            self._finished.set()

    def _submit(self, index: int, now: float) -> None:
        assert self._origin is not None
        row, result = self.trace.requests[index], self.results[index]
        request = Request(
            id=f"replay-{index}",
            prompt=self._prompts[index],
            sampling=SamplingParams(max_tokens=row.max_tokens, **self._sampling),
            model=row.model,
            arrival=self._origin + row.arrival,
            on_event=lambda event: self._on_event(result, event),
        )
        self._requests.append(request)
        result.submitted = now
        try:
            self._target.submit(request)
        except QueueFull as error:
            self._finish(result, "rejected", str(error))
        except ValueError as error:
            self._finish(result, "error", str(error))

    def _on_event(self, result: Served, event: TokenEvent) -> None:
        """Called from the decode thread."""
        assert self._origin is not None
        if event.token is not None:
            result.times.append(self._clock() - self._origin)
            result.tokens.append(event.token)
        if event.finish_reason is not None:
            self._finish(result, event.finish_reason)

    def _finish(self, result: Served, reason: str, error: str | None = None) -> None:
        result.finish_reason, result.error = reason, error
        with self._lock:  # submitting and decoding are two threads; nobody holds it for longer than this
            self._unfinished -= 1
            if not self._unfinished:
                self._finished.set()


def _prompt(
    request: TracedRequest, encode: Callable[[str], Sequence[int]] | None, vocabulary: int | None, seed: list[int]
) -> list[int]:
    if request.prompt is not None:
        if encode is None:
            raise ValueError("the trace has prompts as text: give encode, e.g. the tokenizer's")
        return list(encode(request.prompt))
    if vocabulary is None:
        raise ValueError("the trace has prompts as lengths: give the size of the vocabulary")
    assert request.prompt_tokens is not None
    return np.random.default_rng(seed).integers(0, vocabulary, request.prompt_tokens).tolist()
