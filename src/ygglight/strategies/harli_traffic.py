"""Where requests come from while a fit runs: clients over HTTP, or a trace."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, fields
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from ygglight.engines.harli.engine import Engine
from ygglight.engines.harli.replay import Replayer
from ygglight.engines.harli.trace import Trace, poisson


@dataclass(frozen=True)
class ServerOptions:
    """What ``server=`` of the strategy may hold.

    Args:
        host: Address to listen on; the default lets nobody in from outside. port: 0 takes a free one.
        api_key_env: Environment variable that holds the key clients must send. max_queue: Requests that may wait.
        max_body_bytes, max_prompt_tokens, max_answer_tokens: Limits of one request.
        drain_seconds: What requests under way may take when the fit is over.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key_env: str | None = None
    max_queue: int = 64
    max_body_bytes: int = 1 << 20
    max_prompt_tokens: int | None = None
    max_answer_tokens: int | None = None
    drain_seconds: float = 30.0

    def __post_init__(self) -> None:
        kinds: dict[str, type | tuple[type, ...]] = {
            "host": str, "port": int, "api_key_env": (str, type(None)), "drain_seconds": (int, float)
        }  # fmt: skip
        for name, kind in kinds.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, kind):
                raise ValueError(f"server: {name} is {value!r}, which is no {_name(kind)}")
        if not 0 <= self.drain_seconds < threading.TIMEOUT_MAX:
            raise ValueError(f"server: drain_seconds is {self.drain_seconds}: give 0 or more")


def parse_server(server: bool | dict[str, Any] | None, *, default: bool) -> ServerOptions | None:
    """The options of the server, or None for none.

    Args:
        server: From the user. default: Whether there is one if the user says nothing.

    Raises:
        ValueError: an option that there is not.
    """
    if server is None:
        server = default
    if isinstance(server, bool):
        return ServerOptions() if server else None
    if not isinstance(server, dict):
        raise ValueError(f"server is {server!r}: give true, false or options such as {{port: 8000}}")
    known = [field.name for field in fields(ServerOptions)]
    unknown = sorted(set(server) - set(known))
    if unknown:
        raise ValueError(f"server has no option {', '.join(unknown)}: there are {', '.join(known)}")
    return ServerOptions(**server)


def parse_requests(requests: str | dict[str, Any] | None) -> Trace | None:
    """The trace to replay.

    Raises:
        ValueError: the file or the numbers are wrong.
    """
    if requests is None:
        return None
    if isinstance(requests, str):
        return Trace.load(requests)
    needed = {"rate", "seconds", "prompt_tokens", "max_tokens"}
    allowed = needed | {"model", "seed"}
    if not needed <= set(requests) <= allowed:
        raise ValueError(
            f"requests={requests}: give a .jsonl file, or {', '.join(sorted(needed))} (and model, seed) of Poisson "
            "arrivals"
        )
    return poisson(**requests)


def _name(kind: type | tuple[type, ...]) -> str:
    return "text" if kind in (str, (str, type(None))) else "number" if isinstance(kind, tuple) else "whole number"


class Traffic:
    """The server, the replayed trace, or both.

    Args:
        options: Of the server; None: there is none. trace: To replay; None: nothing.

    Raises:
        ValueError: the port is taken, or the API key is not set.
    """

    def __init__(self, options: ServerOptions | None, trace: Trace | None) -> None:
        self._options, self._trace = options, trace
        self._server: Any = None
        self._key: str | None = None
        self.replayer: Replayer | None = None
        if options is not None:
            from ygglight.compat.extras import require

            require("fastapi", "serve")
            from ygglight.serving.limits import Limits, api_key_from_env
            from ygglight.serving.server import ServerThread

            self._limits = Limits(
                max_body_bytes=options.max_body_bytes, max_prompt_tokens=options.max_prompt_tokens,
                max_answer_tokens=options.max_answer_tokens,
            )  # fmt: skip
            self._key = api_key_from_env(options.api_key_env)
            self._server = ServerThread(options.host, options.port)
            self._server.bind()

    @property
    def url(self) -> str | None:
        """Where the server listens."""
        return None if self._server is None else self._server.url

    @property
    def drain_seconds(self) -> float:
        """What requests under way may take at the end."""
        return ServerOptions.drain_seconds if self._options is None else self._options.drain_seconds

    def start(self, engine: Engine) -> None:
        """Let requests in."""
        if self._server is not None:
            from ygglight.serving.app import build_app

            self._server.start(build_app(engine, self._limits, self._key))
        if self._trace is not None:
            self.replayer = Replayer(
                self._trace, engine, encode=engine.tokenizer.encode, vocabulary=engine.decoder.vocabulary
            )
            for row in self.replayer.results:
                needed = row.prompt_tokens + self._trace.requests[row.index].max_tokens
                if needed > engine.max_context:
                    raise ValueError(
                        f"request {row.index + 1} of the trace has {needed} tokens, prompt and answer together, and "
                        f"max_context is {engine.max_context}: raise max_context, or shorten it"
                    )
            self.replayer.start()

    def serve_on(self, engine: Engine) -> None:
        """Serve until Ctrl-C, or until nobody decodes any more."""
        rank_zero_info(f"harli: the fit is over; still serving at {self.url}, until Ctrl-C")
        try:
            while self._server.running and engine.alive:
                time.sleep(0.2)
        except KeyboardInterrupt:
            pass

    def stop(self, drain_seconds: float) -> None:
        """Let nobody in any more; requests under way have so long to finish."""
        try:
            if self.replayer is not None:
                self.replayer.stop()
        finally:
            if self._server is not None:
                self._server.stop(drain_seconds)
