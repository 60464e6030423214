"""torch.compile with ``activation_memory_budget`` at several values: what compiled users have, beside the eager ways.

``activation_memory_budget`` bounds (as a share) what is held between forward and backward, not the peak, so both are
shown. Bytes come from torch's allocators (on a CPU through the profiler), since compiled code allocates below the
dispatcher, so memory inside operators counts too. ``peak`` is above state, gradients of an earlier micro-batch part of
it, as in the table ``adacc``. A compiled backward of the whole decoder hands over all gradients at its end: that
is harsh on it unless gradients are accumulated, so ``first_peak`` is that of a first micro-batch, gradients counted.
"""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks import adacc_baselines as others
from benchmarks.adacc import Adacc
from benchmarks.adacc_goals import recovered
from benchmarks.allocator import allocated
from benchmarks.harness import Options, Report, Skip, Variant, measure
from benchmarks.sizes import SIZES, sizes
from benchmarks.workload import Workload

BUDGETS = (1.0, 0.7, 0.5, 0.3)
BOUND = {"float32": 1e-3, "bfloat16": 5e-2}
"""Relative gradient error allowed to compiled code: it adds in another order, and keeps bfloat16 chains in float32."""
COLUMNS = ("recovered", "held_bytes", "first_peak_bytes", "gradient_error", "compile_s")


def run(options: Options) -> list[Report]:
    """One report per size.

    Args:
        options: from the command line.
    """
    reports = []
    for name in sizes(options.device, options.quick, options.size):
        work = Workload(SIZES[name], options.device)
        print(f"adacc_compiled: {work.case}")
        work.remember_exact()
        results = measure(_variants(work), options)
        report = Report("adacc_compiled", work.case, results, ("plain", "full"), COLUMNS)
        for result in results:
            won = recovered(report, result)
            if won is not None:
                result.metrics["recovered"] = won
        report.notes = (
            "compiled-B: each decoder layer under torch.compile with activation_memory_budget=B, as torchtitan does; "
            "compiled-whole-B: the decoder as one graph. Head and loss stay eager everywhere.",
            "bytes are those of the allocators; first_peak counts gradients as they are made, peak has them before.",
        )
        reports.append(report)
        torch._dynamo.reset()
        gc.collect()
    return reports


def _variants(work: Workload) -> Iterator[Variant]:
    yield _with_allocator(work, others.plain(work))
    yield _with_allocator(work, next(iter(others.fixed(work))))
    yield _with_allocator(work, Adacc(work, "adacc-0.5-exact", 0.5, compress=False).variant)
    for budget in BUDGETS:
        yield _compiled(work, f"compiled-{budget}", budget, work.layers)
    for budget in (1.0, 0.5):
        yield _compiled(work, f"compiled-whole-{budget}", budget, [work.network.get_decoder()])


def _with_allocator(work: Workload, variant: Variant) -> Variant:
    def prepare() -> dict[str, Any]:
        metrics = dict(variant.prepare())
        return metrics | bytes_of(work, variant.step, variant.around)

    return Variant(variant.name, variant.step, prepare, variant.around)


def _compiled(work: Workload, name: str, budget: float, modules: Sequence[nn.Module]) -> Variant:
    # A backend of its own per budget: dynamo keys its cache on it, so the variants do not take each other's code.
    compiled = torch.compile(type(modules[0]).forward, backend=partial(_inductor, budget))

    @contextmanager
    def around() -> Iterator[None]:
        work.clear()
        for module in modules:
            module.forward = partial(compiled, module)  # type: ignore[method-assign]
        try:
            yield
        finally:
            for module in modules:
                del module.forward

    def prepare() -> dict[str, Any]:
        require_compiler(work.device.type)
        start = time.perf_counter()
        with around():
            work.step()
        compile_seconds = time.perf_counter() - start
        error = work.check(work.step, around, BOUND[work.size.dtype])
        return {"gradient_error": error, "compile_s": compile_seconds} | bytes_of(work, work.step, around)

    return Variant(name, work.step, prepare, around)


def _inductor(budget: float, graph: Any, inputs: Any) -> Any:
    from torch._functorch import config
    from torch._inductor.compile_fx import compile_fx

    with config.patch(activation_memory_budget=budget):
        return compile_fx(graph, inputs)


def require_compiler(device: str) -> None:
    """Check that torch.compile can work here.

    Raises:
        Skip: naming what is missing.
    """
    if device == "cpu" and not any(shutil.which(name) for name in ("g++", "clang++")):
        raise Skip("torch.compile on a CPU needs a C++ compiler: g++ or clang++")
    if device == "cuda":
        try:
            import triton  # noqa: F401
        except ImportError as error:
            raise Skip("torch.compile on CUDA needs triton") from error


def bytes_of(work: Workload, step: Callable[[], Any], around: Callable[[], Any]) -> dict[str, int]:
    """Peaks of a step and what is held after its forward, in allocator bytes above what existed before it.

    Args:
        work: whose step it is. step, around: of a variant.
    """
    with around():
        work.clear()
        first, _ = allocated(step, work.device, work.between)
        peak, held = allocated(step, work.device, work.between)  # gradients are there now
    return {"peak_bytes": peak, "held_bytes": held, "first_peak_bytes": first}
