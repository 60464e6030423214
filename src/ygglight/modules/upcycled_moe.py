"""UpcycledMoE: makes a small mixture of experts, which routes for real, out of a dense model and text."""

from __future__ import annotations

import logging
import os
import shutil
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from ygglight.compat import transformers as hf
from ygglight.compat.experts import experts_config, register_experts
from ygglight.data.assets import MADE, check_model, made_folder, resolve_model
from ygglight.kernels.linear_kl import linear_kl
from ygglight.modules.loss import chunked_loss
from ygglight.modules.optim import build_optimizer, warmup_schedule
from ygglight.modules.routing import Routing, RoutingStatistics
from ygglight.modules.upcycling import balance_loss, run_experts, set_routers, upcycle

__all__ = ["UpcycledMoE"]

log = logging.getLogger(__name__)
register_experts("ygglight_upcycling", run_experts)


class UpcycledMoE(L.LightningModule):
    """A mixture of experts to try offloading on: some layers of a dense model, whose FFNs become experts.

    Two phases in one fit. While ``dense_steps`` last, one expert a layer serves all tokens: leaving out layers does
    most of the damage, and a dense model heals fastest. Then every expert becomes a copy of that one, each router is
    set to the centroids of balanced clusters of its inputs, and the experts part under a load-balancing loss. The
    loss is KL(the whole dense model || this one) on text, chunked so that no whole logits exist. What comes out is an
    ordinary Mixtral that writes worse than the model it was made of: it is here for its routing.

    Args:
        model: The dense model, a Llama: a directory, a .gguf file, or a packaged name.
        output: Where the mixture goes: a folder, or ``smollm2-moe-8x10``, which then is a name for ``model``
            everywhere. When training breaks off, what there is goes to the same place with ``-interrupted``.
        layers: The dense model's layers to keep.
        experts: Of each layer. top_k: Experts a token.
        dense_steps: Optimizer steps of the first phase.
        entropy: Of a token's routing probabilities when the routers are set, as a share of ln(experts).
        balance: Weight of the load-balancing loss.
        learning_rate: The peak of the schedule; the routers' is a tenth.
        warmup_steps: Optimizer steps of linear rise.
        schedule: How the rate falls after that.
        seed: Of the clusters.
    """

    def __init__(
        self,
        model: str,
        output: str,
        layers: list[int],
        experts: int = 8,
        top_k: int = 2,
        dense_steps: int = 100,
        entropy: float = 0.6,
        balance: float = 0.03,
        learning_rate: float = 1e-3,
        warmup_steps: int = 20,
        schedule: Literal["cosine", "linear", "constant"] = "cosine",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if not 1 <= top_k < experts:
            raise ValueError(f"top_k={top_k} of experts={experts}: at least one expert a token, and fewer than all")
        if dense_steps < 0 or not 0 < entropy < 1 or balance < 0:
            raise ValueError(
                f"dense_steps={dense_steps} and balance={balance} must be 0 or more, entropy={entropy} in (0, 1)"
            )
        check_model(model)
        if Path(output).expanduser().is_file():
            raise ValueError(f"output={output!r} is a file: name a folder")
        self.moe: Any = None
        self._split: Tensor
        self.register_buffer("_split", torch.tensor(False))
        self._teacher: list[Any] = []  # in a list, so that it is neither a submodule nor in checkpoints
        self._recent: deque[Tensor] = deque(maxlen=12)
        self._statistics = RoutingStatistics(top_k)
        #: How the routers routed in the last validation.
        self.routing: Routing | None = None

    @property
    def _p(self) -> Any:
        return self.hparams

    def configure_model(self) -> None:
        """Load the dense model and make the mixture out of it. A second call does nothing."""
        if self.moe is not None:
            return
        p = self._p
        teacher: Any = hf.load_causal_lm(resolve_model(p.model))
        self._teacher = [teacher.requires_grad_(False).eval()]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(p.seed)
            self.moe = upcycle(teacher, p.layers, p.experts, p.top_k).train()
        for module in (self.moe.get_input_embeddings(), self.moe.get_output_embeddings()):
            module.requires_grad_(False)  # they fit the teacher's, and are a third of the work
        for block in self._blocks():
            block.experts.config = experts_config(block.experts.config, "ygglight_upcycling")
            block.gate.register_forward_hook(self._serve_all_by_one)

    def _blocks(self) -> list[Any]:
        return [layer.mlp for layer in hf.decoder_layers(self.moe)]

    def _serve_all_by_one(self, gate: nn.Module, args: tuple, output: tuple[Tensor, Tensor, Tensor]) -> Any:
        if self._split:
            return None
        logits, weights, index = output
        return logits, torch.ones_like(weights[:, :1]), torch.zeros_like(index[:, :1])

    # -- steps ---------------------------------------------------------------------------------------------------
    def on_fit_start(self) -> None:
        """Bring the teacher to the device; see now whether the result can be written.

        Raises:
            ValueError: it cannot.
        """
        _check_writable(self._folder)
        self._teacher[0].to(self.device)

    def on_validation_start(self) -> None:
        """Bring the teacher along where no fit came before, and count routes anew."""
        self._teacher[0].to(self.device)
        self._statistics = RoutingStatistics(self._p.top_k)

    def _compare(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
        teacher, tokens, mask = self._teacher[0], batch["input_ids"], batch.get("attention_mask")
        with torch.no_grad():
            theirs = teacher.get_decoder()(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state
        with self._tap(1) as logits:
            ours = self.moe.get_decoder()(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state
        used = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
        loss, agree = linear_kl(
            ours[used], self.moe.get_output_embeddings().weight, theirs[used], teacher.get_output_embeddings().weight
        )
        return loss, agree, logits, used

    @contextmanager
    def _tap(self, what: int) -> Iterator[list[Tensor]]:
        """Collect, layer by layer, what goes into the routers (0) or their logits (1)."""
        seen: list[Tensor] = []
        hooks = [
            block.gate.register_forward_hook(lambda gate, args, output: seen.append((args, output)[what][0]))
            for block in self._blocks()
        ]
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Begin the second phase when it is time.

        Args:
            batch: ``input_ids`` and perhaps ``attention_mask``. batch_idx: Unused.
        """
        if not self._split:
            self._recent.append(batch["input_ids"])
            if self.trainer.global_step >= self._p.dense_steps:
                self.split()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the mean KL a token and the balance of the routers.

        Args:
            batch: ``input_ids`` and perhaps ``attention_mask``. batch_idx: Unused.
        """
        loss, agree, logits, used = self._compare(batch)
        count = int(used.sum())
        self.log("train_loss", loss.detach(), prog_bar=True, batch_size=count)
        self.log("train_acceptance", agree.float() / count, batch_size=count)
        if self._split:
            balance = balance_loss([layer[used.flatten()] for layer in logits], self._p.top_k)
            self.log("train_balance", balance.detach(), prog_bar=True, batch_size=count)
            loss = loss + self._p.balance * balance
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log ``val_loss`` (KL), ``val_cross_entropy`` and ``val_acceptance``, and count the routes.

        Args:
            batch: As in training, perhaps with ``labels``. batch_idx: Unused.
        """
        loss, agree, logits, used = self._compare(batch)
        count = int(used.sum())
        labels = batch.get("labels", batch["input_ids"])
        ce = chunked_loss(self.moe, batch["input_ids"], labels, batch.get("attention_mask"))
        self.log_dict(
            {"val_loss": loss, "val_cross_entropy": ce, "val_acceptance": agree.float() / count},
            prog_bar=True, batch_size=count,
        )  # fmt: skip
        self._statistics.add(logits, used)

    def on_validation_epoch_end(self) -> None:
        """Log what the routers did, as means over the layers; layer by layer it is in ``routing``."""
        self.routing = self._statistics.result()
        self.log_dict({f"route_{name}": value for name, value in self.routing.summary().items()})

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Build the optimizer, in which routers learn slowly: they begin at what they should be."""
        p = self._p
        routers = {id(block.gate.weight) for block in self._blocks()}
        rest = [q for q in self.moe.parameters() if id(q) not in routers]
        # Fused: of 250 million weights the loop over plain operations takes as long as the model itself.
        optimizer = build_optimizer("adamw", rest, p.learning_rate, 0.0, fused=True)
        gates = [block.gate.weight for block in self._blocks()]
        optimizer.add_param_group({"params": gates, "lr": p.learning_rate / 10, "weight_decay": 0.0})
        for group in optimizer.param_groups:
            # A run is a few hundred steps: with 0.999 the steep gradients of its beginning hold the experts still
            # (45 steps after the split they differed by 0.2 % of their norm).
            group["betas"] = (0.9, 0.95)
        schedule = warmup_schedule(optimizer, p.warmup_steps, self.trainer.estimated_stepping_batches, p.schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @torch.no_grad()
    def split(self) -> None:
        """Make every expert a copy of the trained one, with its optimizer's state, and set the routers."""
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        with self._tap(0) as inputs:
            for tokens in self._recent:
                self.moe.get_decoder()(input_ids=tokens, use_cache=False)
        blocks, p = self._blocks(), self._p
        seen = [torch.cat([x.flatten(0, -2) for x in inputs[i :: len(blocks)]]) for i in range(len(blocks))]
        set_routers([block.gate for block in blocks], seen, p.entropy, p.seed)
        for block in blocks:
            for weight in block.experts.parameters():
                weight.copy_(weight[:1].clone().expand_as(weight))
                for name, value in optimizer.state.get(weight, {}).items():
                    if name.startswith("exp_avg"):
                        value.copy_(value[:1].clone().expand_as(value))
        self._split.fill_(True)
        self._recent.clear()

    # -- the result ----------------------------------------------------------------------------------------------
    @property
    def _folder(self) -> Path:
        output = self._p.output
        return made_folder(output) if output in MADE else Path(output).expanduser()

    def configure_callbacks(self) -> list[L.Callback]:
        """Lightning tells callbacks of an exception, but not the module."""
        there = any(isinstance(callback, _Rescue) for callback in self.trainer.callbacks)  # type: ignore[attr-defined]
        return [] if there else [_Rescue()]

    def on_fit_end(self) -> None:
        """Write the mixture."""
        if self.trainer.is_global_zero and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.write(self._folder)

    def rescue(self) -> None:
        """Training broke off: save what there is beside the place where the finished mixture would go."""
        trainer: Any = self.trainer
        trained = self.moe is not None and trainer.state.fn == TrainerFn.FITTING and trainer.global_step > 0
        trained = trained and bool(self._split or self._recent)  # a resumed run may not have seen a batch yet
        if trained and trainer.is_global_zero and not trainer.fast_dev_run:
            self.write(self._folder.with_name(f"{self._folder.name}-interrupted"))

    def write(self, folder: Path) -> None:
        """Write the mixture as a Hugging Face directory, whole or not at all, and say how it routes.

        Args:
            folder: What is there is replaced.
        """
        if not self._split:
            self.split()
        scratch = folder.with_name(f".writing-{folder.name}")
        self.moe.save_pretrained(scratch)
        hf.load_tokenizer(resolve_model(self._p.model)).save_pretrained(scratch)
        (scratch / "README.md").write_text(self._card(), encoding="utf-8")
        for file in scratch.iterdir():
            file.chmod(0o644)  # safetensors writes for the owner alone
        shutil.rmtree(folder, ignore_errors=True)
        scratch.rename(folder)
        log.warning("the mixture of experts is in %s", folder)
        if self.routing is not None:
            log.warning("how it routes:\n%s", self.routing.table())
            if not self.routing.decided:
                log.warning("it does not route for real yet (token entropy < 0.8, load entropy > 0.9): train longer")

    def _card(self) -> str:
        p, steps = self._p, self.trainer.global_step
        measured = {k: round(float(v), 4) for k, v in self.trainer.callback_metrics.items() if k.startswith("val_")}
        return _CARD.format(
            model=p.model, layers=p.layers, experts=p.experts, top_k=p.top_k, steps=steps,
            dense=min(steps, p.dense_steps), measured=measured or "nothing",
            routing="Not measured." if self.routing is None else self.routing.table(),
        )  # fmt: skip


_CARD = """A small mixture of experts for trying expert offloading on, made by ygglight. It writes worse than {model}.

Layers {layers} of {model}.
{experts} experts a layer, {top_k} a token, each begun as a copy of the layer's feed-forward network.
Trained {steps} steps to give {model}'s next-token distribution, the first {dense} with one expert a layer.

Held-out text at the last validation: {measured} (val_loss is KL a token).

```
{routing}
```
Entropies are shares of the largest. reuse: experts that the token before used too; chance: of a token by itself.
"""


class _Rescue(L.Callback):
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if isinstance(pl_module, UpcycledMoE):
            pl_module.rescue()


def _check_writable(folder: Path) -> None:
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"output={str(folder)!r} cannot be written ({there}): name a folder where you may write")
