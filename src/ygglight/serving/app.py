"""The application: routes, and errors in one shape."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from ygglight.serving.backend import Backend
from ygglight.serving.errors import ApiError, shutting_down
from ygglight.serving.generation import ClientGone
from ygglight.serving.guard import Guard
from ygglight.serving.handler import Handler
from ygglight.serving.lifecycle import Lifecycle
from ygglight.serving.limits import Limits
from ygglight.serving.metrics import Metrics


def build_app(backend: Backend, limits: Limits | None = None, api_key: str | None = None) -> FastAPI:
    """An OpenAI-compatible HTTP front of an engine.

    ``POST /v1/completions``, ``POST /v1/chat/completions``, ``GET /v1/models``, ``GET /health``, ``GET /metrics``.

    Args:
        backend: The engine.
        limits: How much a client may ask for. Default: `Limits()`.
        api_key: What clients must send as ``Authorization: Bearer``; None: nothing. See `api_key_from_env`.

    Returns:
        The application; ``app.state.lifecycle`` drains it, which `ServerThread` does.
    """
    limits = limits or Limits()
    lifecycle, metrics = Lifecycle(), Metrics(backend)
    handler = Handler(backend, limits, lifecycle, metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        handler.start(asyncio.get_running_loop())
        yield
        handler.close()

    # No documentation pages: theirs load scripts from a CDN.
    app = FastAPI(title="ygglight", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.lifecycle = lifecycle
    app.add_middleware(Guard, lifecycle=lifecycle, api_key=api_key, max_body_bytes=limits.max_body_bytes)
    _add_errors(app, metrics)
    _add_routes(app, backend, lifecycle, metrics)
    for path, answer in (("/v1/completions", handler.completion), ("/v1/chat/completions", handler.chat)):
        app.add_api_route(path, _counted(answer, path, metrics), methods=["POST"], response_model=None)
    return app


def _counted(
    answer: Callable[[HttpRequest], Awaitable[Response]], path: str, metrics: Metrics
) -> Callable[[HttpRequest], Awaitable[Response]]:
    """Counts the answers of an endpoint by their status."""

    async def route(request: HttpRequest) -> Response:
        code = 500
        try:
            response = await answer(request)
            code = response.status_code
            return response
        except ApiError as error:
            code = error.status
            raise
        except ClientGone:
            code = 499
            raise
        finally:
            metrics.responses.labels(path, str(code)).inc()

    return route


def _add_routes(app: FastAPI, backend: Backend, lifecycle: Lifecycle, metrics: Metrics) -> None:
    def card(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": 0, "owned_by": "ygglight"}

    @app.get("/v1/models", response_model=None)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card(name) for name in backend.models()]}

    @app.get("/v1/models/{name:path}", response_model=None)
    async def model(name: str) -> dict[str, Any]:
        if name not in backend.models():
            raise ApiError(404, f"the model {name!r} does not exist", param="model", code="model_not_found")
        return card(name)

    @app.get("/health", response_model=None)
    async def health() -> Any:
        if lifecycle.draining:
            return shutting_down().response(status="draining", in_flight=lifecycle.in_flight)
        return {**backend.status(), "status": "ok", "in_flight": lifecycle.in_flight}

    @app.get("/metrics", response_model=None)
    async def scrape() -> Response:
        metrics.in_flight.set(lifecycle.in_flight)
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_errors(app: FastAPI, metrics: Metrics) -> None:
    @app.exception_handler(ApiError)
    async def known(request: HttpRequest, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(HTTPException)
    async def routing(request: HttpRequest, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return ApiError(error.status_code, message, headers=error.headers).response()

    @app.exception_handler(ClientGone)
    async def gone(request: HttpRequest, error: ClientGone) -> Response:
        metrics.cancelled.inc()
        return Response(status_code=499)  # nginx' number for it; nobody reads it

    @app.exception_handler(Exception)
    async def unknown(request: HttpRequest, error: Exception) -> Response:
        # uvicorn logs the traceback; the client gets nothing of it.
        return ApiError(500, "an error inside the server: see its log", code="internal_error").response()
