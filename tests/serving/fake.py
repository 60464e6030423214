"""An engine that streams scripted words from a thread, and what tests do with it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import openai

from ygglight.engines.decode.sampling import Logprobs
from ygglight.engines.harli.requests import QueueFull, Request, TokenEvent
from ygglight.serving import ServerThread

END = 0


@dataclass
class Run:
    """A request in the fake engine."""

    request: Request
    words: list[str]
    at: int = 0


class FakeBackend:
    """Says ``w0 w1 w2 ...``, a word a step, for all requests at once, from a thread as the real engine does.

    Args:
        tokenizer: What the front encodes with. words: after how many the text ends by itself.
    """

    def __init__(self, tokenizer: Any, words: int = 50, max_context: int = 200, max_queue: int = 64) -> None:
        self.tokenizer, self.max_context = tokenizer, max_context
        self.words, self.max_queue = words, max_queue
        self.requests: list[Request] = []
        self.cancelled: list[str] = []
        self.largest_batch = 0
        self.fail_at: int | None = None  # the word at which the engine fails
        self.pause_at: int | None = None  # the word before which it waits
        self.deaf = False  # takes requests and never says anything
        self.flow = threading.Event()  # cleared: no words
        self.flow.set()
        self._runs: list[Run] = []
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._decode, name="ygglight-fake-decode", daemon=True)
        self._thread.start()

    def models(self) -> list[str]:
        return ["base", "adapter"]

    def submit(self, request: Request) -> None:
        with self._lock:
            if len(self._runs) >= self.max_queue:
                raise QueueFull(1.5)
            self.requests.append(request)
            self._runs.append(Run(request, [f"w{index} " for index in range(self.words)]))

    def status(self) -> dict[str, Any]:
        return {"engine": "fake"}

    def metrics(self) -> dict[str, float]:
        return {"kv_pages_used": 3.0, "preemptions_total": 2.0}

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _decode(self) -> None:
        while not self._closed.is_set():
            with self._lock:
                runs = list(self._runs)
            if self.deaf:
                runs = []
            self.largest_batch = max(self.largest_batch, len(runs))
            for run in runs:
                if self._step(run):
                    with self._lock:
                        self._runs.remove(run)
            self._closed.wait(0.001)

    def _step(self, run: Run) -> bool:
        """One word of one request; says whether it is over."""
        request, sampling = run.request, run.request.sampling
        if request.cancelled:
            self.cancelled.append(request.id)
            request.on_event(TokenEvent(None, "", "cancelled"))
            return True
        if not self.flow.is_set() or run.at == self.pause_at:
            return False
        if run.at == self.fail_at:
            request.on_event(TokenEvent(None, "", "error", error="words ran out"))
            return True
        if request.model == "adapter" and run.at == 0:
            request.adapter_version = 7
        if run.at == len(run.words):
            request.on_event(TokenEvent(END, "", "stop"))
            return True
        word, run.at = run.words[run.at], run.at + 1
        stop = next((stop for stop in sampling.stop if stop in word), None)
        if stop is not None:
            request.on_event(TokenEvent(1, word[: word.index(stop)], "stop"))
            return True
        last = run.at == sampling.max_tokens
        request.on_event(TokenEvent(1, word, "length" if last else None, self._logprobs(run)))
        return last

    def _logprobs(self, run: Run) -> Logprobs | None:
        """Of the token: 1 at -0.5, and the next ones each 1 less likely."""
        wanted = run.request.sampling.logprobs
        if wanted is None:
            return None
        return Logprobs(-0.5, tuple((1 + rank, -0.5 - rank) for rank in range(wanted)))


def client_of(server: ServerThread, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=20)


def text_of(words: int) -> str:
    return "".join(f"w{index} " for index in range(words))


def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Whether something becomes true in good time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True
