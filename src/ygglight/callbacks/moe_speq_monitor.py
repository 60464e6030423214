"""Watches experts that come on demand: hits, bytes and drafts to the logger, a picture of the run at its end."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from ygglight.callbacks.moe_speq_picture import KINDS, Sample, draw_run
from ygglight.compat.extras import require

_STAGES = {"predict", "validate", "test"}


class MoESpeQMonitor(Callback):
    """Logs how the expert cache and the draft fare under ``MoESpeQStrategy``, batch by batch.

    Logged: ``moe_speq/hits``, ``moe_speq/late``, ``moe_speq/misses`` (parts of the experts that passes asked for),
    ``moe_speq/tokens_per_s``, ``moe_speq/tokens_per_cycle``, ``moe_speq/k`` (mean), ``moe_speq/bytes_per_token``. They
    go straight to the loggers, for in predict a module cannot log.

    Args:
        every_n_batches: Batches between two rows.
        picture: Where to draw the run when it ends (.png or .svg); None: no picture. Needs matplotlib.

    Raises:
        ValueError: ``every_n_batches`` is below 1, or the picture is of a kind that cannot be drawn.
    """

    def __init__(self, every_n_batches: int = 1, picture: str | None = None) -> None:
        if every_n_batches < 1:
            raise ValueError(f"every_n_batches must be at least 1, not {every_n_batches}")
        if picture is not None and Path(picture).suffix not in KINDS:
            raise ValueError(f"picture={picture!r}: name a file that ends in {', '.join(KINDS)}")
        self.every_n_batches, self.picture = every_n_batches, picture
        self.samples: list[Sample] = []
        """One a cycle, over all models and batches of the run."""
        self._logged = 0
        self._before: dict[str, Counter[str]] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse another strategy, and a picture that cannot be drawn, before anything long.

        Raises:
            TypeError: there is nothing to watch. ModuleNotFoundError: a picture is wanted and matplotlib is not there.
        """
        if stage not in _STAGES:
            return
        if not hasattr(trainer.strategy, "engines"):
            raise TypeError(
                f"MoESpeQMonitor watches MoESpeQStrategy, and this Trainer has {type(trainer.strategy).__name__}: set "
                "strategy='moe_speq', or leave the callback out"
            )
        if self.picture is not None:
            require("matplotlib", "plot")
        self.samples, self._logged, self._before = [], 0, {}

    # -- cycle by cycle ----------------------------------------------------------------------------------------------
    def _start(self, trainer: Trainer) -> None:
        if trainer.state.fn == "fit":  # its validation, for which setup has refused no strategy
            return
        strategy: Any = trainer.strategy
        for name, engine in strategy.engines.items():
            strategy.methods[name].watch = partial(self._cycle, name, engine)

    def _cycle(self, name: str, engine: Any, cycle: Any) -> None:
        stats = engine.runtime.stats
        now = stats.experts + Counter({f"{cause}_bytes": moved for cause, moved in stats.moved.items()})
        new = now - self._before.get(name, Counter())
        self._before[name] = now
        self.samples.append(Sample(cycle.k, len(cycle.tokens), cycle.seconds, new))

    def _log(self, trainer: Trainer, batch_idx: int) -> None:
        if batch_idx % self.every_n_batches or len(self.samples) == self._logged:
            return
        values = summary(self.samples[self._logged :])
        self._logged = len(self.samples)
        for logger in trainer.loggers:
            logger.log_metrics({f"moe_speq/{name}": value for name, value in values.items()}, step=batch_idx)

    @rank_zero_only
    def _end(self) -> None:
        if self.picture is not None and self.samples:
            draw_run(Path(self.picture), self.samples)

    # -- Lightning's names for it ------------------------------------------------------------------------------------
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Watch."""
        self._start(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Watch."""
        self._start(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Watch."""
        self._start(trainer)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """Log, if it is time."""
        self._log(trainer, batch_idx)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """Log, if it is time."""
        self._log(trainer, batch_idx)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """Log, if it is time."""
        self._log(trainer, batch_idx)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the picture."""
        self._end()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the picture."""
        self._end()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the picture."""
        self._end()


def summary(samples: list[Sample]) -> dict[str, float]:
    """What some cycles did.

    Args:
        samples: At least one.
    """
    total: Counter[str] = Counter()
    for sample in samples:
        total += sample.counts
    tokens, asked = sum(s.tokens for s in samples), max(1, total["requests"])
    moved = total["demand_bytes"] + total["prefetch_bytes"]
    return {
        **{name: total[name] / asked for name in ("hits", "late", "misses")},
        "tokens_per_s": tokens / max(sum(s.seconds for s in samples), 1e-9),
        "tokens_per_cycle": tokens / len(samples),
        "k": sum(s.k for s in samples) / len(samples),
        "bytes_per_token": moved / max(1, tokens),
    }
