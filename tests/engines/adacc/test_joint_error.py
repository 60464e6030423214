"""Errors measured one codec at a time, and what a plan's codecs do together: the limit holds for the latter."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ygglight.engines.adacc import build
from ygglight.engines.adacc.build import BuiltStep
from ygglight.engines.adacc.config import AdaccConfig
from ygglight.engines.adacc.graph import Action, Policy, StepGraph
from ygglight.engines.adacc.plan import Plan
from ygglight.engines.adacc.planner import plan as solve
from ygglight.engines.adacc.planning import AIM, ATTEMPTS, Planning
from ygglight.engines.adacc.runtime import Runtime
from ygglight.engines.adacc.study import RESERVE, Study

CPU = torch.device("cpu")
LIMIT = 0.03


# -- the loop, on numbers ----------------------------------------------------------------------------------------------
@pytest.fixture
def built(graphs: SimpleNamespace) -> BuiltStep:
    step = StepGraph((graphs.llama_block(lossy=True),), (0,) * 4, tuple(f"layers.{i}" for i in range(4)))
    return BuiltStep(step, ())


def made(built: BuiltStep, joint: Callable[..., float] | None, share: float = 0.3, limit: float = LIMIT) -> Plan:
    return Planning(nn.Identity(), AdaccConfig(share, max_gradient_error=limit), CPU, None).make(built, 1, "", joint)


def added(built: BuiltStep, policies: Sequence[Policy], within: str = "") -> float:
    """Summed squared errors of the codecs, in the instances whose names begin with ``within``."""
    return sum(
        codec.error
        for position, policy in enumerate(policies)
        for value, name in policy.codecs.items()
        for codec in built.step.instance(position).values[value].codecs
        if codec.name == name and built.step.names[position].startswith(within)
    )


def test_errors_that_add_up_change_nothing(built: BuiltStep) -> None:
    calls = []

    def joint(built: BuiltStep, policies: Sequence[Policy]) -> float:
        calls.append(policies)
        return added(built, policies)

    plan = made(built, joint)
    assert plan.budget_bytes is not None
    assert plan.policies == solve(built.step, plan.budget_bytes, error_budget=AIM * LIMIT**2).policies
    assert len(calls) == 1 and plan.profile.error > 0
    assert plan.error_factor == pytest.approx(1.0)
    assert plan.gradient_error == pytest.approx(plan.profile.error**0.5)


def test_errors_that_conspire_tighten_the_plan(built: BuiltStep) -> None:
    loose = made(built, None, limit=0.01)
    assert loose.profile.error > 0
    plan = made(built, lambda built, policies: 9 * added(built, policies), limit=0.01)
    assert plan.policies != loose.policies
    assert 9 * loose.profile.error > 0.01**2 >= 9 * plan.profile.error > 0
    assert plan.error_factor == pytest.approx(9.0) and plan.gradient_error <= 0.01
    assert plan.budget_bytes is not None and plan.predicted_peak_bytes <= plan.budget_bytes
    assert plan.to_dict()["error_factor"] == plan.error_factor


@pytest.mark.parametrize("error", [1.0, math.inf, math.nan])
def test_where_no_lossy_plan_keeps_the_limit_an_exact_one_is_made(built: BuiltStep, error: float) -> None:
    calls = []
    plan = made(built, lambda *_: calls.append(1) or error)
    assert plan.gradient_error == 0.0 and 1 <= len(calls) <= ATTEMPTS
    assert Action.COMPRESS not in {a for policy in plan.policies for a in policy.actions.values()}


# -- the measurement ---------------------------------------------------------------------------------------------------
class Block(nn.Module):
    """With outlier channels behind its norms."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        with torch.no_grad():
            for norm in (self.ln1, self.ln2):
                norm.weight[[5, 130, 200]] *= 25.0

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln1(x)
        q, k, v = (f(y).unflatten(-1, (8, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.ln2(x))))


class Model(nn.Module):
    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))

    def loss(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


BATCH = torch.randn(1, 192, 256, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def compression_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codecs cost nothing, running an operator again a second: plans differ by errors and bytes, not by a clock."""
    monkeypatch.setattr(build, "codec_seconds", lambda *_: 0.0)
    monkeypatch.setattr(build, "REPLAY_OVERHEAD", 1.0)


def gradients(model: Model, runtime: Runtime | None = None) -> Tensor:
    model.zero_grad()
    if runtime is None:
        model.loss(BATCH).backward()
    else:
        with runtime.forward(BATCH):
            loss = model.loss(BATCH)
        loss.backward()
        runtime.after_backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def planned(budget: float = 0.4, limit: float = LIMIT, blocks: int = 3) -> tuple[Runtime, float]:
    """A runtime with its plan, and the largest gradient error of three steps under it."""
    model = Model(blocks)
    exact = gradients(model)
    runtime = Runtime(model, AdaccConfig(budget, max_gradient_error=limit), CPU)
    runtime.attach()
    gradients(model, runtime)
    errors = [float((gradients(model, runtime) - exact).norm() / exact.norm()) for _ in range(3)]
    return runtime, max(errors)


def every_codec(built: BuiltStep) -> list[Policy]:
    """All that can be compressed, by its first codec."""
    kinds = []
    for graph in built.step.types:
        able = {v.id: v.codecs[0].name for v in graph.actionable if v.codecs}
        actions = {v.id: Action.COMPRESS if v.id in able else Action.KEEP for v in graph.actionable}
        kinds.append(Policy(actions, able))
    return [kinds[i] for i in built.step.sequence]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[BuiltStep, Any]]:
    """(step, joint measurement) of every plan that is made, while it is made."""
    seen: list[tuple[BuiltStep, Any]] = []
    make = Planning.make

    def spy(self: Planning, built: BuiltStep, version: int, reason: str, joint: Any = None) -> Plan:
        seen.append((built, joint))
        return make(self, built, version, reason, joint)

    monkeypatch.setattr(Planning, "make", spy)
    return seen


@pytest.mark.usefixtures("compression_pays")
def test_a_plan_whose_errors_only_add_up_on_paper_is_tightened(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(Study, "joint", lambda self, built, policies: added(built, policies))
        loose, real = planned()
    assert loose.plan is not None
    assert loose.plan.gradient_error <= LIMIT < real, "the codecs do not conspire here, so nothing was tested"
    tight, real = planned()
    assert tight.plan is not None
    assert real <= LIMIT and 0 <= tight.plan.gradient_error <= LIMIT
    assert tight.plan.actions != loose.plan.actions
    assert tight.surprises == 0


@pytest.mark.usefixtures("compression_pays")
def test_the_joint_error_foretells_the_real_one_and_is_the_same_again(measured: list[tuple[BuiltStep, Any]]) -> None:
    found = []
    for _ in range(2):
        planned(budget=0.6)
        built, joint = measured[-1]
        found.append(joint(built, every_codec(built)))
    assert found[0] == found[1] > 0
    runtime, real = planned(budget=0.6)
    assert runtime.plan is not None
    assert 0.8 * real <= runtime.plan.gradient_error <= LIMIT


@pytest.mark.usefixtures("compression_pays")
def test_what_cannot_be_measured_keeps_a_reserve(
    measured: list[tuple[BuiltStep, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    planned(budget=0.6)
    built, joint = measured[-1]
    policies = every_codec(built)
    measure = Study._gradients
    monkeypatch.setattr(Study, "_gradients", lambda *a: (measure(*a)[0], True))  # every block leaves the plan
    blocks, total = added(built, policies, "blocks."), added(built, policies)
    assert joint(built, policies) == pytest.approx(total + (RESERVE**2 - 1) * blocks)


class Twice(Model):
    """Every block is called two times."""

    def loss(self, x: Tensor) -> Tensor:
        for block in (*self.blocks, *self.blocks):
            x = block(x)
        return x.square().mean()


@pytest.mark.usefixtures("compression_pays")
def test_blocks_that_are_called_again_count_each_time(measured: list[tuple[BuiltStep, Any]]) -> None:
    model = Twice(2)
    runtime = Runtime(model, AdaccConfig(0.8), CPU)
    runtime.attach()
    gradients(model, runtime)
    built, joint = measured[-1]
    policies = every_codec(built)
    plain = [Policy(dict.fromkeys(policy.actions, Action.KEEP)) for policy in policies]
    assert joint(built, plain) == 0.0
    for position, name in enumerate(built.step.names):
        if name.startswith("blocks."):
            alone = [*plain[:position], policies[position], *plain[position + 1 :]]
            assert joint(built, alone) > 0, name
