"""`/v1/completions` by the official client."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from ygglight.engines.decode.sampling import Logprobs as TokenLogprobs
from ygglight.engines.harli.requests import TokenEvent
from ygglight.serving.logprobs import Logprobs

from .fake import FakeBackend, eventually, text_of


def test_a_completion_has_text_reason_and_usage(client: openai.OpenAI, backend: FakeBackend) -> None:
    answer = client.completions.create(
        model="base", prompt="Once", max_tokens=5, temperature=0, top_p=0.5, seed=3, frequency_penalty=0.25,
        presence_penalty=-0.5, stop="never", extra_body={"top_k": 4, "min_p": 0.1, "repetition_penalty": 1.5},
    )  # fmt: skip
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason, choice.index) == (text_of(5), "length", 0)
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (4, 5, 9)
    assert answer.object == "text_completion" and answer.model == "base" and answer.system_fingerprint is None
    (request,) = backend.requests
    sampling = request.sampling
    assert request.prompt == backend.tokenizer("Once")["input_ids"]
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.seed) == (5, 0, 0.5, 3)
    assert (sampling.frequency_penalty, sampling.presence_penalty, sampling.stop) == (0.25, -0.5, ("never",))
    assert (sampling.top_k, sampling.min_p, sampling.repetition_penalty) == (4, 0.1, 1.5)


def test_defaults_are_those_of_openai(client: openai.OpenAI, backend: FakeBackend) -> None:
    assert client.completions.create(model="base", prompt="a").choices[0].text == text_of(16)
    assert backend.requests[0].sampling.temperature == 1.0


def test_the_end_of_the_text_and_stop_strings_are_told_apart_from_the_length(client: openai.OpenAI) -> None:
    ended = client.completions.create(model="base", prompt="a", max_tokens=100).choices[0]
    assert (ended.text, ended.finish_reason) == (text_of(50), "stop")
    stopped = client.completions.create(model="base", prompt="a", max_tokens=100, stop=["w9", "w3"]).choices[0]
    assert (stopped.text, stopped.finish_reason) == (text_of(3), "stop")


def test_lists_of_prompts_and_tokens_and_n_make_choices_in_order(client: openai.OpenAI, backend: FakeBackend) -> None:
    answer = client.completions.create(model="base", prompt=["a", "bc"], n=2, max_tokens=2, seed=10)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in answer.choices] == [text_of(2)] * 4
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 8)
    asked = sorted(backend.requests, key=lambda request: request.id)
    assert [len(request.prompt) for request in asked] == [1, 1, 2, 2]
    # Equal seeds would make the n answers of a prompt equal.
    assert [request.sampling.seed for request in asked] == [10, 11, 10, 11]

    client.completions.create(model="base", prompt=[5, 6, 7], max_tokens=1)
    client.completions.create(model="base", prompt=[[5], [6, 7]], max_tokens=1)
    assert [request.prompt for request in backend.requests[4:]] == [[5, 6, 7], [5], [6, 7]]


def test_a_stream_is_the_same_text_in_chunks_and_tells_usage_when_asked(client: openai.OpenAI) -> None:
    chunks = list(client.completions.create(model="base", prompt="abc", max_tokens=4, stream=True))
    assert [chunk.choices[0].text for chunk in chunks] == ["w0 ", "w1 ", "w2 ", "w3 ", ""]
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * 4 + ["length"]
    assert len({chunk.id for chunk in chunks}) == 1 and all(chunk.usage is None for chunk in chunks)

    options = {"include_usage": True}
    chunks = list(
        client.completions.create(model="base", prompt="abc", max_tokens=4, stream=True, stream_options=options)  # type: ignore[call-overload]
    )
    assert chunks[-1].choices == []
    usage = chunks[-1].usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (3, 4, 7)
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_a_stream_of_several_choices_can_be_put_together(client: openai.OpenAI) -> None:
    texts = {0: "", 1: "", 2: ""}
    for chunk in client.completions.create(model="base", prompt="a", n=3, max_tokens=6, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == dict.fromkeys(range(3), text_of(6))


def test_tokens_are_sent_when_they_come_and_not_at_the_end(client: openai.OpenAI, backend: FakeBackend) -> None:
    backend.pause_at = 3
    chunks = iter(client.completions.create(model="base", prompt="a", max_tokens=5, stream=True))
    assert [next(chunks).choices[0].text for _ in range(3)] == ["w0 ", "w1 ", "w2 "]  # while the engine stands still
    backend.pause_at = None
    assert [chunk.choices[0].text for chunk in chunks] == ["w3 ", "w4 ", ""]


def test_32_at_once_are_one_batch_and_none_gets_anothers_text(client: openai.OpenAI, backend: FakeBackend) -> None:
    backend.flow.clear()

    def ask(index: int) -> tuple[str, int]:
        streaming = index % 2 == 0
        got = client.completions.create(model="base", prompt="x" * (index + 1), max_tokens=index + 1, stream=streaming)
        if streaming:
            return "".join(chunk.choices[0].text for chunk in got), index + 1
        return got.choices[0].text, got.usage.prompt_tokens

    with ThreadPoolExecutor(32) as pool:
        answers = [pool.submit(ask, index) for index in range(32)]
        assert eventually(lambda: len(backend.requests) == 32, 30)
        backend.flow.set()
        assert [answer.result() for answer in answers] == [(text_of(index + 1), index + 1) for index in range(32)]
    assert backend.largest_batch == 32


def test_the_adapter_tells_its_version(client: openai.OpenAI) -> None:
    assert client.completions.create(model="adapter", prompt="a").system_fingerprint == "adapter-7"
    stream = client.completions.create(model="adapter", prompt="a", max_tokens=2, stream=True)
    assert {chunk.system_fingerprint for chunk in stream} == {"adapter-7"}


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["base", "adapter"]
    assert client.models.retrieve("adapter").id == "adapter"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_an_engine_that_fails_is_a_500_and_in_a_stream_an_error_after_the_text(
    client: openai.OpenAI, backend: FakeBackend
) -> None:
    backend.fail_at = 2
    with pytest.raises(openai.InternalServerError) as failed:
        client.completions.create(model="base", prompt="a")
    assert failed.value.code == "engine_error"
    texts = []
    with pytest.raises(openai.APIError, match="the engine failed"):
        for chunk in client.completions.create(model="base", prompt="a", stream=True):
            texts.append(chunk.choices[0].text)
    assert texts == ["w0 ", "w1 "]


def test_logprobs_have_the_old_shape(client: openai.OpenAI, backend: FakeBackend) -> None:
    first, second = backend.tokenizer.decode([1]), backend.tokenizer.decode([2])
    found = client.completions.create(model="base", prompt="a", max_tokens=3, logprobs=2).choices[0].logprobs
    assert found is not None
    assert (found.tokens, found.token_logprobs, found.text_offset) == ([first] * 3, [-0.5] * 3, [0, 1, 2])
    assert found.top_logprobs == [{first: -0.5, second: -1.5}] * 3
    # Bytes above 127 all read as one replacement character: the likeliest of them keeps its place.
    high = [backend.tokenizer.convert_tokens_to_ids(letter) for letter in "ÿþ"]
    collected = Logprobs(backend.tokenizer.decode)
    collected.add(TokenEvent(high[0], "", None, TokenLogprobs(-1.0, ((high[0], -1.0), (high[1], -2.0)))))
    assert collected.take_completion()["top_logprobs"] == [{"\ufffd": -1.0}]  # type: ignore[index]
    offsets = [
        chunk.choices[0].logprobs.text_offset
        for chunk in client.completions.create(model="base", prompt="a", max_tokens=3, logprobs=0, stream=True)
        if chunk.choices[0].logprobs
    ]
    assert offsets == [[0], [1], [2]]
