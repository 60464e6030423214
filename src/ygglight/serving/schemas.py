"""The bodies of requests: which fields there are, of which types, and what is refused.

Types are strict (``"max_tokens": "5"`` is an error, as it is at OpenAI) and a field that nobody knows is an error too:
ignoring it would answer another question than the one asked.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ygglight.engines.decode.sampling import SamplingParams
from ygglight.serving.errors import bad_request
from ygglight.serving.limits import Limits

Body = TypeVar("Body", bound="GenerationBody")
Penalty = Annotated[float, Field(ge=-2, le=2)]
Likeliest = Annotated[int, Field(ge=0, le=20)]


class StreamOptions(BaseModel):
    """How a stream ends: ``include_usage`` asks for a last chunk with the counts of tokens."""

    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # padding against eavesdroppers, which we never add


class GenerationBody(BaseModel):
    """What completions and chat have in common."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Any = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: Any = None
    # Not OpenAI's; the client sends them by `extra_body`. The names are vLLM's.
    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    ignore_eos: bool | None = None
    # About the caller and the account: they change nothing about the answer.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None

    def limit(self) -> int | None:
        """Tokens that the answer may have, or None when the client does not say."""
        return self.max_tokens

    def likeliest(self) -> int | None:
        """Of how many tokens log-probabilities are wanted besides the chosen one's; None: of none at all."""
        return None

    def check(self) -> None:
        """Refuses what is understood and cannot be done.

        Raises:
            ApiError: 400 with the field.
        """
        if self.logit_bias:
            _unsupported("logit_bias", "is not supported: leave it out")
        if self.stream_options is not None and not self.stream:
            raise bad_request("stream_options is for streams: set stream to true or leave it out", "stream_options")

    def stops(self, limits: Limits) -> tuple[str, ...]:
        """The stop strings.

        Raises:
            ApiError: 400 for another type, an empty string or too many of them.
        """
        stop = [] if self.stop is None else [self.stop] if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, list) or not all(isinstance(text, str) and text for text in stop):
            raise bad_request("stop: give a string or a list of strings, none of them empty", "stop")
        if len(stop) > limits.max_stop:
            raise bad_request(f"stop: {len(stop)} strings, at most {limits.max_stop} are allowed", "stop")
        return tuple(stop)

    def sampling(self, max_tokens: int, choice: int, stops: tuple[str, ...]) -> SamplingParams:
        """Sampling parameters of one choice.

        Args:
            max_tokens: Tokens that it may have.
            choice: Its number among the ``n`` of its prompt: a given seed is counted up by it, for equal seeds would
                make equal answers.
            stops: Stop strings.

        Raises:
            ApiError: 400 for a value that sampling refuses.
        """
        given: dict[str, Any] = {
            name: getattr(self, name)
            for name in ("temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty",
                         "repetition_penalty", "ignore_eos")
            if getattr(self, name) is not None
        }  # fmt: skip
        if self.seed is not None:
            given["seed"] = (self.seed + choice) % 2**63  # SamplingParams takes no negative one
        try:
            return SamplingParams(max_tokens=max_tokens, stop=stops, logprobs=self.likeliest(), **given)
        except ValueError as error:
            raise bad_request(str(error)) from error


class CompletionBody(GenerationBody):
    """Body of ``POST /v1/completions``."""

    prompt: Any = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None
    logprobs: Likeliest | None = None

    def limit(self) -> int | None:
        """Tokens that the answer may have; OpenAI's default is 16."""
        return 16 if self.max_tokens is None else self.max_tokens

    def likeliest(self) -> int | None:
        """Of how many tokens log-probabilities are wanted besides the chosen one's; None: of none at all."""
        return self.logprobs

    def check(self) -> None:
        """Refuses what is understood and cannot be done."""
        super().check()
        if self.echo:
            _unsupported("echo", "is not supported: the answer holds new text only, so leave it out")
        if self.best_of not in (None, self.n or 1):
            _unsupported("best_of", "is not supported: leave it out, or give it the value of n")
        if self.suffix:
            _unsupported("suffix", "is not supported: leave it out")


class ChatBody(GenerationBody):
    """Body of ``POST /v1/chat/completions``."""

    messages: Any = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Likeliest | None = None
    response_format: Any = None
    modalities: Any = None
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None

    def limit(self) -> int | None:
        """Tokens that the answer may have, by the new name of the field or the old one."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def likeliest(self) -> int | None:
        """Of how many tokens log-probabilities are wanted besides the chosen one's; None: of none at all."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def check(self) -> None:
        """Refuses what is understood and cannot be done."""
        super().check()
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise bad_request("max_tokens and max_completion_tokens differ: give one of them", "max_tokens")
        if self.top_logprobs and not self.logprobs:
            raise bad_request("top_logprobs needs logprobs: set it to true", "top_logprobs")
        if self.response_format not in (None, {"type": "text"}):
            _unsupported("response_format", "other than text is not supported")
        if self.modalities not in (None, ["text"]):
            _unsupported("modalities", "other than text are not supported")
        for name in ("tools", "functions"):
            if getattr(self, name):
                _unsupported(name, "are not supported: leave them out")
        for name in ("tool_choice", "function_call"):
            if getattr(self, name) not in (None, "none", "auto"):
                _unsupported(name, "is not supported: leave it out")


def _unsupported(field: str, what: str) -> NoReturn:
    raise bad_request(f"{field} {what}", field, "unsupported_parameter")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def parse_body(content_type: str | None, raw: bytes, kind: type[Body]) -> Body:
    """Reads and checks the body of a request.

    Args:
        content_type: The header. Only JSON is taken: any web page can make a browser send plain text to a server on
            the loopback address, but not JSON.
        raw: The bytes.
        kind: Which body it should be.

    Raises:
        ApiError: 415 for another content type, 400 for anything wrong inside.
    """
    if content_type is None or content_type.partition(";")[0].strip().lower() != "application/json":
        error = bad_request("send the body as JSON, with the header 'Content-Type: application/json'")
        error.status = 415
        raise error
    try:
        data = json.loads(raw, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:  # RecursionError: nested thousands of times
        raise bad_request(f"the body is not valid JSON: {error}", code="invalid_json") from error
    if not isinstance(data, dict):
        raise bad_request("the body is valid JSON, but not an object", code="invalid_json")
    try:
        body = kind.model_validate(data)
    except ValidationError as error:
        raise _explained(error, kind) from error
    body.check()
    return body


def _explained(error: ValidationError, kind: type[Body]) -> Exception:
    first = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return bad_request(f"unrecognized request argument: {field}", field, "unknown_parameter")
    if first["type"] == "missing":
        return bad_request(f"you must give the field {field}", field, "missing_required_parameter")
    return bad_request(f"{field}: {first['msg']}", field, "invalid_value")
