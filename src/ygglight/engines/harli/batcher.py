"""Continuous batching: requests join and leave a running batch between any two steps.

Prompts go in chunks, at most one between two decode steps, so that no token waits for a whole prompt. Pages are taken
as texts grow. The oldest request has the first claim on them, and when nothing can move the newest gives its pages up
and is computed anew later, as in vLLM (Kwon et al. 2023, arXiv:2309.06180): the oldest always gets on.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable
from typing import Any

from ygglight.engines.decode.detokenize import Detokenizer
from ygglight.engines.decode.paged import PagedDecoder
from ygglight.engines.decode.sampling import Choice, Sampler
from ygglight.engines.harli.adapters import Adapters
from ygglight.engines.harli.requests import Closing, FinishReason, QueueFull, Request, TokenEvent
from ygglight.engines.harli.steps import Forwards, Sequence, end_tokens
from ygglight.engines.harli.work import Load, Work
from ygglight.engines.memory.arena import Arena

__all__ = ["Batcher", "Load", "Work"]

_log = logging.getLogger(__name__)


class Batcher:
    """Requests in, tokens out, one forward at a time.

    Any thread may :meth:`submit`, :meth:`drain`, :meth:`stop` and read :meth:`load`. All else is the decode thread's,
    which asks for :meth:`next_work` and hands it to :meth:`run`.

    Args:
        decoder: Over the serving twin. arena: Whose chunks are the pages. tokenizer: None: events carry no text.
        adapters: None: only "base" is served.
        max_context: Tokens of prompt and answer that a request may have.
        max_batch: Requests admitted at a time. max_queue: Requests that may wait.
        prefill_chunk: Prompt tokens a forward.
        ends: Tokens that end a text; default: :func:`~ygglight.engines.harli.steps.end_tokens`.
        clock: Seconds.

    Raises:
        ValueError: a number is not positive, or no request of ``max_context`` tokens fits the arena.
    """

    def __init__(
        self,
        decoder: PagedDecoder,
        arena: Arena,
        tokenizer: Any,
        *,
        max_context: int,
        adapters: Adapters | None = None,
        max_batch: int = 32,
        max_queue: int = 256,
        prefill_chunk: int = 256,
        ends: Collection[int] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        for name, value in {"max_batch": max_batch, "max_queue": max_queue, "prefill_chunk": prefill_chunk}.items():
            if value < 1:
                raise ValueError(f"{name}={value}: give 1 or more")
        if max_context < 2:
            raise ValueError(f"max_context={max_context}: a prompt token and one of the answer are 2")
        # What the decoder keeps for itself is KV's before any request is.
        room = (arena.chunks - arena.counts().kv) * decoder.page
        if max_context - 1 > room:  # the last token of an answer is not run
            raise ValueError(
                f"max_context={max_context}, but the arena holds {room} tokens: give it more memory, or set "
                f"max_context to {room + 1}"
            )
        self.decoder, self.arena, self.tokenizer, self.adapters = decoder, arena, tokenizer, adapters
        self.max_context, self.max_batch, self.max_queue = max_context, max_batch, max_queue
        self.prefill_chunk, self.clock = prefill_chunk, clock
        self.ends = end_tokens(decoder.model, tokenizer) if ends is None else frozenset(ends)
        self.wake = threading.Event()
        """Set when there may be something new; the decode thread clears it before it looks, and waits on it."""
        self.finished: Counter[FinishReason] = Counter()
        """Requests by how they ended."""
        self.preemptions, self.tokens = 0, 0
        self._forwards = Forwards(decoder, adapters)
        self._lock = threading.Lock()
        self._inbox: deque[Request] = deque()
        self._queued = 0  # in the inbox or waiting for the first time; with the lock
        self._draining, self._stopping = False, False
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []  # in the order of admission
        self._prefilled_last = False
        self._denied = False  # pages were asked for in this round and not there
        self._interval: float | None = None  # seconds between two finished requests, smoothed
        self._finished_at: float | None = None

    # -- any thread --------------------------------------------------------------------------------------------------
    def submit(self, request: Request) -> None:
        """Queue a request, first come, first served.

        Args:
            request: Not submitted before.

        Raises:
            QueueFull: ``max_queue`` requests wait. Closing: :meth:`drain` or :meth:`stop` was called.
            ValueError: it can never be served; the text names the limit.
        """
        self._check(request)
        with self._lock:
            if self._draining or self._stopping:
                raise Closing(self._retry_after())
            if self._queued >= self.max_queue:
                raise QueueFull(self._retry_after())
            if request.arrival is None:
                request.arrival = self.clock()
            self._queued += 1
            self._inbox.append(request)
        self.wake.set()

    def _check(self, request: Request) -> None:
        count, most = len(request.prompt), request.sampling.max_tokens
        if not count:
            raise ValueError("the prompt is empty: give at least one token")
        if count >= self.max_context:
            raise ValueError(
                f"the prompt has {count} tokens, max_context is {self.max_context}: shorten it to "
                f"{self.max_context - 1} or fewer"
            )
        if count + most > self.max_context:
            raise ValueError(
                f"{count} prompt tokens and max_tokens={most} are more than max_context={self.max_context}: set "
                f"max_tokens to {self.max_context - count} or less"
            )
        if min(request.prompt) < 0 or max(request.prompt) >= self.decoder.vocabulary:
            raise ValueError(f"the prompt has tokens outside of the vocabulary of {self.decoder.vocabulary}")
        names = ["base"] if self.adapters is None else ["base", "adapter"]
        if request.model not in names:
            raise ValueError(f"there is no model {request.model!r}: ask for {' or '.join(names)}")
        if request.sampling.stop and self.tokenizer is None:
            raise ValueError("stop strings need a tokenizer, and none was given to the engine")

    def _retry_after(self) -> float:
        return min(60.0, max(1.0, self._interval or 1.0))

    def drain(self) -> None:
        """Take no request any more; those that are here are finished."""
        with self._lock:
            self._draining = True
        self.wake.set()

    def stop(self) -> None:
        """Take no request any more; those that are here are cancelled when the decode thread asks for work."""
        with self._lock:
            self._stopping = True
        self.wake.set()

    @property
    def idle(self) -> bool:
        """Nothing is here."""
        return not (self._queued or self._waiting or self._running)

    def load(self) -> Load:
        """What there is to do; from another thread, about."""
        running = list(self._running)
        decoding = [sequence for sequence in running if sequence.decoding]
        return Load(
            batch=len(decoding),
            context_tokens=self._context(decoding),
            waiting=len(self._inbox) + len(self._waiting),
            prefill_tokens=sum(sequence.missing for sequence in running if not sequence.decoding),
        )

    @property
    def next_prompt(self) -> int:
        """Tokens still to run of the prompt that goes next; 0: none is here. Decode thread only."""
        ahead = next((sequence.missing for sequence in self._running if not sequence.decoding), 0)
        if not ahead and self._waiting:
            ahead = self._waiting[0].missing
        return ahead or (len(self._inbox[0].prompt) if self._inbox else 0)

    # -- what to do next (decode thread) -----------------------------------------------------------------------------
    def next_work(self) -> Work | None:
        """The next forward. Cancelled requests leave, waiting ones are admitted, pages are taken.

        Returns:
            None if there is nothing to do, or everything waits for pages that finetuning holds.
        """
        if self._stopping:
            self.finish_all("cancelled")
            return None
        self._denied = False
        self._look_for_news()
        self._admit()
        work = self._choose()
        if not self._denied:
            self.arena.withdraw()  # who asked for more the last time has left, or was content with less
        return work

    def _choose(self) -> Work | None:
        while self._running:
            decoding = self._with_pages([sequence for sequence in self._running if sequence.decoding])
            prefilling = next((sequence for sequence in self._running if not sequence.decoding), None)
            if prefilling is not None and not (decoding and (self._prefilled_last or not self.prefill_chunk)):
                count = min(self.prefill_chunk or self.decoder.page, prefilling.missing)
                context = self.decoder.pages_for(prefilling.cached + count) * self.decoder.page
                return Work("prefill", (prefilling.request,), count, context, (prefilling,))
            if decoding:
                requests = tuple(sequence.request for sequence in decoding)
                return Work("decode", requests, len(decoding), self._context(decoding), tuple(decoding))
            if len(self._running) == 1:
                return None  # finetuning holds the pages, and is told by the arena's pressure
            self._preempt(self._running[-1])
        return None

    def _look_for_news(self) -> None:
        while self._inbox:
            request = self._inbox.popleft()
            detokenizer = None
            if self.tokenizer is not None:
                detokenizer = Detokenizer(self.tokenizer, request.sampling.stop, context=request.prompt)
            sampler = Sampler(request.sampling, request.prompt, self.decoder.device)
            self._waiting.append(Sequence(request, sampler, detokenizer))
        for sequence in [*self._running, *self._waiting]:
            if sequence.request.cancelled:
                self._finish(sequence, "cancelled")

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self.max_batch:
            sequence = self._waiting[0]  # none overtakes it, or a long prompt would starve
            need = self.decoder.pages_for(sequence.missing)
            # A page for each of the others: else the first step would preempt what was just admitted.
            spare = min(len(self._running), self.arena.chunks - need)
            pages = self.arena.allocate_kv(need + spare)
            if pages is None:
                self._denied = True
                return
            if spare:
                self.arena.free_kv(pages[need:])
            self._waiting.popleft()
            self._running.append(sequence)
            sequence.pages = pages[:need]
            request = sequence.request
            if request.admitted is None:
                request.admitted = self.clock()
                if request.model == "adapter" and self.adapters is not None:
                    request.adapter_version = self.adapters.pin()
                with self._lock:
                    self._queued -= 1

    def _with_pages(self, sequences: list[Sequence]) -> list[Sequence]:
        """Those whose pages have a place for one more token; the oldest asks first."""
        ready = []
        for sequence in sequences:
            if self.decoder.pages_for(sequence.cached + 1) > len(sequence.pages):
                page = self.arena.allocate_kv(1)
                if page is None:
                    self._denied = True
                    continue
                sequence.pages += page
            ready.append(sequence)
        return ready

    def _preempt(self, sequence: Sequence) -> None:
        self.preemptions += 1
        sequence.request.preemptions += 1
        self._free(sequence)
        self._running.remove(sequence)
        self._waiting.appendleft(sequence)

    def _context(self, sequences: Iterable[Sequence]) -> int:
        return sum(self.decoder.pages_for(sequence.cached + 1) for sequence in sequences) * self.decoder.page

    # -- doing it (decode thread) ------------------------------------------------------------------------------------
    def run(self, work: Work) -> None:
        """Run the forward, choose tokens, tell the clients, and let those go that are done.

        A forward that raises ends the requests in it with "error"; the others go on.

        Args:
            work: From the last :meth:`next_work`.
        """
        sequences = list(work.sequences)
        try:
            if work.kind == "prefill":
                choices = self._forwards.prefill(sequences[0], work.tokens)
            else:
                choices = self._forwards.decode(sequences)
        except Exception as error:  # whatever a model, a kernel or the memory of the device has to say
            _log.exception("a %s of %d requests failed", work.kind, len(sequences))
            for sequence in sequences:
                self._finish(sequence, "error", error=f"{type(error).__name__}: {error}")
            return
        finally:
            self._prefilled_last = work.kind == "prefill"
        now = self.clock()
        for sequence, choice in zip(sequences, choices, strict=False):
            if choice is None:
                self._finish(sequence, "error", error="the model's logits are not finite")
            else:
                self._take(sequence, choice, now)

    def _take(self, sequence: Sequence, choice: Choice, now: float) -> None:
        """Book a token and tell the client."""
        request, token = sequence.request, choice.token
        request.output.append(token)
        request.token_times.append(now)
        if request.first_token is None:
            request.first_token = now
        self.tokens += 1
        detokenizer = sequence.detokenizer
        ended = token in self.ends and not request.sampling.ignore_eos
        full = len(request.output) >= request.sampling.max_tokens
        text = ""
        if detokenizer is not None:
            text = "" if ended else detokenizer.add(token)
            text += detokenizer.finish() if ended or full else ""
            ended = ended or detokenizer.stopped
        reason: FinishReason | None = "stop" if ended else "length" if full else None
        if reason is None:
            self._tell(request, TokenEvent(token, text, None, choice.logprobs))
        else:
            self._finish(sequence, reason, TokenEvent(token, text, reason, choice.logprobs))

    # -- the end of a request ----------------------------------------------------------------------------------------
    def finish_all(self, reason: FinishReason, error: str | None = None) -> None:
        """End every request that is here, and take no more.

        Args:
            reason: For the clients. error: Its text.
        """
        with self._lock:
            self._stopping = True
        self._look_for_news()
        for sequence in [*self._running, *self._waiting]:
            self._finish(sequence, reason, error=error)

    def _finish(
        self, sequence: Sequence, reason: FinishReason, event: TokenEvent | None = None, error: str | None = None
    ) -> None:
        request = sequence.request
        self._free(sequence)
        if sequence in self._running:
            self._running.remove(sequence)
        else:
            self._waiting.remove(sequence)
        if request.admitted is None:
            with self._lock:
                self._queued -= 1
        if request.adapter_version is not None and self.adapters is not None:
            self.adapters.unpin(request.adapter_version)
        now = self.clock()
        if self._finished_at is not None:
            passed = now - self._finished_at
            self._interval = passed if self._interval is None else 0.8 * self._interval + 0.2 * passed
        self._finished_at = now
        request.finished, request.finish_reason = now, reason
        self.finished[reason] += 1
        if event is None:
            text = "" if sequence.detokenizer is None else sequence.detokenizer.finish()
            event = TokenEvent(None, text, reason, error=error)
        self._tell(request, event)

    def _free(self, sequence: Sequence) -> None:
        self._forwards.settle()
        self.arena.free_kv(sequence.pages)
        sequence.pages, sequence.cached = [], 0

    def _tell(self, request: Request, event: TokenEvent) -> None:
        try:
            request.on_event(event)
        except Exception:  # a client's trouble is not the others'
            _log.exception("the listener of request %s failed: it is cancelled", request.id)
            request.cancel()
