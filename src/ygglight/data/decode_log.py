"""DecodeLogData: logged iterations of tree decoding, split by prompt."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
import torch
from torch.utils.data import DataLoader, TensorDataset

from ygglight.engines.yggdrasil.decode_log import read_log

__all__ = ["DecodeLogData"]


class DecodeLogData(L.LightningDataModule):
    """Batches of (hidden, accepted, drafted) for a depth predictor.

    Args:
        path: Folder that YggdrasilStrategy wrote with its ``log`` argument.
        batch_size: Rows a batch.
        val_fraction: Part of the prompts that is held out: whole prompts, or the predictor would be tested on texts
            that it has seen the rest of.
        seed: Of the choice.
    """

    def __init__(self, path: str, batch_size: int = 256, val_fraction: float = 0.2, seed: int = 0) -> None:
        super().__init__()
        self.save_hyperparameters()
        if not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction={val_fraction} must be above 0 and below 1")
        self.rows = read_log(path)
        prompts = self.rows["prompt"].unique()
        if len(prompts) < 2:
            raise ValueError(f"{path} holds one prompt, and validation needs others: log more")
        order = prompts[torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed))]
        self._held_out = order[: min(len(prompts) - 1, max(1, round(val_fraction * len(prompts))))]

    @property
    def hidden_size(self) -> int:
        """Of the logged model."""
        return self.rows["hidden"].shape[1]

    @property
    def max_depth(self) -> int:
        """Deepest tree in the log."""
        return int(self.rows["drafted"].max())

    def _subset(self, held_out: bool) -> TensorDataset:
        chosen = torch.isin(self.rows["prompt"], self._held_out) == held_out
        return TensorDataset(*(self.rows[name][chosen] for name in ("hidden", "accepted", "drafted")))

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled rows of the prompts that are not held out."""
        return DataLoader(self._subset(False), batch_size=self.hparams["batch_size"], shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Rows of the held-out prompts."""
        return DataLoader(self._subset(True), batch_size=4096)
