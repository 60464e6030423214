"""SmolLM2-135M finetuned three ways: plain, fully recomputed, and by Adacc within half of the plain memory."""

from __future__ import annotations

import csv
import logging
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch

from ygglight.callbacks.adacc_monitor import AdaccMonitor
from ygglight.data.text import TextData
from ygglight.engines.memory.picture import draw_memory
from ygglight.engines.memory.sizes import format_bytes
from ygglight.modules.causal_lm import CausalLM
from ygglight.strategies.adacc import AdaccStrategy

MODEL = "smollm2-135m-instruct"
TEXT = "gsm8k"
SHARE = 0.5


@dataclass
class Result:
    """One way of training."""

    name: str
    peak_bytes: int
    step_seconds: float
    loss: float
    timeline: list[int]
    strategy: Any


class _Progress(L.Callback):
    """Times steps and collects losses; says where it is, since a step takes seconds on a CPU."""

    def __init__(self, name: str, steps: int) -> None:
        self.name, self.steps = name, steps
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self._start = 0.0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._start)
        self.losses.append(float(outputs["loss"]))
        print(f"\r{self.name}: step {len(self.losses)}/{self.steps}, loss {self.losses[-1]:.3f} ", end="", flush=True)


def run(short: bool, out: Path) -> None:
    """Train, print the table, save ``memory.png`` and ``adacc.csv``.

    Args:
        short: 8 steps a way of 512 tokens (minutes on two cores); else 40 of 1,024.
        out: folder for the picture and the rows.
    """
    steps, block = (8, 512) if short else (40, 1024)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning.*")
    print(f"{MODEL} on {TEXT}, {block} tokens a step, {steps} steps each way; loading (the first time converts it)")
    plain = _train("plain", steps, block, "auto")
    full = _train("full recompute", steps, block, "auto", gradient_checkpointing=True)
    budget = int(SHARE * plain.peak_bytes)
    strategy = AdaccStrategy(memory_budget=budget)
    adacc = _train(f"adacc, {SHARE:.0%} of plain", steps, block, strategy)
    results = [plain, full, adacc]
    print(table(results, budget))
    print("\nwhat Adacc decided:\n" + (strategy.plan.table() if strategy.plan else "nothing"))
    _save(results, budget, out)


def _train(name: str, steps: int, block: int, strategy: Any, *, gradient_checkpointing: bool = False) -> Result:
    L.seed_everything(42, verbose=False)
    module = CausalLM(MODEL, learning_rate=1e-4, warmup_steps=2, gradient_checkpointing=gradient_checkpointing)
    data = TextData(TEXT, tokenizer=MODEL, block_size=block, batch_size=1, max_tokens=block * (steps + 8))
    progress, monitor = _Progress(name, steps), AdaccMonitor(every_n_steps=max(4, steps // 2))
    trainer = L.Trainer(
        strategy=strategy, accelerator="auto", devices=1, max_steps=steps, callbacks=[monitor, progress],
        limit_val_batches=0, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    measured = {step for step, _ in monitor.peaks}
    # Leave out the first step (planning, warm-up, optimizer state) and those slowed down by the measurement itself.
    seconds = [s for i, s in enumerate(progress.seconds) if i > 0 and i + 1 not in measured]
    step = min(seconds)  # the ways run one after another, and whatever else the machine does only ever adds
    print(f"\r{name}: {steps} steps, {step:.2f} s each, loss {progress.losses[0]:.3f} -> {progress.losses[-1]:.3f}")
    peak = max(peak for _, peak in monitor.peaks)
    return Result(name, peak, step, progress.losses[-1], monitor.timeline, strategy)


def table(results: list[Result], budget: int) -> str:
    """Peak, time and loss, each beside the plain way's."""
    plain = results[0]
    lines = [
        "",
        f"{'':<22}{'activation peak':>17}{'of plain':>10}{'s/step*':>9}{'of plain':>10}{'last loss':>11}",
    ]
    for result in results:
        lines.append(
            f"{result.name:<22}{format_bytes(result.peak_bytes):>17}{result.peak_bytes / plain.peak_bytes:>10.0%}"
            f"{result.step_seconds:>9.2f}{result.step_seconds / plain.step_seconds:>10.0%}{result.loss:>11.4f}"
        )
    within = "kept" if results[-1].peak_bytes <= budget else "BROKEN"
    lines.append(
        f"budget {format_bytes(budget)}: {within}. Peak: live bytes above weights, gradients, optimizer, batch."
    )
    return "\n".join(lines)


def _save(results: list[Result], budget: int, out: Path) -> None:
    with (out / "adacc.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["way", "peak_bytes", "step_seconds", "last_loss"])
        writer.writerows([r.name, r.peak_bytes, f"{r.step_seconds:.4f}", f"{r.loss:.6f}"] for r in results)
    curves = {result.name: result.timeline for result in results[1:]}
    picture = draw_memory(out / "memory.png", curves, plain=results[0].timeline, budget=budget)
    print(f"\npicture: {picture}")
