"""Rows, the append-only file, tables, and a tiny benchmark from the command line to the file."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import record
from benchmarks.harness import Goal, Incorrect, Options, Report, Result, Variant, measure
from benchmarks.registry import BENCHMARKS, load, summary
from benchmarks.run import main

README = Path(__file__).parents[2] / "benchmarks" / "README.md"


def report() -> Report:
    ok = Result("plain", seconds=[0.001, 0.002, 0.003], metrics={"peak_bytes": 2**20, "share": 0.123456789})
    bad = Result("wrong", status="incorrect: x | y")
    return Report("fake", "tiny", [ok, bad], ("plain",))


def where(run: str = "r1") -> dict[str, str]:
    return record.environment(Options(quick=True)) | {"run": run}


def test_a_row_has_exactly_the_columns() -> None:
    good, bad = record.rows(report(), where())
    assert tuple(good) == tuple(bad) == record.COLUMNS
    assert (good["p20_s"], good["p50_s"], good["p80_s"], good["repeats"]) == ("0.0014", "0.002", "0.0026", "3")
    assert json.loads(good["ratios"]) == {"plain": 1.0}
    assert json.loads(good["metrics"]) == {"share": 0.12346}
    assert good["peak_bytes"] == str(2**20)
    assert (bad["status"], bad["p50_s"], bad["ratios"]) == ("incorrect: x | y", "", "")


def test_every_column_is_documented() -> None:
    text = README.read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    documented = {name.strip(" `") for cell in rows for name in cell.split(",")}
    assert set(record.COLUMNS) <= documented


def test_append_never_changes_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    record.append(record.rows(report(), where("r1")), path)
    before = path.read_bytes()
    record.append(record.rows(report(), where("r2")), path)
    assert path.read_bytes().startswith(before)
    rows = record.read(path)
    assert [row["run"] for row in rows] == ["r1", "r1", "r2", "r2"]
    assert {row["run"] for row in record.latest("fake", path)} == {"r2"}
    assert record.latest("other", path) == []


def test_append_refuses_other_columns(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    path.write_text("a,b\n1,2\n", encoding="utf-8")
    with pytest.raises(ValueError, match="other columns"):
        record.append(record.rows(report(), where()), path)
    assert path.read_text(encoding="utf-8") == "a,b\n1,2\n"


def test_the_recorded_file_has_todays_columns() -> None:
    if record.RESULTS.exists():
        header = record.RESULTS.read_text(encoding="utf-8").partition("\n")[0]
        assert tuple(header.split(",")) == record.COLUMNS


def test_markdown_shows_failures_and_says_quick() -> None:
    text = record.markdown(record.rows(report(), where()))
    assert "quick run" in text
    assert "| plain | 2 ms | 1.4 ms-2.6 ms | 1.000 | 1.0 MiB | 0.123 |" in text
    assert "| wrong | incorrect: x / y |" in text


@pytest.mark.parametrize(("value", "text"), [(2.5, "2.5 s"), ("0.0125", "12.5 ms"), (3e-6, "3 us")])
def test_seconds_for_a_reader(value: float | str, text: str) -> None:
    assert record.seconds(value) == text


def test_revision_is_read_from_git_or_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("YGGLIGHT_REVISION", raising=False)
    assert record.revision(tmp_path) == "none"

    def git(*words: str) -> None:
        who = ("-c", "user.name=t", "-c", "user.email=t@example.org")
        subprocess.run(["git", "-C", str(tmp_path), *who, *words], check=True, capture_output=True)

    git("init", "-q")
    (tmp_path / "file").write_text("1")
    git("add", ".")
    git("commit", "-q", "-m", "first", "--no-verify")
    clean = record.revision(tmp_path)
    assert len(clean) == 12
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "results.csv").write_text("x")
    assert record.revision(tmp_path) == clean
    (tmp_path / "file").write_text("2")
    assert record.revision(tmp_path) == clean + "+dirty"
    monkeypatch.setenv("YGGLIGHT_REVISION", "told")
    assert record.revision(tmp_path) == "told"


def test_hardware_names_the_threads() -> None:
    assert record.hardware("cpu").endswith("threads")


# -- registry --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", sorted(BENCHMARKS))
def test_every_row_of_the_registry_loads(name: str) -> None:
    assert callable(load(name))
    assert len(summary(name)) > 20


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(KeyError, match="act_codec"):
        load("nothing")


# -- end to end ------------------------------------------------------------------------------------------------------
def install(monkeypatch: pytest.MonkeyPatch, run: Callable[[Options], list[Report]]) -> None:
    module = types.ModuleType("fake_benchmark")
    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fake_benchmark", module)
    monkeypatch.setitem(BENCHMARKS, "fake", "fake_benchmark:run")


def fake(options: Options) -> list[Report]:
    def wrong() -> dict[str, object]:
        raise Incorrect("2 + 2 = 5")

    variants = [
        Variant("plain", lambda: sum(range(100)), lambda: {"peak_bytes": 8}),
        Variant("double", lambda: sum(range(200)), lambda: {"value": 1.5}),
        Variant("wrong", lambda: None, wrong),
    ]
    results = measure(variants, options, lambda line: None)
    return [Report("fake", "sums", results, ("plain",), ("value",), [Goal("is fast", True)], ("a note",))]


def test_run_and_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    install(monkeypatch, fake)
    path = tmp_path / "results.csv"
    arguments = ["run", "fake", "--quick", "--results", str(path)]
    assert main([*arguments, "--no-record"]) == 1  # a variant is incorrect
    assert not path.exists()
    assert main([*arguments, "--only", "plain,double", "--repeats", "4"]) == 0
    printed = capsys.readouterr().out
    assert "met     is fast" in printed
    assert "note: a note" in printed
    rows = record.read(path)
    assert [(row["variant"], row["status"], row["repeats"]) for row in rows] == [
        ("plain", "ok", "4"),
        ("double", "ok", "4"),
    ]
    assert main(["table", "fake", "--results", str(path)]) == 0
    assert "| double |" in capsys.readouterr().out


def test_list_and_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in BENCHMARKS)
    assert main(["run", "act_codec", "--repeats", "0"]) == 2
    assert main(["run", "adacc", "--size", "huge", "--no-record"]) == 2
    assert "no size 'huge'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["run", "nothing"])
