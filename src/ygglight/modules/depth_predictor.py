"""DepthPredictorModule: fits the depth predictor of tree speculation to a decode log."""

from __future__ import annotations

import logging
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor

from ygglight.engines.yggdrasil.predictor import DepthPredictor

__all__ = ["DepthPredictorModule"]

log = logging.getLogger(__name__)

PAYS = 1.02
"""Least gain that counts: what the objective asks of a tree, too; less may be chance in a small log."""


class DepthPredictorModule(L.LightningModule):
    """Learns how deep the draft will be right from the target's last hidden state.

    The size of the predictor comes from the log. Validation compares it with the best constant depth in tokens per
    cost, and logs ``val_gain``: well above 1 the predictor pays, else the final message says that it does not.

    Args:
        output: Folder for the fitted predictor.
        width: Of its layers.
        learning_rate: Of AdamW.
        weight_decay: Of AdamW: logs are small.
        draft_cost: One draft pass in units of one verification, as the table of a run shows it.
    """

    def __init__(
        self,
        output: str,
        width: int = 256,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.05,
        draft_cost: float = 0.2,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if draft_cost <= 0:
            raise ValueError(f"draft_cost={draft_cost} must be above 0: a draft that costs nothing needs no depth")
        self.predictor: DepthPredictor | None = None
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []
        self.gain: float | None = None

    def configure_model(self) -> None:
        """Make the predictor for the log's model. A second call does nothing."""
        if self.predictor is None:
            data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
            if data is None or not hasattr(data, "max_depth"):
                raise TypeError("DepthPredictorModule is fitted on ygglight.data.DecodeLogData")
            self.predictor = DepthPredictor(data.hidden_size, data.max_depth, self.hparams["width"])

    def _model(self) -> DepthPredictor:
        assert self.predictor is not None
        return self.predictor

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the censored cross entropy of the hazards.

        Args:
            batch: Hidden states, accepted lengths, drafted depths. batch_idx: Unused.
        """
        loss = self._model().loss(*batch)
        self.log("train_loss", loss.detach(), prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> None:
        """Log ``val_loss``.

        Args:
            batch: As in training. batch_idx: Unused.
        """
        self.log("val_loss", self._model().loss(*batch), prog_bar=True, batch_size=len(batch[0]))
        self._seen.append((self._model().survival(batch[0]), batch[1], batch[2]))

    def on_validation_epoch_end(self) -> None:
        """Log ``val_gain``."""
        survival, accepted, drafted = (torch.cat(parts) for parts in zip(*self._seen, strict=True))
        self._seen = []
        self.gain = gain(survival, accepted, drafted, self.hparams["draft_cost"])
        self.log("val_gain", self.gain, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        p: Any = self.hparams
        return torch.optim.AdamW(self.parameters(), lr=p.learning_rate, weight_decay=p.weight_decay)

    def on_fit_end(self) -> None:
        """Write the predictor, and say whether it pays."""
        if not self.trainer.is_global_zero or self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._model().save(self.hparams["output"])
        if self.gain is not None:
            verdict = "it pays" if self.gain > PAYS else "no gain: leave it out"
            log.warning(
                "depth predictor in %s: %.3f times the tokens per cost of the best constant depth; %s",
                self.hparams["output"], self.gain, verdict,
            )  # fmt: skip


def gain(survival: Tensor, accepted: Tensor, drafted: Tensor, draft_cost: float) -> float:
    """Tokens per cost with predicted depths, over that of the best constant depth.

    Args:
        survival: float ``[N, D]``. accepted, drafted: int64 ``[N]``; what a depth beyond ``drafted`` would have given
            is not known and counts as nothing more, for the predictor and for the constant alike. draft_cost: of a
            draft pass.
    """
    depths = torch.arange(1, survival.shape[1] + 1, device=survival.device)
    cost = 1 + draft_cost * depths
    tokens = 1 + torch.minimum(accepted[:, None], depths[None])
    constant = (tokens.float().sum(0) / (cost * len(accepted))).max()
    # The depth that maximises a ratio of sums: each row takes its best tokens - rate * cost (Dinkelbach), with the rate
    # of the best constant, so that the predictor is not judged by a rule made for single rows.
    expected = 1 + survival.cumsum(1)
    chosen = (expected - constant * cost).argmax(1)
    predicted = tokens.gather(1, chosen[:, None]).sum() / cost[chosen].sum()
    return float(predicted / constant)
