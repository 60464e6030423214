"""A tokenizer of bytes, and a server in front of a fake engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest

from ygglight.serving import Limits, ServerThread, build_app

from .fake import END, FakeBackend, client_of

TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' and loop.first %}"
    "{{ raise_exception('an assistant cannot begin') }}{% endif %}"
    "<{{ message.role }}>{{ message.content }}<|end|>{% endfor %}<assistant>"
)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|end|>": END} | {letter: index for index, letter in enumerate(alphabet, start=1)}
    bytes_only = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=bytes_only, eos_token="<|end|>")
    made.chat_template = TEMPLATE
    return made


@pytest.fixture
def backend(tokenizer: Any) -> Iterator[FakeBackend]:
    made = FakeBackend(tokenizer)
    yield made
    made.close()


@pytest.fixture
def serve(backend: FakeBackend) -> Iterator[Callable[..., ServerThread]]:
    """Starts a server on a free port; it is stopped after the test."""
    started: list[ServerThread] = []

    def start(limits: Limits | None = None, api_key: str | None = None) -> ServerThread:
        server = ServerThread(port=0)
        server.start(build_app(backend, limits, api_key))
        started.append(server)
        return server

    yield start
    backend.flow.set()
    for server in started:
        server.stop(drain_seconds=0.5)


@pytest.fixture
def client(serve: Callable[..., ServerThread]) -> Iterator[openai.OpenAI]:
    """The official client, talking to a server without a key."""
    with client_of(serve()) as made:
        yield made
