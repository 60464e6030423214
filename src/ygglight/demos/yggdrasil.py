"""SmolLM2-135M-Instruct completes Python functions three ways: plain, by the best chain, and by a tree."""

from __future__ import annotations

import csv
import logging
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as L

from ygglight.callbacks.generation_writer import GenerationWriter
from ygglight.data.text import TextData
from ygglight.engines.yggdrasil.report import Report
from ygglight.modules.causal_lm import CausalLM
from ygglight.strategies.yggdrasil import YggdrasilStrategy

MODEL = "smollm2-135m-instruct"
CHAINS = (3, 6)
"""Depths of the chains that are tried."""
PROMPT = (
    "Here is some Python code:\n\n{code}\n\nRewrite the code so that every function has a docstring and type hints.\n"
)
CODE = (
    "def mean(values):\n    total = 0\n    for value in values:\n        total += value\n"
    "    return total / len(values)\n",
    "def count_words(text):\n    counts = {}\n    for word in text.split():\n"
    "        counts[word] = counts.get(word, 0) + 1\n    return counts\n",
    "def is_prime(number):\n    if number < 2:\n        return False\n    for divisor in range(2, number):\n"
    "        if number % divisor == 0:\n            return False\n    return True\n",
)


@dataclass
class Result:
    """One way of generating."""

    name: str
    seconds: float
    texts: list[str]
    tokens: int
    report: Report | None


def run(short: bool, out: Path) -> None:
    """Generate, print the table, save ``yggdrasil.csv`` and the texts.

    Args:
        short: three prompts of 64 new tokens; else of 192. out: folder for the files.
    """
    tokens = 64 if short else 192
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning.*")
    module = CausalLM(MODEL, max_new_tokens=tokens, chat=True)
    print(
        f"{MODEL} edits {len(CODE)} functions, {tokens} tokens each, greedy; the draft copies from the text", flush=True
    )
    _generate("warm-up", module, "auto", None, only=1)
    results = [_generate("plain", module, "auto", out)]
    chains = [_generate(f"chain of {depth}", module, _strategy({"width": 1, "depth": depth}), out) for depth in CHAINS]
    results.append(min(chains, key=lambda result: result.seconds))
    _generate("measuring", module, _strategy("auto"), None, only=1)  # latencies, kept for later runs
    results.append(_generate("yggdrasil", module, _strategy("auto"), out))
    print(table(results))
    _save(results, out)


def _strategy(tree: Any) -> YggdrasilStrategy:
    return YggdrasilStrategy(draft="lookup", tree=tree, progress=False)


def _generate(name: str, module: CausalLM, strategy: Any, out: Path | None, only: int | None = None) -> Result:
    prompts = [PROMPT.format(code=code) for code in CODE[:only]]
    callbacks: list[Any] = (
        [] if out is None else [GenerationWriter(str(out / f"{name.replace(' ', '_')}.jsonl"), overwrite=True)]
    )
    trainer = L.Trainer(
        strategy=strategy, accelerator="auto", devices=1, logger=False, callbacks=callbacks, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    start = time.perf_counter()
    found: Any = trainer.predict(module, TextData(prompts=prompts, tokenizer=MODEL, batch_size=1))
    seconds = time.perf_counter() - start
    rows = [row for batch in found for row in batch]
    if out is not None:
        print(f"{name}: {seconds:.1f} s", flush=True)
    report = strategy.report if isinstance(strategy, YggdrasilStrategy) else None
    return Result(name, seconds, [r["text"] for r in rows], sum(len(r["tokens"]) for r in rows), report)


def table(results: list[Result]) -> str:
    """Time, tokens a second and tokens a step, each beside plain generation."""
    plain = results[0]
    lines = ["", f"{'':<14}{'seconds':>9}{'tokens/s':>10}{'speedup':>9}{'tokens/step':>13}  same text"]
    for result in results:
        per_step = 1.0 if result.report is None else result.report.tokens_per_step
        same = "yes" if result.texts == plain.texts else "NO"
        lines.append(
            f"{result.name:<14}{result.seconds:>9.1f}{result.tokens / result.seconds:>10.1f}"
            f"{plain.seconds / result.seconds:>9.2f}{per_step:>13.2f}  {same}"
        )
    return "\n".join(lines)


def _save(results: list[Result], out: Path) -> None:
    with (out / "yggdrasil.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["way", "seconds", "tokens", "tokens_per_step"])
        for r in results:
            per_step = 1.0 if r.report is None else r.report.tokens_per_step
            writer.writerow([r.name, f"{r.seconds:.3f}", r.tokens, f"{per_step:.3f}"])
