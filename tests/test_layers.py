"""The direction of the layers, read from the imports of every file.

    kernels <- engines <- modules, data, serving <- strategies, callbacks <- cli, recipes, demos

An import inside a function or under TYPE_CHECKING counts too: it is a dependency all the same.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src"

# Layer -> (layers of the house it may import, libraries it may import besides the standard one; None: any).
# `extras` finds optional packages and `compat` (compat/torch.py, compat/transformers.py) lies below the kernels;
# `compat.lightning` lies beside the strategies; `registry` is the tables, and imports Lightning's registry only.
LOW = {"extras", "compat"}
RULES: dict[str, tuple[set[str], set[str] | None]] = {
    "launcher": (set(), set()),
    "extras": (set(), set()),
    "compat": ({"extras", "compat"}, {"torch", "transformers", "tokenizers", "peft", "numpy", "safetensors", "triton"}),
    "compat.lightning": (set(), {"lightning"}),
    "registry": (set(), {"lightning"}),
    "kernels": ({"kernels", *LOW}, {"torch", "triton"}),
    "engines": (
        {"kernels", "engines", *LOW},
        {"torch", "transformers", "peft", "pulp", "safetensors", "fsspec", "numpy"},
    ),
    "data": ({"kernels", "engines", "data", *LOW}, None),
    "modules": ({"kernels", "engines", "data", "modules", *LOW}, None),
    "serving": ({"kernels", "engines", "serving", *LOW}, None),
    "strategies": ({"kernels", "engines", "data", "serving", "strategies", "compat.lightning", "registry", *LOW}, None),
    "callbacks": ({"kernels", "engines", "callbacks", "compat.lightning", "registry", *LOW}, None),
}
# One file each, with a reason: the picture of memory over a step is drawn for a callback and for the demo alike.
EXCEPTIONS = {"ygglight.engines.memory.picture": {"matplotlib"}}
TOP = {"root", "cli", "demos"}  # may import everything
NO_LIGHTNING = {"launcher", "extras", "compat", "kernels", "engines", "serving"}
SHARED_ENGINES = {"decode", "memory", "profiling"}


def layer_of(module: str) -> str:
    """The layer of a module, by its name."""
    parts = module.split(".")
    if parts[0] == "ygglight_launcher":
        return "launcher"
    if len(parts) == 1 or parts[1] == "__main__":
        return "root"
    if parts[1] == "compat":
        return {"extras": "extras", "lightning": "compat.lightning"}.get(parts[2] if len(parts) > 2 else "", "compat")
    return parts[1]


def imports(source: str, module: str, is_package: bool = False) -> Iterator[tuple[int, str]]:
    """Line and full name of everything a file imports; `from a import b` gives `a.b`, for `b` may be a module."""
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def system_of(module: str) -> str | None:
    """The system that an engine module belongs to; None for shared engines and everything else."""
    parts = module.split(".")
    if parts[:2] != ["ygglight", "engines"] or len(parts) < 3 or parts[2] in SHARED_ENGINES:
        return None
    return parts[2]


def problem(module: str, imported: str) -> str | None:
    """Why a module may not import a name, or None when it may."""
    layer, root = layer_of(module), imported.split(".")[0]
    if root == "pytorch_lightning":
        return "imports pytorch_lightning: the house is built on lightning.pytorch alone"
    if layer in NO_LIGHTNING and root == "lightning":
        return f"{layer} knows no Lightning"
    if layer in TOP:
        return None
    if layer not in RULES:
        return f"lies in {layer!r}, which is no layer of the house"
    own, libraries = RULES[layer]
    if root in ("ygglight", "ygglight_launcher"):
        target = layer_of(imported)
        # `from ygglight.compat import transformers` names compat itself, `from ygglight import kernels` the root.
        if target == layer == "launcher" or target in own:
            mine, theirs = system_of(module), system_of(imported)
            if theirs is not None and mine is None and layer == "engines" and module.count(".") > 1:
                return f"a shared engine imports the system {theirs}"
            if None not in (mine, theirs) and mine != theirs:
                return f"the system {mine} imports the system {theirs}"
            return None
        return f"{layer} may not import {target}"
    if libraries is None or root in EXCEPTIONS.get(module, ()):
        return None
    if root not in libraries and root not in sys.stdlib_module_names:
        return f"{layer} may not import the library {root}"
    return None


def files() -> list[Path]:
    return sorted(path for path in SRC.rglob("*.py"))


def module_name(path: Path) -> tuple[str, bool]:
    parts = list(path.relative_to(SRC).with_suffix("").parts)
    is_package = parts[-1] == "__init__"
    return ".".join(parts[:-1] if is_package else parts), is_package


def test_every_import_runs_down() -> None:
    found = []
    for path in files():
        module, is_package = module_name(path)
        for line, imported in imports(path.read_text(encoding="utf-8"), module, is_package):
            why = problem(module, imported)
            if why:
                found.append(f"{path.relative_to(SRC)}:{line}: {why} ({imported})")
    assert not found, "\n" + "\n".join(found)


def test_the_check_reads_something() -> None:
    assert len(files()) > 20
    names = {module_name(path)[0] for path in files()}
    assert {"ygglight", "ygglight.strategies.base", "ygglight_launcher"} <= names


# The negative control: each of these is a violation, and a check that lets one pass proves nothing.
@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ygglight.kernels.act_codec.triton", "from ygglight.engines.adacc import plan"),
        ("ygglight.kernels.act_codec", "import numpy"),
        ("ygglight.kernels.act_codec", "import transformers"),
        ("ygglight.engines.adacc.plan", "import lightning.pytorch as pl"),
        ("ygglight.engines.adacc.plan", "def f():\n    from lightning.pytorch import Trainer"),
        ("ygglight.engines.adacc.plan", "if TYPE_CHECKING:\n    from ygglight.strategies import AdaccStrategy"),
        ("ygglight.engines.adacc.plan", "from ygglight.engines.harli import scheduler"),
        ("ygglight.engines.adacc.plan", "from ..harli.scheduler import plan"),
        ("ygglight.engines.adacc.plan", "from ...strategies import base"),
        ("ygglight.engines.memory.meter", "from ygglight.engines.adacc import plan"),
        ("ygglight.engines.adacc.plan", "from ygglight.modules import CausalLM"),
        ("ygglight.engines.adacc.plan", "from ygglight import modules"),
        ("ygglight.engines.adacc.plan", "import matplotlib.pyplot"),
        ("ygglight.engines.adacc.plan", "from ygglight.compat.lightning import is_foreign_class"),
        ("ygglight.data.text", "from ygglight.modules import CausalLM"),
        ("ygglight.data.text", "import ygglight.strategies"),
        ("ygglight.modules.causal_lm", "from ygglight.callbacks import AdaccMonitor"),
        ("ygglight.modules.causal_lm", "from ygglight.compat import lightning"),
        ("ygglight.strategies.adacc", "from ygglight.callbacks import AdaccMonitor"),
        ("ygglight.strategies.adacc", "from ygglight.modules import CausalLM"),
        ("ygglight.strategies.adacc", "from pytorch_lightning.strategies import DDPStrategy"),
        ("ygglight.callbacks.adacc_monitor", "from ygglight.strategies.adacc import AdaccStrategy"),
        ("ygglight.callbacks.adacc_monitor", "from ygglight.cli import doctor"),
        ("ygglight.compat.torch", "import lightning"),
        ("ygglight.compat.transformers", "from ygglight.kernels import act_codec"),
        ("ygglight.serving.http", "import lightning.pytorch"),
        ("ygglight_launcher.recipes", "import yaml"),
        ("ygglight_launcher.recipes", "import ygglight"),
        ("ygglight.utils.misc", "import os"),
    ],
)
def test_violations_are_found(module: str, source: str) -> None:
    assert any(problem(module, imported) for _, imported in imports(source, module))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ygglight.kernels.act_codec.triton", "import torch, triton\nfrom ygglight.kernels.act_codec import reference"),
        (
            "ygglight.engines.adacc.plan",
            "import pulp\nfrom .graph import Value\nimport ygglight.kernels.act_codec",
        ),
        ("ygglight.engines.adacc.plan", "from ygglight.engines.memory import LiveBytes"),
        ("ygglight.modules.causal_lm", "from ygglight.compat import transformers as hf\nimport lightning.pytorch as L"),
        ("ygglight.strategies.adacc", "from ygglight.engines.adacc import plan\nimport lightning"),
        (
            "ygglight.callbacks.adacc_monitor",
            "import matplotlib\nfrom ygglight.compat.lightning import attached_trainer",
        ),
        ("ygglight.cli.run", "from ygglight.strategies import AdaccStrategy\nimport ygglight_launcher"),
        ("ygglight.demos.adacc", "from ygglight.strategies import AdaccStrategy"),
        ("ygglight_launcher", "from ygglight_launcher.recipes import near"),
    ],
)
def test_what_is_allowed_passes(module: str, source: str) -> None:
    assert [problem(module, imported) for _, imported in imports(source, module) if problem(module, imported)] == []
