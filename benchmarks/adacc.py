"""Adacc against every other way to train in less activation memory, eager, one training step of CausalLM.

What the figures mean: ``peak`` is live bytes above parameters, gradients, buffers and batch at any instant of the step
(what ``memory_budget`` bounds); ``held`` the same at the end of forward; ``recovered`` is (t_full - t) / (t_full -
t_plain), the share of the time between Hugging Face's full recomputation (``full``) and ``plain`` that is won back.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks import adacc_baselines as others
from benchmarks.adacc_goals import goals, recovered
from benchmarks.harness import DoesNotFit, Incorrect, Options, Report, Variant, measure
from benchmarks.sizes import SIZES, sizes
from benchmarks.workload import Workload
from ygglight.engines.adacc.config import AdaccConfig
from ygglight.engines.adacc.graph import Action, Policy
from ygglight.engines.adacc.plan import Plan, keep_all
from ygglight.engines.adacc.planner import InfeasibleBudget
from ygglight.engines.adacc.regions import ROOT
from ygglight.engines.adacc.runtime import Runtime
from ygglight.engines.adacc.schedule import validate_policy
from ygglight.engines.adacc.simulate import simulate_region, simulate_step

BUDGETS = (0.3, 0.5, 0.7, 0.9)
COLUMNS = ("recovered", "allocator_bytes", "held_bytes", "predicted_bytes", "budget_bytes", "gradient_error", "layers")


class Adacc:
    """One Adacc configuration as a variant.

    Args:
        work: what is trained. name: of the variant. budget: share of the plain peak. compress: whether codecs are
            allowed; if not, the gradient must be bitwise that of plain training (on a CPU).
        one_per_block: afterwards, replace the plan by one that recomputes a single tensor of each block.
    """

    def __init__(
        self, work: Workload, name: str, budget: float, *, compress: bool, one_per_block: bool = False
    ) -> None:
        self.work, self.name, self.one_per_block = work, name, one_per_block
        self.config = AdaccConfig(memory_budget=budget, compress=compress, monitor_every=0)
        self.runtime = Runtime(work.module, self.config, work.device)

    @property
    def variant(self) -> Variant:
        """For the harness."""
        return Variant(self.name, self.step, self.prepare, self.around)

    def step(self) -> None:
        """A training step, with all that a strategy does around it."""
        with self.runtime.forward(self.work.batch):
            loss = self.work.loss()
        self.work.backward(loss)
        self.runtime.after_backward()
        self.runtime.after_optimizer_step()

    @contextmanager
    def around(self) -> Iterator[None]:
        """Hooks on, gradients gone."""
        self.work.clear()
        with self._attached():
            yield

    @contextmanager
    def _attached(self) -> Iterator[None]:
        self.runtime.attach()
        try:
            yield
        finally:
            self.runtime.detach()

    def prepare(self) -> dict[str, Any]:
        """Profile and plan in the first step, check the second, count bytes in two more."""
        with self._attached():  # once: it is in the next step that the runtime counts the surprises of the last
            return self._prepare()

    def _prepare(self) -> dict[str, Any]:
        runtime, work = self.runtime, self.work
        work.clear()
        try:
            self.step()
        except InfeasibleBudget as error:
            raise DoesNotFit(str(error)) from error
        plan = runtime.plan
        if plan is None:
            raise Incorrect("no plan was made")
        if self.one_per_block:
            plan = one_tensor_per_block(plan)
            runtime.forced = plan.regions
        bound = 2 * self.config.max_gradient_error if self.config.compress else 0.0
        metrics: dict[str, Any] = {
            "gradient_error": work.check(self.step, bound=bound),
            "predicted_bytes": plan.predicted_peak_bytes,
            "predicted_plain_bytes": plan.plain_peak_bytes,
            "predicted_added_s": plan.added_seconds,
            "planning_s": plan.solve_seconds,
        }
        metrics |= work.bytes_of(self.step)
        if runtime.surprises or runtime.skipped:
            raise Incorrect(f"the plan was not carried out: {runtime.surprises} surprises, skipped {runtime.skipped}")
        if plan.budget_bytes is not None and not self.one_per_block:
            metrics["budget_bytes"] = plan.budget_bytes
        return metrics | {f"{action}_bytes": size for action, size in plan.saved_bytes.items()}


def one_tensor_per_block(plan: Plan) -> Plan:
    """The plan that keeps all but one tensor of each block: that which frees most bytes per second to rebuild it."""
    step = plan.built.step
    kept, chosen = keep_all(plan.built), {}
    for kind, graph in enumerate(step.types):
        keep = Policy({v.id: Action.KEEP for v in graph.actionable})
        if all(name.startswith(ROOT) for name, k in zip(step.names, step.sequence, strict=True) if k == kind):
            continue
        best, base = 0.0, simulate_region(graph, keep)
        for value in graph.actionable:
            policy = Policy(keep.actions | {value.id: Action.RECOMPUTE})
            try:
                validate_policy(graph, policy)
            except ValueError:
                continue
            profile = simulate_region(graph, policy)
            rate = (base.stored_bytes - profile.stored_bytes) / max(profile.added_seconds, 1e-9)
            if rate > best:
                best, chosen[kind] = rate, policy
    policies = tuple(chosen.get(kind, kept[i]) for i, kind in enumerate(step.sequence))
    return Plan(
        plan.built, policies, simulate_step(step, policies), None, plan.plain_peak_bytes, plan.full_seconds, notes=()
    )


# -- the benchmark ---------------------------------------------------------------------------------------------------
def run(options: Options) -> list[Report]:
    """One report per size.

    Args:
        options: from the command line.
    """
    reports = []
    for name in sizes(options.device, options.quick, options.size):
        reports.append(_run(Workload(SIZES[name], options.device), options))
        gc.collect()
    return reports


def _run(work: Workload, options: Options) -> Report:
    print(f"adacc: {work.case}")
    work.remember_exact()
    results = measure(_variants(work, options), options)
    report = Report("adacc", work.case, results, ("plain", "full"), COLUMNS)
    for result in results:
        won = recovered(report, result)
        if won is not None:
            result.metrics["recovered"] = won
    report.goals.extend(goals(report, options.device))
    report.notes = (
        "full = Hugging Face gradient_checkpointing(use_reentrant=False); sac-fit and full-fit = checkpointing on the "
        "fewest layers that fit the budget, selectively or fully, found by measuring.",
        *(["save_on_cpu moves nothing on a CPU: its peak says nothing, its time is that of copies."]
          if options.device == "cpu" else []),
        "the best other that fits is looked for among all that stay within the same bytes with a gradient error that "
        f"Adacc is allowed ({AdaccConfig.max_gradient_error:.0%}), so int4-everything seldom counts.",
    )  # fmt: skip
    return report


def _variants(work: Workload, options: Options) -> Iterator[Variant]:
    yield others.plain(work)
    yield from others.fixed(work)
    plain_peak = work.peak(work.step)
    for share in BUDGETS:
        yield from others.fitted(work, share, plain_peak)
    yield Adacc(work, "adacc-keep", 1.0, compress=False).variant
    yield Adacc(work, "adacc-one-per-block", 1.0, compress=False, one_per_block=True).variant
    for share in BUDGETS:
        yield Adacc(work, f"adacc-{share}-exact", share, compress=False).variant
        yield Adacc(work, f"adacc-{share}", share, compress=True).variant
