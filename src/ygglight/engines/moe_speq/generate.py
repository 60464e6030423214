"""Experts on demand as transformers takes a decoding method: ``model.generate(..., custom_generate=...)``."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import ExitStack
from typing import Any, ClassVar

from torch import Tensor, nn

from ygglight.engines.decode.method import DecodingMethod
from ygglight.engines.decode.processors import NodeProcessors
from ygglight.engines.decode.stopping import Stopping
from ygglight.engines.moe_speq.config import Config
from ygglight.engines.moe_speq.engine import Engine
from ygglight.engines.moe_speq.loop import Round
from ygglight.engines.moe_speq.report import Report

__all__ = ["MoESpeQGenerate"]


class MoESpeQGenerate(DecodingMethod[Engine, Report]):
    """A decoding method for ``custom_generate``: the text of ``generate``, with experts that do not fit the device.

    A model's first call takes its routed experts to host memory or disk; from then on all its forwards bring them as
    they need them, until :meth:`release` gives them back. Greedy and sampled (``do_sample``) texts speculate: a 4-bit
    copy of the experts drafts, and its routes say which experts to send ahead. What that cannot do (beams, streamers,
    scores as output, ...) goes to transformers' own loop, with one warning a reason, and has its experts all the same.

    Args:
        expert_budget: Device memory for routed experts, in bytes or as "8GiB". **options: See :class:`Config`.

    Raises:
        ValueError: an option is out of range; or (at the first call) the model has no experts that can be taken, or the
            budget is too small.
    """

    name: ClassVar[str] = "moe_speq"

    def __init__(self, expert_budget: int | str, **options: Any) -> None:
        super().__init__(Report())
        self.config = Config(expert_budget, **options)
        self.watch: Callable[[Round], None] | None = None

    def _make(self, model: nn.Module) -> Engine:
        return Engine(model, self.config, store=getattr(model, "expert_store", None))

    def engine(self, model: nn.Module) -> Engine:
        """The engine of a model, which has its experts from now on."""
        return super().engine(model).attach()

    def _why_not(self, model: Any, *args: Any) -> str | None:
        with self.engine(model).unnoticed():  # transformers' own loop finds the experts through the engine, too
            return super()._why_not(model, *args)

    def _run(
        self, engine: Engine, row: Tensor, prompt: Tensor, processors: NodeProcessors, stopping: Stopping, config: Any
    ) -> Generator[list[int], None, None]:
        return engine.generate(
            prompt, processors, stopping, shown=row, do_sample=bool(config.do_sample), generator=self.generator,
            watch=self.watch,
        )  # fmt: skip

    @property
    def used(self) -> bool:
        """Whether there is anything to report, plain forwards included."""
        return super().used or self.report.moved.total() > 0

    def release(self) -> None:
        """Give the models their experts back, and all else free.

        Raises:
            OSError: some cannot be read from the disk any more.
        """
        with ExitStack() as stack:  # all of it is done, whatever fails
            stack.callback(super().release)
            for engine in self._engines.values():
                stack.callback(engine.detach)
                self.report.add(engine.take_report())
