"""The forwards of a batcher: a chunk of one prompt, or a token of each sequence, with each one's adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ygglight.engines.decode.call import Step
from ygglight.engines.decode.detokenize import Detokenizer
from ygglight.engines.decode.paged import PagedDecoder
from ygglight.engines.decode.sampling import Choice, Sampler, sample_rows
from ygglight.engines.harli.adapters import Adapters
from ygglight.engines.harli.requests import Request

__all__ = ["Forwards", "Sequence", "end_tokens"]


@dataclass(eq=False)
class Sequence:
    """A request at work.

    Args:
        request: Whose. sampler: Its own. detokenizer: None without a tokenizer. pages: Chunks of the arena.
        cached: Tokens whose keys and values are in the pages.
    """

    request: Request
    sampler: Sampler
    detokenizer: Detokenizer | None
    pages: list[int] = field(default_factory=list)
    cached: int = 0

    @property
    def text(self) -> list[int]:
        """All tokens so far."""
        return self.request.prompt + self.request.output

    @property
    def missing(self) -> int:
        """Tokens to run before the next one is known; 1 while decoding."""
        return len(self.request.prompt) + len(self.request.output) - self.cached

    @property
    def decoding(self) -> bool:
        """Whether its next step is a decode step."""
        return bool(self.request.output) and self.missing == 1


def end_tokens(model: Any, tokenizer: Any = None) -> frozenset[int]:
    """The tokens that end a text: the generation config's and the tokenizer's.

    Args:
        model: Of transformers. tokenizer: Of transformers, or None.
    """
    config = getattr(model, "generation_config", None) or model.config
    found = [getattr(config, "eos_token_id", None), getattr(tokenizer, "eos_token_id", None)]
    return frozenset(
        int(token) for ends in found if ends is not None for token in (ends if isinstance(ends, list) else [ends])
    )


class Forwards:
    """Runs sequences and chooses their next tokens.

    Args:
        decoder: Over the serving twin. adapters: None: the base alone.
    """

    def __init__(self, decoder: PagedDecoder, adapters: Adapters | None) -> None:
        self._decoder, self._adapters = decoder, adapters
        self._unread = False  # the device may still be at a chunk that nobody has read the result of

    def prefill(self, sequence: Sequence, count: int) -> list[Choice | None]:
        """Run the next ``count`` tokens of a text that is not in the pages yet.

        Returns:
            The token that follows, if that was all of it; else nothing.
        """
        start = sequence.cached
        tokens = torch.tensor(sequence.text[start : start + count])
        call = partial(self._decoder.prefill, sequence.pages, start, tokens)
        step = self._run([sequence.request.adapter_version], call)
        sequence.cached += count
        if sequence.missing:
            self._unread = True
            return []
        return self._choose(step.logits[:, -1], [sequence])

    def decode(self, sequences: list[Sequence]) -> list[Choice | None]:
        """Run the last token of each, and choose the next."""
        if self._adapters is None or self._decoder.device.type != "cuda":
            groups = [sequences]
        else:  # a recorded step has the matrices and the rows in it, so there is one a version and none for mixtures
            by_version: dict[int | None, list[Sequence]] = {}
            for sequence in sequences:
                by_version.setdefault(sequence.request.adapter_version, []).append(sequence)
            groups = list(by_version.values())
        chosen: dict[int, Choice | None] = {}
        for group in groups:
            tables, lengths = [sequence.pages for sequence in group], [sequence.cached for sequence in group]
            tokens = torch.tensor([sequence.request.output[-1] for sequence in group])
            call = partial(self._decoder.decode, tables, lengths, tokens)
            step = self._run([sequence.request.adapter_version for sequence in group], call)
            for sequence, choice in zip(group, self._choose(step.logits[:, -1], group), strict=True):
                sequence.cached += 1
                chosen[id(sequence)] = choice
        return [chosen[id(sequence)] for sequence in sequences]

    def settle(self) -> None:
        """Wait until the device is done with all pages: finetuning uses another stream, and may get them next."""
        if self._unread and self._decoder.device.type == "cuda":
            torch.cuda.current_stream(self._decoder.device).synchronize()
        self._unread = False

    def _run(self, versions: list[int | None], call: Callable[[], Step]) -> Step:
        if self._adapters is None:
            return call()
        partition = self._decoder.partition
        self._decoder.partition = (partition, self._adapters.signature(versions))
        try:
            with self._adapters.activate(versions):
                return call()
        finally:
            self._decoder.partition = partition

    def _choose(self, logits: Tensor, sequences: list[Sequence]) -> list[Choice | None]:
        choices = sample_rows(logits, [sequence.sampler for sequence in sequences])
        self._unread = False  # the tokens are on the host, so all work before is done
        return choices
