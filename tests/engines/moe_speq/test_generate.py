"""``generate`` through the method, and around it: settings, fallbacks, plain forwards, budgets, giving the draft up."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ygglight.engines.decode.method import routed
from ygglight.engines.moe_speq import engine as module
from ygglight.engines.moe_speq.budget import split_budget
from ygglight.engines.moe_speq.config import Config
from ygglight.engines.moe_speq.draft import DraftExperts
from ygglight.engines.moe_speq.engine import Engine
from ygglight.engines.moe_speq.generate import MoESpeQGenerate
from ygglight.engines.moe_speq.governor import SEEN, Governor
from ygglight.engines.moe_speq.layout import find_sites
from ygglight.engines.moe_speq.machine import Machine
from ygglight.engines.moe_speq.stores import HostStore

from .conftest import tiny_moe, tokens
from .speculation import CopyDraft, budget, method, plain

NEW = 20

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def model() -> Any:
    return tiny_moe("qwen3_moe")


@pytest.fixture
def made(model: Any) -> Iterator[MoESpeQGenerate]:
    made = method(model, 3, CopyDraft(model, 0.1))
    yield made
    made.release()


def batch() -> dict[str, Tensor]:
    ids, mask = tokens(10, rows=2), torch.ones(2, 10, dtype=torch.long)
    mask[0, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


# -- settings ---------------------------------------------------------------------------------------------------------
SETTINGS: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.3},
    {"no_repeat_ngram_size": 2},
    {"suppress_tokens": [1, 2, 3]},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_padded_batch_under_settings(model: Any, made: MoESpeQGenerate, settings: dict[str, Any]) -> None:
    kwargs = {**batch(), **settings, "max_new_tokens": NEW, "do_sample": False}
    expected = model.generate(**kwargs)
    assert torch.equal(model.generate(**kwargs, custom_generate=made), expected)
    assert made.report.fallbacks == {} and made.report.generations == 2 and made.report.accepted > 0


@pytest.mark.parametrize(
    "unusual", [{"num_beams": 2}, {"output_scores": True, "return_dict_in_generate": True}], ids=str
)
def test_what_cannot_speculate_has_its_experts_all_the_same(
    model: Any, made: MoESpeQGenerate, unusual: dict[str, Any]
) -> None:
    kwargs = {**batch(), **unusual, "max_new_tokens": NEW, "do_sample": False}
    expected = model.generate(**kwargs)
    found = model.generate(**kwargs, custom_generate=made)
    assert made.engine(model).runtime is not None
    expected, found = (x if isinstance(x, Tensor) else x.sequences for x in (expected, found))
    assert torch.equal(found, expected)
    assert sum(made.report.fallbacks.values()) == 2 and made.report.cycles == 0


def test_a_streamer_works_while_the_experts_are_elsewhere(model: Any, made: MoESpeQGenerate) -> None:
    from transformers.generation.streamers import BaseStreamer

    class Collects(BaseStreamer):
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            pass

    expected, stream = plain(model, tokens(9), NEW), Collects()
    made.engine(model)
    with routed([model], made):
        plain(model, tokens(9), NEW, streamer=stream)
    assert stream.tokens == expected[0].tolist()


def test_a_plain_forward_brings_its_experts(model: Any, made: MoESpeQGenerate) -> None:
    ids = tokens(12, rows=2)
    with torch.no_grad():
        expected = model(ids).logits
        engine = made.engine(model)
        assert not [name for name, _ in model.named_parameters() if ".experts." in name]
        assert torch.allclose(model(ids).logits, expected, atol=1e-4)
        text = engine.generate(ids[0], _nothing(), _until(20))
        next(text)
        assert torch.allclose(model(ids).logits, expected, atol=1e-4), "between two cycles of a text, too"
        text.close()


def _nothing() -> Any:
    from transformers import LogitsProcessorList

    from ygglight.engines.decode.processors import NodeProcessors

    return NodeProcessors(LogitsProcessorList())


def _until(length: int) -> Any:
    from transformers import MaxLengthCriteria, StoppingCriteriaList

    from ygglight.engines.decode.stopping import Stopping

    return Stopping(StoppingCriteriaList([MaxLengthCriteria(length)]))


def test_release_gives_the_very_parameters_back(model: Any) -> None:
    before = {name: p.clone() for name, p in model.named_parameters()}
    made = method(model, 2, CopyDraft(model))
    plain(model, tokens(9), 6, custom_generate=made)
    made.release()
    after = dict(model.named_parameters())
    assert list(after) == list(before) and all(torch.equal(after[name], p) for name, p in before.items())


@pytest.mark.parametrize("where", ["host", "disk"])
def test_taken_and_given_back_under_inference_mode_a_model_can_be_trained(model: Any, where: str) -> None:
    expected = plain(model, tokens(9), 6)
    made = method(model, 2, CopyDraft(model), experts=where)
    with torch.inference_mode():
        found = plain(model, tokens(9), 6, custom_generate=made)
    again = plain(model, tokens(9), 6, custom_generate=made)
    with torch.inference_mode():
        made.release()
    assert torch.equal(found, expected) and torch.equal(again, expected)
    model.train()(input_ids=tokens(9), labels=tokens(9)).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    experts = [p for name, p in model.named_parameters() if ".experts." in name]
    assert experts and all(p.grad is not None and not p.is_inference() for p in experts)


def test_a_long_prompt_goes_in_chunks_and_fits_a_larger_cache(made: MoESpeQGenerate) -> None:
    model = tiny_moe("mixtral", max_position_embeddings=2048)
    made = method(model, 2, CopyDraft(model, 0.1))
    for length in (9, 700):
        ids = tokens(length)
        expected = plain(model, ids, 6) if length == 9 else expected_of(ids, 6)
        assert torch.equal(plain(model, ids, 6, custom_generate=made), expected)
    assert made.report.moved["prefill"] > 0
    made.release()


def expected_of(ids: Tensor, new: int) -> Tensor:
    return plain(tiny_moe("mixtral", max_position_embeddings=2048), ids, new)


def test_a_prompt_beyond_max_tokens(model: Any) -> None:
    made = MoESpeQGenerate(budget(model, 2), k=0, draft_bits=None, experts="host", max_tokens=9)
    with pytest.raises(ValueError, match="the prompt has 9 tokens and max_tokens is 9"):
        plain(model, tokens(9), 4, custom_generate=made)
    made.release()


# -- the budget -------------------------------------------------------------------------------------------------------
SIZES: dict[str, int] = {"layers": 4, "experts": 8, "slab": 1000, "staging": 2}


def test_the_least_budget_is_named_and_works() -> None:
    with pytest.raises(ValueError, match="give 6000 bytes"):
        split_budget(5999, draft=0, **SIZES)
    assert split_budget(6000, draft=0, **SIZES).slots == 1


@pytest.mark.parametrize("whole", [6000, 9999, 10_000, 18_000, 40_000])
@pytest.mark.parametrize("draft", [0, 3000])
def test_all_that_experts_take_is_within_the_budget(whole: int, draft: int) -> None:
    split = split_budget(whole, draft=draft, **SIZES)
    assert split.nbytes <= whole and 1 <= split.slots <= 8
    assert split.slots == 8 or whole - split.nbytes < 4000, "a slot a layer was left unused"
    if split.draft:
        assert split.more_slots == split_budget(whole, draft=0, **SIZES).slots >= split.slots


def test_a_draft_that_does_not_fit_is_left_out_with_a_note() -> None:
    split = split_budget(8999, draft=3000, **SIZES)
    assert split.draft == 0 and "9000" not in str(split.slots) and "no room for the draft" in str(split.note)
    assert split_budget(9000, draft=3000, **SIZES).draft == 3000


def test_where_all_experts_fit_nothing_is_drafted_unless_asked_for() -> None:
    assert split_budget(40_000, draft=3000, **SIZES).draft == 0
    assert split_budget(40_000, draft=3000, insists=True, **SIZES).draft == 3000


def test_an_engine_says_why_it_does_not_draft(model: Any) -> None:
    draft = CopyDraft(model)
    config = Config(budget(model, 1, draft) - 1, experts="host")
    engine = Engine(model, config, draft=draft).attach()
    assert engine.draft is None and any("no room for the draft" in note for note in engine.take_report().notes)
    engine.detach()
    with pytest.raises(ValueError, match=r"expert_budget=.* is too small"):
        Engine(model, Config(budget(model, 1) - 1), draft=draft)


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ({"k": -1}, "k=-1"), ({"k": "often"}, "k='often'"), ({"k_max": 65}, "k_max=65"), ({"staging": 0}, "staging=0"),
        ({"draft_bits": 8}, "draft_bits=8"), ({"link": {"speed": 1}}, "link="),
        ({"link": {"bandwidth": 0}}, "bandwidth"), ({"link": {"bandwidth": None}}, "bandwidth"),
        ({"max_tokens": 1}, "max_tokens=1"),
        ({"experts": "tape"}, "experts='tape'"), ({"prefetch_cap": "a lot"}, "a lot"),
        ({"max_cycle_seconds": 0}, "max_cycle_seconds"), ({"expert_budget": "-1"}, "size"),
    ],
)  # fmt: skip
def test_bad_options(option: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        MoESpeQGenerate(**{"expert_budget": "1GiB"} | option)


# -- choosing ---------------------------------------------------------------------------------------------------------
def test_auto_measures_and_reports(model: Any) -> None:
    expected = plain(model, tokens(9), 40)
    made = method(model, 3, CopyDraft(model, 0.05), k="auto", k_max=4, profile_seconds=0.5)
    assert torch.equal(plain(model, tokens(9), 40, custom_generate=made), expected)
    governor = made.engine(model).governor
    assert governor is not None
    machine = governor.machine
    assert machine.draft_token > 0 and machine.expert >= 0 and set(machine.verify) == {1, 2, 3, 5}
    assert 0 < machine.copy < 0.1
    report = made.report
    assert sum(cycles for _, cycles in report.choices) == report.cycles
    assert 0 < len(report.errors) <= report.cycles and max(report.drafting) <= 4
    made.release()


class Slow(CopyDraft):
    """A draft for which two slots a layer must make room."""

    nbytes = 1 << 17


def sure(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which a draft must win if it is accepted, whatever this one is like."""
    machine = Machine(1e-4, {1: 1.0, 9: 1.0}, 0.0, 1e-4, 2, 2, 2, 2)
    monkeypatch.setattr(module, "measure_machine", lambda *args, **kwargs: machine)
    monkeypatch.setattr(Machine, "at", lambda self, copy, draft_token: self)
    monkeypatch.setattr(Governor, "_correct", lambda self, cycle: None)


def test_all_memory_is_slots_until_a_draft_promises_more(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sure(monkeypatch)
    expected = plain(model, tokens(9), 160)
    draft = Slow(model, 0.02)
    made = method(model, 2, draft, k="auto")
    engine = made.engine(model)
    more = engine.split.more_slots
    assert engine.runtime is not None and engine.runtime.slots == more > 2 and engine.draft is None
    text = plain(model, tokens(9), SEEN, custom_generate=made)
    assert draft.calls == 0
    assert torch.equal(plain(model, tokens(9), 160, custom_generate=made), expected)
    assert torch.equal(text, expected[:, : 9 + SEEN])
    assert engine.draft is draft and engine.governor is not None and engine.governor.k >= 4
    assert engine.runtime.slots == 2 and engine.runtime.nbytes + draft.nbytes <= made.config.budget
    assert made.report.accepted > 0.8 * made.report.drafted > 0
    assert any("were predicted to be faster than" in note for note in made.report.notes)
    made.release()


def test_a_draft_that_does_not_pay_becomes_slots(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sure(monkeypatch)
    monkeypatch.setattr(Machine, "cycle", lambda self, k, *experts: 1.0 + 0.8 * k)  # pays if 9 of 10 are accepted
    expected = plain(model, tokens(9), 200)
    draft = Slow(model, float("inf"))
    made = method(model, 2, draft, k="auto")
    engine = made.engine(model)
    more = engine.split.more_slots
    assert torch.equal(plain(model, tokens(9), 200, custom_generate=made), expected)
    assert draft.calls and engine.draft is None and engine.runtime is not None
    assert engine.runtime.draft is None and engine.runtime.slots == more
    assert engine.runtime.nbytes <= made.config.budget
    assert any("the draft was dropped" in note for note in made.report.notes)
    calls = draft.calls
    assert torch.equal(plain(model, tokens(9), 8, custom_generate=made), expected[:, :17])
    assert draft.calls == calls, "and the next text does not draft"
    made.release()


def test_a_draft_that_cannot_be_made_in_time_costs_nothing_but_itself(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sure(monkeypatch)
    expected = plain(model, tokens(9), 100)
    made = MoESpeQGenerate(budget(model, 2, Slow(model)), experts="host")
    engine = made.engine(model)
    assert engine.split.draft and engine.runtime is not None

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise OSError("the disk is on fire")

    monkeypatch.setattr(DraftExperts, "build", broken)
    assert torch.equal(plain(model, tokens(9), 100, custom_generate=made), expected)
    assert engine.draft is None and engine.runtime.slots == engine.split.more_slots
    assert any("the disk is on fire" in note for note in made.report.notes) and not made.report.drafted
    made.release()


def test_a_damaged_draft_is_told_before_it_is_needed(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "draft.safetensors"
    DraftExperts.build(sites := find_sites(model), HostStore(sites), device="cpu").save(path)
    DraftExperts.check(path, sites)
    with path.open("r+b") as file:
        file.seek(-2000, 2)
        byte = file.read(1)[0]
        file.seek(-2000, 2)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(ValueError, match="is damaged"):
        MoESpeQGenerate(budget(model, 2, Slow(model)), experts="host", draft=str(path)).engine(model)


def test_tokens_are_counted_as_they_come(model: Any, made: MoESpeQGenerate) -> None:
    counts: list[int] = []
    made.on_tokens = counts.append
    plain(model, tokens(9), NEW, custom_generate=made)
    assert sum(counts) == NEW and len(counts) == made.report.cycles + 1
