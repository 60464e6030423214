"""A way of decoding as transformers takes one: ``model.generate(..., custom_generate=...)``."""

from __future__ import annotations

import logging
import weakref
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from ygglight.compat.generation import (
    hugging_face_loop,
    inputs_besides_tokens,
    lost_streamer,
    output_wishes,
    padded_rows,
    stored_mode,
    through,
    wrap_output,
)
from ygglight.engines.decode.processors import NodeProcessors, unknown
from ygglight.engines.decode.stopping import Stopping
from ygglight.engines.decode.support import check_tree_support

log = logging.getLogger(__name__)


class RunReport(Protocol):
    """Totals of a method, or of one text."""

    generations: int
    fallbacks: Counter[str]

    def add(self, other: Self) -> None:
        """Take the counts of another report in."""


class DecodingEngine(Protocol):
    """What decodes the texts of one model."""

    def take_report(self) -> Any:
        """What was done since the last call."""


E = TypeVar("E", bound=DecodingEngine)
R = TypeVar("R", bound=RunReport)


class DecodingMethod(ABC, Generic[E, R]):
    """A decoding method for ``custom_generate`` that takes what ``generate`` takes.

    Greedy and sampled (``do_sample``) texts of one or several prompts; each prompt of a batch is decoded by itself.
    What a method over a KV cache of ours cannot do (beams, streamers, unknown logits processors, scores or hidden
    states as output, models in training mode) goes to transformers' own loop, with one warning a reason.

    Args:
        report: Where counts are kept.
    """

    name: ClassVar[str]
    """As warnings call it."""

    def __init__(self, report: R) -> None:
        self.report = report
        self.on_tokens: Callable[[int], None] | None = None
        self.generator: torch.Generator | None = None
        self._engines: weakref.WeakKeyDictionary[nn.Module, E] = weakref.WeakKeyDictionary()
        self._warned: set[str] = set()

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Generate; called by ``generate`` with what it prepared.

        Args:
            model: The target. input_ids: int64 ``[B, L]``, padded on the left. logits_processor: Prepared list.
            stopping_criteria: Prepared list. generation_config: Complete. synced_gpus: For sharded models.
            streamer: Of tokens. **model_kwargs: ``attention_mask`` and what else the model's forward takes.

        Returns:
            int64 ``[B, L + new]``, padded on the right; or transformers' output object when it was asked for.

        Raises:
            ValueError: a prompt is longer than ``max_tokens`` allows, or the decoding mode is one whose code
                transformers does not hold.
        """
        streamer = lost_streamer() if streamer is None else streamer
        mode = stored_mode(generation_config)
        if mode is not None:
            raise ValueError(f"custom_generate decodes greedily or samples, and the settings ask for {mode}")
        reason = self._why_not(
            model, input_ids, logits_processor, generation_config, synced_gpus, streamer, model_kwargs
        )
        if reason is not None:
            self._fall_back(reason, len(input_ids) // max(1, generation_config.num_beams))  # a row a beam
            extra = {} if streamer is None else {"streamer": streamer}
            return self._transformers_loop(
                model, input_ids, logits_processor, stopping_criteria, generation_config,
                synced_gpus=synced_gpus, **extra, **model_kwargs,
            )  # fmt: skip
        engine = self.engine(model)
        mask = model_kwargs.get("attention_mask")
        texts = []
        for index, row in enumerate(input_ids):
            prompt = row if mask is None else row[mask[index].bool()]
            stopping = Stopping(stopping_criteria, input_ids.device)
            texts.append(self._one(engine, row, prompt, NodeProcessors(logits_processor), stopping, generation_config))
        return wrap_output(padded_rows(input_ids, texts, generation_config), generation_config)

    @abstractmethod
    def _make(self, model: nn.Module) -> E:
        """A new engine for a model."""

    @abstractmethod
    def _run(
        self, engine: E, row: Tensor, prompt: Tensor, processors: NodeProcessors, stopping: Stopping, config: Any
    ) -> Generator[list[int], None, None]:
        """The new tokens of one text, a few at a time.

        Args:
            engine: Of the model. row: The prompt with its padding, as processors and criteria see it. prompt: Without.
            processors: Of the logits. stopping: Ends the text. config: A complete ``GenerationConfig``.
        """

    def engine(self, model: nn.Module) -> E:
        """The engine of a target, made at its first use."""
        engine = self._engines.get(model)
        if engine is None:
            engine = self._engines[model] = self._make(model)
        return engine

    @property
    def used(self) -> bool:
        """Whether there is anything to report."""
        return bool(self.report.generations or self.report.fallbacks)

    def release(self) -> None:
        """Give the caches back."""
        self._engines.clear()

    def _one(
        self, engine: E, row: Tensor, prompt: Tensor, processors: NodeProcessors, stopping: Stopping, config: Any
    ) -> list[int]:
        tokens: list[int] = []
        run = self._run(engine, row, prompt, processors, stopping, config)
        try:
            for new in run:
                tokens += new
                if self.on_tokens is not None:
                    self.on_tokens(len(new))
        finally:
            run.close()
            self.report.add(engine.take_report())
        return tokens

    # -- what goes to transformers -----------------------------------------------------------------------------------
    def _transformers_loop(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        return hugging_face_loop(model, *args, **kwargs)

    def _why_not(
        self, model: Any, input_ids: Tensor, processors: Any, config: Any, synced: bool, streamer: Any, kwargs: Any
    ) -> str | None:
        if config.num_beams > 1:
            return f"num_beams={config.num_beams}"
        if model.training:  # dropout is drawn anew in every forward, and gradient checkpointing keeps no cache
            return "a model in training mode (call eval() first)"
        if streamer is not None:
            return "a streamer"
        if synced:
            return "a sharded model"
        names = unknown(processors)
        if names:
            return f"logits processors that cannot be run over a tree ({', '.join(names)})"
        wishes = output_wishes(config)
        if wishes:
            return f"outputs that only its loop collects ({', '.join(wishes)})"
        mask = kwargs.get("attention_mask")
        if mask is not None and (mask.dim() != 2 or bool((mask[:, 1:] < mask[:, :-1]).any())):
            return "an attention mask that is more than left padding"
        if mask is not None and mask.shape[1] and not bool(mask[:, -1].all()):
            return "a prompt that is padding only"
        cache = kwargs.get("past_key_values")
        if cache is not None and int(cache.get_seq_length()) > 0:
            return "a KV cache that was handed over"
        if input_ids.shape[1] == 0 or "inputs_embeds" in kwargs:
            return "no prompt, or embeddings instead of tokens"
        inputs = inputs_besides_tokens(model, kwargs)
        if inputs:
            return f"inputs besides tokens ({', '.join(inputs)})"
        try:
            check_tree_support(model)
        except ValueError as error:
            return str(error)
        return None

    def _fall_back(self, reason: str, prompts: int) -> None:
        self.report.fallbacks[reason] += prompts
        if reason not in self._warned:
            self._warned.add(reason)
            log.warning("%s: %s: transformers' own loop generates instead", self.name, reason)


@contextmanager
def routed(models: list[Any], method: DecodingMethod[Any, Any]) -> Iterator[None]:
    """While inside, ``generate`` of these models goes through ``method``; then they are as they were, come what may.

    Args:
        models: Generation models of transformers. method: what decodes.
    """
    before = [(model, model.__dict__.get("generate")) for model in models]
    for model in models:
        model.__dict__["generate"] = through(model, method)
    try:
        yield
    finally:
        for model, theirs in before:
            if theirs is None:
                model.__dict__.pop("generate", None)
            else:
                model.__dict__["generate"] = theirs
