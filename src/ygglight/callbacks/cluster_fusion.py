"""ClusterFusion: generation whose steps of one token run the attention half of each layer as one block."""

from __future__ import annotations

from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from ygglight.compat.generation import generation_models
from ygglight.engines.clusterfusion.report import ModelReport
from ygglight.engines.clusterfusion.runtime import ClusterFusionRuntime


class ClusterFusion(Callback):
    """Runs the attention half of decoder layers fused (ClusterFusion, arXiv 2508.18850), in predict, validate and test.

    From the start of a stage to its end, or an exception, every causal language model of transformers in the
    LightningModule takes its steps of one token a sequence through one block: norm, projections, rotary embedding, KV
    append, attention and output projection. Prompts, training, trees and whatever the block is not for run the model's
    own code. Works under any strategy. A table at the end says what ran how, and why.

    Args:
        enabled: ``auto`` measures plain and fused steps once a model and machine, and takes what is faster; on a CPU it
            is off, except for latent attention (DeepSeek). ``true`` runs fused without asking, on a CPU by plain torch.
            ``false``: nothing.
        cluster_size: Blocks of a thread-block cluster, where there are clusters: 1, 2, 4 or 8; ``auto``: the fastest.
        context: Tokens of text at which steps are measured.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        enabled: bool | Literal["auto"] = "auto",
        cluster_size: Literal["auto", 1, 2, 4, 8] = "auto",
        context: int = 1024,
    ) -> None:
        if enabled not in (True, False, "auto"):
            raise ValueError(f"enabled={enabled!r}: give true, false or 'auto'")
        if cluster_size not in ("auto", 1, 2, 4, 8):
            raise ValueError(f"cluster_size={cluster_size!r}: give 1, 2, 4, 8 or 'auto'")
        if context < 1:
            raise ValueError(f"context={context}: give a number of tokens above 0")
        self.enabled, self.cluster_size, self.context = enabled, cluster_size, context
        self.runtime: ClusterFusionRuntime | None = None

    @property
    def reports(self) -> list[ModelReport]:
        """What became of each model since the last setup."""
        return [] if self.runtime is None else self.runtime.reports()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget earlier runs."""
        self.runtime = None

    # -- on ----------------------------------------------------------------------------------------------------------
    def _start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.runtime is None:
            found = generation_models(pl_module)
            named: dict[str, Any] = {
                name: each for name, each in pl_module.named_modules() if any(each is model for model in found)
            }
            if not named and self.enabled is True:
                raise TypeError(
                    f"{type(pl_module).__name__} holds no causal language model of transformers, so there is nothing "
                    "to fuse: leave ClusterFusion out, or load the model in configure_model"
                )
            size = None if self.cluster_size == "auto" else self.cluster_size
            self.runtime = ClusterFusionRuntime(named, self.enabled, size, self.context)
        self.runtime.start()

    on_predict_start = _start
    on_validation_start = _start
    on_test_start = _start

    # -- off ---------------------------------------------------------------------------------------------------------
    def _stop(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.runtime is not None:
            self.runtime.stop()

    on_predict_end = _stop
    on_validation_end = _stop
    on_test_end = _stop

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Put everything back."""
        self._stop(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Say what ran how."""
        if self.runtime is not None:
            self.runtime.stop()
            rank_zero_info("ClusterFusion:\n" + (self.runtime.table() or "  no causal language model of transformers"))
