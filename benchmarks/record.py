"""Rows of ``results.csv`` and tables made of them. The columns are fixed; README.md says what each means."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Goal, Options, Report, quantile

RESULTS = Path(__file__).parent / "results.csv"
COLUMNS = (
    "date", "run", "benchmark", "case", "quick", "variant", "status", "device", "hardware", "load", "python", "torch",
    "triton", "ygglight", "revision", "repeats", "p20_s", "p50_s", "p80_s", "ratios", "peak_bytes", "metrics",
)  # fmt: skip


# -- where it ran ----------------------------------------------------------------------------------------------------
def hardware(device: str) -> str:
    """GPU name, or CPU model with the number of threads that torch uses."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = (line.partition(":") for line in cpuinfo.read_text().splitlines())
        fields = {key.strip(): value.strip() for key, _, value in lines}
        model = fields.get("model name", model)
        if "cpu family" in fields:  # virtual machines hide the name
            model += f" (family {fields['cpu family']} model {fields.get('model', '?')})"
    return f"{model}, {torch.get_num_threads()} threads"


def revision(root: Path | None = None) -> str:
    """Commit of the working tree, ``+dirty`` when anything but ``results.csv`` differs from it.

    ``$YGGLIGHT_REVISION`` goes before, for machines to which only files were copied.
    """
    told = os.environ.get("YGGLIGHT_REVISION")
    if told:
        return told
    root = root or Path(__file__).parents[1]

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True, timeout=30)
        return done.stdout.strip()

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        changed = git("status", "--porcelain", "--", ".", ":!benchmarks/results.csv")
    except (OSError, subprocess.SubprocessError):
        return "none"
    return commit + ("+dirty" if changed else "")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def environment(options: Options) -> dict[str, str]:
    """All columns that are the same for every row of a run."""
    now = datetime.datetime.now(datetime.UTC)
    return {
        "date": now.strftime("%Y-%m-%d"),
        "run": f"{now:%Y%m%dT%H%M%SZ}-{os.getpid()}",
        "quick": str(int(options.quick)),
        "device": options.device,
        "hardware": hardware(options.device),
        "load": f"{os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else "",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "ygglight": _version("ygglight"),
        "revision": revision(),
    }


# -- rows ------------------------------------------------------------------------------------------------------------
def rows(report: Report, where: Mapping[str, str]) -> list[dict[str, str]]:
    """One row per variant, failed ones too.

    Args:
        report: what was measured. where: from :func:`environment`, taken before the run.
    """
    made = []
    for result in report.results:
        metrics = {key: value for key, value in result.metrics.items() if key != "peak_bytes"}
        row = dict.fromkeys(COLUMNS, "") | dict(where)
        row |= {"benchmark": report.benchmark, "case": report.case, "variant": result.name, "status": result.status}
        row["metrics"] = json.dumps(_rounded(metrics), sort_keys=True)
        row["peak_bytes"] = str(result.metrics.get("peak_bytes", ""))
        row["repeats"] = str(len(result.seconds))
        if result.ok:
            for name, q in (("p20_s", 0.2), ("p50_s", 0.5), ("p80_s", 0.8)):
                row[name] = f"{quantile(result.seconds, q):.6g}"
            row["ratios"] = json.dumps(_rounded(report.ratios(result)))
        made.append(row)
    return made


def _rounded(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in values.items()}


def append(made: Sequence[Mapping[str, str]], path: Path = RESULTS) -> None:
    """Add rows at the end; what is there is never changed.

    Raises:
        ValueError: the file has other columns.
    """
    fresh = not path.exists() or path.stat().st_size == 0
    if not fresh:
        with path.open(newline="", encoding="utf-8") as file:
            header = tuple(next(csv.reader(file)))
        if header != COLUMNS:
            raise ValueError(f"{path} has other columns than this version writes: {', '.join(header)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerows(made)


def read(path: Path = RESULTS) -> list[dict[str, str]]:
    """All rows, oldest first."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def latest(name: str, path: Path = RESULTS) -> list[dict[str, str]]:
    """The rows of the newest run of a benchmark."""
    mine = [row for row in read(path) if row["benchmark"] == name]
    return [row for row in mine if row["run"] == mine[-1]["run"]] if mine else []


# -- tables ----------------------------------------------------------------------------------------------------------
def markdown(made: Sequence[Mapping[str, str]], columns: Sequence[str] = ()) -> str:
    """A markdown table per case, with the line that says where it ran.

    Args:
        made: rows of one run. columns: metrics to show; none: all that occur.
    """
    lines: list[str] = []
    for case in dict.fromkeys(row["case"] for row in made):
        mine = [row for row in made if row["case"] == case]
        first = mine[0]
        quick = " **quick run: shows that it works, not how fast.**" if first["quick"] == "1" else ""
        repeats = max(int(row["repeats"]) for row in mine)
        where = f"{first['hardware']}, torch {first['torch']}, {first['date']}, revision {first['revision']}"
        lines += [f"{first['benchmark']}, {case}: {where}, {repeats} repeats.{quick}", ""]
        lines += [*_table(mine, columns), ""]
    return "\n".join(lines).rstrip()


def _table(mine: Sequence[Mapping[str, str]], columns: Sequence[str]) -> list[str]:
    metrics = [json.loads(row["metrics"] or "{}") for row in mine]
    ratios = [json.loads(row["ratios"] or "{}") for row in mine]
    shown = list(columns) or list(dict.fromkeys(key for values in metrics for key in values))
    baselines = list(dict.fromkeys(key for values in ratios for key in values))
    has_peak = any(row["peak_bytes"] for row in mine)
    head = ["variant", "p50", "p20-p80", *(f"x {name}" for name in baselines), *(["peak"] if has_peak else []), *shown]
    table = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row, values, against in zip(mine, metrics, ratios, strict=True):
        if row["p50_s"]:
            times = [seconds(row["p50_s"]), f"{seconds(row['p20_s'])}-{seconds(row['p80_s'])}"]
        else:
            times = [row["status"].replace("|", "/")[:70], ""]
        cells = [row["variant"], *times, *(f"{against[b]:.3f}" if b in against else "" for b in baselines)]
        cells += [mebibytes(row["peak_bytes"])] if has_peak else []
        cells += [_cell(key, values.get(key)) for key in shown]
        table.append("| " + " | ".join(cells) + " |")
    return table


def _cell(name: str, value: Any) -> str:
    if value is None:
        return ""
    if name.endswith("_bytes"):
        return mebibytes(value)
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def mebibytes(size: str | float) -> str:
    """Bytes for a table cell."""
    return f"{float(size) / 2**20:.1f} MiB" if size != "" else ""


def seconds(value: str | float) -> str:
    """A time for a table cell."""
    number = float(value)
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if number * scale >= 1 or unit == "us":
            return f"{number * scale:.3g} {unit}"
    raise AssertionError("unreachable")


def goals(items: Sequence[Goal]) -> str:
    """One line a goal."""
    words = {True: "met   ", False: "MISSED", None: "n/a   "}
    return "\n".join(f"  {words[goal.met]}  {goal.text}" for goal in items)
