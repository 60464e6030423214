"""Writes measured figures into the pages: what stands between `<!-- results:NAME -->` and `<!-- /results -->`.

    python docs/fill_results.py            the newest run of each benchmark on each device
    python docs/fill_results.py --check    exit code 1 when a page differs from the rows that it names

`<!-- results:NAME -->` is the short table, `<!-- results:NAME full -->` has every variant and metric, and
`<!-- results:summary -->` has a line for each system. Rows come from
`benchmarks/results.csv` and from nowhere else; quick runs never count. Each table names its run, so that a page can be
held against its own rows after newer ones were appended.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.record import RESULTS, markdown, mebibytes, read, seconds  # noqa: E402
from docs import gains  # noqa: E402

Row = Mapping[str, str]

NOTHING = "not measured yet"
MARK = re.compile(r"(<!-- results:(?P<name>\w+)(?P<full> full)? -->\n).*?(\n<!-- /results -->)", re.DOTALL)
RUN = re.compile(r"\brun (\d{8}T\d{6}Z-\d+)")

SHORT: dict[str, dict[str, str]] = {
    "adacc": {
        "plain": "plain training",
        "full": "full recompute (`gradient_checkpointing`)",
        "sac-fit-0.5": "selective checkpointing, tuned by hand for half",
        "adacc-0.7": "**Adacc**, budget 0.7",
        "adacc-0.5": "**Adacc**, budget 0.5",
        "adacc-0.5-exact": "**Adacc**, budget 0.5, no compression",
        "adacc-0.3": "**Adacc**, budget 0.3",
    },
    "yggdrasil": {
        "plain": "plain `generate`",
        "prompt-lookup": "transformers' prompt lookup",
        "assisted": "transformers' assisted generation",
        "best-chain": "chain of drafted tokens, best length",
        "sequoia": "static tree (Sequoia), best shape",
        "level-beam": "level beam (EAGLE-2), best shape",
        "yggdrasil": '**Yggdrasil**, `tree="auto"`',
    },
    "harli": {
        "inference-only": "serving alone",
        "halves": "half of the cores each",
        "split": "the same, and all of them when nobody asks",
        "whole-step": "a training step after each decode step",
        "naive": "both at once",
        "capped-1": "one layer after each decode step",
        "capped-2": "two layers after each decode step",
        "harli": "**Harli**",
    },
    "moe_speq": {
        "accelerate": "accelerate's offloading",
        "lru-sc": "cache of experts, slots as beside the draft",
        "lru-sm": "cache of experts, the same memory",
        "k-4": "drafts of 4",
        "k-4-no-prefetch": "drafts of 4, nothing sent ahead",
        "k-8": "drafts of 8",
        "moe-speq": '**MoE-SpeQ**, `k="auto"`',
        "unoffloaded": "all experts in memory",
    },
}
"""Variants of a short table, in order, and what a reader is told; a benchmark that is not here shows all of them."""


def pages() -> list[Path]:
    """Every page that may hold figures."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def fill(text: str, rows: Sequence[Row], *, pinned: bool = False) -> str:
    """The page with its tables made from `rows`.

    Args:
        text: the page. rows: of results.csv, oldest first.
        pinned: take the runs that each table names instead of the newest; a table of no run stays as it is.
    """

    def table(match: re.Match[str]) -> str:
        named = RUN.findall(match[0])
        if pinned and not named:
            body = NOTHING
        else:
            body = render(match["name"], rows, full=bool(match["full"]), runs=named if pinned else None)
        return f"{match[1]}{body}{match[4]}"

    return MARK.sub(table, text)


def render(name: str, rows: Sequence[Row], *, full: bool, runs: Sequence[str] | None = None) -> str:
    """The tables of one benchmark.

    Args:
        name: of the benchmark. rows: of results.csv. full: every variant and metric. runs: which; None: the newest of
            each device.
    """
    rows = [row for row in rows if row["quick"] != "1"]
    if name == "summary":
        return gains.table(rows, runs) or NOTHING
    mine = [row for row in rows if row["benchmark"] == name]
    if runs is None:
        key = ("device", "case") if full else ("device",)
        runs = sorted({tuple(row[k] for k in key): row["run"] for row in mine}.values())
    parts = []
    for run in dict.fromkeys(runs):
        its = [row for row in mine if row["run"] == run]
        for case in dict.fromkeys(row["case"] for row in its):
            of_case = [row for row in its if row["case"] == case]
            if full:
                parts.append(_full(of_case))
            else:
                parts.append(TABLES.get(name, partial(_short, name))(of_case))
    return "\n\n".join(parts) or NOTHING


def _full(rows: Sequence[Row]) -> str:
    heading, _, table = markdown(rows).partition("\n")
    return f"{heading.removesuffix('.')}, run {rows[0]['run']}.\n{table}"


def _short(name: str, rows: Sequence[Row]) -> str:
    by_variant = {row["variant"]: row for row in rows}
    plain = by_variant.get("plain", {}).get("peak_bytes")

    def cells(row: Row) -> list[str]:
        variant = row["variant"]
        ratio = json.loads(row["ratios"] or "{}").get("plain", 1.0 if variant == "plain" else None)
        peak, share = "", ""
        if row["peak_bytes"]:
            peak = mebibytes(row["peak_bytes"])
            share = f"{float(row['peak_bytes']) / float(plain):.0%}" if plain else ""
        return [seconds(row["p50_s"]), "" if ratio is None else f"{ratio:.0%}", peak, share]

    heads = ["time of forward and backward", "of plain", "activation peak", "of plain"]
    return _table(rows, SHORT.get(name) or {variant: variant for variant in by_variant}, heads, cells)


def _generation(rows: Sequence[Row]) -> str:
    def cells(row: Row) -> list[str]:
        metrics, ratio = json.loads(row["metrics"]), json.loads(row["ratios"] or "{}").get("plain", 1.0)
        per_step = f"{metrics['per_step']:.2f}" if "per_step" in metrics else ""
        return [f"{metrics['tokens_per_s']:.1f}", f"{1 / ratio:.2f}", per_step]

    heads = ["tokens a second", "speed, plain is 1", "tokens a pass of the model"]
    return _table(rows, SHORT["yggdrasil"], heads, cells)


def _sharing(rows: Sequence[Row]) -> str:
    def cells(row: Row) -> list[str]:
        found = json.loads(row["metrics"])
        return [
            f"{found['attainment']:.0%}", f"{found['tpot_p99_ms']:.0f} ms",
            f"{found['finetune_tokens_per_s']:.1f}", f"{found['share_of_alone']:.0%}",
        ]  # fmt: skip

    heads = ["requests inside the target", "time per token, p99", "finetune tokens/s", "of finetuning alone"]
    return _table(rows, SHORT["harli"], heads, cells)


def _offloading(rows: Sequence[Row]) -> str:
    def cells(row: Row) -> list[str]:
        found, ratio = json.loads(row["metrics"]), json.loads(row["ratios"] or "{}").get("lru-sm", 1.0)
        moved = [found.get(f"{cause}_MB_per_token") for cause in ("demand", "prefetch")]
        megabytes = "" if None in moved else f"{sum(moved):.0f} MB"
        per_cycle = f"{found['per_cycle']:.2f}" if "per_cycle" in found else ""
        return [f"{found['tokens_per_s']:.2f}", f"{1 / ratio:.2f}", megabytes, per_cycle]

    heads = ["tokens a second", "speed, same memory is 1", "copied for a token", "tokens a pass"]
    return _table(rows, SHORT["moe_speq"], heads, cells)


def _table(
    rows: Sequence[Row], labels: Mapping[str, str], heads: Sequence[str], cells: Callable[[Row], Sequence[str]]
) -> str:
    """The variants that have labels, in their order; one without timings tells its status."""
    by_variant = {row["variant"]: row for row in rows}
    lines = [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for variant, label in labels.items():
        row = by_variant.get(variant)
        if row is None:
            continue
        if row["p50_s"]:
            lines.append(f"| {label} | {' | '.join(cells(row))} |")
        else:
            lines.append(f"| {label} | {row['status'].replace('|', '/')} |" + " |" * (len(heads) - 1))
    return _framed(rows, lines)


def _framed(rows: Sequence[Row], lines: Sequence[str]) -> str:
    first, repeats = rows[0], max(int(row["repeats"]) for row in rows)
    where = f"{first['hardware']}, torch {first['torch']}, {first['date']}, revision {first['revision']}"
    return f"{first['case']}:\n\n" + "\n".join(lines) + f"\n\n<sub>{where}, {repeats} repeats, run {first['run']}</sub>"


TABLES: dict[str, Callable[[Sequence[Row]], str]] = {
    "yggdrasil": _generation,
    "harli": _sharing,
    "moe_speq": _offloading,
}
"""Short tables that are not of time and memory."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 when a page is wrong")
    parsed = parser.parse_args(arguments)
    rows, wrong = read(RESULTS), []
    for page in pages():
        before = page.read_text(encoding="utf-8")
        after = fill(before, rows, pinned=parsed.check)
        if before == after:
            continue
        wrong.append(str(page.relative_to(ROOT)))
        if not parsed.check:
            page.write_text(after, encoding="utf-8")
    print(("differs from results.csv: " if parsed.check else "written: ") + (", ".join(wrong) or "nothing"))
    return int(parsed.check and bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
