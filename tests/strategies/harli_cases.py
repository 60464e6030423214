"""What the tests of HarliStrategy share: a module that knows nothing of ygglight, and clients of the engine."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import openai
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ygglight.engines.decode.sampling import SamplingParams
from ygglight.engines.harli.requests import Request, TokenEvent
from ygglight.strategies import HarliStrategy

VOCABULARY, LENGTH = 284, 24
PROMPT = "the quick brown fox"


class Tuned(L.LightningModule):
    """A LoRA model of peft's in a module of a user's own, with a count and logs that a replay must not repeat."""

    def __init__(self, directory: Path, automatic: bool = True, dropout: float = 0.1, **lora: Any) -> None:
        super().__init__()
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(directory)
        options = {"r": 4, "lora_dropout": dropout, "target_modules": "all-linear", "init_lora_weights": False}
        self.lm = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **options | lora)).train()
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.automatic_optimization = automatic
        self.seen = 0

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        loss: Tensor = self.lm(input_ids=batch["input_ids"], labels=batch["labels"], use_cache=False).loss
        return loss

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor | None:
        self.seen += batch["input_ids"].numel()
        loss = self.loss(batch)
        self.log("loss", loss.detach(), on_step=True, on_epoch=True)
        self.log("seen", float(self.seen))
        if self.automatic_optimization:
            return loss
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return {"loss": loss.detach()}  # type: ignore[return-value]

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self.log("zeroed", float(self.global_step))

    def on_after_backward(self) -> None:
        self.log("after_backward", float(self.seen))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], 1e-2)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Record(L.Callback):
    """Losses of every micro-batch and whatever was logged after it."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.logged: list[dict[str, float]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        torch.manual_seed(11)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))
        self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})


class Asked:
    """A request to the engine, and its events."""

    def __init__(self, engine: Any, prompt: list[int], tokens: int, model: str = "base", **sampling: Any) -> None:
        self.events: list[TokenEvent] = []
        options = {"max_tokens": tokens, "temperature": 0.0, "ignore_eos": True} | sampling
        self.request = Request(prompt, self.events.append, SamplingParams(**options), model=model)
        engine.submit(self.request)

    @property
    def tokens(self) -> list[int]:
        return [event.token for event in list(self.events) if event.token is not None]

    @property
    def ended(self) -> str | None:
        events = list(self.events)
        return events[-1].finish_reason if events else None


class Beside(L.Callback):
    """Asks while the fit runs, and lets no batch end before every request that runs has got some more tokens."""

    def __init__(self, strategy: HarliStrategy, ask: Callable[[Any], list[Asked]], pace: int = 2) -> None:
        self.strategy, self.ask, self.pace = strategy, ask, pace
        self.asked: list[Asked] = []
        self.batches = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.asked = self.ask(self.strategy.engine)
        assert eventually(lambda: all(asked.tokens or asked.ended for asked in self.asked))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.batches += 1
        assert eventually(lambda: all(len(a.tokens) >= self.pace * self.batches or a.ended for a in self.asked))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert eventually(lambda: all(asked.ended for asked in self.asked))


class At(L.Callback):
    """Calls a function when a batch begins, once."""

    def __init__(self, batch: int, do: Callable[[L.Trainer, Any], None]) -> None:
        self.batch, self.do = batch, do

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx == self.batch:
            self.do(trainer, pl_module)


def rows(count: int = 16, length: int = LENGTH) -> list[dict[str, Tensor]]:
    ids = torch.randint(1, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(3))
    return [{"input_ids": row, "labels": row} for row in ids]


def loader(count: int = 16, length: int = LENGTH, size: int = 2) -> DataLoader:
    return DataLoader(rows(count, length), batch_size=size)


def strategy(**options: Any) -> HarliStrategy:
    """Small, and on a free port if there is a server at all."""
    small = {"server": False, "max_batch": 4, "memory": "8MiB", "tpot_slo_ms": 20.0, "prefill_chunk": 32}
    return HarliStrategy(**small | options)


def trainer(chosen: Any = "auto", callbacks: Any = (), **options: Any) -> L.Trainer:
    quiet: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "max_steps": 4, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0,
    }  # fmt: skip
    return L.Trainer(strategy=chosen, callbacks=list(callbacks), **quiet | options)


def fit(module: Any, chosen: Any = "auto", *callbacks: Any, data: Any = None, **options: Any) -> Record:
    record = Record()
    ckpt = {"ckpt_path": options.pop("ckpt_path")} if "ckpt_path" in options else {}
    trainer(chosen, [record, *callbacks], **options).fit(module, data or loader(), **ckpt)
    return record


def adapter(module: Any) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}


def close(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 1e-6) -> bool:
    return one.keys() == other.keys() and all(torch.allclose(one[n], other[n], rtol=0, atol=tolerance) for n in one)


def solo(model: Any, prompt: list[int], tokens: int) -> list[int]:
    """What transformers says alone."""
    ids = torch.tensor([prompt])
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        found = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens,
            min_new_tokens=tokens, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    return found[0, len(prompt) :].tolist()


def client(url: str | None) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30)


def eventually(condition: Callable[[], bool], seconds: float = 30.0) -> bool:
    """Whether something becomes true in good time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True
