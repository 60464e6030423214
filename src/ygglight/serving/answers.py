"""The objects of the OpenAI API that answer a completion or a chat, whole or in chunks."""

from __future__ import annotations

import json
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from ygglight.serving.logprobs import Logprobs

Usage = dict[str, int]


def usage_of(prompts: Sequence[Sequence[int]], completion_tokens: int) -> Usage:
    """Counts of tokens; a prompt counts once however many choices it has."""
    prompt_tokens = sum(map(len, prompts))
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


class Answer(ABC):
    """Forms the answer to one HTTP request.

    Args:
        model: The name that the client asked for.
        include_usage: Each chunk of the stream has a member ``usage``, null but in the last.
    """

    prefix = ""
    whole = ""
    chunk = ""

    def __init__(self, model: str, include_usage: bool = False) -> None:
        self.id = self.prefix + secrets.token_hex(12)
        self._model = model
        self._created = int(time.time())
        self._include_usage = include_usage

    def complete(
        self,
        texts: Sequence[str],
        reasons: Sequence[str],
        logprobs: Sequence[Logprobs],
        usage: Usage,
        fingerprint: str | None,
    ) -> dict[str, Any]:
        """The whole answer.

        Args:
            texts, reasons, logprobs: Of each choice: its text, why it ended, what is known of its tokens.
            usage: Counts of tokens. fingerprint: What computed it.
        """
        every = enumerate(zip(texts, reasons, logprobs, strict=True))
        choices = [self._choice(index, text, reason, self.taken(found)) for index, (text, reason, found) in every]
        return self._envelope(self.whole, choices, fingerprint) | {"usage": usage}

    def piece(
        self, index: int, text: str, reason: str | None, logprobs: dict[str, Any] | None, fingerprint: str | None
    ) -> dict[str, Any]:
        """A chunk with new text of one choice, or with the reason why it ended."""
        return self._chunk([self._delta(index, text, reason, logprobs)], fingerprint)

    def opening(self, choices: int) -> list[dict[str, Any]]:
        """Chunks that come before any text."""
        return []

    def closing(self, usage: Usage) -> list[dict[str, Any]]:
        """Chunks that come after all text."""
        if not self._include_usage:
            return []
        return [self._envelope(self.chunk, [], None) | {"usage": usage}]

    def _chunk(self, choices: list[dict[str, Any]], fingerprint: str | None) -> dict[str, Any]:
        chunk = self._envelope(self.chunk, choices, fingerprint)
        return chunk | {"usage": None} if self._include_usage else chunk

    def _envelope(self, kind: str, choices: list[dict[str, Any]], fingerprint: str | None) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "system_fingerprint": fingerprint,
            "choices": choices,
        }

    @abstractmethod
    def taken(self, logprobs: Logprobs) -> dict[str, Any] | None:
        """What is new among the log-probabilities of a choice, in this endpoint's shape."""

    @abstractmethod
    def _choice(self, index: int, text: str, reason: str | None, logprobs: dict[str, Any] | None) -> dict[str, Any]: ...

    @abstractmethod
    def _delta(self, index: int, text: str, reason: str | None, logprobs: dict[str, Any] | None) -> dict[str, Any]: ...


class CompletionAnswer(Answer):
    """Answers ``/v1/completions``."""

    prefix = "cmpl-"
    whole = chunk = "text_completion"

    def taken(self, logprobs: Logprobs) -> dict[str, Any] | None:
        """What is new among the log-probabilities of a choice."""
        return logprobs.take_completion()

    def _choice(self, index: int, text: str, reason: str | None, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    _delta = _choice


class ChatAnswer(Answer):
    """Answers ``/v1/chat/completions``."""

    prefix = "chatcmpl-"
    whole = "chat.completion"
    chunk = "chat.completion.chunk"

    def opening(self, choices: int) -> list[dict[str, Any]]:
        """The role of each choice, which comes first."""
        first = {"role": "assistant", "content": ""}
        return [
            self._chunk([{"index": index, "delta": first, "logprobs": None, "finish_reason": None}], None)
            for index in range(choices)
        ]

    def taken(self, logprobs: Logprobs) -> dict[str, Any] | None:
        """What is new among the log-probabilities of a choice."""
        return logprobs.take_chat()

    def _choice(self, index: int, text: str, reason: str | None, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}

    def _delta(self, index: int, text: str, reason: str | None, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        delta = {"content": text} if text else {}
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def server_sent(data: dict[str, Any] | str) -> bytes:
    """One event of a stream."""
    text = data if isinstance(data, str) else json.dumps(data, separators=(",", ":"))
    return f"data: {text}\n\n".encode()
