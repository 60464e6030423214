"""Forwards that change between steps: results stay those of plain torch, surprises are counted, and end."""

from __future__ import annotations

import random
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ygglight.engines.adacc.graph import Policy
from ygglight.engines.adacc.runtime import MAX_SURPRISES

from .harness import COMPRESS, KEEP, RECOMPUTE, Session, error, nothing_left, prepared, random_policies, same
from .models import lora, tokens

WIDTH = 16


class Block(nn.Module):
    branch: Any = 0
    scale = 1.0

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.gelu(self.a(x)))


class Model(nn.Module):
    skip: tuple[int, ...] = ()
    order = (0, 1, 2, 3)

    def __init__(self, block: type[Block] = Block, width: int = WIDTH) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(8, width), nn.Linear(width, 1)
        self.blocks = nn.ModuleList(block(width) for _ in range(4))

    def set(self, name: str, value: Any) -> None:
        for block in self.blocks:
            setattr(block, name, value)

    def loss(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        for index in self.order:
            if index not in self.skip:
                h = self.blocks[index](h)
        return self.head(F.gelu(h)).square().mean()


def any_policies(session: Session, seed: int) -> Any:
    return "recompute" if seed == 0 else random_policies(session.built, random.Random(seed))


def test_dropped_and_reordered_layers_stay_exact() -> None:
    session = prepared(Model(), torch.randn(4, 8))
    module, rng = session.module, random.Random(0)
    with nothing_left():
        for seed in range(8):
            module.skip = tuple(rng.sample(range(4), rng.choice((0, 1, 2, 4))))
            module.order = tuple(rng.sample(range(4), 4))
            truth = session.plain()
            session.use(any_policies(session, seed))
            assert same(session.managed(), truth)
    session.close()


class Scaled(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.gelu(self.a(x) * self.scale).clamp(max=self.scale))


def test_a_python_number_that_changes_every_step_is_no_surprise() -> None:
    session = prepared(Model(Scaled), torch.randn(4, 8))
    outcomes = []
    for step in range(5):
        session.module.set("scale", 1 + 0.3 * step)
        truth = session.plain()
        session.use(any_policies(session, step))
        outcomes.append(session.managed())
        assert same(outcomes[-1], truth) and not session.diverged()
    assert len({outcome[0] for outcome in outcomes}) == 5, "the number had no effect"
    session.close()


class Branches(Block):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if self.branch == 0:
            return self.b(F.gelu(h))
        if self.branch == 1:
            return self.b(F.silu(h) * h.sigmoid())
        if self.branch == 2:
            return self.b(h.softmax(-1) * 8)
        if self.branch == 3:
            return self.b(h.gather(-1, h.detach().argsort(-1)))
        return h


@pytest.mark.parametrize("branch", [1, 2, 3, 4])
def test_another_branch_is_exact_and_noticed(branch: int) -> None:
    session = prepared(Model(Branches), torch.randn(4, 8))
    with nothing_left():
        for seed in range(5):
            session.module.set("branch", branch)
            truth = session.plain()
            policies = any_policies(session, seed)
            session.use(policies)
            assert same(session.managed(), truth)
            traced = [n for n, p in zip(session.built.step.names, session.runtime.plan.policies, strict=True)
                      if n.startswith("blocks") and RECOMPUTE in p.actions.values()]  # fmt: skip
            assert set(traced) <= set(session.diverged())
    session.close()


@pytest.mark.parametrize("branch", [1, 2, 3, 4])
def test_another_branch_under_a_plan_that_only_compresses_is_never_far_off(branch: int) -> None:
    """Nothing traces such a plan; what does not fit its codec is kept."""
    session = Session(Model(Branches, 128), torch.randn(64, 8), compress=True)
    session.profile()
    session.use(random_policies(session.built, random.Random(0), (COMPRESS,)))
    assert 0 < error(session.managed(), session.plain()) < 0.05
    session.module.set("branch", branch)
    truth = session.plain()
    with nothing_left():
        assert error(session.managed(), truth) < 0.05
    if branch != 2:  # softmax saves as many tensors of the same kinds as gelu: nobody can tell
        assert len(session.diverged()) == 4
    session.close()


class Dropped(Block):
    """With branch 1 dropout is off, so one saved tensor fewer stands in the row."""

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.dropout(F.gelu(self.a(x)), 0.3, self.branch == 0))


def test_dropout_that_is_switched_off_does_not_turn_activations_into_masks() -> None:
    session = Session(Model(Dropped, 128), torch.randn(64, 8), compress=True)
    session.profile()
    kinds = []
    for graph in session.built.step.types:
        masks = [v.id for v in graph.actionable if [c.name for c in v.codecs] == ["mask"]]
        kinds.append(Policy({v.id: COMPRESS if v.id in masks else KEEP for v in graph.actionable},
                            dict.fromkeys(masks, "mask")))  # fmt: skip
    policies = [kinds[i] for i in session.built.step.sequence]
    assert any(policy.codecs for policy in policies)
    session.use(policies)
    assert same(session.managed(), session.plain()), "one bit is enough for dropout noise"
    session.module.set("branch", 1)
    truth = session.plain()
    assert same(session.managed(), truth)
    assert session.diverged()
    session.close()


class LateNoise(Block):
    """What is rebuilt hangs on a random tensor that is saved only later, and with branch 1 never."""

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.randn_like(x)
        y = F.gelu(noise + x)
        return self.b(noise * y if self.branch == 0 else y * 2.0)


def test_random_tensors_that_the_plan_counted_on_are_there_although_the_branch_never_saves_them() -> None:
    session = prepared(Model(LateNoise), torch.randn(4, 8))
    session.use("recompute")
    assert session.runtime.plan.actions["blocks.0/aten.add:0"] == "recompute"
    session.module.set("branch", 1)
    truth = session.plain()
    with nothing_left():
        assert same(session.managed(), truth)
    assert session.diverged()
    session.close()


def test_lora_adapters_switched_off_and_on() -> None:
    session = prepared(lora(), tokens())
    for seed in range(3):
        truth = session.plain()
        session.use(any_policies(session, seed))
        assert same(session.managed(), truth) and not session.diverged()
        with session.module.model.disable_adapter():
            session.use(any_policies(session, seed))
            with torch.enable_grad(), session.runtime.forward(session.batch):
                off = session.module.loss(session.batch)
            assert not off.requires_grad, "with the adapters off nothing is trainable"
        assert off.item() != truth[0]
    session.close()


def test_evaluation_mode_and_back() -> None:
    session = prepared(lora(), tokens())
    for mode in (False, True):
        session.module.train(mode)
        truth = session.plain()
        session.use("recompute")
        assert same(session.managed(), truth)
        assert bool(session.diverged()) == (not mode)
    session.close()


# -- the runtime's reaction --------------------------------------------------------------------------------------------
def step(session: Session) -> Any:
    outcome = session.managed()
    session.runtime.after_backward()
    session.runtime.after_optimizer_step()
    return outcome


def test_surprises_are_counted_looked_at_again_and_given_up_with_a_warning() -> None:
    session = Session(Model(Branches, 32), torch.randn(256, 8), budget=0.7)
    runtime, module = session.runtime, session.module
    step(session)
    assert runtime.plan is not None and not runtime.plan.all_keep and runtime.surprises == 0
    given_up: list[int] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in range(4 * MAX_SURPRISES + 4):
            module.set("branch", number % 5 if number % 2 else 4)
            truth = session.plain()
            assert same(step(session), truth), number
            if runtime.plan is None:
                given_up.append(number)
    messages = [str(w.message) for w in caught if "keeps changing" in str(w.message)]
    assert len(messages) == 1, "once, not every step"
    assert runtime.surprises > MAX_SURPRISES
    assert given_up and given_up == list(range(given_up[0], 4 * MAX_SURPRISES + 4)), "for good"
    assert runtime.replans >= 1, "it was looked at again before"
    session.close()


def test_a_forward_that_never_changes_is_never_a_surprise() -> None:
    session = Session(Model(Branches, 32), torch.randn(256, 8), budget=0.7, monitor_every=3)
    for _ in range(8):
        step(session)
    assert session.runtime.surprises == 0 and session.runtime.replans == 0
    assert session.runtime.plan is not None and not session.runtime.plan.all_keep
    session.close()


def test_one_change_for_good_leads_to_one_new_plan() -> None:
    session = Session(Model(Branches, 32), torch.randn(256, 8), budget=0.7, monitor_every=0)
    for _ in range(2):
        step(session)
    session.module.set("branch", 1)
    for _ in range(5):
        step(session)
    runtime = session.runtime
    assert runtime.surprises == 1 and runtime.replans == 1
    assert "the forward left its plan" in runtime.history[-1][1]
    assert any("silu" in name for name in runtime.plan.actions)
    assert not session.diverged()
    session.close()
