"""Adacc as Lightning strategies: one mixin over a single device, DDP and FSDP2.

The mixin touches four moments of a Lightning step (the order is optimizer_step -> training_step -> zero_grad ->
backward): the training step runs inside the runtime's regions, after backward a profiled step becomes a plan, after
the optimizer step plans may change, and teardown takes the hooks off. Validation and predict never meet it.
"""

from __future__ import annotations

import logging
import warnings
from typing import Any, Literal

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from ygglight.engines.adacc.config import AdaccConfig
from ygglight.engines.adacc.maxbatch import PlanReport, search_max_batch
from ygglight.engines.adacc.plan import Plan
from ygglight.engines.adacc.runtime import Runtime
from ygglight.strategies.base import OneDeviceStrategy, RefusesPytorchLightning

log = logging.getLogger(__name__)

CHECKPOINT_KEY = "ygglight_adacc"


class AdaccMixin:
    """What Adacc adds to a Lightning strategy.

    Attributes:
        runtime: the engine; None outside of ``fit`` or when switched off.
        off_because: why Adacc does nothing, if so.
    """

    config: AdaccConfig
    runtime: Runtime | None = None
    off_because: str | None = None
    _restored: dict[str, Any] | None = None
    _listens: bool = False
    _report: PlanReport | None = None
    _planning_only: bool = False
    _wants_max_batch: bool = False

    @property
    def plan(self) -> Plan | None:
        """The plan in force (``.actions``, ``.predicted_peak_bytes``, ``.to_json()``); None before the first one."""
        return None if self.runtime is None else self.runtime.plan

    # -- life ------------------------------------------------------------------------------------------------------
    def setup(self, trainer: Trainer) -> None:
        """Check what can be checked before anything long starts, then let Lightning set up, then hook the blocks."""
        fitting = trainer.state.fn == TrainerFn.FITTING
        module = self.lightning_module  # type: ignore[attr-defined]
        self.off_because = None
        if fitting:
            self.runtime = None  # of an earlier fit
            self.off_because = self._why_off(module)
        super().setup(trainer)  # type: ignore[misc]
        if not fitting or self.off_because is not None:
            return
        self.runtime = Runtime(
            module,
            self.config,
            self.root_device,  # type: ignore[attr-defined]
            root=module.automatic_optimization,
            agree=self._agree if trainer.world_size > 1 else None,
        )
        self.runtime.attach()
        self._listens = True
        if self._restored is not None:
            self.runtime.load_state_dict(self._restored)
            self._restored = None

    def _why_off(self, module: LightningModule) -> str | None:
        if self.config.enabled is False:
            return "enabled is false"
        compiled = compiled_part(module)
        if compiled is not None:
            why = (
                f"{compiled} is under torch.compile, where saved tensors cannot be managed one by one: fit the module "
                "uncompiled, or use torch._functorch.config.activation_memory_budget with the compiled one"
            )
            if self.config.enabled is True:
                raise ValueError(f"adacc: {why}")
            warnings.warn(f"adacc is off: {why}", stacklevel=2)
            return why
        if self.config.memory_budget is None and self.root_device.type != "cuda":  # type: ignore[attr-defined]
            raise ValueError(
                "adacc needs memory_budget on a CPU (nobody can tell how much is free): pass "
                "AdaccStrategy(memory_budget='600MiB'), or a float such as 0.5 for half of the unmanaged peak"
            )
        return None

    def _agree(self, mine: Any) -> Any:
        return self.broadcast(mine)  # type: ignore[attr-defined]

    def teardown(self) -> None:
        """Say what was done and take the hooks off."""
        if self.runtime is not None and self._listens:
            self._listens = False
            if self.runtime.plan is not None and not self._planning_only:
                rank_zero_info(f"adacc: {self.summary()}")
            self.runtime.detach()
        super().teardown()  # type: ignore[misc]

    def on_exception(self, exception: BaseException) -> None:
        """Stop listening; nothing of the failed step stays."""
        if self.runtime is not None:
            self.runtime.abort()
        super().on_exception(exception)  # type: ignore[misc]

    def summary(self) -> str:
        """A short table of what Adacc did."""
        runtime = self.runtime
        if runtime is None or runtime.plan is None:
            return f"off: {self.off_because}" if self.off_because else "no plan was made"
        lines = [f"{len(runtime.blocks)} blocks, {runtime.replans} re-plans, {runtime.surprises} surprises"]
        lines.append(runtime.plan.table())
        lines.extend(f"  not managed: {name} {why}" for name, why in list(runtime.skipped.items())[:3])
        return "\n".join(lines)

    # -- the step ----------------------------------------------------------------------------------------------------
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Lightning's training step, inside the runtime's regions."""
        runtime = self.runtime
        if runtime is None:
            return super().training_step(*args, **kwargs)  # type: ignore[misc]
        if self._planning_only and self._wants_max_batch:
            self._report = search_max_batch(runtime, super().training_step, args, kwargs)  # type: ignore[misc]
            return None
        with runtime.forward(args[0] if args else kwargs):
            output = super().training_step(*args, **kwargs)  # type: ignore[misc]
        if not self.lightning_module.automatic_optimization:  # type: ignore[attr-defined]
            runtime.after_backward()
        return output

    def backward(self, closure_loss: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        """Lightning's backward; the one of a profiled step ends in a plan."""
        loss = super().backward(closure_loss, optimizer, *args, **kwargs)  # type: ignore[misc]
        if self.runtime is not None and self.lightning_module.automatic_optimization:  # type: ignore[attr-defined]
            self.runtime.after_backward()
        return loss

    def optimizer_step(self, optimizer: Any, closure: Any, model: Any = None, **kwargs: Any) -> Any:
        """Lightning's optimizer step; afterwards plans may change."""
        if self._planning_only:
            return self._plan_instead(closure)
        output = super().optimizer_step(optimizer, closure, model, **kwargs)  # type: ignore[misc]
        if self.runtime is not None:
            self.runtime.after_optimizer_step()
        return output

    # -- ygglight plan -----------------------------------------------------------------------------------------------
    def plan_only(
        self,
        trainer: Trainer,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        *,
        max_batch: bool = False,
    ) -> PlanReport:
        """Profile one micro-batch and solve, without training.

        Args:
            trainer: made with this strategy; loggers and checkpoints should be off.
            model: what would be trained. datamodule: its data.
            max_batch: also search the largest batch that fits the budget.
        """
        self._planning_only, self._wants_max_batch, self._report = True, max_batch, None
        try:
            trainer.fit(model, datamodule=datamodule)
        finally:
            self._planning_only = False
        if self._report is None:
            raise RuntimeError(f"no plan was made: {self.off_because or 'the training step returned no loss'}")
        return self._report

    def _plan_instead(self, closure: Any) -> Any:
        output = closure()
        runtime = self.runtime
        if runtime is not None and self._report is None and runtime.plan is not None:
            self._report = PlanReport(runtime.plan, None)
        trainer = self.lightning_module.trainer  # type: ignore[attr-defined]
        trainer.fit_loop.min_epochs = 0
        trainer.should_stop = True
        return output

    # -- checkpoints -------------------------------------------------------------------------------------------------
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Adds plan and statistics under a key of their own; plain Lightning ignores it."""
        if self.runtime is not None:
            checkpoint[CHECKPOINT_KEY] = self.runtime.state_dict()
        super().save_checkpoint(checkpoint, filepath, storage_options=storage_options)  # type: ignore[misc]

    def load_checkpoint(self, checkpoint_path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Takes plan and statistics back, if the checkpoint has them."""
        checkpoint = super().load_checkpoint(checkpoint_path, *args, **kwargs)  # type: ignore[misc]
        state = checkpoint.get(CHECKPOINT_KEY)
        if state is not None and self.runtime is not None and self._listens:
            self.runtime.load_state_dict(state)
        elif state is not None:
            self._restored = state
        return checkpoint  # type: ignore[no-any-return]


def compiled_part(module: nn.Module) -> str | None:
    """The name of a submodule under ``torch.compile``, or None."""
    if getattr(module, "_compiler_ctx", None) is not None:
        return type(module).__name__
    for name, child in module.named_modules():
        if getattr(child, "_compiled_call_impl", None) is not None or type(child).__name__ == "OptimizedModule":
            return name or type(child).__name__
    return None


def _config(
    memory_budget: int | float | str | None,
    enabled: bool | Literal["auto"],
    compress: bool,
    max_gradient_error: float,
    monitor_every: int,
) -> AdaccConfig:
    return AdaccConfig(
        memory_budget=memory_budget,
        enabled=enabled,
        compress=compress,
        max_gradient_error=max_gradient_error,
        monitor_every=monitor_every,
    )


class AdaccStrategy(AdaccMixin, OneDeviceStrategy):
    """Adacc on one device: train within a memory budget for activations.

    Args:
        memory_budget: Bytes that may be alive at any instant of a training step above parameters, gradients, optimizer
            state, buffers and the batch: an int, text such as "8GiB", or a float in (0, 1] as the share of what
            training takes without Adacc. Default: what the CUDA device has free, less 5 %; on a CPU it must be given.
        enabled: "auto" switches itself off with a warning where it cannot act; true raises there; false does nothing.
        compress: Whether lossy codecs may be used; false makes every plan exact.
        max_gradient_error: Largest relative error of the gradient that compression may cause.
        monitor_every: Optimizer steps between two looks at the statistics (each costs one recomputed step); 0: never.
        accelerator: Set by the Trainer.
        checkpoint_io: Set by the Trainer.
        precision_plugin: Set by the Trainer.
    """

    several_devices_name = "adacc_ddp"

    def __init__(
        self,
        memory_budget: int | float | str | None = None,
        enabled: bool | Literal["auto"] = "auto",
        compress: bool = True,
        max_gradient_error: float = 0.03,
        monitor_every: int = 500,
        accelerator: Any = None,
        checkpoint_io: Any = None,
        precision_plugin: Any = None,
    ) -> None:
        super().__init__(accelerator=accelerator, checkpoint_io=checkpoint_io, precision_plugin=precision_plugin)
        self.config = _config(memory_budget, enabled, compress, max_gradient_error, monitor_every)


class AdaccDDPStrategy(AdaccMixin, RefusesPytorchLightning, DDPStrategy):
    """Adacc on every rank of DistributedDataParallel; the budget is per rank, the first plan is rank 0's.

    Args:
        memory_budget: See :class:`AdaccStrategy`; per rank.
        enabled: See :class:`AdaccStrategy`.
        compress: See :class:`AdaccStrategy`.
        max_gradient_error: See :class:`AdaccStrategy`.
        monitor_every: See :class:`AdaccStrategy`.
        kwargs: What ``lightning.pytorch.strategies.DDPStrategy`` takes.
    """

    def __init__(
        self,
        memory_budget: int | float | str | None = None,
        enabled: bool | Literal["auto"] = "auto",
        compress: bool = True,
        max_gradient_error: float = 0.03,
        monitor_every: int = 500,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.config = _config(memory_budget, enabled, compress, max_gradient_error, monitor_every)


class AdaccModelParallelStrategy(AdaccMixin, RefusesPytorchLightning, ModelParallelStrategy):
    """Adacc over FSDP2: the module shards itself in ``configure_model``; the budget is per rank.

    Args:
        memory_budget: See :class:`AdaccStrategy`; per rank.
        enabled: See :class:`AdaccStrategy`.
        compress: See :class:`AdaccStrategy`.
        max_gradient_error: See :class:`AdaccStrategy`.
        monitor_every: See :class:`AdaccStrategy`.
        kwargs: What ``lightning.pytorch.strategies.ModelParallelStrategy`` takes.
    """

    def __init__(
        self,
        memory_budget: int | float | str | None = None,
        enabled: bool | Literal["auto"] = "auto",
        compress: bool = True,
        max_gradient_error: float = 0.03,
        monitor_every: int = 500,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.config = _config(memory_budget, enabled, compress, max_gradient_error, monitor_every)


__all__ = ["AdaccDDPStrategy", "AdaccMixin", "AdaccModelParallelStrategy", "AdaccStrategy"]
