"""`ygglight plan`: profile one step, solve, print the plan; nothing is trained and nothing is written but `--json`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from ygglight.cli.run import YggLightCLI, import_from_here


class PlanningTrainer(Trainer):
    """A Trainer with the verb `plan`; its typed arguments become the flags of `ygglight plan`."""

    def plan(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        json: str | None = None,
        max_batch: bool = False,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Profile and solve without training; print the plan and its predicted peak.

        Args:
            model: The module to plan for.
            datamodule: Its data; one batch is used.
            json: Also write the plan to this file, as JSON.
            max_batch: Also search the largest batch that fits the budget.
            ckpt_path: Accepted so that the config saved by a fit can be planned with; not used.
            weights_only: As `ckpt_path`.
        """
        plan_only = getattr(self.strategy, "plan_only", None)
        if plan_only is None:
            raise ValueError(
                f"`ygglight plan` needs a strategy that plans, and this config has {type(self.strategy).__name__}: set "
                "trainer.strategy to {class_path: ygglight.strategies.AdaccStrategy, init_args: {memory_budget: ...}}"
            )
        if json is not None and not Path(json).resolve().parent.is_dir():
            raise ValueError(f"--json {json}: no such folder; make it first")
        report = plan_only(self, model, datamodule, max_batch=max_batch)
        print(report.table())
        if json is not None:
            Path(json).write_text(report.to_json() + "\n", encoding="utf-8")
            print(f"plan written to {json}")


class PlanCLI(YggLightCLI):
    """Takes the config of a fit and leaves out all that writes or draws."""

    def before_instantiate_classes(self) -> None:
        """Switches off logger, checkpoints, callbacks and bars."""
        super().before_instantiate_classes()
        trainer = self.config["plan"].trainer
        trainer.logger = trainer.enable_checkpointing = trainer.enable_progress_bar = False
        trainer.enable_model_summary = False
        trainer.callbacks = None


def main(argv: Sequence[str]) -> int:
    """Runs `plan`."""
    import_from_here()
    # jsonargparse spells a method's flag --max_batch=true; people type it as any other flag.
    words = ["--max_batch=true" if word in ("--max-batch", "--max_batch") else word for word in argv]
    PlanCLI("plan", words, trainer_class=PlanningTrainer, save_config_callback=None)
    return 0
