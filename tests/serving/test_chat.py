"""`/v1/chat/completions` by the official client."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from .fake import FakeBackend, client_of, text_of

HELLO: list[Any] = [{"role": "user", "content": "hello"}]


def test_a_chat_goes_through_the_template(client: openai.OpenAI, backend: FakeBackend) -> None:
    answer = client.chat.completions.create(
        model="base",
        messages=[
            {"role": "developer", "content": "short"},
            {"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]},
        ],
        max_completion_tokens=3,
    )
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", text_of(3), "length")
    asked = backend.tokenizer.decode(backend.requests[0].prompt)
    assert asked == "<system>short<|end|><user>hello<|end|><assistant>"
    assert answer.usage is not None and answer.usage.prompt_tokens == len(backend.requests[0].prompt)
    assert answer.object == "chat.completion"


def test_an_answer_of_no_stated_length_may_fill_the_context(client: openai.OpenAI, backend: FakeBackend) -> None:
    answer = client.chat.completions.create(model="base", messages=HELLO)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (text_of(50), "stop")
    (request,) = backend.requests
    assert request.sampling.max_tokens == backend.max_context - len(request.prompt)


def test_a_stream_begins_with_the_role_and_ends_with_reason_and_usage(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="base", messages=HELLO, max_tokens=2, stream=True, stream_options={"include_usage": True}
        )
    )
    role, *texts, reason, usage = chunks
    assert (role.choices[0].delta.role, role.choices[0].delta.content) == ("assistant", "")
    assert [(chunk.choices[0].delta.role, chunk.choices[0].delta.content) for chunk in texts] == [
        (None, "w0 "),
        (None, "w1 "),
    ]
    assert (reason.choices[0].delta.content, reason.choices[0].finish_reason) == (None, "length")
    assert usage.choices == [] and usage.usage is not None and usage.usage.completion_tokens == 2
    assert all(chunk.object == "chat.completion.chunk" for chunk in chunks)


def test_n_chats_have_a_role_each(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(model="base", messages=HELLO, n=2, max_tokens=1, stream=True))
    roles = [chunk.choices[0].index for chunk in chunks if chunk.choices[0].delta.role]
    assert roles == [0, 1]
    answer = client.chat.completions.create(model="base", messages=HELLO, n=2, max_tokens=1)
    assert [choice.message.content for choice in answer.choices] == ["w0 ", "w0 "]


def test_stop_is_a_string_or_a_list(client: openai.OpenAI) -> None:
    for stop in ("w2", ["w7", "w2"]):
        answer = client.chat.completions.create(model="base", messages=HELLO, stop=stop)
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (text_of(2), "stop")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_cannot_be_done_is_refused_with_the_field(client: openai.OpenAI, backend: FakeBackend) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"tools": [tool]}, "tools"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ({"extra_body": {"reasoning": "much"}}, "reasoning"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "a"}]}, "messages.0.role"),
        ({"messages": [*HELLO, {"role": "user", "content": None}]}, "messages.1.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
         "messages.0.content"),
        ({"messages": ["hello"]}, "messages.0"),
    ]  # fmt: skip
    for changes, param in cases:
        arguments = {"model": "base", "messages": HELLO} | changes
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(**arguments)
        assert refused.value.param == param, (changes, refused.value)
    assert backend.requests == []
    with pytest.raises(openai.BadRequestError, match="an assistant cannot begin"):
        client.chat.completions.create(model="base", messages=[{"role": "assistant", "content": "a"}])


def test_a_tokenizer_without_a_template_says_what_to_use(
    serve: Any, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend.tokenizer, "chat_template", None)
    with client_of(serve()) as client:
        with pytest.raises(openai.BadRequestError, match="no chat template: use /v1/completions"):
            client.chat.completions.create(model="base", messages=HELLO)
        assert client.completions.create(model="base", prompt="a").choices


def test_logprobs_come_with_the_tokens(client: openai.OpenAI, backend: FakeBackend) -> None:
    arguments: dict[str, Any] = {"model": "base", "messages": HELLO, "max_tokens": 2, "logprobs": True}
    first, second = backend.tokenizer.decode([1]), backend.tokenizer.decode([2])
    answer = client.chat.completions.create(**arguments, top_logprobs=2)
    found = answer.choices[0].logprobs
    assert found is not None and found.content is not None
    assert [(entry.token, entry.logprob) for entry in found.content] == [(first, -0.5)] * 2
    assert [(top.token, top.logprob) for top in found.content[1].top_logprobs] == [(first, -0.5), (second, -1.5)]
    assert found.content[0].bytes == list(first.encode())

    chunks = list(client.chat.completions.create(**arguments, stream=True))
    counts = [len(chunk.choices[0].logprobs.content) if chunk.choices[0].logprobs else 0 for chunk in chunks]
    assert counts == [0, 1, 1, 0]
    assert client.chat.completions.create(model="base", messages=HELLO).choices[0].logprobs is None
    assert [request.sampling.logprobs for request in backend.requests] == [2, 0, None]
