"""Every error has one shape, and the server lives on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest

from ygglight.engines.harli.requests import Closing
from ygglight.serving import Limits, ServerThread, api_key_from_env, build_app

from .fake import FakeBackend, client_of, text_of

COMPLETION = {"model": "base", "prompt": "a", "max_tokens": 2}


def error_of(answer: httpx.Response) -> dict[str, Any]:
    """The error of an answer, after a look at its shape."""
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and isinstance(error["message"], str)
    assert error["type"] == ("server_error" if answer.status_code >= 500 else error["type"])
    return error


def post(server: ServerThread, body: Any, path: str = "/v1/completions", **options: Any) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"} | options.pop("headers", {})
    return httpx.post(server.url + path, content=content, headers=headers, timeout=20, **options)


def test_malformed_bodies_are_400_and_the_server_lives_on(
    serve: Callable[..., ServerThread], backend: FakeBackend
) -> None:
    server = serve()
    cases: list[tuple[Any, str | None]] = [
        (b"", None),
        (b"{", None),
        (b'{"model": "base", "prompt": "a"', None),
        (b"\xff\xfe{}", None),
        (b"[1, 2]", None),
        (b"null", None),
        (b"[" * 100_000, None),
        (b'{"model": "base", "prompt": "a", "temperature": NaN}', None),
        (b'{"model": "base", "prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}", None),
        (b'{"model": "base", "prompt": "\\ud800"}', "prompt"),
        ({"prompt": "a"}, "model"),
        ({"model": 3, "prompt": "a"}, "model"),
        ({"model": "base"}, "prompt"),
        ({"model": "base", "prompt": ""}, "prompt"),
        ({"model": "base", "prompt": []}, "prompt"),
        ({"model": "base", "prompt": [[]]}, "prompt"),
        ({"model": "base", "prompt": [1, "a"]}, "prompt"),
        ({"model": "base", "prompt": [True]}, "prompt"),
        ({"model": "base", "prompt": [1.5]}, "prompt"),
        ({"model": "base", "prompt": [-1]}, "prompt"),
        ({"model": "base", "prompt": [10**6]}, "prompt"),
        ({"model": "base", "prompt": {"text": "a"}}, "prompt"),
        (COMPLETION | {"max_tokens": "5"}, "max_tokens"),
        (COMPLETION | {"max_tokens": 0}, "max_tokens"),
        (COMPLETION | {"max_tokens": 2.5}, "max_tokens"),
        (COMPLETION | {"max_tokens": True}, "max_tokens"),
        (COMPLETION | {"temperature": 3}, "temperature"),
        (COMPLETION | {"temperature": "hot"}, "temperature"),
        (COMPLETION | {"top_p": 0}, "top_p"),
        (COMPLETION | {"n": 0}, "n"),
        (COMPLETION | {"n": 1000}, "n"),
        (COMPLETION | {"seed": 2**63}, "seed"),
        (COMPLETION | {"presence_penalty": 5}, "presence_penalty"),
        (COMPLETION | {"stop": 5}, "stop"),
        (COMPLETION | {"stop": [""]}, "stop"),
        (COMPLETION | {"stop": ["a"] * 17}, "stop"),
        (COMPLETION | {"stream": "yes"}, "stream"),
        (COMPLETION | {"stream_options": {"include_usage": True}}, "stream_options"),
        (COMPLETION | {"stream": True, "stream_options": {"chatter": True}}, "stream_options.chatter"),
        (COMPLETION | {"echo": True}, "echo"),
        (COMPLETION | {"logprobs": 200}, "logprobs"),
        (COMPLETION | {"best_of": 4}, "best_of"),
        (COMPLETION | {"suffix": "z"}, "suffix"),
        (COMPLETION | {"temprature": 1}, "temprature"),
    ]
    for body, param in cases:
        answer = post(server, body)
        assert answer.status_code == 400, (body, answer.text)
        error = error_of(answer)
        assert (error["param"], error["type"]) == (param, "invalid_request_error"), (body, error)
    assert backend.requests == []
    assert post(server, COMPLETION).json()["choices"][0]["text"] == text_of(2)


def test_what_only_tells_about_the_caller_is_taken_and_null_is_the_default(serve: Callable[..., ServerThread]) -> None:
    nulls = dict.fromkeys(["temperature", "top_p", "n", "seed", "stop", "stream", "stream_options", "echo", "logprobs"])
    about = {"user": "me", "metadata": {"a": "b"}, "best_of": 1, "logit_bias": {}}
    assert post(serve(), COMPLETION | nulls | about).status_code == 200


def test_other_paths_methods_content_types_and_models(serve: Callable[..., ServerThread]) -> None:
    server = serve()
    for path, method in (("/v1/embeddings", "POST"), ("/nothing", "GET"), ("/docs", "GET")):
        answer = httpx.request(method, server.url + path)
        assert answer.status_code == 404 and error_of(answer)
    answer = httpx.get(server.url + "/v1/completions")
    assert answer.status_code == 405 and error_of(answer) and "POST" in answer.headers["allow"]
    # A web page may send this without asking; it must not reach the engine.
    answer = post(server, COMPLETION, headers={"Content-Type": "text/plain"})
    assert answer.status_code == 415 and error_of(answer)
    for path, prompt in (("completions", {"prompt": "a"}), ("chat/completions", {"messages": []})):
        answer = post(server, {"model": "gpt-\ud8004", **prompt}, path=f"/v1/{path}")
        error = error_of(answer)
        assert (answer.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
        assert "base, adapter" in error["message"]


def test_what_does_not_fit_the_context_says_so(client: openai.OpenAI, backend: FakeBackend) -> None:
    fits = client.completions.create(model="base", prompt="x" * 190, max_tokens=10)  # 200 tokens in all
    assert fits.choices[0].finish_reason == "length"
    for prompt, max_tokens in (("x" * 190, 11), ("x" * 200, 1), ("x" * 5000, 1), ("x", 10**9)):
        with pytest.raises(openai.BadRequestError) as refused:
            client.completions.create(model="base", prompt=prompt, max_tokens=max_tokens)
        assert refused.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="base", messages=[{"role": "user", "content": "x" * 300}])
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "messages")
    assert len(backend.requests) == 1


def test_limits_on_prompt_answer_and_choices(serve: Callable[..., ServerThread], backend: FakeBackend) -> None:
    limits = Limits(max_prompt_tokens=60, max_answer_tokens=4, max_choices=2)
    with client_of(serve(limits)) as client:
        assert client.completions.create(model="base", prompt="x" * 60, max_tokens=4, n=2).choices[1].text == text_of(4)
        chat = client.chat.completions.create(model="base", messages=[{"role": "user", "content": "x"}])
        assert chat.choices[0].message.content == text_of(4)
        for arguments in ({"prompt": "x" * 61}, {"max_tokens": 5}, {"n": 3}, {"prompt": ["a", "b", "c"]}):
            with pytest.raises(openai.BadRequestError):
                client.completions.create(**({"model": "base", "prompt": "a", "max_tokens": 4} | arguments))  # type: ignore[call-overload]
    assert len(backend.requests) == 3


def test_a_large_body_is_413_whether_its_length_is_stated_or_not(
    serve: Callable[..., ServerThread], backend: FakeBackend
) -> None:
    server = serve(Limits(max_body_bytes=1000))
    head = json.dumps(COMPLETION).encode()
    fits = head + b" " * (1000 - len(head))
    assert post(server, fits).status_code == 200

    def chunks() -> Iterator[bytes]:
        yield fits
        yield b" "

    for body in (fits + b" ", chunks()):
        answer = httpx.post(server.url + "/v1/completions", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 413 and error_of(answer)["code"] == "body_too_large"
    assert len(backend.requests) == 1


def test_a_full_queue_is_429_with_retry_after_and_takes_all_choices_or_none(
    client: openai.OpenAI, backend: FakeBackend
) -> None:
    backend.max_queue = 3
    backend.flow.clear()
    with pytest.raises(openai.RateLimitError) as refused:
        client.completions.create(model="base", prompt="a", n=4)
    assert refused.value.response.headers["retry-after"] == "2"  # 1.5 s, and only whole seconds can be said
    assert error_of(httpx.Response(429, content=refused.value.response.content))["code"] == "rate_limit_exceeded"
    backend.flow.set()
    assert client.completions.create(model="base", prompt="a", n=3).choices[2].text == text_of(16)
    # Those three that had been let in were cancelled.
    assert len(backend.cancelled) == 3


def test_what_the_engine_refuses_is_400_and_a_bug_is_500_without_its_text(
    serve: Callable[..., ServerThread], backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve()
    errors = (ValueError("it never fits"), 400), (Closing(1.0), 503), (KeyError("a secret of the inside"), 500)
    for error, status in errors:

        def fail(request: Any, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(backend, "submit", fail)
        answer = post(server, COMPLETION)
        assert answer.status_code == status
        assert ("never fits" in error_of(answer)["message"]) == (status == 400)
        assert "secret" not in answer.text


def test_without_the_key_nobody_gets_in(serve: Callable[..., ServerThread], backend: FakeBackend) -> None:
    server = serve(api_key="sésame")
    key = "sésame".encode()
    for header in (None, b"", b"Bearer", b"Bearer s", b"Bearer " + key + b"x", b"Basic " + key, key):
        headers = {} if header is None else {b"Authorization": header}
        for method, path in (("POST", "/v1/completions"), ("GET", "/v1/models"), ("GET", "/v1/nothing")):
            answer = httpx.request(method, server.url + path, headers=headers)
            assert answer.status_code == 401 and error_of(answer)["code"] == "invalid_api_key", header
            assert answer.headers["www-authenticate"] == "Bearer"
    assert backend.requests == []
    for scheme in (b"Bearer ", b"bearer  "):
        assert httpx.get(server.url + "/v1/models", headers={b"Authorization": scheme + key}).status_code == 200
    for path in ("/health", "/metrics"):
        assert httpx.get(server.url + path).status_code == 200


def test_the_official_client_with_and_without_the_key(serve: Callable[..., ServerThread]) -> None:
    server = serve(api_key="sesame")
    with client_of(server, "sesame") as client:
        assert client.completions.create(model="base", prompt="a").choices
    with client_of(server, "wrong") as client, pytest.raises(openai.AuthenticationError):
        client.completions.create(model="base", prompt="a")


def test_the_key_comes_from_a_variable_that_must_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", " sesame\n")
    assert api_key_from_env("A_KEY") == "sesame"
    assert api_key_from_env(None) is None
    for value in ("", "  "):
        monkeypatch.setenv("A_KEY", value)
        with pytest.raises(ValueError, match=r"A_KEY.*not set"):
            api_key_from_env("A_KEY")


def test_limits_that_cannot_be(backend: FakeBackend) -> None:
    for name in ("max_body_bytes", "max_prompt_tokens", "max_choices", "max_stop"):
        for value in (0, -1, True, 1.5, "many"):
            with pytest.raises(ValueError, match=name):
                Limits(**{name: value})
    with pytest.raises(ValueError, match="max_body_bytes"):
        Limits(max_body_bytes=None)  # type: ignore[arg-type]
    assert build_app(backend, Limits(max_prompt_tokens=None))
