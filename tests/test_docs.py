"""The docs hold: their code runs, their commands parse, their tables are complete, their figures were measured."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as L
import pytest
import torch
import yaml
from torch import nn
from torch.utils.data import DataLoader

import ygglight
from ygglight_launcher import VERBS, main, recipes

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
# What the pages of the site include, and what GitHub shows.
TEXTS = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
SHARED_ENGINES = {"decode", "memory", "profiling"}


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


class Block(NamedTuple):
    """A fenced block: language, `title="..."`, text, line of its first line, and the reason of a `no-run` mark."""

    language: str
    title: str
    text: str
    line: int
    no_run: str


FENCE = re.compile(
    r"^(?:<!-- no-run: (?P<why>.*?) -->\n+)?```(?P<lang>\w*)(?P<info>[^\n]*)\n(?P<text>.*?)^```$", re.M | re.S
)


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        title = re.search(r'title="([^"]*)"', match["info"])
        line = text.count("\n", 0, match.start("text")) + 1
        found.append(Block(match["lang"], title[1] if title else "", match["text"], line, match["why"] or ""))
    return found


def with_blocks(language: str) -> list[Path]:
    return [page for page in PAGES if any(block.language == language for block in blocks(page))]


# -- Python ----------------------------------------------------------------------------------------------------------
class ReadersModule(L.LightningModule):
    """Stands for `model`, the reader's own module."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64), nn.LayerNorm(64)) for _ in range(4))
        )

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.layers(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.fixture
def fresh_modules() -> Iterator[None]:
    """Forgets what a page imported from the current folder."""
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name in ("mine",):
            del sys.modules[name]


@pytest.mark.parametrize("page", with_blocks("python"), ids=name_of)
def test_python_blocks_run(page: Path, capsys: pytest.CaptureFixture[str], fresh_modules: None) -> None:
    space: dict[str, Any] = {"__name__": "docs", "model": ReadersModule(), "data": DataLoader(torch.randn(64, 64), 16)}
    printed = ""
    for block in blocks(page):
        if block.language == "python" and not block.no_run:
            if block.title:
                Path(block.title).write_text(block.text)
            capsys.readouterr()
            # Blank lines in front, so that a traceback names the page's own line.
            exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), space)
            printed = capsys.readouterr().out
        elif block.title == "prints":
            pattern = re.escape(block.text.rstrip()).replace(re.escape("..."), ".*")
            assert re.fullmatch(pattern, printed.rstrip(), re.S), f"{page}:{block.line}: printed was\n{printed}"


def test_few_blocks_are_left_out() -> None:
    left_out = [block for page in PAGES for block in blocks(page) if block.no_run]
    assert all(len(block.no_run) > 5 for block in left_out)
    assert len(left_out) <= 4


# -- commands --------------------------------------------------------------------------------------------------------
def commands(page: Path) -> list[str]:
    lines = [line for block in blocks(page) if block.language == "bash" for line in block.text.splitlines()]
    return list(dict.fromkeys(line for line in lines if line.startswith("ygglight ")))


@pytest.fixture
def parse_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands meet the real parsers; what they would start is left out."""
    from ygglight.cli.run import YggLightCLI

    monkeypatch.setattr(YggLightCLI, "instantiate_classes", lambda self: None)
    monkeypatch.setattr(YggLightCLI, "_run_subcommand", lambda self, subcommand: None)
    monkeypatch.setattr("ygglight.cli.demo.load", lambda target: lambda short, out: None)


def run_commands(page: Path, chosen: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["ygglight"])
    for block in blocks(page):
        if block.title.endswith((".py", ".yaml")):
            Path(block.title).write_text(block.text)
    for command in chosen:
        try:
            code = main(shlex.split(command, comments=True)[1:])
        except SystemExit as exit_:  # --print_config
            code = int(exit_.code or 0)
        assert code == 0, f"{command}\n{capsys.readouterr().err}"


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=name_of)
def test_commands_parse(page: Path, parse_only: None, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    run_commands(page, commands(page), monkeypatch, capsys)


def test_commands_with_a_module_that_is_shown_run(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, fresh_modules: None
) -> None:
    page = DOCS / "cli.md"
    chosen = [command for command in commands(page) if "--config mine.yaml" in command]
    assert len(chosen) == 2
    run_commands(page, chosen, monkeypatch, capsys)
    assert "predicted peak" in capsys.readouterr().out


@pytest.mark.parametrize("page", TEXTS, ids=name_of)
def test_commands_in_the_text_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    for verb in re.findall(r"`ygglight ([a-z]+)", text):
        assert verb in VERBS, f"{page.name} names `ygglight {verb}`"
    shown = [line for block in blocks(page) if block.language == "bash" for line in block.text.splitlines()]
    for target in [
        *re.findall(r"`make ([a-z-]+)", text),
        *(line.split()[1] for line in shown if line.startswith("make ")),
    ]:
        assert target in targets, f"{page.name} names `make {target}`"
    for extras in re.findall(r"\.\[([a-z,]+)\]", text):
        assert set(extras.split(",")) <= set(extras_of_pyproject()), f"{page.name} names the extras {extras}"


# -- tables ----------------------------------------------------------------------------------------------------------
def first_cells(table: str) -> list[list[str]]:
    """The cells of a markdown table, without heading and rule."""
    rows = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows[2:]]


KNOBS = re.compile(r"<!-- knobs: ([\w.]+) -->\n+((?:\|.*\n)+)")
SET_BY_THE_TRAINER = {"accelerator", "checkpoint_io", "precision_plugin"}


def knob_tables() -> list[tuple[str, str]]:
    return [found for page in PAGES for found in KNOBS.findall(page.read_text(encoding="utf-8"))]


def knobs_of(cls: type) -> dict[str, Any]:
    parameters = inspect.signature(cls).parameters.values()
    plain = [p for p in parameters if p.kind is not p.VAR_KEYWORD and p.name not in SET_BY_THE_TRAINER]
    return {p.name: p.default for p in plain}


@pytest.mark.parametrize(("target", "table"), knob_tables(), ids=lambda text: text.rpartition(".")[2][:20])
def test_tables_of_knobs_are_complete(target: str, table: str) -> None:
    module, _, name = target.rpartition(".")
    wanted = knobs_of(getattr(importlib.import_module(module), name))
    told = {
        cells[0].strip("`"): ast.literal_eval(cells[1].strip("`")) if cells[1] else inspect.Parameter.empty
        for cells in first_cells(table)
    }
    assert told == wanted


def test_every_class_for_users_has_its_table() -> None:
    told = {target.rpartition(".")[2] for target, _ in knob_tables()}
    assert told == {
        "AdaccStrategy", "AdaccMonitor", "CausalLM", "TextData",
        "HarliStrategy", "HarliMonitor",
        "ClusterFusion",
        "MoESpeQStrategy", "MoESpeQMonitor", "UpcycledMoE",
        "YggdrasilStrategy", "GenerationWriter", "DistilledDraft", "DepthPredictorModule", "DecodeLogData",
    }  # fmt: skip
    from ygglight.strategies import AdaccDDPStrategy, AdaccModelParallelStrategy, AdaccStrategy

    assert knobs_of(AdaccStrategy) == knobs_of(AdaccDDPStrategy) == knobs_of(AdaccModelParallelStrategy)


def extras_of_pyproject() -> list[str]:
    return list(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])


def test_table_of_extras_is_complete() -> None:
    table = re.search(r"^\| extra \|.*?\n\n", (DOCS / "install.md").read_text(encoding="utf-8"), re.M | re.S)
    assert table is not None
    told = [cells[0].strip("`") for cells in first_cells(table[0])]
    assert sorted(told) == sorted(extras_of_pyproject())


def test_table_of_recipes_is_complete() -> None:
    text = (DOCS / "recipes.md").read_text(encoding="utf-8")
    told = re.findall(r"^\| `([\w/.]+\.yaml)` \|", text, re.M)
    assert sorted(told) == sorted(recipe.name for recipe in recipes.list_recipes())


def test_what_is_not_there_yet_is_not_there() -> None:
    """Ten systems in both lists; those marked as here have an engine and a page, the others have neither."""
    lists = []
    for page in (ROOT / "README.md", DOCS / "systems" / "index.md"):
        rows = [
            cells for cells in first_cells(page.read_text(encoding="utf-8")) if re.search("here|there yet", cells[-1])
        ]
        lists.append({re.match(r"[*\[]*([\w-]+)", cells[0])[1]: "not there yet" not in cells[-1] for cells in rows})  # type: ignore[index]
    assert lists[0] == lists[1] and len(lists[0]) == 10
    engines = {path.name for path in (ROOT / "src/ygglight/engines").iterdir() if (path / "__init__.py").exists() or
               any(path.glob("*.py"))} - SHARED_ENGINES  # fmt: skip
    here = {name.lower().replace("-", "_") for name, there in lists[0].items() if there}
    assert engines == here
    assert {page.stem for page in (DOCS / "systems").glob("*.md")} - {"index"} == here


def test_environment_variables_exist() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    for page in TEXTS:
        for name in re.findall(r"\bYGGLIGHT_[A-Z_]+", page.read_text(encoding="utf-8")):
            assert f'"{name}"' in source, f"{page.name} names {name}"


def test_changelog_opens_with_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## \[([^\]]+)\]", text, re.M)[0] == ygglight.__version__


# -- links and paths -------------------------------------------------------------------------------------------------
def without_blocks(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", text))


def anchors(page: Path) -> set[str]:
    """As Python-Markdown and GitHub make them of headings."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for included in re.findall(r'^--8<-- "([^"]+)"$', text, re.M):
        text += (ROOT / included).read_text(encoding="utf-8")
    plain = [re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in re.findall(r"^#+ (.+)$", text, re.M)]
    return {re.sub(r"[\s-]+", "-", heading) for heading in plain}


@pytest.mark.parametrize("page", TEXTS, ids=name_of)
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_blocks(page.read_text(encoding="utf-8"))):
        if target.startswith(("https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_file(), f"{page.name}: {target}"
        assert not page.is_relative_to(DOCS) or file.is_relative_to(DOCS), (
            f"{page.name}: {target} is outside of the site"
        )
        assert not anchor or anchor in anchors(file), f"{page.name}: {target}"


@pytest.mark.parametrize("page", TEXTS, ids=name_of)
def test_paths_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for path in re.findall(r"`((?:src|tests|docs|recipes|benchmarks|\.ci)/[^`\s<>*]*)`", text):
        # benchmarks/results.csv is made by the first run.
        assert (ROOT / path).exists() or path == "benchmarks/results.csv", f"{page.name} names {path}"


def nav_entries(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [entry for item in (nav.values() if isinstance(nav, dict) else nav) for entry in nav_entries(item)]


def test_navigation_is_complete() -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert sorted(nav_entries(config["nav"])) == sorted(
        page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")
    )


# -- figures ---------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def filler() -> Iterator[Any]:
    path = list(sys.path)
    spec = importlib.util.spec_from_file_location("fill_results", DOCS / "fill_results.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = path


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_figure_is_that_of_a_recorded_row(page: Path, filler: Any) -> None:
    """Against the runs that the page names, so that `make bench` on another machine breaks nothing."""
    text = page.read_text(encoding="utf-8")
    again = filler.fill(text, filler.read(filler.RESULTS), pinned=True)
    assert again == text, f"run `python docs/fill_results.py`: {page.name} shows other figures than results.csv"


def row(run: int, variant: str, seconds: float, peak: int, **more: str) -> dict[str, str]:
    from benchmarks.record import COLUMNS

    values = {
        "date": "2026-01-01", "run": f"20260101T00000{run}Z-1", "benchmark": "adacc", "case": "a model", "quick": "0",
        "variant": variant, "status": "ok", "device": "cpu", "hardware": "a box", "torch": "2.13.0", "revision": "abc",
        "repeats": "20", "p20_s": str(seconds), "p50_s": str(seconds), "p80_s": str(seconds),
        "ratios": f'{{"plain": {seconds}}}', "peak_bytes": str(peak), "metrics": "{}",
    }  # fmt: skip
    return dict.fromkeys(COLUMNS, "") | values | more


PAGE = """text
<!-- results:adacc -->
not measured yet
<!-- /results -->
more
<!-- results:other full -->
old
<!-- /results -->
"""


def test_figures_are_filled_in_and_wrong_ones_found(filler: Any) -> None:
    rows = [row(1, "plain", 1.0, 200 << 20), row(1, "adacc-0.5", 1.25, 100 << 20)]
    page = filler.fill(PAGE, rows)
    assert "| **Adacc**, budget 0.5 | 1.25 s | 125% | 100.0 MiB | 50% |" in page
    assert page.startswith("text\n") and page.count("not measured yet") == 1, "the other benchmark has no row"
    assert filler.fill(page, rows, pinned=True) == page == filler.fill(page, rows)
    tampered = page.replace("1.25 s", "1.05 s")
    assert filler.fill(tampered, rows, pinned=True) == page != tampered
    invented = PAGE.replace("not measured yet", "ten times as fast")
    assert filler.fill(invented, rows, pinned=True) != invented


def test_newer_rows_leave_a_filled_page_valid(filler: Any) -> None:
    rows = [row(1, "plain", 1.0, 200 << 20), row(1, "full", 1.3, 50 << 20)]
    page = filler.fill(PAGE, rows)
    rows += [row(2, "plain", 3.0, 100 << 20), row(3, "plain", 9.0, 100 << 20, quick="1")]
    assert filler.fill(page, rows, pinned=True) == page
    newer = filler.fill(page, rows)
    assert "| plain training | 3 s |" in newer and "9 s" not in newer
    assert "| full recompute" in page and "| full recompute" not in newer


def test_the_summary_has_a_line_for_each_system_that_was_measured(filler: Any) -> None:
    page = "<!-- results:summary -->\nnot measured yet\n<!-- /results -->"
    case, speeds = "qwen2.5", ("plain", "assisted", "best-chain", "yggdrasil")
    rows = [
        row(1, name, 1.0, 0, benchmark="yggdrasil", case=case, metrics=f'{{"tokens_per_s": {2.0 + i}}}')
        for i, name in enumerate(speeds)
    ]
    assert filler.fill(page, rows[:-1]) == page, "without its own row it has no line"
    full = filler.fill(page, rows)
    assert "| **Yggdrasil** | tokens/s, Qwen2.5-Coder 1.5B | 5.0 | plain 2.0, assisted generation 3.0," in full
    assert "Adacc" not in full and filler.fill(full, rows, pinned=True) == full
    newer = [dict(each, run="20260101T000002Z-1", metrics='{"tokens_per_s": 9.0}') for each in rows]
    assert filler.fill(full, rows + newer, pinned=True) == full != filler.fill(full, rows + newer)
    assert filler.fill(full.replace("5.0", "7.0"), rows, pinned=True) == full


def test_a_variant_that_failed_is_shown(filler: Any) -> None:
    failed = row(1, "adacc-0.5", 0, 0, p50_s="", status="does not fit: floor|high", peak_bytes="", ratios="")
    page = filler.fill(PAGE, [row(1, "plain", 1.0, 200 << 20), failed])
    assert "| **Adacc**, budget 0.5 | does not fit: floor/high | | | |" in page
    full = filler.render("adacc", [row(1, "plain", 1.0, 1 << 20), failed], full=True)
    assert "run 20260101T000001Z-1" in full and "does not fit: floor/high" in full
