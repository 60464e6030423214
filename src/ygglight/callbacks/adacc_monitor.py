"""Watches activation memory during ``fit``: numbers to the logger, a picture of one step, a table at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from ygglight.engines.memory.meter import LiveBytes
from ygglight.engines.memory.picture import draw_memory
from ygglight.engines.memory.sizes import format_bytes


class AdaccMonitor(Callback):
    """Measures live bytes above parameters, gradients, optimizer state, buffers and batch, every so many steps.

    Works under any strategy, so that plain training can be measured the same way. Under an Adacc strategy it also logs
    what the plan does, and hands the measured peak to it (which may lead to a new plan).

    Logged, in bytes: ``adacc/peak``, ``adacc/budget``, ``adacc/saved`` (what autograd holds between forward and
    backward under the plan), ``adacc/saved_plain`` (without it); and ``adacc/ratio`` (the second over the first),
    ``adacc/replans``.

    Args:
        every_n_steps: Batches between two measurements. On a CPU a measured step is slower (every operator passes
            through Python); on CUDA the allocator knows the numbers anyway.
        picture: Where to write the picture of memory over one step (.png or .svg); None: no picture. Needs matplotlib.
    """

    def __init__(self, every_n_steps: int = 50, picture: str | None = None) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, not {every_n_steps}")
        self.every_n_steps = every_n_steps
        self.picture = picture
        self.peaks: list[tuple[int, int]] = []
        self.timeline: list[int] = []
        self._meter: LiveBytes | None = None
        self._samples: list[int] = []

    # -- measuring ---------------------------------------------------------------------------------------------------
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start to count, if it is time."""
        # Before the first optimizer step the optimizer's own state would be counted as it is made.
        due = trainer.global_step > 0 and (batch_idx % self.every_n_steps == 0 or not self.peaks)
        if not due:
            return
        self._samples = []
        self._meter = LiveBytes(pl_module.parameters(), pl_module.device, on_operator=self._operator)
        self._meter.__enter__()

    def _operator(self, func: Any, seconds: float, live: int, peak: int) -> None:
        self._samples.append(peak)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop counting and log."""
        meter, self._meter = self._meter, None
        if meter is None:
            return
        peak = meter.peak
        meter.__exit__(None, None, None)
        runtime = getattr(trainer.strategy, "runtime", None)
        if runtime is not None and (runtime.plan is None or runtime.just_profiled):
            return  # a fully recomputed step says nothing about the plan
        self.peaks.append((trainer.global_step, peak))
        self.timeline = self._samples
        pl_module.log("adacc/peak", float(peak), on_step=True, on_epoch=False, rank_zero_only=True)
        if runtime is None:
            return
        runtime.measured_peak = peak
        plan = runtime.plan
        stored, plain = plan.stored_bytes, plan.plain_stored_bytes
        values = {
            "adacc/saved": stored,
            "adacc/saved_plain": plain,
            "adacc/ratio": plain / max(1, stored),
            "adacc/replans": runtime.replans,
        }
        if plan.budget_bytes:
            values["adacc/budget"] = plan.budget_bytes
        for name, value in values.items():
            pl_module.log(name, float(value), on_step=True, on_epoch=False, rank_zero_only=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop counting."""
        if self._meter is not None:
            self._meter.__exit__(None, None, None)
            self._meter = None

    # -- results -----------------------------------------------------------------------------------------------------
    @rank_zero_only
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the table, draw the picture."""
        if not self.peaks:
            return
        peak = max(peak for _, peak in self.peaks)
        plan = getattr(trainer.strategy, "plan", None)
        lines = [f"  measured peak over {len(self.peaks)} steps   {format_bytes(peak)}"]
        if plan is not None:
            lines.append(f"  predicted                    {format_bytes(plan.predicted_peak_bytes)}")
        rank_zero_info("adacc monitor (live bytes above state):\n" + "\n".join(lines))
        if self.picture is not None:
            plain = None if plan is None else [size for _, size in plan.plain_timeline()]
            budget = None if plan is None else plan.budget_bytes
            draw_memory(Path(self.picture), {"this run": self.timeline}, plain=plain, budget=budget)

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"peaks": [list(item) for item in self.peaks]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue."""
        self.peaks = [(int(step), int(peak)) for step, peak in state_dict["peaks"]]
