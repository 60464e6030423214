"""Errors in the shape of the OpenAI API: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response


class ApiError(Exception):
    """An answer other than 2xx.

    Args:
        status: HTTP status.
        message: What is wrong and how to mend it.
        param: The field of the body that is to blame.
        code: A word for programs, e.g. ``context_length_exceeded``.
        headers: Headers besides the content's.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON object of the answer."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        if self.status == 429:
            kind = "rate_limit_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self, **extra: Any) -> Response:
        """The whole answer.

        Args:
            extra: Members of the object besides ``error``.
        """
        # ASCII: a message may quote half a surrogate pair from the client, which has no UTF-8.
        content = json.dumps(self.body() | extra)
        return Response(content, self.status, self.headers, media_type="application/json")


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A 400."""
    return ApiError(400, message, param=param, code=code)


def retry_later(seconds: float) -> ApiError:
    """A 429 for a full queue.

    Args:
        seconds: When there may be room again; sent rounded up, for ``Retry-After`` knows whole seconds only.
    """
    after = str(max(1, math.ceil(seconds)))
    return ApiError(
        429,
        f"too many requests are waiting: try again in {after} s",
        code="rate_limit_exceeded",
        headers={"Retry-After": after},
    )


def shutting_down() -> ApiError:
    """A 503 while the server drains or after the engine gave a request up."""
    return ApiError(503, "the server is shutting down", code="shutting_down", headers={"Connection": "close"})


def engine_failed() -> ApiError:
    """A 500 for a request that the engine could not finish."""
    return ApiError(500, "the engine failed on this request: see the server's log", code="engine_error")
