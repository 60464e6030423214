"""Fits a depth predictor to the calibration prompts of a ladder, as a user does with the recipe."""

from __future__ import annotations

import logging
from pathlib import Path

import lightning.pytorch as L
from torch import Tensor

from benchmarks.decode_pairs import Pair
from ygglight.data import DecodeLogData
from ygglight.engines.yggdrasil.generate import TreeGenerate
from ygglight.modules import DepthPredictorModule

DEPTH = 8


def fit_predictor(pair: Pair, prompts: list[Tensor], folder: str) -> str:
    """Log deep trees on the calibration prompts, fit, and return the folder of the predictor.

    Args:
        pair: target and draft. prompts: to log. folder: for the log and the predictor.
    """
    made, rows = str(Path(folder) / "predictor"), str(Path(folder) / "log")
    method = TreeGenerate(pair.draft, tree={"width": 2, "depth": DEPTH}, plan={"prune": "fixed"}, log=rows)
    for prompt in prompts:
        pair.target.generate(
            prompt,
            attention_mask=prompt.new_ones(prompt.shape),
            max_new_tokens=pair.case.tokens,
            custom_generate=method,
        )
    method.release()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    trainer = L.Trainer(
        max_epochs=20, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(DepthPredictorModule(output=made, width=64), DecodeLogData(rows, val_fraction=0.5))
    return made
