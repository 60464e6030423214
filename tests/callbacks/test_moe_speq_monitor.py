"""MoESpeQMonitor: numbers that add up, a picture, and refusals."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader

import ygglight  # noqa: F401  (registers the names)
from ygglight.callbacks import MoESpeQMonitor
from ygglight.callbacks.moe_speq_monitor import summary
from ygglight.callbacks.moe_speq_picture import Sample, draw_run
from ygglight.engines.moe_speq.config import STAGING
from ygglight.strategies import MoESpeQStrategy

NEW, BATCHES = 12, 3


class Writes(L.LightningModule):
    """Knows nothing of ygglight."""

    def __init__(self) -> None:
        from transformers import MixtralConfig, MixtralForCausalLM

        super().__init__()
        torch.manual_seed(0)
        self.model = MixtralForCausalLM(
            MixtralConfig(
                vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2, initializer_range=0.2,
                tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
            )
        ).eval()  # fmt: skip

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.model.generate(batch, do_sample=False, max_new_tokens=NEW)


def run(monitor: MoESpeQMonitor, strategy: Any, folder: Path, logger: Any = False) -> None:
    trainer = L.Trainer(
        strategy=strategy, accelerator="cpu", devices=1, logger=logger, callbacks=[monitor], enable_progress_bar=False,
        enable_checkpointing=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.predict(Writes(), DataLoader(torch.arange(5 * BATCHES).view(BATCHES, 5), batch_size=1))


pytestmark = pytest.mark.usefixtures("own_cache")


def strategy(k: int = 2) -> MoESpeQStrategy:
    slots, slab, staging, draft = 3 * 2, 3 * 32 * 32 * 4, STAGING, 60_000
    return MoESpeQStrategy((slots + staging) * slab + draft, k=k)


def test_what_is_logged_adds_up_to_the_report_of_the_run(tmp_path: Path) -> None:
    monitor, used = MoESpeQMonitor(picture=str(tmp_path / "run.png")), strategy()
    logger = CSVLogger(tmp_path)
    run(monitor, used, tmp_path, logger)
    report = used.report
    assert sum(s.tokens for s in monitor.samples) == report.tokens - BATCHES  # the first one comes with the prompt
    assert sum(s.k for s in monitor.samples) == report.drafted > 0
    for name in ("requests", "hits", "late", "misses"):
        assert sum(s.counts[name] for s in monitor.samples) == report.experts[name]
    logger.save()
    rows = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    assert len(rows) == 1 + BATCHES
    assert {"moe_speq/hits", "moe_speq/tokens_per_s", "moe_speq/bytes_per_token"} <= set(rows[0].split(","))
    assert (tmp_path / "run.png").stat().st_size > 10_000


def test_shares_are_of_what_was_asked_for() -> None:
    counts = Counter(requests=10, hits=6, late=1, misses=3, demand_bytes=300, prefetch_bytes=100, prefill_bytes=999)
    values = summary([Sample(3, 4, 0.5, counts), Sample(0, 1, 0.5, Counter())])
    assert values["hits"] == 0.6 and values["late"] == 0.1 and values["misses"] == 0.3
    assert values["tokens_per_s"] == 5.0 and values["tokens_per_cycle"] == 2.5 and values["k"] == 1.5
    assert values["bytes_per_token"] == 80.0


def test_another_strategy_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="strategy='moe_speq'"):
        run(MoESpeQMonitor(), "auto", tmp_path)


def test_a_fit_with_it_goes_on(tmp_path: Path) -> None:
    """The same callbacks for fit and predict: in the validation of a fit there is nothing to watch."""

    class Learns(Writes):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.model(input_ids=batch, labels=batch).loss

        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            pass

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    rows = DataLoader(torch.arange(10).view(2, 5), batch_size=1)
    trainer = L.Trainer(
        accelerator="cpu", devices=1, logger=False, callbacks=[MoESpeQMonitor()], enable_progress_bar=False,
        enable_checkpointing=False, enable_model_summary=False, max_steps=1,
    )  # fmt: skip
    trainer.fit(Learns(), rows, rows)
    assert trainer.global_step == 1


@pytest.mark.parametrize("cycles", [1, 10, 200])
def test_a_picture_spans_all_cycles(cycles: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    axes = pytest.importorskip("matplotlib.axes").Axes
    spans: list[Any] = []
    right = axes.stackplot
    monkeypatch.setattr(
        axes, "stackplot", lambda self, x, *args, **kw: (spans.append(list(x)), right(self, x, *args, **kw))[1]
    )
    draw_run(tmp_path / "a.svg", [Sample(2, 3, 0.1, Counter(requests=2, hits=2, demand_bytes=5))] * cycles)
    assert spans and all(span[0] == 0 and span[-1] == cycles for span in spans)


def test_a_picture_that_cannot_be_drawn_is_refused_before_the_run() -> None:
    with pytest.raises(ValueError, match=r"picture='run\.txt'.*\.png"):
        MoESpeQMonitor(picture="run.txt")


def test_the_rows_are_at_least_a_batch_apart() -> None:
    with pytest.raises(ValueError, match="every_n_batches"):
        MoESpeQMonitor(every_n_batches=0)
