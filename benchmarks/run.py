"""The command line of the benchmarks: ``list``, ``run NAME``, ``table NAME``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import record
from benchmarks.harness import BadInput, Options, Report
from benchmarks.registry import BENCHMARKS, columns, load, summary


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("list", help="all benchmarks")
    run = verbs.add_parser("run", help="measure, print a table, append to results.csv")
    run.add_argument("name", choices=sorted(BENCHMARKS))
    run.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    run.add_argument("--quick", action="store_true", help="small sizes, 3 repeats: shows that it works, not how fast")
    run.add_argument("--repeats", type=int, help="timed repeats (default 20, quick 3)")
    run.add_argument("--size", help="a size of the benchmark's own table (default: by device)")
    run.add_argument("--only", default="", help="comma-separated patterns of variant names, e.g. 'plain,full,adacc-*'")
    run.add_argument("--no-record", action="store_true", help="append nothing")
    run.add_argument("--results", type=Path, default=record.RESULTS, help="another csv file")
    table = verbs.add_parser("table", help="markdown of the latest recorded run")
    table.add_argument("name", choices=sorted(BENCHMARKS))
    table.add_argument("--results", type=Path, default=record.RESULTS)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (1: some variant is incorrect).

    Args:
        arguments: those of the process by default.
    """
    parsed = _parser().parse_args(arguments)
    if parsed.verb == "list":
        width = max(map(len, BENCHMARKS))
        print("\n".join(f"{name:<{width}}  {summary(name)}" for name in sorted(BENCHMARKS)))
        return 0
    if parsed.verb == "table":
        found = record.latest(parsed.name, parsed.results)
        nothing = f"no run of {parsed.name} is recorded in {parsed.results}"
        print(record.markdown(found, columns(parsed.name)) if found else nothing)
        return 0
    if parsed.repeats is not None and parsed.repeats < 1:
        print("--repeats must be at least 1", file=sys.stderr)
        return 2
    if parsed.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda, but torch sees no CUDA device", file=sys.stderr)
        return 2
    only = tuple(pattern.strip() for pattern in parsed.only.split(",") if pattern.strip())
    options = Options(parsed.device, parsed.quick, parsed.repeats, parsed.size, only)
    where = record.environment(options)
    try:
        reports = load(parsed.name)(options)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    show(reports, where)
    if not parsed.no_record:
        for report in reports:
            record.append(record.rows(report, where), parsed.results)
        print(f"\nappended to {parsed.results}")
    return int(any(result.status.startswith("incorrect") for report in reports for result in report.results))


def show(reports: Sequence[Report], where: dict[str, str]) -> None:
    """Print tables, goals and notes.

    Args:
        reports: of one run. where: from :func:`benchmarks.record.environment`.
    """
    for report in reports:
        print("\n" + record.markdown(record.rows(report, where), report.columns))
        if report.goals:
            print("\ngoals:\n" + record.goals(report.goals))
        for note in report.notes:
            print(f"\nnote: {note}")
