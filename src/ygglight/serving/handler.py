"""From a checked body to an answer: limits, submission to the engine, the whole text or a stream."""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from ygglight.engines.harli.requests import Closing, QueueFull, Request
from ygglight.serving.answers import Answer, ChatAnswer, CompletionAnswer, server_sent, usage_of
from ygglight.serving.backend import Backend
from ygglight.serving.errors import ApiError, bad_request, retry_later, shutting_down
from ygglight.serving.generation import ClientGone, Generation, Mailbox
from ygglight.serving.lifecycle import Lifecycle
from ygglight.serving.limits import Limits
from ygglight.serving.logprobs import Logprobs
from ygglight.serving.metrics import Metrics
from ygglight.serving.prompts import Prompts
from ygglight.serving.schemas import ChatBody, CompletionBody, GenerationBody, parse_body


class EventStream(Response):
    """A response that is sent piece by piece, and that leaves watching for the client to whoever makes the pieces.

    Starlette's own would read the connection as well.

    Args:
        pieces: What is sent; closed in any case.
        generation: Where they come from. It is cancelled here as well, for closing a generator that was never begun
            (the client left before the first piece) runs none of its code.
    """

    def __init__(self, pieces: AsyncGenerator[bytes, None], generation: Generation) -> None:
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self._pieces = pieces
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends it."""
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async with aclosing(self._pieces) as pieces:
                async for piece in pieces:
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._generation.cancel()


@dataclass(frozen=True)
class _Job:
    """One HTTP request that the engine has taken."""

    answer: Answer
    generation: Generation
    prompts: list[list[int]]
    model: str
    arrival: float


class Handler:
    """Answers requests for text.

    Args:
        backend: The engine.
        limits: How much a client may ask for.
        lifecycle: Knows the generations under way.
        metrics: Counts them.
        clock: Seconds; the clock that ``Request.arrival`` is read from.
    """

    def __init__(
        self,
        backend: Backend,
        limits: Limits,
        lifecycle: Lifecycle,
        metrics: Metrics,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._backend = backend
        self._limits = limits
        self._lifecycle = lifecycle
        self._metrics = metrics
        self._clock = clock
        self._prompts = Prompts(copy.deepcopy(backend.tokenizer))
        # One thread: a prompt of a megabyte takes a second, in which the streams of others must go on.
        self._tokenizing = ThreadPoolExecutor(1, thread_name_prefix="ygglight-tokenize")
        self._mailbox: Mailbox | None = None

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Says on which loop answers are made."""
        self._mailbox = Mailbox(loop)

    def close(self) -> None:
        """Ends the tokenizing thread."""
        self._tokenizing.shutdown(cancel_futures=True)

    async def completion(self, http: HttpRequest) -> Response:
        """``POST /v1/completions``."""
        arrival = self._clock()
        body = parse_body(http.headers.get("content-type"), await http.body(), CompletionBody)
        self._check_model(body)
        prompts = await self._tokenized(self._prompts.of_completion, body)
        return await self._answer(http, body, prompts, CompletionAnswer, arrival)

    async def chat(self, http: HttpRequest) -> Response:
        """``POST /v1/chat/completions``."""
        arrival = self._clock()
        body = parse_body(http.headers.get("content-type"), await http.body(), ChatBody)
        self._check_model(body)
        prompts = await self._tokenized(self._prompts.of_chat, body)
        return await self._answer(http, body, prompts, ChatAnswer, arrival)

    async def _tokenized(self, make: Callable[[Any], list[list[int]]], body: GenerationBody) -> list[list[int]]:
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, make, body)

    def _check_model(self, body: GenerationBody) -> None:
        models = self._backend.models()
        if body.model not in models:
            message = f"the model {body.model!r} does not exist: there are {', '.join(models)}"
            raise ApiError(404, message, param="model", code="model_not_found")

    async def _answer(
        self, http: HttpRequest, body: GenerationBody, prompts: list[list[int]], kind: type[Answer], arrival: float
    ) -> Response:
        assert self._mailbox is not None, "the application's lifespan has not begun"
        include_usage = bool(body.stream_options and body.stream_options.include_usage)
        answer = kind(body.model, include_usage)
        generation = Generation(self._mailbox, self._clock)
        requests = self._requests(body, prompts, answer.id, generation, arrival)
        try:
            generation.submit(self._backend, requests)
        except Closing as closing:
            raise shutting_down() from closing
        except QueueFull as full:
            raise retry_later(full.retry_after) from full
        except ValueError as error:
            raise bad_request(str(error)) from error
        self._metrics.prompt_tokens.labels(body.model).inc(sum(map(len, prompts)))
        job = _Job(answer, generation, prompts, body.model, arrival)
        if body.stream:
            return EventStream(self._stream(http, job), generation)
        return await self._whole(http, job)

    def _requests(
        self, body: GenerationBody, prompts: list[list[int]], name: str, generation: Generation, arrival: float
    ) -> list[Request]:
        """One request a choice: those of the first prompt, then those of the second and so on."""
        n, stops = body.n or 1, body.stops(self._limits)
        if n * len(prompts) > self._limits.max_choices:
            raise bad_request(
                f"{n * len(prompts)} answers in one request, at most {self._limits.max_choices} are allowed", "n"
            )
        requests = []
        for index in range(n * len(prompts)):
            prompt = prompts[index // n]
            requests.append(
                Request(
                    id=f"{name}-{index}",
                    prompt=prompt,
                    sampling=body.sampling(self._max_tokens(body, prompt), index % n, stops),
                    model=body.model,
                    arrival=arrival,
                    on_event=generation.listener(index),
                )
            )
        return requests

    def _max_tokens(self, body: GenerationBody, prompt: Sequence[int]) -> int:
        """How long the answer to a prompt may be.

        Raises:
            ApiError: 400: prompt and answer do not fit.
        """
        limits, context = self._limits, self._backend.max_context
        field = "messages" if isinstance(body, ChatBody) else "prompt"
        longest = min(context - 1, limits.max_prompt_tokens or context)
        if len(prompt) > longest:
            message = f"the prompt has {len(prompt)} tokens, at most {longest} are allowed: shorten it"
            raise bad_request(message, field, "context_length_exceeded")
        room = context - len(prompt)
        asked = body.limit()
        if asked is None:
            return min(room, limits.max_answer_tokens or room)
        if limits.max_answer_tokens is not None and asked > limits.max_answer_tokens:
            raise bad_request(
                f"max_tokens is {asked}, at most {limits.max_answer_tokens} are allowed", "max_tokens", "invalid_value"
            )
        if asked > room:
            raise bad_request(
                f"the context has {context} tokens: a prompt of {len(prompt)} leaves {room} for the answer, and "
                f"{asked} are asked for: shorten the prompt or lower max_tokens",
                field,
                "context_length_exceeded",
            )
        return asked

    async def _whole(self, http: HttpRequest, job: _Job) -> Response:
        generation = job.generation
        logprobs = self._logprobs(generation)
        texts = [""] * len(generation.requests)
        reasons = [""] * len(generation.requests)
        try:
            with self._lifecycle.generating(generation):
                async with aclosing(generation.events(http.receive)) as events:
                    async for index, event in events:
                        texts[index] += event.text
                        logprobs[index].add(event)
                        reasons[index] = event.finish_reason or reasons[index]
        finally:
            self._observe(job)
        usage = usage_of(job.prompts, sum(generation.tokens))
        return JSONResponse(job.answer.complete(texts, reasons, logprobs, usage, _fingerprint(generation, 0)))

    async def _stream(self, http: HttpRequest, job: _Job) -> AsyncGenerator[bytes, None]:
        answer, generation = job.answer, job.generation
        logprobs = self._logprobs(generation)
        try:
            with self._lifecycle.generating(generation):
                for chunk in answer.opening(len(generation.requests)):
                    yield server_sent(chunk)
                async with aclosing(generation.events(http.receive)) as events:
                    async for index, event in events:
                        fingerprint = _fingerprint(generation, index)
                        logprobs[index].add(event)
                        taken = answer.taken(logprobs[index])
                        if event.text or taken:
                            yield server_sent(answer.piece(index, event.text, None, taken, fingerprint))
                        if event.finish_reason is not None:
                            yield server_sent(answer.piece(index, "", event.finish_reason, None, fingerprint))
            for chunk in answer.closing(usage_of(job.prompts, sum(generation.tokens))):
                yield server_sent(chunk)
            yield server_sent("[DONE]")
        except ClientGone:
            self._metrics.cancelled.inc()
        except ApiError as error:  # the status line is gone, so the client reads it from the stream
            yield server_sent(error.body())
        finally:
            self._observe(job)

    def _logprobs(self, generation: Generation) -> list[Logprobs]:
        return [Logprobs(self._prompts.text) for _ in generation.requests]

    def _observe(self, job: _Job) -> None:
        generation = job.generation
        self._metrics.observe(job.model, job.arrival, generation.first, generation.last, generation.tokens)


def _fingerprint(generation: Generation, index: int) -> str | None:
    """Which version of the adapter answered; None for the base model."""
    version = generation.requests[index].adapter_version
    return None if version is None else f"adapter-{version}"
