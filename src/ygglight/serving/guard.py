"""What is asked of a request before its body is read: a server that is not draining, a key, a size."""

from __future__ import annotations

import hashlib
import hmac

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ygglight.serving.errors import ApiError, shutting_down
from ygglight.serving.lifecycle import Lifecycle


class Guard:
    """ASGI middleware around the whole application.

    The paths below ``/v1/`` need the key; ``/health`` and ``/metrics`` are for probes and need none.

    Args:
        app: The application inside.
        lifecycle: Counts the requests to ``/v1/`` and says whether new ones are taken.
        api_key: The key, or None to let everybody in.
        max_body_bytes: Largest body.
    """

    def __init__(self, app: ASGIApp, lifecycle: Lifecycle, api_key: str | None, max_body_bytes: int) -> None:
        self._app = app
        self._lifecycle = lifecycle
        self._key = None if api_key is None else hashlib.sha256(api_key.encode()).digest()
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers with an error, or hands the request on."""
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self._app(scope, receive, send)
            return
        headers: dict[bytes, bytes] = dict(scope["headers"])
        error = self._refusal(headers)
        if error is not None:
            await error.response()(scope, receive, send)
            return
        with self._lifecycle.answering():
            await self._app(scope, self._limited(receive), send)

    def _refusal(self, headers: dict[bytes, bytes]) -> ApiError | None:
        if self._key is not None and not self._has_key(headers.get(b"authorization", b"")):
            return ApiError(
                401,
                "missing or wrong API key: send the header 'Authorization: Bearer <key>'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if self._lifecycle.draining:
            return shutting_down()
        length = headers.get(b"content-length", b"")
        return self._too_large() if length.isdigit() and int(length) > self._max_body_bytes else None

    def _has_key(self, authorization: bytes) -> bool:
        scheme, _, given = authorization.partition(b" ")
        # Digests have one length, so that the comparison tells nothing about the key's either.
        same = hmac.compare_digest(hashlib.sha256(given.strip()).digest(), self._key or b"")
        return same and scheme.lower() == b"bearer"

    def _too_large(self) -> ApiError:
        return ApiError(
            413, f"the body is larger than {self._max_body_bytes} bytes, which is the limit", code="body_too_large"
        )

    def _limited(self, receive: Receive) -> Receive:
        """Counts the body as it comes, for one sent in chunks states no length."""
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._max_body_bytes:
                raise self._too_large()
            return message

        return counted
