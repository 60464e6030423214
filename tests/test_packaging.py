"""What is shipped, and that the tables which must agree do."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import ygglight
from ygglight.compat.extras import EXTRAS, missing_extras, offered, pip_line, require
from ygglight_launcher.recipes import list_recipes, recipes_dir

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def name_of(requirement: str) -> str:
    return Requirement(requirement).name.lower().replace("_", "-")


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line.partition("==") for line in lines if line and not line.startswith("#")]
    return {name.lower().replace("_", "-"): pin for name, _, pin in pins}


def test_version_has_one_source() -> None:
    assert version("ygglight") == ygglight.__version__, "reinstall (`make setup`): the metadata is of another version"
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == ygglight.__version__


def test_extras_of_code_and_pyproject_agree() -> None:
    optional = PROJECT["optional-dependencies"]
    modules = {extra: tuple(name_of(text).replace("-", "_") for text in optional[extra]) for extra in EXTRAS}
    assert modules == EXTRAS
    assert set(optional) - set(EXTRAS) == {"all", "dev", "docs"}
    assert set(Requirement(optional["all"][0]).extras) == set(EXTRAS)


def test_where_an_extra_has_no_build_pyproject_says_so() -> None:
    systems = {"linux": "Linux", "darwin": "Darwin", "win32": "Windows"}
    for extra in EXTRAS:
        marker = Requirement(PROJECT["optional-dependencies"][extra][0]).marker
        for platform, system in systems.items():
            by_marker = marker is None or marker.evaluate({"platform_system": system})
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "platform", platform)
                assert offered(extra) == by_marker, (extra, platform)


def test_constraints_meet_the_ranges_and_never_pin_triton() -> None:
    pins = constraints()
    assert pins["torch"] == "2.13.0"
    assert "triton" not in pins
    optional = [requirement for extra in PROJECT["optional-dependencies"].values() for requirement in extra]
    for text in [*PROJECT["dependencies"], *optional]:
        requirement = Requirement(text)
        pin = pins.get(name_of(text))
        assert pin is None or requirement.specifier.contains(pin), text


def test_every_dependency_of_the_tests_is_pinned() -> None:
    needed = {name_of(text) for text in PROJECT["dependencies"]} | {"peft", "gguf", "accelerate", "pytest"}
    assert needed <= set(constraints())


def test_no_file_names_this_machine_or_an_index() -> None:
    for name in ("pyproject.toml", "constraints.txt", "Makefile", ".ci/run", ".pre-commit-config.yaml"):
        text = (ROOT / name).read_text()
        assert not re.search(r"file://|--(extra-)?index-url|--find-links|/(home|root|work|opt)/", text), name


def test_make_has_its_targets_and_ci_calls_it() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in ("demo", "test", "lint", "bench", "docs", "setup", "clean", "format", "test-slow", "test-gpu"):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_the_wheel_holds_package_launcher_and_recipes(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    assert {"ygglight/py.typed", "ygglight/__init__.py", "ygglight_launcher/__init__.py"} <= names
    assert {f"ygglight/recipes/{recipe.name}" for recipe in list_recipes()} <= names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "recipes/"))]
    code = "from ygglight_launcher.recipes import recipes_dir; print(recipes_dir())"
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    found = subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True, text=True)
    assert found.stdout.strip() == str(tmp_path / "site" / "ygglight" / "recipes")


def test_an_editable_install_finds_the_recipes_of_the_repository() -> None:
    if not Path(ygglight.__file__).is_relative_to(ROOT):
        pytest.skip("installed from a wheel")
    assert recipes_dir() == ROOT / "recipes"


def test_a_missing_extra_is_one_line_with_its_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModuleNotFoundError, match=r"this needs peft: pip install 'ygglight\[lora\]'"):
        require("peft", "lora")
    assert require("json", "lora").__name__ == "json"
    assert pip_line("lora", "gguf") == "pip install 'ygglight[lora,gguf]'"


def test_an_extra_without_a_build_is_not_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "triton" not in missing_extras()
    with pytest.raises(ModuleNotFoundError, match="has no build for darwin"):
        require("triton", "triton")


def test_a_broken_dependency_is_not_called_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_dependency.py").write_text("import a_module_that_nobody_has\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="a_module_that_nobody_has"):
        require("broken_dependency", "lora")
