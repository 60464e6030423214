"""DepthPredictorModule: finds what a log holds, and owns up to it when there is nothing (check A15 of the brief)."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import Tensor

from ygglight.data import DecodeLogData
from ygglight.engines.yggdrasil.decode_log import DecodeLog
from ygglight.engines.yggdrasil.predictor import DepthPredictor
from ygglight.modules import DepthPredictorModule
from ygglight.modules.depth_predictor import gain

HIDDEN, DEPTH, PROMPTS, EACH = 16, 8, 40, 50


def synthetic(telling: bool, seed: int = 0) -> list[tuple[Tensor, int, int, int]]:
    """Rows of which half are easy for the draft (0.95 a token) and half hard (0.2); a telling state says which."""
    generator = torch.Generator().manual_seed(seed)
    count = PROMPTS * EACH
    hidden = torch.randn(count, HIDDEN, generator=generator)
    coins = torch.randn(count, generator=generator)
    easy = (hidden[:, 3] + hidden[:, 7] if telling else coins) > 0
    chance = torch.where(easy, 0.95, 0.2)[:, None]
    would = (torch.rand(count, DEPTH, generator=generator) < chance).long().cumprod(1).sum(1)
    drafted = torch.randint(DEPTH // 2, DEPTH + 1, (count,), generator=generator)  # right-censored, some of them
    accepted = torch.minimum(would, drafted)
    return [(hidden[i], int(accepted[i]), int(drafted[i]), i // EACH) for i in range(count)]


def written(folder: Path, telling: bool = True, seed: int = 0) -> DecodeLogData:
    log = DecodeLog(folder)
    for row in synthetic(telling, seed):
        log.append(*row)
    log.flush()
    return DecodeLogData(str(folder), batch_size=128)


def trainer(**options: Any) -> L.Trainer:
    defaults: dict[str, Any] = {
        "max_epochs": 8, "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
        "enable_checkpointing": False,
    }  # fmt: skip
    return L.Trainer(accelerator="cpu", devices=1, **defaults | options)


def verdict(caplog: pytest.LogCaptureFixture) -> str:
    (message,) = [r.getMessage() for r in caplog.records if r.name == "ygglight.modules.depth_predictor"]
    return message


# -- A15 -------------------------------------------------------------------------------------------------------------
def test_it_beats_the_best_constant_where_the_state_tells(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = DepthPredictorModule("predictor", width=32, learning_rate=3e-3)
    run = trainer()
    with caplog.at_level(logging.WARNING, "ygglight.modules.depth_predictor"):
        run.fit(module, datamodule=written(tmp_path / "log"))
    found = float(run.callback_metrics["val_gain"])
    assert found > 1.05 and {"train_loss", "val_loss"} <= set(run.callback_metrics)
    assert f"predictor: {found:.3f} times" in verdict(caplog) and "it pays" in verdict(caplog)

    # The written curve is near the truth: 0.95 ** d and 0.2 ** d.
    loaded = DepthPredictor.load("predictor")
    state = torch.zeros(2, HIDDEN)
    state[0, [3, 7]], state[1, [3, 7]] = 2.0, -2.0
    easy, hard = loaded.survival(state)
    assert easy[2] > 0.7 and hard[0] < 0.4 and hard[2] < 0.1
    assert loaded.max_depth == DEPTH and loaded.hidden_size == HIDDEN


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_where_the_state_tells_nothing_it_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture, seed: int) -> None:
    module = DepthPredictorModule("predictor", width=32, learning_rate=3e-3)
    run = trainer()
    with caplog.at_level(logging.WARNING, "ygglight.modules.depth_predictor"):
        run.fit(module, datamodule=written(tmp_path / "log", telling=False, seed=seed))
    assert float(run.callback_metrics["val_gain"]) <= 1.02
    assert "no gain: leave it out" in verdict(caplog) and "it pays" not in verdict(caplog)


def test_a_gain_within_chance_is_no_gain(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = DepthPredictorModule("predictor")
    module.predictor = DepthPredictor(HIDDEN, DEPTH, width=4)
    data = written(tmp_path / "log")

    class Lucky(L.Callback):
        def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            module.gain = 1.015

    with caplog.at_level(logging.WARNING, "ygglight.modules.depth_predictor"):
        trainer(max_steps=1, callbacks=[Lucky()]).fit(module, datamodule=data)
    assert "1.015 times" in verdict(caplog) and "no gain" in verdict(caplog)


# -- the gain --------------------------------------------------------------------------------------------------------
def curves(depths: Tensor) -> Tensor:
    """Survival curves that fall from 1 to 0 after so many tokens."""
    return (torch.arange(1, DEPTH + 1) <= depths[:, None]).float()


def by_hand(chosen: list[int], accepted: list[int], cost: float) -> float:
    tokens = sum(1 + min(a, d) for a, d in zip(accepted, chosen, strict=True))
    return tokens / sum(1 + cost * d for d in chosen)


@pytest.mark.parametrize("cost", [0.05, 0.2, 1.0])
def test_a_prophet_gains_what_can_be_gained(cost: float) -> None:
    generator = torch.Generator().manual_seed(0)
    accepted = torch.randint(0, DEPTH + 1, (200,), generator=generator)
    drafted = torch.full_like(accepted, DEPTH)
    lengths = accepted.tolist()
    constants = [by_hand([depth] * 200, lengths, cost) for depth in range(1, DEPTH + 1)]
    found = gain(curves(accepted), accepted, drafted, cost)
    # A token costs `cost` and yields 1 against the rate of all: worth it as long as it is accepted, or never.
    worth = cost * max(constants) < 1
    expected = by_hand([max(1, n) if worth else 1 for n in lengths], lengths, cost) / max(constants)
    assert found == pytest.approx(expected, rel=1e-5)
    assert found > 1.1 if cost < 1 else found >= 1 - 1e-6


def test_a_constant_curve_is_the_constant_it_asks_for() -> None:
    generator = torch.Generator().manual_seed(1)
    accepted = torch.randint(0, DEPTH + 1, (300,), generator=generator)
    drafted = torch.full_like(accepted, DEPTH)
    lengths = accepted.tolist()
    constants = [by_hand([depth] * 300, lengths, 0.2) for depth in range(1, DEPTH + 1)]
    assert min(constants) < 0.8 * max(constants)
    for depth in range(1, DEPTH + 1):
        found = gain(curves(torch.full_like(accepted, depth)), accepted, drafted, 0.2)
        assert found == pytest.approx(constants[depth - 1] / max(constants), rel=1e-5)
        assert found <= 1 + 1e-6


def test_a_predictor_that_is_always_wrong_loses() -> None:
    generator = torch.Generator().manual_seed(2)
    accepted = torch.randint(0, DEPTH + 1, (300,), generator=generator)
    assert gain(curves(DEPTH - accepted), accepted, torch.full_like(accepted, DEPTH), 0.2) < 0.95


# -- around it -------------------------------------------------------------------------------------------------------
def test_validation_alone_and_sizes_from_the_log(tmp_path: Path) -> None:
    module = DepthPredictorModule("predictor", width=24)
    assert not list(module.parameters())
    run = trainer()
    run.validate(module, datamodule=written(tmp_path / "log"), verbose=False)
    assert module.predictor is not None and module.gain == pytest.approx(float(run.callback_metrics["val_gain"]))
    predictor = module.predictor
    assert (predictor.hidden_size, predictor.max_depth, predictor.width) == (HIDDEN, DEPTH, 24)
    module.configure_model()
    assert module.predictor is predictor and not Path("predictor").exists()


@pytest.mark.parametrize("fast", [True, False])
def test_fast_dev_run_writes_nothing(tmp_path: Path, fast: bool) -> None:
    run = trainer(max_epochs=1, fast_dev_run=fast)
    run.fit(DepthPredictorModule("predictor", width=4), datamodule=written(tmp_path / "log"))
    assert Path("predictor").exists() != fast


def test_a_run_without_validation_writes_without_a_verdict(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "ygglight.modules.depth_predictor"):
        run = trainer(max_epochs=1, limit_val_batches=0)
        run.fit(DepthPredictorModule("predictor", width=4), datamodule=written(tmp_path / "log"))
    assert Path("predictor/predictor.json").is_file() and not caplog.records


def test_other_data_is_one_error(tmp_path: Path) -> None:
    loader: Any = torch.utils.data.DataLoader([(torch.zeros(HIDDEN), 1, 2)])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"fitted on ygglight\.data\.DecodeLogData"):
        trainer(max_steps=1).fit(DepthPredictorModule("predictor"), loader)


@pytest.mark.parametrize("cost", [0.0, -1.0])
def test_a_draft_must_cost_something(cost: float) -> None:
    with pytest.raises(ValueError, match=f"draft_cost={cost} must be above 0"):
        DepthPredictorModule("predictor", draft_cost=cost)
