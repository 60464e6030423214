"""Plans without compression change nothing: loss and gradients are bitwise those of plain torch (A1, CPU fp32)."""

from __future__ import annotations

import random
from contextlib import nullcontext

import pytest
import torch

from ygglight.engines.adacc import tape

from .harness import KEEP, RECOMPUTE, Session, nothing_left, prepared, random_policies, same, single
from .models import FAMILIES, GPT, tokens

POLICIES = 30


@pytest.fixture(params=FAMILIES)
def session(request: pytest.FixtureRequest) -> Session:
    family = FAMILIES[request.param]
    found = Session(family.build().train(), family.batch())
    assert len(found.runtime.blocks) == family.blocks
    return found


def test_profiled_kept_recomputed_and_random_plans_are_bitwise_plain(session: Session) -> None:
    truth = session.plain()
    assert same(session.plain(), truth), "plain torch is not deterministic itself: the test below would prove nothing"
    assert same(session.profile(), truth), "the watched, fully recomputed step"
    rng = random.Random(0)
    plans = ["keep", "recompute"]
    plans += [random_policies(session.built, rng, per_instance=i % 2 == 0) for i in range(POLICIES)]
    for index, policies in enumerate(plans):
        session.use(policies)
        with nothing_left() if index == 2 else nullcontext():
            outcome = session.managed()
        assert same(outcome, truth), f"plan {index}"
        assert not session.diverged(), f"plan {index}: the same forward was taken for another"


def test_every_slot_can_be_recomputed_alone(session: Session) -> None:
    session.profile()
    truth, tried = session.plain(), 0
    for kind, graph in enumerate(session.built.step.types):
        for value in graph.actionable:
            if value.pinned:
                continue
            policies = single(session.built, kind, value.id, RECOMPUTE)
            try:
                session.use(policies)
            except ValueError:  # it hangs on something random: stays
                continue
            assert same(session.managed(), truth), value.name
            tried += 1
    assert tried >= 3


def test_recomputing_what_is_random_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: were dropout taken for repeatable, the comparison would fail."""
    monkeypatch.setattr(tape, "_KINDS", {})
    monkeypatch.setattr(tape, "is_replayable", lambda func, args, kwargs: True)
    session = Session(GPT(), tokens())
    truth = session.plain()
    assert not same(session.managed(), truth)
    session.close()


def test_an_all_keep_plan_installs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    session = prepared(GPT(), tokens())
    session.use("keep")

    def forbidden(*_: object) -> None:
        raise AssertionError("a hook or a mode was installed")

    monkeypatch.setattr(torch.autograd.graph.saved_tensors_hooks, "__enter__", forbidden)
    monkeypatch.setattr(tape.TapeMode, "__enter__", forbidden)
    session.managed()
    session.use("recompute")
    with pytest.raises(AssertionError, match="was installed"):
        session.managed()


def test_every_saved_tensor_that_a_region_computes_has_an_action_and_a_name() -> None:
    session = prepared(GPT(), tokens())
    plan = session.use("recompute")
    slots = sum(len(session.built.step.instance(i).actionable) for i in range(len(session.built.step.sequence)))
    assert len(plan.actions) == slots, "two slots share a name"
    assert plan.actions["blocks.1.ln2/aten.native_layer_norm:0"] == "recompute"
    assert {"keep", "recompute"} == set(plan.actions.values()), "dropout masks can only be kept"
    assert set(session.use("keep").actions.values()) == {KEEP.value}


def test_names_and_ids_are_the_same_in_another_process_run() -> None:
    first, second = (prepared(GPT(), tokens()) for _ in range(2))
    assert first.use("recompute").actions == second.use("recompute").actions
    assert [g.uses for g in first.built.step.types] == [g.uses for g in second.built.step.types]
