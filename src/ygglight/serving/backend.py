"""What an engine must offer to be served over HTTP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from ygglight.engines.harli.requests import Request


class Backend(Protocol):
    """A decode engine as the HTTP front sees it; every method is called from the server's thread and must not block.

    Attributes:
        tokenizer: The tokenizer of the served model. The front works on a copy of its own: a fast tokenizer that two
            threads set up at once raises ``Already borrowed``.
        max_context: Tokens of prompt and answer together that one request may have.
    """

    tokenizer: Any
    max_context: int

    def models(self) -> list[str]:
        """Names that a client may ask for."""

    def submit(self, request: Request) -> None:
        """Takes a request in. Its events arrive through ``request.on_event``, from any thread.

        Raises:
            QueueFull: Too many are waiting.
            ValueError: It can never be served.
        """

    def status(self) -> Mapping[str, Any]:
        """What ``/health`` reports besides ``status``: JSON values."""

    def metrics(self) -> Mapping[str, float]:
        """What ``/metrics`` reports besides the front's own; a name that ends in ``_total`` is a counter."""
