"""A mixture of experts three ways: whole, its experts on demand, and by MoE-SpeQ, with a 4-bit draft. Same text."""

from __future__ import annotations

import csv
import logging
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor

from ygglight.callbacks.moe_speq_monitor import MoESpeQMonitor
from ygglight.compat import transformers as hf
from ygglight.compat.extras import offered
from ygglight.data.documents import read_prompts
from ygglight.data.text import TextData
from ygglight.engines.memory.sizes import format_bytes
from ygglight.engines.moe_speq.layout import find_sites
from ygglight.engines.moe_speq.report import Report
from ygglight.modules.causal_lm import CausalLM
from ygglight.modules.upcycling import set_routers, upcycle
from ygglight.strategies.moe_speq import MoESpeQStrategy

DENSE = "smollm2-135m-instruct"
EXPERTS, TOP_K, ENTROPY = 8, 2, 0.5
DRAFTED = 4
"""Tokens a cycle in the short form: its text ends before a draft that is made on the way has paid for its making."""
SHARE = 0.6
"""Of the experts' bytes that the device may hold."""
LINK = {"bandwidth": 4e9, "latency": 1e-4}
"""Slower than a GPU's link in the proportion in which a CPU is slower than a GPU."""


@dataclass
class Result:
    """One way of running the model."""

    name: str
    seconds: float
    tokens: list[list[int]]
    report: Report | None


def run(short: bool, out: Path) -> None:
    """Generate, print the tables, save ``moe_speq.csv`` and the picture of the run.

    Args:
        short: two prompts of 32 new tokens; else six of 96. out: folder for the files.
    """
    count, new = (2, 32) if short else (6, 96)
    k: int | str = DRAFTED if short else "auto"
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning.*")
    module, about = model(new)
    assert module.model is not None
    sites = find_sites(module.model)
    whole = sum(site.experts * site.layout.nbytes for site in sites)
    budget = int(SHARE * whole)
    print(
        f"{about}\n{format_bytes(whole)} of experts, {format_bytes(budget)} on the device, the rest behind a link of "
        f"{LINK['bandwidth'] / 1e9:.0f} GB/s; {count} prompts, {new} tokens each, greedy",
        flush=True,
    )
    picture = str(out / "moe_speq.png") if offered("plot") else None
    monitor = MoESpeQMonitor(picture=picture)
    options: dict[str, Any] = {"experts": "host", "link": LINK, "progress": False}
    results = [
        _generate("whole", module, "auto", count),
        _generate("on demand", module, MoESpeQStrategy(budget, draft_bits=None, **options), count),
        _generate("moe-speq", module, MoESpeQStrategy(budget, k=k, **options), count, [monitor]),
    ]
    print(table(results))
    report = results[-1].report
    assert report is not None
    print(f"\nmoe-speq:\n{report.table()}")
    _save(results, out)


def model(new: int) -> tuple[CausalLM, str]:
    """SmolLM2 with every feed-forward network in eight copies, for no trained mixture arrives as a package.

    Copies give SmolLM2's own text whatever the routers say, which follow clusters of what each layer sees.

    Args:
        new: Tokens to generate.
    """
    module = CausalLM(DENSE, max_new_tokens=new, chat=True)
    dense: Any = hf.load_causal_lm(module.directory, dtype=torch.float32)
    module.model = copies(dense, module.tokenizer)
    module.eval()
    return module, f"{DENSE} with every feed-forward network in {EXPERTS} copies, {TOP_K} of them a token"


@torch.no_grad()
def copies(dense: Any, tokenizer: Any) -> Any:
    """A mixture of copies, and routers that follow the clusters of what each layer sees of some questions.

    Args:
        dense: A Llama. tokenizer: Its own.
    """
    text = "\n\n".join(read_prompts("gsm8k-test")[-64:])
    ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :2048]
    moe = upcycle(dense, range(dense.config.num_hidden_layers), EXPERTS, TOP_K).eval()
    layers: Any = hf.decoder_layers(moe)
    gates = [layer.mlp.gate for layer in layers]
    seen: list[Tensor] = []
    hooks = [gate.register_forward_hook(lambda _, given, made: seen.append(given[0])) for gate in gates]
    moe.get_decoder()(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    set_routers(gates, seen, ENTROPY)
    return moe


def _generate(name: str, module: CausalLM, strategy: Any, count: int, callbacks: list[Any] | None = None) -> Result:
    trainer = L.Trainer(
        strategy=strategy, accelerator="auto", devices=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, callbacks=callbacks,
    )  # fmt: skip
    data = TextData(prompts=read_prompts("gsm8k-test")[:count], tokenizer=DENSE, batch_size=1)
    start = time.perf_counter()
    found: Any = trainer.predict(module, data)
    seconds = time.perf_counter() - start
    print(f"{name}: {seconds:.1f} s", flush=True)
    report = strategy.report if isinstance(strategy, MoESpeQStrategy) else None
    return Result(name, seconds, [row["tokens"] for batch in found for row in batch], report)


def table(results: list[Result]) -> str:
    """Tokens a second, where experts were, and what travelled, each way."""
    lines = ["", f"{'':<12}{'tokens/s':>9}{'tokens/cycle':>14}{'in a slot':>11}{'bytes a token':>15}  same text"]
    for result in results:
        same = "yes" if result.tokens == results[0].tokens else "NO"
        report = result.report
        if report is None:
            rate = sum(map(len, result.tokens)) / result.seconds
            lines.append(f"{result.name:<12}{rate:>9.1f}{1.0:>14.2f}{'all':>11}{'-':>15}  {same}")
            continue
        rate = report.tokens / report.decode_seconds
        hits = report.experts["hits"] / max(1, report.experts["requests"])
        lines.append(
            f"{result.name:<12}{rate:>9.1f}{report.tokens_per_cycle:>14.2f}{hits:>11.0%}"
            f"{format_bytes(report.bytes_per_token):>15}  {same}"
        )
    return "\n".join(lines)


def _save(results: list[Result], out: Path) -> None:
    with (out / "moe_speq.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["way", "seconds", "tokens", "tokens_per_cycle", "bytes_per_token"])
        for r in results:
            cycle, moved = (1.0, 0.0) if r.report is None else (r.report.tokens_per_cycle, r.report.bytes_per_token)
            writer.writerow([r.name, f"{r.seconds:.3f}", sum(map(len, r.tokens)), f"{cycle:.3f}", f"{moved:.0f}"])
