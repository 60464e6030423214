"""Starting, leaving clients, draining, metrics."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial

import httpx
import openai
import pytest

from ygglight.serving import ServerThread, build_app
from ygglight.serving.generation import Mailbox

from .fake import FakeBackend, client_of, eventually, text_of

BODY = {"model": "base", "prompt": "a", "max_tokens": 5}


def test_it_listens_on_the_loopback_address_when_start_returns(backend: FakeBackend) -> None:
    app = build_app(backend)
    server = ServerThread(port=0)
    assert server.host == "127.0.0.1" and not server.running
    with server:
        server.start(app)
        assert server.running and server.port > 0
        with socket.create_connection(("127.0.0.1", server.port), timeout=5):
            pass
        with pytest.raises(RuntimeError, match="starts once"):
            server.start(app)
    assert not server.running
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", server.port), timeout=5)
    assert server.stop()  # again: nothing to do


def test_a_taken_port_is_one_error_before_anything_runs(backend: FakeBackend) -> None:
    first = ServerThread(port=0)
    first.bind()  # early, before there is anything to serve
    second = ServerThread(port=first.port)
    for attempt in (second.bind, lambda: second.start(build_app(backend))):
        with pytest.raises(ValueError, match=f"cannot listen on port {first.port} of 127.0.0.1.*choose another"):
            attempt()
    assert not second.running
    first.stop()
    second.start(build_app(backend))  # the port is free again
    second.stop()
    for host, port in (("no.such.host.invalid", 0), ("127.0.0.1", 70000), ("192.0.2.1", 0)):
        with pytest.raises(ValueError, match=r"host|port"):
            ServerThread(host, port).bind()


def test_an_application_that_does_not_start_is_an_error_and_not_a_wait(backend: FakeBackend) -> None:
    app = build_app(backend)

    @asynccontextmanager
    async def broken(_: object) -> AsyncIterator[None]:
        raise OSError("no lifespan today")
        yield

    app.router.lifespan_context = broken
    server = ServerThread(port=0)
    with pytest.raises(RuntimeError, match="did not start"):
        server.start(app)
    assert not server.running


def test_a_client_that_leaves_a_stream_frees_the_engine(client: openai.OpenAI, backend: FakeBackend) -> None:
    backend.words, backend.max_context = 10**5, 10**6
    stream = client.completions.create(model="base", prompt="a", n=2, max_tokens=10**5, stream=True)
    assert next(iter(stream)).choices[0].text == "w0 "
    assert backend.cancelled == []
    stream.close()
    assert eventually(lambda: len(backend.cancelled) == 2)
    assert client.completions.create(model="base", prompt="a").choices[0].text == text_of(16)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_client_that_leaves_before_the_first_token_frees_the_engine(
    serve: Callable[..., ServerThread], backend: FakeBackend, streaming: bool
) -> None:
    server = serve()
    backend.flow.clear()
    body = json.dumps(BODY | {"stream": streaming}).encode()
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        connection.sendall(head.encode() + b"\r\n\r\n" + body)
        assert eventually(lambda: len(backend.requests) == 1)
        assert backend.cancelled == []
    assert eventually(lambda: len(backend.cancelled) == 1)
    assert eventually(lambda: httpx.get(server.url + "/health").json()["in_flight"] == 0)
    assert "ygglight_http_requests_cancelled_total 1.0" in httpx.get(server.url + "/metrics").text


def test_health_tells_what_the_engine_says(serve: Callable[..., ServerThread]) -> None:
    answer = httpx.get(serve().url + "/health")
    assert answer.status_code == 200
    assert answer.json() == {"status": "ok", "in_flight": 0, "engine": "fake"}


def test_draining_lets_requests_finish_and_refuses_new_ones(
    serve: Callable[..., ServerThread], backend: FakeBackend
) -> None:
    server = serve()
    backend.flow.clear()
    with client_of(server) as client, ThreadPoolExecutor(3) as pool:
        whole = pool.submit(client.completions.create, model="base", prompt="a", max_tokens=5)
        stream = client.completions.create(model="base", prompt="a", max_tokens=5, stream=True)
        assert eventually(lambda: len(backend.requests) == 2)
        stopped = pool.submit(server.stop, 20.0)
        assert eventually(lambda: httpx.get(server.url + "/health").status_code == 503)
        health = httpx.get(server.url + "/health").json()
        assert (health["status"], health["in_flight"], health["error"]["code"]) == ("draining", 2, "shutting_down")
        with pytest.raises(openai.InternalServerError) as refused:
            client.completions.create(model="base", prompt="a")
        assert (refused.value.status_code, refused.value.code) == (503, "shutting_down")
        assert not stopped.done()
        backend.flow.set()
        assert whole.result().choices[0].text == text_of(5)
        assert "".join(chunk.choices[0].text for chunk in stream) == text_of(5)
        assert stopped.result() is True
    assert not server.running and len(backend.requests) == 2 and backend.cancelled == []


@pytest.mark.parametrize("deaf", [False, True], ids=["engine answers", "engine is dead"])
def test_what_does_not_finish_in_time_is_cancelled_and_its_clients_are_told(
    serve: Callable[..., ServerThread], backend: FakeBackend, deaf: bool
) -> None:
    server = serve()
    backend.flow.clear()
    backend.deaf = deaf
    with client_of(server) as client, ThreadPoolExecutor(2) as pool:
        whole = pool.submit(client.completions.create, model="base", prompt="a")
        stream = client.completions.create(model="base", prompt="a", stream=True)
        assert eventually(lambda: len(backend.requests) == 2)
        assert server.stop(drain_seconds=0.05) is False
        assert isinstance(whole.exception(), openai.InternalServerError)
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
    assert not server.running
    assert all(request.cancelled for request in backend.requests)


def test_events_after_the_end_of_the_server_do_not_hurt_the_decode_thread(backend: FakeBackend) -> None:
    server = ServerThread(port=0)
    server.start(build_app(backend))
    backend.flow.clear()
    backend.deaf = True
    with server, ThreadPoolExecutor(1) as pool, client_of(server) as client:
        whole = pool.submit(client.completions.create, model="base", prompt="a")
        assert eventually(lambda: len(backend.requests) == 1)
        server.stop(drain_seconds=0.0)
        assert whole.exception() is not None
    backend.deaf = False
    assert eventually(lambda: len(backend.cancelled) == 1)  # its event found a closed loop; the engine lives on


def test_metrics_count_requests_tokens_and_latencies_and_carry_the_engines(client: openai.OpenAI) -> None:
    client.completions.create(model="base", prompt="abc", max_tokens=5)
    list(client.completions.create(model="adapter", prompt="ab", max_tokens=3, stream=True))
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="base", prompt="")
    answer = httpx.get(str(client.base_url).replace("/v1/", "/metrics"))
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = answer.text.splitlines()
    for line in (
        'ygglight_http_requests_total{code="200",endpoint="/v1/completions"} 2.0',
        'ygglight_http_requests_total{code="400",endpoint="/v1/completions"} 1.0',
        'ygglight_prompt_tokens_total{model="base"} 3.0',
        'ygglight_prompt_tokens_total{model="adapter"} 2.0',
        'ygglight_answer_tokens_total{model="base"} 5.0',
        'ygglight_answer_tokens_total{model="adapter"} 3.0',
        'ygglight_time_to_first_token_seconds_count{model="base"} 1.0',
        'ygglight_time_per_output_token_seconds_count{model="base"} 1.0',
        "ygglight_http_requests_in_flight 0.0",
        "ygglight_kv_pages_used 3.0",
        "# TYPE ygglight_kv_pages_used gauge",
        "ygglight_preemptions_total 2.0",
        "# TYPE ygglight_preemptions_total counter",
    ):
        assert line in lines, line


def test_a_mailbox_keeps_the_order_wakes_the_loop_once_and_loses_nothing_between_threads() -> None:
    got: list[tuple[int, int]] = []
    each, senders = 500, 4

    async def main() -> int:
        loop = asyncio.get_running_loop()
        wakes = 0
        plain = loop.call_soon_threadsafe

        def counted(*arguments: object) -> object:
            nonlocal wakes
            wakes += 1
            return plain(*arguments)  # type: ignore[arg-type]

        loop.call_soon_threadsafe = counted  # type: ignore[assignment, method-assign]
        mailbox = Mailbox(loop)
        for index in range(100):  # as one decode step would, before the loop gets to run
            mailbox.post(partial(got.append, (-1, index)))
        assert wakes == 1

        def send(sender: int) -> None:
            for index in range(each):
                mailbox.post(partial(got.append, (sender, index)))

        threads = [threading.Thread(target=send, args=(sender,)) for sender in range(senders)]
        for thread in threads:
            thread.start()
        while len(got) < 100 + senders * each:
            await asyncio.sleep(0.001)
        for thread in threads:
            thread.join()
        return wakes

    wakes = asyncio.run(asyncio.wait_for(main(), 20))
    assert got[:100] == [(-1, index) for index in range(100)]
    for one in range(senders):
        assert [index for sender, index in got if sender == one] == list(range(each))
    assert wakes <= 1 + senders * each


def test_a_mailbox_of_a_closed_loop_tells_every_sender() -> None:
    loop = asyncio.new_event_loop()
    mailbox = Mailbox(loop)
    loop.close()
    for _ in range(2):
        with pytest.raises(RuntimeError):
            mailbox.post(lambda: None)


def test_a_missing_package_is_one_line_with_its_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    import ygglight.serving

    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ModuleNotFoundError, match=r"this needs uvicorn: pip install 'ygglight\[serve\]'"):
        ygglight.serving.ServerThread  # noqa: B018
    assert ygglight.serving.Limits().max_body_bytes == 1 << 20
    with pytest.raises(AttributeError):
        ygglight.serving.nothing  # type: ignore[attr-defined]  # noqa: B018
