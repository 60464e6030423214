"""What clients ask for, and what they are told while it is worked on."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from ygglight.engines.decode.sampling import Logprobs, SamplingParams

__all__ = ["Closing", "FinishReason", "QueueFull", "Request", "TokenEvent"]

FinishReason = Literal["stop", "length", "cancelled", "error"]


class QueueFull(Exception):
    """As many requests wait as may.

    Args:
        retry_after: Seconds until a place may be free.
    """

    def __init__(self, retry_after: float) -> None:
        super().__init__(f"too many requests wait: try again in {retry_after:.1f} s")
        self.retry_after = retry_after


class Closing(QueueFull):
    """No request is taken any more: the server drains, or has stopped."""


@dataclass(frozen=True)
class TokenEvent:
    """One token, or the end.

    Args:
        token: None if the end came without one (cancelled, error).
        text: What became safe to show; may be empty, or hold the text of tokens before.
        finish_reason: Set in the last event of a request, and only there.
        logprobs: Of the token, if the request asked.
        error: Why, if the reason is "error".
    """

    token: int | None
    text: str
    finish_reason: FinishReason | None = None
    logprobs: Logprobs | None = None
    error: str | None = None


class Request:
    """One completion. Times are seconds of the batcher's clock.

    Args:
        prompt: Token ids.
        on_event: Called from the decode thread for each token; it must not block or raise. The last event has a
            ``finish_reason``, and comes exactly once.
        sampling: How tokens are chosen; default: ``SamplingParams()``.
        model: "base", or "adapter": the newest version at admission.
        id: Default: a random one.
        arrival: When the client asked; default: when it is submitted.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        on_event: Callable[[TokenEvent], None],
        sampling: SamplingParams | None = None,
        *,
        model: str = "base",
        id: str | None = None,
        arrival: float | None = None,
    ) -> None:
        self.id = id or uuid.uuid4().hex
        self.prompt, self.on_event, self.model = list(prompt), on_event, model
        self.sampling = sampling or SamplingParams()
        self.adapter_version: int | None = None
        """Set at admission and never changed after; None for the base."""
        self.arrival = arrival
        self.admitted: float | None = None
        """For the first time: a preempted request is admitted again."""
        self.first_token: float | None = None
        self.token_times: list[float] = []
        self.finished: float | None = None
        self.finish_reason: FinishReason | None = None
        self.output: list[int] = []
        """Tokens so far, an end token among them."""
        self.preemptions = 0
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Give it up, from any thread: the next time that the decode thread looks, its pages are free."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        """Whether :meth:`cancel` was called."""
        return self._cancelled.is_set()
