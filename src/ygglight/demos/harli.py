"""SmolLM2-135M-Instruct is finetuned by LoRA while a client talks to it over HTTP."""

from __future__ import annotations

import json
import logging
import threading
import time
import urllib.request
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as L

from ygglight.callbacks.harli_monitor import HarliMonitor
from ygglight.data.text import TextData
from ygglight.modules.causal_lm import CausalLM
from ygglight.strategies.harli import HarliStrategy

MODEL = "smollm2-135m-instruct"
QUESTIONS = (
    "Tom has 3 boxes with 12 pencils each. How many pencils does he have?",
    "What is the capital of France?",
    "A train goes 60 km in one hour. How far does it go in 3 hours?",
)


@dataclass
class Client:
    """Asks one question after the other, as any client would, and notes when the pieces of the answers came.

    Args:
        tokens: Most of an answer. answers: (model, question, text). times: Of the pieces of each answer, in seconds.
    """

    tokens: int
    answers: list[tuple[str, str, str]] = field(default_factory=list)
    times: list[list[float]] = field(default_factory=list)
    error: str | None = None

    def talk(self, url: str, ended: threading.Event) -> None:
        """Until ``ended``; base and adapter in turn."""
        turn = 0
        while not ended.is_set():
            question, model = QUESTIONS[turn % len(QUESTIONS)], ("base", "adapter")[turn % 2]
            turn += 1
            try:
                self._ask(url, model, question)
            except OSError as error:  # the server is going down
                if not ended.is_set():
                    self.error = str(error)
                return

    def _ask(self, url: str, model: str, question: str) -> None:
        body = {
            "model": model, "stream": True, "max_tokens": self.tokens, "temperature": 0,
            "messages": [{"role": "user", "content": question}],
        }  # fmt: skip
        request = urllib.request.Request(
            f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        text, times = "", []
        with urllib.request.urlopen(request, timeout=120) as response:
            for line in response:
                if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
                    continue
                piece = json.loads(line[6:])
                if piece.get("choices"):
                    text += piece["choices"][0].get("delta", {}).get("content") or ""
                    times.append(time.perf_counter())
        self.answers.append((model, question, text))
        self.times.append(times)


class _Talking(L.Callback):
    """Starts the client when training starts."""

    def __init__(self, client: Client, strategy: HarliStrategy) -> None:
        self._client, self._strategy = client, strategy
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self._strategy.url is not None
        self._thread = threading.Thread(target=self._client.talk, args=(self._strategy.url, self._ended), daemon=True)
        self._thread.start()

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        loss = trainer.callback_metrics.get("train_loss")
        print(f"  step {trainer.global_step}: loss {loss:.3f}, {len(self._client.answers)} answers", flush=True)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._ended.set()
        assert self._thread is not None
        self._thread.join(60)


def run(short: bool, out: Path) -> None:
    """Finetune and talk, print the table, save ``harli.png`` and the answers.

    Args:
        short: 6 steps of 1x128 tokens; else 40 of 2x256. out: folder for the files.
    """
    steps, block, batch = (6, 128, 1) if short else (40, 256, 2)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning.*")
    L.seed_everything(0, verbose=False)
    strategy = HarliStrategy(server={"port": 0}, max_batch=4, max_context=512, memory="512MiB")
    client = Client(tokens=24)
    picture = out / "harli.png"
    trainer = L.Trainer(
        strategy=strategy, accelerator="auto", devices=1, max_steps=steps, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=1.0, default_root_dir=out,
        callbacks=[_Talking(client, strategy), HarliMonitor(picture=str(picture))],
    )  # fmt: skip
    print(f"{MODEL}: LoRA finetuning on gsm8k, {steps} steps of {batch}x{block} tokens, beside a client", flush=True)
    module = CausalLM(MODEL, lora={"r": 8, "lora_alpha": 16}, learning_rate=5e-4)
    trainer.fit(module, TextData("gsm8k", tokenizer=MODEL, block_size=block, batch_size=batch))
    assert strategy.report is not None
    print(strategy.report.table())
    for model, question, text in client.answers[:2]:
        print(f"\n[{model}] {question}\n{text.strip()}")
    if client.error is not None:
        print(f"\nthe client met an error: {client.error}")
    with (out / "harli.jsonl").open("w", encoding="utf-8") as file:
        for model, question, text in client.answers:
            file.write(json.dumps({"model": model, "question": question, "text": text}) + "\n")
    print(f"\nthe run as a picture: {picture}")
