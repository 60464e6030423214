"""The official openai client against the endpoint, while the model behind it is finetuned."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import openai
import pytest

from ygglight.strategies import HarliStrategy

from .harli_cases import PROMPT, Asked, Tuned, client, eventually, fit, solo, strategy

Talk = Callable[[HarliStrategy, openai.OpenAI], Any]


class Meanwhile(L.Callback):
    """Talks from a thread of its own, and trains until it is done; what it raises is raised where the fit was begun."""

    def __init__(self, chosen: HarliStrategy, talk: Talk) -> None:
        self.chosen, self.talk = chosen, talk
        self.batches, self.result, self.error = 0, None, None  # type: ignore[var-annotated]
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            with client(self.chosen.url) as made:
                self.result = self.talk(self.chosen, made)
        except BaseException as error:
            self.error = error

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.thread.start()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.batches += 1
        trainer.should_stop = trainer.should_stop or not self.thread.is_alive()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.thread.join(30)


def talking(module: Any, talk: Talk, *, server: dict[str, Any] | None = None, **options: Any) -> Any:
    """What ``talk`` returned; it ran beside at least one step."""
    chosen = strategy(server={"port": 0} | (server or {}), **options)
    meanwhile = Meanwhile(chosen, talk)
    fit(module, chosen, meanwhile, max_steps=-1, max_epochs=-1)
    if meanwhile.error is not None:
        raise meanwhile.error
    assert meanwhile.batches > 0 and not meanwhile.thread.is_alive()
    return meanwhile.result


def post(url: str | None, body: bytes, kind: str = "application/json") -> tuple[int, Any]:
    asked = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": kind})
    try:
        with urllib.request.urlopen(asked, timeout=30) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def before_each_step(engine: Any, do: Callable[[], Any]) -> None:
    """Has the decode thread do something first."""
    run = engine.batcher.run

    def later(work: Any) -> None:
        do()
        run(work)

    engine.batcher.run = later


GREEDY: dict[str, Any] = {"temperature": 0, "extra_body": {"ignore_eos": True}}


def test_completions_chat_streams_stops_and_lengths(tiny: Path) -> None:
    module = Tuned(tiny)
    with module.lm.disable_adapter():
        tokens = solo(module.lm, module.tokenizer.encode(PROMPT), 30)
    text = module.tokenizer.decode(tokens)

    def talk(chosen: HarliStrategy, made: openai.OpenAI) -> None:
        ask = made.completions.create
        whole = ask(model="base", prompt=PROMPT, max_tokens=30, **GREEDY)
        assert (whole.choices[0].text, whole.choices[0].finish_reason) == (text, "length")
        assert whole.usage is not None and whole.usage.completion_tokens == 30 and whole.system_fingerprint is None
        pieces = list(ask(model="base", prompt=PROMPT, max_tokens=30, stream=True, **GREEDY))
        assert "".join(piece.choices[0].text for piece in pieces) == text and len(pieces) > 5
        word = text[8:11]
        stopped = ask(model="base", prompt=PROMPT, max_tokens=30, stop=[word], **GREEDY).choices[0]
        assert (stopped.text, stopped.finish_reason) == (text[: text.index(word)], "stop")
        short = ask(model="base", prompt=PROMPT, max_tokens=3, **GREEDY)
        assert short.choices[0].text == module.tokenizer.decode(tokens[:3])
        turns: Any = [{"role": "user", "content": "to be, or not to be"}]
        chat = made.chat.completions.create(model="adapter", messages=turns, max_tokens=9, **GREEDY)
        assert chat.usage is not None and chat.usage.completion_tokens == 9 and chat.choices[0].finish_reason
        assert chat.system_fingerprint is not None and chat.system_fingerprint.startswith("adapter-")
        stream = made.chat.completions.create(
            model="base", messages=turns, max_tokens=9, stream=True, stream_options={"include_usage": True}, **GREEDY
        )
        events = list(stream)
        assert events[0].choices[0].delta.role == "assistant"
        assert events[-1].usage is not None and events[-1].usage.completion_tokens == 9
        assert {model.id for model in made.models.list()} == {"base", "adapter"}

    talking(module, talk)


def test_many_at_once_get_what_each_gets_alone(tiny: Path) -> None:
    module = Tuned(tiny)
    prompts = [PROMPT[: 3 + 2 * index] for index in range(8)]
    with module.lm.disable_adapter():
        tokens = [solo(module.lm, module.tokenizer.encode(prompt), 16) for prompt in prompts]
    expected = [module.tokenizer.decode(row, skip_special_tokens=True) for row in tokens]

    def talk(chosen: HarliStrategy, made: openai.OpenAI) -> list[str]:
        def one(prompt: str) -> str:
            return made.completions.create(model="base", prompt=prompt, max_tokens=16, **GREEDY).choices[0].text

        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(one, prompts))

    assert talking(module, talk) == expected


def test_clients_that_leave_free_their_pages(tiny: Path) -> None:
    def talk(chosen: HarliStrategy, made: openai.OpenAI) -> None:
        engine: Any = chosen.engine
        before_each_step(engine, lambda: time.sleep(0.01))
        with made.completions.create(model="base", prompt=PROMPT, max_tokens=200, stream=True, **GREEDY) as stream:
            next(iter(stream))
        assert eventually(lambda: engine.batcher.finished["cancelled"] == 1)
        body = json.dumps({"model": "adapter", "prompt": PROMPT, "max_tokens": 200, "ignore_eos": True})
        raw = http.client.HTTPConnection(str(chosen.url).removeprefix("http://"))
        raw.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        assert eventually(lambda: engine.batcher.load().batch > 0)
        assert raw.sock is not None
        raw.sock.shutdown(socket.SHUT_RDWR)
        raw.close()
        assert eventually(lambda: engine.batcher.idle and engine.arena.counts().kv == 0)
        assert engine.batcher.finished["cancelled"] == 2 and engine.report.requests == 0
        assert made.completions.create(model="base", prompt=PROMPT, max_tokens=2).usage is not None

    talking(Tuned(tiny), talk, max_context=256)


BAD: dict[str, Any] = {
    "no json": b"{",
    "no object": b"[1]",
    "no utf-8": b"\xff\xfe",
    "empty": b"",
    "model": {"model": "gpt-5", "prompt": "a"},
    "no prompt": {"model": "base"},
    "a prompt that is a number": {"model": "base", "prompt": 3},
    "tokens out of the vocabulary": {"model": "base", "prompt": [1, 99999]},
    "negative tokens": {"model": "base", "prompt": [-1]},
    "an empty prompt": {"model": "base", "prompt": ""},
    "a long prompt": {"model": "base", "prompt": [1] * 5000},
    "no tokens": {"model": "base", "prompt": "a", "max_tokens": 0},
    "too many tokens": {"model": "base", "prompt": "a", "max_tokens": 10**9},
    "temperature": {"model": "base", "prompt": "a", "temperature": -1},
    "top_p": {"model": "base", "prompt": "a", "top_p": 7},
    "stop": {"model": "base", "prompt": "a", "stop": 5},
    "n": {"model": "base", "prompt": "a", "n": 10_000},
    "a large body": b"x" * 5000,
}


def test_bad_bodies_get_4xx_and_the_server_lives_on(tiny: Path) -> None:
    def talk(chosen: HarliStrategy, made: openai.OpenAI) -> dict[str, Any]:
        answers = {}
        for name, body in BAD.items():
            answers[name] = post(chosen.url, body if isinstance(body, bytes) else json.dumps(body).encode())
        with socket.create_connection(("127.0.0.1", int(str(chosen.url).rsplit(":", 1)[1]))) as raw:
            raw.sendall(b"\x00nonsense\r\n\r\n")
            assert raw.recv(64).startswith(b"HTTP/1.1 400")
        assert made.completions.create(model="adapter", prompt=PROMPT, max_tokens=4, **GREEDY).usage is not None
        assert chosen.engine is not None and chosen.engine.alive
        return answers

    answers = talking(Tuned(tiny), talk, server={"max_body_bytes": 30_000, "max_prompt_tokens": 200})
    answers["a large body"] = talking(
        Tuned(tiny), lambda chosen, _: post(chosen.url, b"x" * 5000), server={"max_body_bytes": 1000}
    )
    assert {name: code for name, (code, _) in answers.items() if not 400 <= code < 500} == {}
    assert answers["model"][0] == 404 and answers["a large body"][0] == 413
    assert all(answer["error"]["message"] for _, answer in answers.values())


def test_a_burst_over_capacity_gets_429_with_retry_after(tiny: Path) -> None:
    def talk(chosen: HarliStrategy, made: openai.OpenAI) -> list[Any]:
        engine: Any = chosen.engine
        flow = threading.Event()
        flow.set()
        before_each_step(engine, lambda: time.sleep(0.01) or flow.wait(10))
        running = [Asked(engine, [5, 6], 250) for _ in range(2)]  # as many as decode at once
        assert eventually(lambda: engine.batcher.load().batch == 2)
        flow.clear()
        waiting = [Asked(engine, [7], 1) for _ in range(2)]  # as many as may wait
        refused = []
        for _ in range(3):
            with pytest.raises(openai.RateLimitError) as caught:
                made.completions.create(model="base", prompt=PROMPT, max_tokens=1)
            refused.append(caught.value.response)
        flow.set()
        for asked in running:
            asked.request.cancel()
        assert eventually(lambda: all(asked.ended for asked in [*running, *waiting]))
        assert made.completions.create(model="base", prompt=PROMPT, max_tokens=1).usage is not None
        assert engine.report.rejected == 3
        return refused

    refused = talking(Tuned(tiny), talk, server={"max_queue": 2}, max_batch=2, max_context=256)
    assert [answer.status_code for answer in refused] == [429] * 3
    assert all(float(answer.headers["retry-after"]) >= 1 for answer in refused)


def test_only_those_with_the_key_are_answered(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARLI_TEST_KEY", "secret")

    def talk(chosen: HarliStrategy, made: openai.OpenAI) -> None:
        with pytest.raises(openai.AuthenticationError):
            made.completions.create(model="base", prompt=PROMPT, max_tokens=1)
        known = made.with_options(api_key="secret")
        assert known.completions.create(model="base", prompt=PROMPT, max_tokens=1).usage is not None

    talking(Tuned(tiny), talk, server={"api_key_env": "HARLI_TEST_KEY"})


def test_health_and_metrics_tell_of_both_sides(tiny: Path) -> None:
    def talk(chosen: HarliStrategy, made: openai.OpenAI) -> tuple[Any, str]:
        made.completions.create(model="adapter", prompt=PROMPT, max_tokens=4, **GREEDY)
        assert eventually(lambda: chosen.report is not None and chosen.report.micro_batches > 1)
        with urllib.request.urlopen(f"{chosen.url}/health") as health:
            status = json.load(health)
        with urllib.request.urlopen(f"{chosen.url}/metrics") as metrics:
            return status, metrics.read().decode()

    status, metrics = talking(Tuned(tiny), talk)
    assert status["status"] == "ok" and status["finetuning"] is True and status["adapter_version"] > 0
    for name in ("finetune_tokens_total", "kv_chunks", "requests_in_target_total", "adapter_version"):
        assert name in metrics


def test_the_port_is_free_again_and_requests_under_way_are_finished(tiny: Path) -> None:
    module, chosen = Tuned(tiny), strategy(server={"port": 0})
    answers: list[Any] = []
    url: list[str] = []

    class Leave(L.Callback):
        """Has a request under way when training ends."""

        def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            url.append(str(chosen.url))
            engine: Any = chosen.engine
            self.thread = threading.Thread(target=self.ask)
            self.thread.start()
            assert eventually(lambda: engine.batcher.load().batch == 1 or answers)

        def ask(self) -> None:
            with client(url[0]) as made:
                answers.append(made.completions.create(model="base", prompt=PROMPT, max_tokens=200, **GREEDY))

    leave = Leave()
    fit(module, chosen, leave)
    leave.thread.join(30)
    assert answers[0].usage.completion_tokens == 200
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"{url[0]}/health", timeout=5)
    port = int(url[0].rsplit(":", 1)[1])
    again = strategy(server={"port": port})
    fit(Tuned(tiny), again, max_steps=1)
