"""One table of what each system gains, a line each, for the README; figures are rows of results.csv."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.record import mebibytes, seconds

Row = Mapping[str, str]
Variants = Mapping[str, Row]


@dataclass(frozen=True)
class Gain:
    """One line.

    Args:
        name: Of the system. benchmark: Its rows. case: Part of the name of the case.
        variants: That must be there. text: What was measured, with the system, and without it.
    """

    name: str
    benchmark: str
    case: str
    variants: tuple[str, ...]
    text: Callable[[Variants], tuple[str, str, str]]


def _adacc(rows: Variants) -> tuple[str, str, str]:
    plain = rows["plain"]

    def cell(row: Row) -> str:
        slower = json.loads(row["ratios"])["plain"]
        return f"{mebibytes(row['peak_bytes'])}, {slower:.0%} of the time"

    beside = f"{mebibytes(plain['peak_bytes'])}; full recompute {cell(rows['full'])}"
    return "activations of a training step, SmolLM2-135M", cell(rows["adacc-0.3"]), beside


def _speeds(rows: Variants) -> dict[str, str]:
    return {name: f"{json.loads(row['metrics'])['tokens_per_s']:.1f}" for name, row in rows.items() if row["p50_s"]}


def _yggdrasil(rows: Variants) -> tuple[str, str, str]:
    speed = _speeds(rows)
    beside = f"plain {speed['plain']}, assisted generation {speed['assisted']}, best chain {speed['best-chain']}"
    return "tokens/s, Qwen2.5-Coder 1.5B", speed["yggdrasil"], beside


def _harli(rows: Variants) -> tuple[str, str, str]:
    found = {name: json.loads(row["metrics"]) for name, row in rows.items()}

    def cell(name: str) -> str:
        one = found[name]
        return f"{one['finetune_tokens_per_s']:.0f} ({one['attainment']:.0%} of requests inside the target)"

    beside = f"a layer after each decode step {cell('capped-1')}, a fixed split of the cores {cell('split')}"
    return "finetuning tokens/s beside serving, SmolLM2-135M", cell("harli"), beside


def _moe_speq(rows: Variants) -> tuple[str, str, str]:
    speed = _speeds(rows)
    beside = f"accelerate's offloading {speed['accelerate']}, a cache of the same memory {speed['lru-sm']}"
    return "tokens/s, half of the experts' memory, link 4 GB/s", speed["moe-speq"], beside


def _clusterfusion(rows: Variants) -> tuple[str, str, str]:
    eager, sdpa = (seconds(rows[name]["p50_s"]) for name in ("transformers-eager", "transformers"))
    beside = f"transformers {eager}, with sdpa {sdpa}"
    return "latent attention of DeepSeek-V2-Lite's size, a step at 4K tokens", seconds(rows["torch"]["p50_s"]), beside


GAINS = (
    Gain("Adacc", "adacc", "1x1024 tokens", ("plain", "full", "adacc-0.3"), _adacc),
    Gain("Yggdrasil", "yggdrasil", "qwen", ("plain", "assisted", "best-chain", "yggdrasil"), _yggdrasil),
    Gain("Harli", "harli", "Poisson 0.5", ("harli", "capped-1", "split"), _harli),
    Gain("MoE-SpeQ", "moe_speq", "link 4 GB/s + 0.1 ms, 32", ("accelerate", "lru-sm", "moe-speq"), _moe_speq),
    Gain(
        "ClusterFusion", "clusterfusion", "context 4096, 1 layer in a model, bfloat16",
        ("transformers", "transformers-eager", "torch"), _clusterfusion,
    ),
)  # fmt: skip


def table(rows: Sequence[Row], runs: Sequence[str] | None = None) -> str:
    """The table, and the runs that it is made of; a system that was not measured has no line.

    Args:
        rows: Of results.csv, oldest first, no quick ones. runs: To take them from; None: the newest of each system.
    """
    lines, named, where = ["| | measured | with it | without it |", "|---|---|---|---|"], [], ""
    for gain in GAINS:
        its = [row for row in rows if row["benchmark"] == gain.benchmark and gain.case in row["case"]]
        by_run: dict[str, dict[str, Row]] = {}
        for row in its:
            by_run.setdefault(row["run"], {})[row["variant"]] = row
        fit = [run for run, found in by_run.items() if all(found.get(v, {}).get("p50_s") for v in gain.variants)]
        run = next((run for run in reversed(fit) if runs is None or run in runs), None)
        if run is None:
            continue
        measured, ours, others = gain.text(by_run[run])
        lines.append(f"| **{gain.name}** | {measured} | {ours} | {others} |")
        named.append(f"run {run}")
        where = f"CPUs, torch {its[-1]['torch']}"
    return "\n".join(lines) + f"\n\n<sub>{where}; {', '.join(named)}</sub>" if named else ""
