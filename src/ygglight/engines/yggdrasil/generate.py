"""Tree decoding as transformers takes a decoding method: ``model.generate(..., custom_generate=...)``."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator
from typing import Any, ClassVar

from torch import Tensor, nn

from ygglight.engines.decode.method import DecodingMethod, routed
from ygglight.engines.decode.processors import NodeProcessors
from ygglight.engines.decode.stopping import Stopping
from ygglight.engines.yggdrasil.config import Config
from ygglight.engines.yggdrasil.decode_log import DecodeLog
from ygglight.engines.yggdrasil.engine import Engine
from ygglight.engines.yggdrasil.loop import Iteration
from ygglight.engines.yggdrasil.report import Report

__all__ = ["TreeGenerate", "routed"]


class TreeGenerate(DecodingMethod[Engine, Report]):
    """A decoding method for ``custom_generate``: the same text as ``generate`` gives, by tree speculation.

    Greedy and sampled (``do_sample``) texts of one or several prompts; each prompt of a batch is decoded by itself.
    What it cannot do (beams, streamers, unknown logits processors, scores or hidden states as output, models that
    cannot be run over a tree or are in training mode) goes to transformers' own loop, with one warning a reason.

    transformers 5.17 drops ``tokenizer=`` on the way to a ``custom_generate`` and then refuses ``stop_strings``: give
    ``stopping_criteria=[StopStringCriteria(tokenizer, strings)]``. (Under YggdrasilStrategy both work.)

    Args:
        draft: "lookup" (copies from the text), or a causal LM with the vocabulary of the model.
        **options: Of :class:`Config`.

    Raises:
        ValueError: an option is out of range, or (at the first call) the draft's vocabulary is another one.
    """

    name: ClassVar[str] = "yggdrasil"

    def __init__(self, draft: Any = "lookup", **options: Any) -> None:
        super().__init__(Report())
        self.draft = draft
        self.config = Config(**options)
        self.watch: Callable[[Iteration], None] | None = None
        self._log: DecodeLog | None = None
        self._prompts = 0

    def _make(self, model: nn.Module) -> Engine:
        return Engine(model, self.draft, self.config)

    def _run(
        self, engine: Engine, row: Tensor, prompt: Tensor, processors: NodeProcessors, stopping: Stopping, config: Any
    ) -> Generator[list[int], None, None]:
        return engine.generate(
            prompt, processors, stopping, shown=row, do_sample=bool(config.do_sample), generator=self.generator,
            temperature=float(config.temperature or 1.0) if config.do_sample else 1.0, watch=self._watcher(),
        )  # fmt: skip

    def release(self) -> None:
        """Give the caches back, and write what the log still holds."""
        super().release()
        if self._log is not None:
            self._log.flush()

    def _watcher(self) -> Callable[[Iteration], None] | None:
        """Who sees the iterations of the next text: the one who asked, and the log."""
        if self.config.log is None:
            return self.watch
        if self._log is None:
            self._log = DecodeLog(self.config.log)
            weakref.finalize(self, self._log.flush)  # at exit, too: no run loses rows
        rows, number, asked = self._log, self._prompts, self.watch
        self._prompts += 1

        def watch(iteration: Iteration) -> None:
            if iteration.shape is not None and iteration.hidden is not None:
                depth = int(iteration.tree.depths.max())  # what was verified: deeper nodes were cut off, not refused
                rows.append(iteration.hidden, len(iteration.verdict.path) - 1, max(1, depth), number)
            if asked is not None:
                asked(iteration)

        return watch
