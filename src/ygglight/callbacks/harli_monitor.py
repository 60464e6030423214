"""Watches a co-located run: targets and rates to the logger, a picture of the run at its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from ygglight.callbacks.harli_picture import draw_run
from ygglight.compat.extras import require


class HarliMonitor(Callback):
    """Logs how requests and finetuning fare while ``HarliStrategy`` runs a fit.

    Logged: ``harli/attainment`` (share of requests within the targets), ``harli/tpot_p50_ms``, ``harli/tpot_p99_ms``,
    ``harli/longest_gap_ms``, ``harli/finetune_tokens_per_s``, ``harli/kv_bytes``, ``harli/activation_bytes``,
    ``harli/free_bytes``, ``harli/waiting_requests``. What there is none of yet is not logged.

    Args:
        every_n_steps: Batches between two rows.
        picture: Where to draw the run when it ends (.png or .svg); None: no picture. Needs matplotlib.

    Raises:
        ValueError: ``every_n_steps`` is below 1.
    """

    def __init__(self, every_n_steps: int = 10, picture: str | None = None) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, not {every_n_steps}")
        self.every_n_steps, self.picture = every_n_steps, picture
        self._last: tuple[float, int] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse another strategy, and a picture that cannot be drawn, before anything long.

        Raises:
            TypeError: there is nothing to watch. ModuleNotFoundError: a picture is wanted and matplotlib is not there.
        """
        if stage != "fit":
            return
        if not hasattr(trainer.strategy, "engine"):
            raise TypeError(
                f"HarliMonitor watches HarliStrategy, and this Trainer has {type(trainer.strategy).__name__}: set "
                "strategy='harli', or leave the callback out"
            )
        if self.picture is not None:
            require("matplotlib", "plot")
        self._last = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log, if it is time."""
        strategy: Any = trainer.strategy
        engine = strategy.engine
        if engine is None or batch_idx % self.every_n_steps:
            return
        report, counts, load = engine.report, engine.arena.counts(), engine.batcher.load()
        now, tokens = engine.clock(), report.finetune_tokens
        since, before = self._last or (report.started, 0)
        self._last = now, tokens
        values = {
            "attainment": report.attainment,
            "tpot_p50_ms": _thousand(report.tpot(0.5)),
            "tpot_p99_ms": _thousand(report.tpot(0.99)),
            "longest_gap_ms": _thousand(report.longest_gap),
            "finetune_tokens_per_s": (tokens - before) / (now - since) if since is not None and now > since else None,
            "kv_bytes": counts.kv * report.chunk_bytes,
            "activation_bytes": counts.leased * report.chunk_bytes,
            "free_bytes": counts.free * report.chunk_bytes,
            "waiting_requests": load.waiting,
        }
        for name, value in values.items():
            if value is not None:
                pl_module.log(f"harli/{name}", float(value), on_step=True, on_epoch=False)

    @rank_zero_only
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the picture."""
        strategy: Any = trainer.strategy
        if self.picture is not None and strategy.report is not None:
            draw_run(Path(self.picture), strategy.report)


def _thousand(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1000
