"""All benchmarks: name -> ``module:function``.

The function takes :class:`~benchmarks.harness.Options` and returns a list of
reports. A new benchmark is one row here and one function there.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
from collections.abc import Callable

from benchmarks.harness import Options, Report

Benchmark = Callable[[Options], list[Report]]

BENCHMARKS: dict[str, str] = {
    "act_codec": "benchmarks.act_codec:run",
    "adacc": "benchmarks.adacc:run",
    "adacc_compiled": "benchmarks.adacc_compiled:run",
    "clusterfusion": "benchmarks.clusterfusion:run",
    "expert_gemm": "benchmarks.expert_gemm:run",
    "harli": "benchmarks.harli:run",
    "moe_speq": "benchmarks.moe_speq:run",
    "tree_attention": "benchmarks.tree_attention:run",
    "yggdrasil": "benchmarks.yggdrasil:run",
}


def load(name: str) -> Benchmark:
    """The function of a benchmark.

    Args:
        name: a key of ``BENCHMARKS``.

    Raises:
        KeyError: there is none of that name; the text lists those that there are.
    """
    if name not in BENCHMARKS:
        raise KeyError(f"no benchmark {name!r}; there are: {', '.join(sorted(BENCHMARKS))}")
    module, _, function = BENCHMARKS[name].partition(":")
    found: Benchmark = getattr(importlib.import_module(module), function)
    return found


def columns(name: str) -> tuple[str, ...]:
    """The metrics that a table of this benchmark shows: its module's ``COLUMNS``.

    Args:
        name: a key of ``BENCHMARKS``.
    """
    return tuple(getattr(importlib.import_module(BENCHMARKS[name].partition(":")[0]), "COLUMNS", ()))


def summary(name: str) -> str:
    """The first line of the benchmark's module docstring, read without importing it.

    Args:
        name: a key of ``BENCHMARKS``.
    """
    spec = importlib.util.find_spec(BENCHMARKS[name].partition(":")[0])
    if spec is None or spec.origin is None:
        return "(missing)"
    with open(spec.origin, encoding="utf-8") as file:
        text = ast.get_docstring(ast.parse(file.read())) or ""
    return text.partition("\n")[0]
