"""Log-probabilities of tokens in the two shapes of the OpenAI API."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ygglight.engines.harli.requests import TokenEvent

Decode = Callable[[list[int]], str]


class Logprobs:
    """Collects what the events of one choice say about their tokens.

    A token that is part of a character reads as a replacement character; a stop string is cut from the text and not
    from here.

    Args:
        decode: Text of tokens.
    """

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._entries: list[dict[str, Any]] = []
        self._offset = 0

    def add(self, event: TokenEvent) -> None:
        """Takes in the token of an event, if it has one with a log-probability."""
        if event.token is None or event.logprobs is None:
            return
        top = [self._entry(token, logprob) for token, logprob in event.logprobs.top]
        self._entries.append(self._entry(event.token, event.logprobs.chosen) | {"top_logprobs": top})

    def take_chat(self) -> dict[str, Any] | None:
        """What came since the last call, as chat wants it; None if nothing did."""
        entries, self._entries = self._entries, []
        return {"content": entries, "refusal": None} if entries else None

    def take_completion(self) -> dict[str, Any] | None:
        """What came since the last call, as completions want it; None if nothing did."""
        entries, self._entries = self._entries, []
        if not entries:
            return None
        offsets = []
        for entry in entries:
            offsets.append(self._offset)
            self._offset += len(entry["token"])
        return {
            "tokens": [entry["token"] for entry in entries],
            "token_logprobs": [entry["logprob"] for entry in entries],
            "top_logprobs": [_likeliest(entry["top_logprobs"]) for entry in entries],
            "text_offset": offsets,
        }

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._decode([token])
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def _likeliest(top: list[dict[str, Any]]) -> dict[str, float]:
    """Log-probability by text; of tokens that read the same, the likeliest one's."""
    found: dict[str, float] = {}
    for entry in top:  # best first
        found.setdefault(entry["token"], entry["logprob"])
    return found
