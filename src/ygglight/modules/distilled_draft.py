"""DistilledDraft: makes a small draft model out of the target, on the user's own text."""

from __future__ import annotations

import copy
import logging
import os
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from ygglight.compat import transformers as hf
from ygglight.data.assets import check_model, resolve_model
from ygglight.kernels.linear_kl import linear_kl
from ygglight.modules.optim import build_optimizer, warmup_schedule

__all__ = ["DistilledDraft"]

log = logging.getLogger(__name__)


class DistilledDraft(L.LightningModule):
    """A draft for tree speculation, distilled from the model whose text it shall foresee.

    The draft is the target with a few of its layers, trained to give the target's next-token distribution: the loss is
    KL(target || draft) on text, chunked so that no whole logits exist. When training ends it is written as an ordinary
    Hugging Face directory, to be given as ``draft`` to YggdrasilStrategy.

    Args:
        target: A directory of a Hugging Face model, a .gguf file, or a packaged name.
        output: Where the draft goes. When training breaks off, what there is goes to the same name with
            ``-interrupted``.
        layers: Decoder layers of the draft: the target's first ones. (First and last would be a worse beginning: of
            two layers of SmolLM2 the first two start at a KL of 15, first and last at 49.)
        init: ``target`` copies embeddings, norms, head and those layers; ``random`` draws all weights anew.
        freeze_embeddings: Train neither embeddings nor head: they are most of a small draft's weights.
        temperature: Of both distributions in the loss.
        learning_rate: The peak of the schedule.
        weight_decay: On matrices.
        warmup_steps: Optimizer steps of linear rise.
        schedule: How the rate falls after that.
        dtype: Of the weights of both.
        seed: Of random weights.
    """

    def __init__(
        self,
        target: str,
        output: str,
        layers: int = 2,
        init: Literal["target", "random"] = "target",
        freeze_embeddings: bool = True,
        temperature: float = 1.0,
        learning_rate: float = 5e-4,
        weight_decay: float = 0.0,
        warmup_steps: int = 20,
        schedule: Literal["cosine", "linear", "constant"] = "cosine",
        dtype: Literal["float32", "bfloat16"] = "float32",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if layers < 1:
            raise ValueError(f"layers={layers} must be at least 1")
        if temperature <= 0:
            raise ValueError(f"temperature={temperature} must be above 0")
        check_model(target)
        if Path(output).expanduser().is_file():
            raise ValueError(f"output={output!r} is a file: name a folder")
        self.draft: Any = None
        self._teacher: list[Any] = []  # in a list, so that it is neither a submodule nor in checkpoints

    @property
    def _p(self) -> Any:
        return self.hparams

    @property
    def tokenizer(self) -> Any:
        """The target's, which is the draft's too."""
        return hf.load_tokenizer(resolve_model(self._p.target))

    def configure_model(self) -> None:
        """Load the target and cut the draft out of it. A second call does nothing."""
        if self.draft is not None:
            return
        p = self._p
        teacher: Any = hf.load_causal_lm(resolve_model(p.target), dtype=getattr(torch, p.dtype))
        teacher.requires_grad_(False).eval()
        head = hf.linear_head(teacher)
        if head is None or head[1] is not None:  # linear_kl knows no soft cap
            raise ValueError(
                f"the logits of {type(teacher).__name__} are more than a linear head: it cannot be distilled"
            )
        self._teacher = [teacher]
        self.draft = cut(teacher, p.layers, random=p.init == "random", seed=p.seed)
        if p.freeze_embeddings and p.init == "target":
            for module in (self.draft.get_input_embeddings(), self.draft.get_output_embeddings()):
                module.requires_grad_(False)

    def on_fit_start(self) -> None:
        """Bring the target to where the draft trains; see now whether the draft can be written at the end.

        Raises:
            ValueError: it cannot.
        """
        _check_writable(self._p.output)
        self._teacher[0].to(self.device)

    def on_validation_start(self) -> None:
        """The same for the target where no fit came before."""
        self._teacher[0].to(self.device)

    # -- steps ---------------------------------------------------------------------------------------------------
    def _compare(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, int]:
        teacher, tokens, mask = self._teacher[0], batch["input_ids"], batch.get("attention_mask")
        with torch.no_grad():
            theirs = teacher.get_decoder()(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state
        ours = self.draft.get_decoder()(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state
        used = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
        loss, agree = linear_kl(
            ours[used], self.draft.get_output_embeddings().weight, theirs[used], teacher.get_output_embeddings().weight,
            temperature=self._p.temperature,
        )  # fmt: skip
        return loss, agree, int(used.sum())

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the mean KL a token.

        Args:
            batch: ``input_ids`` and perhaps ``attention_mask``. batch_idx: Unused.
        """
        loss, agree, count = self._compare(batch)
        self.log("train_loss", loss.detach(), prog_bar=True, batch_size=count)
        self.log("train_acceptance", agree.float() / count, prog_bar=True, batch_size=count)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log ``val_loss`` and ``val_acceptance``: how often the draft's best token is the target's.

        Args:
            batch: As in training. batch_idx: Unused.
        """
        loss, agree, count = self._compare(batch)
        self.log("val_loss", loss, prog_bar=True, batch_size=count)
        self.log("val_acceptance", agree.float() / count, prog_bar=True, batch_size=count)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Build the optimizer over the draft."""
        p = self._p
        optimizer = build_optimizer("adamw", self.draft.parameters(), p.learning_rate, p.weight_decay)
        schedule = warmup_schedule(optimizer, p.warmup_steps, self.trainer.estimated_stepping_batches, p.schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # -- the result ----------------------------------------------------------------------------------------------
    def configure_callbacks(self) -> list[L.Callback]:
        """Lightning tells callbacks of an exception, but not the module."""
        there = any(isinstance(callback, _Rescue) for callback in self.trainer.callbacks)  # type: ignore[attr-defined]
        return [] if there else [_Rescue()]

    def on_fit_end(self) -> None:
        """Write the draft."""
        if self.trainer.is_global_zero and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.write(self._p.output)

    def rescue(self) -> None:
        """Training broke off: save what there is beside the place where the finished draft would go."""
        trainer: Any = self.trainer
        trained = self.draft is not None and trainer.state.fn == TrainerFn.FITTING and trainer.global_step > 0
        if trained and trainer.is_global_zero and not trainer.fast_dev_run:
            self.write(f"{str(self._p.output).rstrip('/')}-interrupted")

    def write(self, directory: str) -> None:
        """Write the draft as a Hugging Face directory.

        Args:
            directory: A folder, made if it is not there.
        """
        folder = Path(directory).expanduser()
        self.draft.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        log.warning("the draft is in %s: give it to YggdrasilStrategy(draft=%r)", folder, str(folder))


class _Rescue(L.Callback):
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if isinstance(pl_module, DistilledDraft):
            pl_module.rescue()


def _check_writable(output: str) -> None:
    folder = Path(output).expanduser().absolute()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"output={output!r} cannot be written ({folder}): name a folder where you may write")


def cut(teacher: Any, layers: int, *, random: bool = False, seed: int = 0) -> nn.Module:
    """A model like ``teacher`` with fewer layers.

    Args:
        teacher: A causal LM of transformers. layers: How many are kept, from the first on.
        random: Draw all weights anew. seed: Of those.

    Raises:
        ValueError: the teacher has fewer layers.
    """
    config = copy.deepcopy(teacher.config)
    total = int(config.num_hidden_layers)
    if layers > total:
        raise ValueError(f"layers={layers}, but the target has {total}")
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        draft: Any = type(teacher)(config).to(next(teacher.parameters()).dtype)
    if not random:
        first = hf.decoder_layers(teacher)[0]
        prefix = next(name for name, module in teacher.named_modules() if module is first)[: -len("0")]
        state = {
            name: value
            for name, value in teacher.state_dict().items()
            if not name.startswith(prefix) or int(name[len(prefix) :].partition(".")[0]) < layers
        }
        draft.load_state_dict(state)
    return draft.train()  # type: ignore[no-any-return]
