"""CausalLM: any Hugging Face causal language model as a LightningModule, to finetune and to generate with."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from ygglight.compat import transformers as hf
from ygglight.data.assets import resolve_model
from ygglight.modules import network
from ygglight.modules.checks import check_arguments
from ygglight.modules.loss import IGNORE, chunked_loss, full_loss
from ygglight.modules.optim import build_optimizer, warmup_schedule

__all__ = ["CausalLM"]

log = logging.getLogger(__name__)


class CausalLM(L.LightningModule):
    """A causal language model, finetuned whole or by LoRA, on plain or quantised weights.

    Constructing it is cheap: the weights are loaded in ``configure_model``, which the Trainer calls. Batches are
    dicts with ``input_ids``, ``labels`` (-100 where nothing is learnt) and, if padded, ``attention_mask``; to
    predict, lists of prompts. The network itself is ``self.model``.

    Args:
        model: A directory of a Hugging Face model, a .gguf file, or the name of a packaged model
            (``smollm2-135m-instruct``). Nothing is downloaded.
        lora: Arguments of ``peft.LoraConfig`` (``{"r": 16, "lora_alpha": 32}``); None trains all weights.
            Checkpoints then hold the adapters alone.
        quantization: Load the base in ``4bit`` or ``8bit`` by bitsandbytes. Needs CUDA; training then needs ``lora``.
        learning_rate: The peak of the schedule.
        weight_decay: On matrices; norms and biases have none.
        warmup_steps: Optimizer steps of linear rise.
        schedule: How the rate falls after that, to a tenth of the peak.
        optimizer: ``adamw``, or ``adamw8bit`` by bitsandbytes.
        dtype: Of the weights: ``float32``, ``bfloat16``, ``float16``, or ``auto`` for what the files hold. The
            Trainer's ``precision`` acts on top of it.
        attention: The ``attn_implementation`` of transformers: ``sdpa``, ``eager``, ``flash_attention_2``.
        gradient_checkpointing: Recompute every decoder layer in the backward pass, as transformers does it.
        loss: ``chunked`` never holds all logits, which otherwise set the peak of memory; ``full`` is the plain one.
            Same value and gradients. A model whose logits are more than a linear head gets ``full`` and a warning.
        max_new_tokens: Longest text that ``predict`` adds to a prompt.
        generation: More arguments of transformers' ``generate`` (``{"do_sample": true, "temperature": 0.7}``);
            greedy by default.
        chat: Wrap each prompt in the tokenizer's chat template as one user message.
        init: ``pretrained``, or ``random`` for weights drawn from ``seed``.
        config_overrides: Changed fields of the model's configuration, e.g. ``{"num_hidden_layers": 4}`` to keep the
            first four layers only.
        seed: Of random weights and of fresh LoRA adapters.
        experts: ``disk`` leaves the routed experts of a mixture of experts in the files, so that the model may be
            larger than the memory. It can then predict under MoESpeQStrategy, and nothing else.
    """

    def __init__(
        self,
        model: str,
        lora: dict[str, Any] | None = None,
        quantization: Literal["4bit", "8bit"] | None = None,
        learning_rate: float = 2e-4,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        schedule: Literal["cosine", "linear", "constant"] = "cosine",
        optimizer: Literal["adamw", "adamw8bit"] = "adamw",
        dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32",
        attention: str = "sdpa",
        gradient_checkpointing: bool = False,
        loss: Literal["chunked", "full"] = "chunked",
        max_new_tokens: int = 64,
        generation: dict[str, Any] | None = None,
        chat: bool = False,
        init: Literal["pretrained", "random"] = "pretrained",
        config_overrides: dict[str, Any] | None = None,
        seed: int = 0,
        experts: Literal["memory", "disk"] = "memory",
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        check_arguments(self.hparams)
        self.model: nn.Module | None = None
        if lora is not None:
            self.strict_loading = False  # a checkpoint lacks the frozen base by design
        self._tokenizer: Any = None
        self._softcap: float | None = None
        self._chunked = loss == "chunked"
        self._tokens: Tensor | int = 0

    # -- the network ---------------------------------------------------------------------------------------------

    @property
    def directory(self) -> Path:
        """The Hugging Face directory that the model comes from (a .gguf file is converted on first use)."""
        return resolve_model(self._p.model)

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, loaded on first use."""
        if self._tokenizer is None:
            self._tokenizer = hf.load_tokenizer(self.directory)
        return self._tokenizer

    def configure_model(self) -> None:
        """Load the weights and put on them what the arguments ask for. A second call does nothing."""
        if self.model is not None:
            return
        p, mesh = self._p, self.device_mesh
        if p.experts == "disk":
            if self._trainer and not getattr(self._trainer.strategy, "brings_experts", False):
                raise ValueError(
                    "experts='disk' leaves a model without experts, which MoESpeQStrategy alone can run: set "
                    "strategy='moe_speq', or experts='memory'"
                )
            self.model = network.load_without_experts(self.directory, p.dtype, p.attention)
            return
        if mesh is not None and p.quantization:
            raise ValueError("quantised weights cannot be sharded: drop `quantization`, or use strategy='ddp'")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(p.seed)
            model: Any = hf.load_causal_lm(
                self.directory,
                dtype=p.dtype if p.dtype == "auto" else getattr(torch, p.dtype),
                attention=p.attention,
                overrides=p.config_overrides,
                pretrained=p.init == "pretrained",
                quantization=p.quantization,
                device=self._trainer.strategy.root_device if self._trainer else torch.device("cuda"),
            )
        if p.quantization:
            model = network.prepare_quantized(model, p.gradient_checkpointing)
        elif p.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if p.lora is not None:
            # A sharded unit must be of one dtype, so float32 adapters over a half-precision base are out there.
            model = network.add_lora(model, p.lora, p.seed, cast_adapters=mesh is None)
        if self._chunked:
            self._choose_loss(model)
        model.train()  # transformers hands models over in eval mode, and Lightning leaves modes alone
        if mesh is not None:
            network.shard(model, mesh, chunked_loss if self._chunked else full_loss)
        self.model = model

    def _choose_loss(self, model: nn.Module) -> None:
        head = hf.linear_head(model)
        if head is None:
            self._chunked = False
            name = type(hf.unwrap(model)).__name__
            log.warning("the logits of %s are more than a linear head: using loss='full', with more memory", name)
        else:
            self._softcap = head[1]

    @property
    def _p(self) -> Any:
        """The constructor's arguments; Lightning types them as a mapping, which hides their names."""
        return self.hparams

    def _network(self) -> Any:
        if self.model is None:
            raise RuntimeError("the weights are not loaded: give this module to a Trainer, or call configure_model()")
        return self.model

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """Call the transformers model.

        Args:
            input_ids: Token ids [batch, length].
            attention_mask: 0 at padding.
            **kwargs: Passed on.
        """
        return self._network()(input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Tensor:
        """Call the ``generate`` of the transformers model.

        Args:
            *args: Passed on.
            **kwargs: Passed on.
        """
        return self._network().generate(*args, **kwargs)

    # -- training ------------------------------------------------------------------------------------------------

    def _loss(self, batch: dict[str, Tensor]) -> Tensor:
        model = self._network()
        tensors = batch["input_ids"], batch["labels"], batch.get("attention_mask")
        extra: dict[str, Any] = {"softcap": self._softcap} if self._chunked else {}
        if self.device_mesh is not None:
            return model.ygg_loss(*tensors, **extra)  # see network.shard
        return (chunked_loss if self._chunked else full_loss)(model, *tensors, **extra)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the mean loss per token.

        Args:
            batch: ``input_ids``, ``labels`` and perhaps ``attention_mask``.
            batch_idx: Unused.
        """
        loss = self._loss(batch)
        # Kept on the device: reading it here would make every step wait for the GPU.
        self._tokens = self._tokens + (batch["labels"][:, 1:] != IGNORE).sum()
        self.log("train_loss", loss.detach(), prog_bar=True, batch_size=len(batch["labels"]))
        self.log("tokens", self._tokens.float(), batch_size=len(batch["labels"]))
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log ``val_loss``, weighted by tokens.

        Args:
            batch: As in training.
            batch_idx: Unused.
        """
        self._evaluate(batch, "val_loss")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log ``test_loss``, weighted by tokens.

        Args:
            batch: As in training.
            batch_idx: Unused.
        """
        self._evaluate(batch, "test_loss")

    def _evaluate(self, batch: dict[str, Tensor], name: str) -> None:
        tokens = int((batch["labels"][:, 1:] != IGNORE).sum())
        self.log(name, self._loss(batch), prog_bar=True, batch_size=tokens, sync_dist=True)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Build the optimizer over what is trainable, and the schedule over the Trainer's steps."""
        p = self._p
        optimizer = build_optimizer(p.optimizer, self._network().parameters(), p.learning_rate, p.weight_decay)
        total = self.trainer.estimated_stepping_batches
        schedule = warmup_schedule(optimizer, p.warmup_steps, total, p.schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # -- generation ----------------------------------------------------------------------------------------------

    def on_predict_start(self) -> None:
        """Refuse ``predict(module, ["a prompt", ...])``: Lightning takes each string for a dataset of letters."""
        loaders = self.trainer.predict_dataloaders
        if any(isinstance(x, str) for x in (loaders if isinstance(loaders, list) else [loaders])):
            raise TypeError("prompts go in batches: predict(module, TextData(prompts=[...])) or a DataLoader over them")

    def predict_step(self, batch: list[str] | dict[str, list[str]], batch_idx: int) -> list[dict[str, Any]]:
        """Continue each prompt of a batch.

        Args:
            batch: The prompts, or a dict that holds them as ``prompt``.
            batch_idx: Unused.

        Returns:
            A dict a prompt: ``prompt``, the added ``text``, and the added ``tokens`` (ids, up to the end token).
        """
        prompts = list(batch["prompt"] if isinstance(batch, dict) else batch)
        encoded = self._encode(prompts).to(self.device)
        settings = {"do_sample": False, "max_new_tokens": self._p.max_new_tokens} | (self._p.generation or {})
        if not settings["do_sample"]:  # a model's own sampling defaults would only be warned about
            settings = {"temperature": None, "top_p": None, "top_k": None} | settings
        output = self.generate(**encoded, pad_token_id=self.tokenizer.pad_token_id, **settings)
        added = output[:, encoded["input_ids"].shape[1] :].tolist()
        return [self._result(prompt, tokens) for prompt, tokens in zip(prompts, added, strict=True)]

    def _encode(self, prompts: list[str]) -> Any:
        tokenizer, chat = self.tokenizer, self._p.chat
        if chat:
            if not tokenizer.chat_template:
                raise ValueError(f"the tokenizer of {self._p.model} has no chat template: set chat=False")
            turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
            prompts = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        # New tokens follow at the right, so padding goes to the left. A template writes its own special tokens.
        return tokenizer(
            prompts,
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=not chat,
            return_token_type_ids=False,
        )

    def _result(self, prompt: str, tokens: list[int]) -> dict[str, Any]:
        ends = self._network().generation_config.eos_token_id
        ends = {ends} if isinstance(ends, int) else set(ends or ())
        stop = next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))
        text = self.tokenizer.decode(tokens[:stop], skip_special_tokens=True)
        return {"prompt": prompt, "text": text, "tokens": tokens[:stop]}

    # -- saving --------------------------------------------------------------------------------------------------

    def _trainable(self) -> set[str]:
        return {name for name, parameter in self.named_parameters() if parameter.requires_grad}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the frozen base out of a LoRA checkpoint.

        Args:
            checkpoint: What Lightning is about to save.
        """
        checkpoint["ygglight_tokens"] = int(self._tokens)
        if self._p.lora is not None:
            keep = self._trainable()
            checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in keep}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint without this module's adapters, which non-strict loading would pass in silence.

        And any checkpoint where the experts are elsewhere, for to load into what is not there is silent, too.

        Args:
            checkpoint: What Lightning has read.
        """
        if self._p.experts == "disk":
            raise ValueError(
                "experts='disk' reads experts from the model's own files, which a checkpoint does not change: leave it "
                "out, or set experts='memory'"
            )
        self._tokens = checkpoint.get("ygglight_tokens", 0)
        if self._p.lora is not None and self.model is not None and "state_dict" in checkpoint:
            missing = sorted(self._trainable() - checkpoint["state_dict"].keys())
            if missing:
                raise ValueError(
                    f"this checkpoint lacks {len(missing)} adapter tensors of the model ({missing[0]}, ...): "
                    "was it saved with another `lora` or another model?"
                )

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights; under LoRA the frozen base does not count as missing.

        Args:
            state_dict: Names to tensors.
            strict: Raise on names that do not fit.
            assign: Take the tensors themselves instead of copying them.
        """
        result = super().load_state_dict(state_dict, strict=strict, assign=assign)
        if self._p.lora is not None:
            trainable = self._trainable()
            result.missing_keys[:] = [name for name in result.missing_keys if name in trainable]
        return result

    def save_adapter(self, directory: str) -> None:
        """Write the LoRA adapters so that ``peft.PeftModel.from_pretrained(base, directory)`` loads them.

        Args:
            directory: A folder, made if it is not there.
        """
        if self._p.lora is None:
            raise ValueError("this model has no adapters (lora is None): use save_pretrained")
        self._network().save_pretrained(directory)

    def save_pretrained(self, directory: str) -> None:
        """Write the model (or the adapters) and the tokenizer as a Hugging Face directory.

        Args:
            directory: A folder, made if it is not there.
        """
        self._network().save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)
