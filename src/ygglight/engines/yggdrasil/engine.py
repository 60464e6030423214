"""Tree decoding of one model: decoders, draft, latency tables and what was learnt, kept from one text to the next."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator
from typing import Any

import torch
from torch import Tensor

from ygglight.engines.decode import Decoder
from ygglight.engines.decode.processors import NodeProcessors
from ygglight.engines.decode.stopping import Stopping
from ygglight.engines.yggdrasil.config import Config
from ygglight.engines.yggdrasil.drafts import Draft, ModelDraft, make_draft
from ygglight.engines.yggdrasil.loop import Iteration, Loop
from ygglight.engines.yggdrasil.plans import PlanTrial
from ygglight.engines.yggdrasil.predictor import DepthPredictor
from ygglight.engines.yggdrasil.profile import measure_costs
from ygglight.engines.yggdrasil.report import Report
from ygglight.engines.yggdrasil.selector import Selector
from ygglight.engines.yggdrasil.verifier import Verifier

log = logging.getLogger(__name__)

CONTEXT_GRAIN = 512
"""Texts are grouped by length for latency tables: a table is measured at the upper end of its group."""


class Engine:
    """Tree decoding for one target.

    Args:
        model: The target. draft: "lookup", a causal LM, or an object with the methods of :class:`drafts.Draft`.
        config: What the user said. static: Keep to static shapes and one host read an iteration; default: on CUDA.

    Raises:
        ValueError: the draft's vocabulary is another one, or the predictor is of another model.
    """

    def __init__(self, model: Any, draft: Any, config: Config, *, static: bool | None = None) -> None:
        self.model, self.config = model, config
        parameter = next(model.parameters())
        self.device = parameter.device
        self.static = self.device.type == "cuda" if static is None else static
        vocabulary = int(model.config.get_text_config(decoder=True).vocab_size)
        self.draft: Draft = make_draft(draft, vocabulary, compile=config.compile)
        self.predictor: DepthPredictor | None = None
        if config.predictor is not None:
            self.predictor = DepthPredictor.load(config.predictor).to(self.device)
            self.predictor.check(int(model.config.get_text_config(decoder=True).hidden_size), config.predictor)
        self.selectors: dict[tuple[Any, ...], Selector] = {}
        self.decoder: Decoder | None = None
        self._plans = PlanTrial(config.fixed_plan(), self.device, of_model=self.draft.needs_model)
        self._report = Report()

    def generate(
        self,
        prompt: Tensor,
        processors: NodeProcessors,
        stopping: Stopping,
        *,
        shown: Tensor | None = None,
        do_sample: bool = False,
        generator: torch.Generator | None = None,
        temperature: float = 1.0,
        watch: Callable[[Iteration], None] | None = None,
    ) -> Generator[list[int], None, None]:
        """Yield the new tokens of one text, a few at a time.

        Args:
            prompt: int64 ``[L]``. processors: Of the logits. stopping: Its ``max_length`` bounds the text.
            shown: The prompt with the padding that processors and criteria see before it.
            do_sample: Draw, or take the best. generator: Of the draws. temperature: Of the draft's distribution, which
                should be that of the target's. watch: Called with every iteration.

        Raises:
            ValueError: the prompt does not fit ``max_tokens``.
        """
        shown = prompt if shown is None else shown
        room = stopping.room(len(prompt), len(shown), self.config.max_tokens)
        limit = len(shown) + room
        if stopping.max_length is None or stopping.max_length > limit:
            stopping.max_length = limit
        nodes = self._largest_tree()
        capacity = len(prompt) + room + nodes + 1
        if self.decoder is None or self.decoder.capacity < capacity:
            self.decoder = None  # let go of the old cache before the new one is made
            self.decoder = Decoder(self.model, _rounded(capacity), compile=self.config.compile)
        selector = self._selector(len(prompt) + room, do_sample, temperature)
        loop = Loop(
            self.decoder,
            self.draft,
            selector,
            Verifier(processors, do_sample=do_sample, generator=generator, static=self.static),
            stopping,
            plan=self._plans.next,
            predict=None if self.predictor is None else self.predictor.survival,
            watch=watch,
            temperature=temperature,
        )
        try:
            for tokens in loop.run(prompt.to(self.device), shown, limit):
                self._plans.done(len(tokens))
                yield tokens
        finally:
            self._report.add(loop.report)

    def take_report(self) -> Report:
        """What was done since the last call."""
        report, self._report = self._report, Report()
        for selector in self.selectors.values():
            if selector.chose_plain:
                report.notes.append("plain decoding is measured to be the fastest here: no tree paid for itself")
        return report

    def _largest_tree(self) -> int:
        fixed = self.config.fixed_tree()
        width, depth = (fixed[0], fixed[1]) if fixed else (self.config.max_width, self.config.max_depth)
        return 2 + width * (depth + 1)

    def _selector(self, context: int, do_sample: bool, temperature: float) -> Selector:
        context = _rounded(context)
        key = (context, do_sample, temperature if do_sample else 1.0)
        if key not in self.selectors:
            costs = None
            if self.config.fixed_tree() is None:
                assert self.decoder is not None
                model = self.draft.model if isinstance(self.draft, ModelDraft) else None
                costs = measure_costs(self.decoder, model, min(context, self.decoder.capacity), self.config)
            self.selectors[key] = Selector(self.config, costs, greedy=not do_sample, free=self.draft.costs_nothing)
        return self.selectors[key]


def _rounded(tokens: int) -> int:
    return -(-tokens // CONTEXT_GRAIN) * CONTEXT_GRAIN
