"""Writes measured figures into the pages: what stands between `<!-- results:NAME -->` and `<!-- /results -->`.

    python docs/fill_results.py            the newest run of each benchmark on each device
    python docs/fill_results.py --check    exit code 1 when a page differs from the rows that it names

`<!-- results:NAME -->` is the short table, `<!-- results:NAME full -->` has every variant and metric. Rows come from
`benchmarks/results.csv` and from nowhere else; quick runs never count. Each table names its run, so that a page can be
held against its own rows after newer ones were appended.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.record import RESULTS, markdown, mebibytes, read, seconds  # noqa: E402

Row = Mapping[str, str]

NOTHING = "not measured yet"
MARK = re.compile(r"(<!-- results:(?P<name>\w+)(?P<full> full)? -->\n).*?(\n<!-- /results -->)", re.DOTALL)
RUN = re.compile(r"\brun (\d{8}T\d{6}Z-\d+)")

SHORT: dict[str, tuple[str, ...]] = {"adacc": ("plain", "full*", "adacc-0*")}
"""Patterns of the variants in a short table; others have all variants."""


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
    mine = [row for row in rows if row["benchmark"] == name and row["quick"] != "1"]
    if runs is None:
        runs = list({row["device"]: row["run"] for row in mine}.values())
    parts = []
    for run in dict.fromkeys(runs):
        its = [row for row in mine if row["run"] == run]
        for case in dict.fromkeys(row["case"] for row in its):
            of_case = [row for row in its if row["case"] == case]
            parts.append(_full(of_case) if full else _short(name, of_case))
    return "\n\n".join(parts) or NOTHING


def _full(rows: Sequence[Row]) -> str:
    heading, _, table = markdown(rows).partition("\n")
    return f"{heading.removesuffix('.')}, run {rows[0]['run']}.\n{table}"


def _short(name: str, rows: Sequence[Row]) -> str:
    first = rows[0]
    plain = next((row for row in rows if row["variant"] == "plain" and row["p50_s"]), None)
    lines = ["| | step time | of plain | activation peak | of plain |", "|---|---|---|---|---|"]
    for row in rows:
        if not any(fnmatchcase(row["variant"], pattern) for pattern in SHORT.get(name, ("*",))):
            continue
        if not row["p50_s"]:
            lines.append(f"| {row['variant']} | {row['status'].replace('|', '/')} | | | |")
            continue
        ratio = json.loads(row["ratios"] or "{}").get("plain")
        share = plain and row["peak_bytes"] and float(row["peak_bytes"]) / float(plain["peak_bytes"])
        lines.append(
            f"| {row['variant']} | {seconds(row['p50_s'])} | {f'{ratio:.0%}' if ratio else ''} | "
            f"{mebibytes(row['peak_bytes'])} | {f'{share:.0%}' if share else ''} |"
        )
    repeats = max(int(row["repeats"]) for row in rows)
    where = f"{first['hardware']}, torch {first['torch']}, {first['date']}, revision {first['revision']}"
    return f"{first['case']}\n\n" + "\n".join(lines) + f"\n\n<sub>{where}, {repeats} repeats, run {first['run']}</sub>"


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
