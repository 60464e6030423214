"""What HarliMonitor logs, and the picture it draws."""

from __future__ import annotations

import csv
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from ygglight.callbacks import HarliMonitor
from ygglight.callbacks.harli_picture import draw_run
from ygglight.engines.decode.sampling import SamplingParams
from ygglight.engines.harli.report import Outcome, Report, Sample
from ygglight.engines.harli.requests import Request
from ygglight.modules import CausalLM
from ygglight.modules.testing import tiny_causal_lm
from ygglight.strategies import HarliStrategy

ALWAYS = {"finetune_tokens_per_s", "kv_bytes", "activation_bytes", "free_bytes", "waiting_requests"}
SERVED = {"attainment", "tpot_p50_ms", "tpot_p99_ms", "longest_gap_ms"}


class Ask(L.Callback):
    """One request after the second batch, finished before the third."""

    def __init__(self, chosen: HarliStrategy) -> None:
        self.chosen = chosen

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            import threading

            ended = threading.Event()

            def on_event(event: Any) -> None:
                if event.finish_reason is not None:
                    ended.set()

            assert self.chosen.engine is not None
            self.chosen.engine.submit(Request([1, 2], on_event, SamplingParams(max_tokens=5, ignore_eos=True)))
            assert ended.wait(30)


def run(tmp_path: Path, monitor: HarliMonitor, **strategy: Any) -> list[dict[str, str]]:
    model = tiny_causal_lm(tmp_path / "model")
    ids = torch.randint(1, 280, (12, 16), generator=torch.Generator().manual_seed(3))
    data = DataLoader([{"input_ids": row, "labels": row} for row in ids], batch_size=2)
    chosen = HarliStrategy(server=False, memory="8MiB", tpot_slo_ms=20, max_batch=2, **strategy)
    callbacks = [monitor, *([Ask(chosen)] if strategy.get("enabled", True) else [])]
    trainer = L.Trainer(
        strategy=chosen, accelerator="cpu", devices=1, max_steps=5, logger=CSVLogger(tmp_path, version=0),
        log_every_n_steps=1, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=callbacks,
    )  # fmt: skip
    trainer.fit(CausalLM(str(model), lora={"r": 2}), data)
    with (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def logged(row: dict[str, str]) -> set[str]:
    return {name.removeprefix("harli/") for name, value in row.items() if name.startswith("harli/") and value}


def test_it_logs_what_there_is_every_so_many_batches(tmp_path: Path) -> None:
    rows = run(tmp_path, HarliMonitor(every_n_steps=2))
    assert [logged(row) for row in rows] == [ALWAYS, ALWAYS, *[ALWAYS | SERVED] * 3]
    rates = [row["harli/finetune_tokens_per_s"] for row in rows]  # Lightning repeats what was logged last
    assert rates[0] == rates[1] != rates[2] == rates[3] != rates[4]
    assert rows[2]["harli/attainment"] in ("0.0", "1.0") and float(rows[2]["harli/finetune_tokens_per_s"]) > 0
    sizes = [sum(float(rows[i][f"harli/{part}_bytes"]) for part in ("kv", "activation", "free")) for i in (0, 2, 4)]
    assert len(set(sizes)) == 1 and 0 < sizes[0] <= 8 << 20


def test_it_draws_the_run(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run(tmp_path, HarliMonitor(picture=str(tmp_path / "pictures" / "run.svg")))
    words = "".join(ET.parse(tmp_path / "pictures" / "run.svg").getroot().itertext())
    assert ET.parse(tmp_path / "pictures" / "run.svg").getroot().tag.endswith("svg") and words


def test_nothing_to_watch_when_it_is_switched_off(tmp_path: Path) -> None:
    rows = run(tmp_path, HarliMonitor(every_n_steps=1, picture=str(tmp_path / "run.png")), enabled=False)
    assert rows and not any(logged(row) for row in rows) and not (tmp_path / "run.png").exists()


def test_an_interval_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="at least 1, not 0"):
        HarliMonitor(every_n_steps=0)


@pytest.mark.parametrize("kind", ["empty", "full"])
def test_any_report_can_be_drawn(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("matplotlib")
    report = Report(chunk_bytes=4096)
    if kind == "full":
        report = Report(tpot_slo=0.02, max_gap=0.08, chunk_bytes=4096, executor="time_slices", started=0.0, ended=2.0)
        report.finished(Outcome("base", "length", 4, 0.1, 0.01, 0.02, 1.0))
        report.trained(32, 0.5)
        report.trained(32, 0.9)
        for step in range(4):
            idle = step == 3
            report.sample(Sample(0.2 * step, 0.01, "idle" if idle else "decode", 1, "why", step == 1, 3, step, 9))
    path = draw_run(tmp_path / "run.png", report)
    assert path.read_bytes().startswith(b"\x89PNG")
