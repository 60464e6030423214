"""uvicorn in a thread: listening when `start` returns, drained when `stop` does."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any

import uvicorn
from fastapi import FastAPI

_START_SECONDS = 30.0


class ServerThread:
    """Serves an application of `build_app` beside other work of the process.

    It installs no signal handlers: Ctrl-C is the main thread's, which stops the server. `bind` may be called before
    long work and before there is an application, so that a taken port is known at once; clients that come between
    `bind` and `start` wait. As a context it stops at the end.

    Args:
        host: Address to listen on. The default lets nobody in from outside.
        port: Port; 0 takes a free one, which `port` tells after `bind`.
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 8000) -> None:
        self._app: FastAPI | None = None
        self.host, self.port = host, port
        self._socket: socket.socket | None = None
        self._thread: threading.Thread | None = None
        self._server: uvicorn.Server | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._failure: BaseException | None = None

    @property
    def url(self) -> str:
        """Base of all addresses, as ``http://127.0.0.1:8000``."""
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"

    @property
    def running(self) -> bool:
        """Whether it answers."""
        return self._thread is not None and self._thread.is_alive()

    def bind(self) -> None:
        """Takes the port; does nothing when it has it.

        Raises:
            ValueError: The port is taken or not allowed, or the host is none of this machine's.
        """
        if self._socket is not None:
            return
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port {self.port} does not exist: give one from 1 to 65535, or 0 for a free one")
        where = f"port {self.port} of {self.host}"
        try:
            family, kind, _, _, address = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)[0]
        except (OSError, UnicodeError) as error:
            raise ValueError(f"host {self.host!r} is no address of this machine: {error}") from error
        listener = socket.socket(family, kind)
        try:
            if os.name == "posix":  # elsewhere it would let two servers have one port
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(2048)
        except OSError as error:
            listener.close()
            raise ValueError(f"cannot listen on {where} ({error.strerror}): choose another, or 0 for any") from error
        self._socket, self.port = listener, listener.getsockname()[1]

    def start(self, app: FastAPI) -> None:
        """Returns when requests are answered.

        Args:
            app: The application.

        Raises:
            ValueError: See `bind`.
            RuntimeError: It was started before, or the application did not start.
        """
        if self._thread is not None:
            raise RuntimeError("a ServerThread starts once: make another")
        self.bind()
        self._app = app
        config = uvicorn.Config(
            app, http="h11", loop="asyncio", ws="none", lifespan="on", log_config=None, access_log=False,
            server_header=False, timeout_graceful_shutdown=2,
        )  # fmt: skip
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._serve, name="ygglight-server", daemon=True)
        self._thread.start()
        deadline = time.monotonic() + _START_SECONDS
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                self._close()
                raise RuntimeError(f"the server did not start: see the log ({self._failure})")
            time.sleep(0.002)

    def stop(self, drain_seconds: float = 10.0) -> bool:
        """Refuses new requests with 503, lets those under way finish, then ends the thread.

        Harmless when it runs no more, and callable from any thread but its own.

        Args:
            drain_seconds: How long requests under way may take. Then they are cancelled and their clients told.

        Returns:
            Whether all of them finished by themselves.
        """
        finished = True
        if self.running and self._loop is not None and self._app is not None:
            drain = self._app.state.lifecycle.drain(drain_seconds)
            try:
                finished = asyncio.run_coroutine_threadsafe(drain, self._loop).result(drain_seconds + 10)
            except FutureTimeout:
                finished = False
            except RuntimeError:  # the loop closed meanwhile: the server ended by itself
                drain.close()
        self._close()
        return finished

    def _close(self) -> None:
        if self._server is not None:
            self._server.should_exit = True
        if self._thread is not None:
            self._thread.join(timeout=10)
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _serve(self) -> None:
        assert self._server is not None and self._socket is not None
        try:
            asyncio.run(self._main(self._server, self._socket))
        except BaseException as error:  # uvicorn leaves by SystemExit when the application does not start
            self._failure = error

    async def _main(self, server: uvicorn.Server, listener: socket.socket) -> None:
        self._loop = asyncio.get_running_loop()
        await server.serve(sockets=[listener])

    def __enter__(self) -> ServerThread:
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()
