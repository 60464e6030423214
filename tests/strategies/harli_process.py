"""A fit that ends when somebody ends it: ``python harli_process.py MODEL``. Says where it serves once it trains."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import ModelCheckpoint

sys.path.insert(0, str(Path(__file__).parents[1]))

from strategies.harli_cases import Tuned, loader, strategy  # type: ignore[import-not-found]


class Tell(L.Callback):
    """After two optimizer steps."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 2:
            print("training at", chosen.url, flush=True)


chosen = strategy(server={"port": 0})
trainer = L.Trainer(
    strategy=chosen, accelerator="cpu", devices=1, max_steps=-1, max_epochs=-1, logger=False,
    enable_progress_bar=False, enable_model_summary=False,
    callbacks=[Tell(), ModelCheckpoint("kept", save_last=True, every_n_train_steps=3)],
)  # fmt: skip
trainer.fit(Tuned(Path(sys.argv[1])), loader())
