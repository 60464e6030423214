"""MoESpeQStrategy through the Trainer, on modules that know nothing of it: same text, and nothing left behind."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ygglight  # noqa: F401  (registers the names)
from ygglight.cli.convert import main as convert
from ygglight.engines.moe_speq.layout import find_sites
from ygglight.modules import CausalLM
from ygglight.modules.testing import tiny_causal_lm
from ygglight.strategies import MoESpeQStrategy

from .sparse import NEW, PROMPTS, Scores, Writes, mixtral, prompts, slabs, trainer
from .sparse import alone as alone  # a fixture


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """What was printed at the end of runs."""
    lines: list[str] = []
    monkeypatch.setattr("ygglight.strategies.generating.rank_zero_info", lines.append)
    return lambda: "\n".join(lines)


# -- same text ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("k", ["auto", 3, 0])
def test_the_text_is_that_of_the_whole_model_and_the_model_is_as_before(k: Any, told: Callable[[], str]) -> None:
    model = mixtral()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = [model.generate(row, do_sample=False, max_new_tokens=NEW) for row in prompts()]
    strategy = MoESpeQStrategy(expert_budget=slabs(model, 4) + 40_000, k=k)
    found = trainer(strategy).predict(Writes(model), prompts())
    assert found is not None and all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert strategy.report.tokens == PROMPTS * NEW and strategy.report.experts["requests"] > 0
    assert "experts asked for" in told() and "bytes moved" in told()
    if k == 3:
        assert strategy.report.drafted > 0


def test_by_name_with_what_memory_there_is(told: Callable[[], str]) -> None:
    model = mixtral()
    plain = [model.generate(row, do_sample=False, max_new_tokens=NEW) for row in prompts()]
    found = trainer("moe_speq").predict(Writes(model), prompts())
    assert found is not None and all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
    assert "all experts fit" in told()


def test_plain_forwards_find_their_experts_too() -> None:
    model = mixtral()
    with torch.no_grad():
        plain = [model(input_ids=row).logits for row in prompts()]
    found = trainer(MoESpeQStrategy(slabs(model, 1), draft_bits=None)).predict(Scores(model), prompts())
    assert found is not None
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_one_strategy_serves_two_runs() -> None:
    model = mixtral()
    strategy = MoESpeQStrategy(slabs(model, 2), draft_bits=None)
    module = Writes(model)
    first = trainer(strategy).predict(module, prompts())
    again = trainer(MoESpeQStrategy(slabs(model, 4), draft_bits=None)).predict(module, prompts())
    assert first is not None and again is not None
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_switched_off_it_says_so(told: Callable[[], str]) -> None:
    model = mixtral()
    strategy = MoESpeQStrategy("1GiB", enabled=False)
    trainer(strategy).predict(Writes(model), prompts())
    assert strategy.report.tokens == 0 and "moe_speq: off" in told()


# -- refusals ----------------------------------------------------------------------------------------------------------
def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    dense = AutoModelForCausalLM.from_pretrained(tiny_causal_lm(tmp_path / "dense"))
    with pytest.raises(ValueError, match="MoESpeQStrategy: LlamaForCausalLM has no"):
        trainer("moe_speq").predict(Writes(dense), prompts())


def test_a_module_without_a_model_is_refused() -> None:
    with pytest.raises(TypeError, match="no causal language model"):
        trainer("moe_speq").predict(Writes(torch.nn.Linear(2, 2)), prompts())


def test_fit_is_refused_and_leaves_the_model_whole() -> None:
    model = mixtral()
    names = list(model.state_dict())
    with pytest.raises(ValueError, match="fit with another strategy"):
        trainer("moe_speq", max_steps=1).fit(Writes(model), prompts())
    assert list(model.state_dict()) == names


def test_a_budget_below_one_expert_a_layer_is_refused_with_the_least_that_works() -> None:
    model = mixtral()
    least = slabs(model, 1)
    with pytest.raises(ValueError, match=str(least)):
        trainer(MoESpeQStrategy(least - 1, draft_bits=None)).predict(Writes(model), prompts())
    assert find_sites(model)  # whole again
    assert trainer(MoESpeQStrategy(least, draft_bits=None)).predict(Writes(model), prompts())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"k": -1}, "k=-1"), ({"expert_budget": "8 apples"}, "8 apples"), ({"draft_bits": 3}, "draft_bits=3"),
        ({"experts": "tape"}, "tape"), ({"link": {"speed": 1}}, "bandwidth"),
    ],
)  # fmt: skip
def test_bad_numbers_are_refused_at_once(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MoESpeQStrategy(**{"expert_budget": "1GiB"} | options)


def test_an_error_inside_a_step_gives_the_experts_back() -> None:
    class Breaks(Writes):
        def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            super().predict_step(batch, batch_idx)
            raise KeyError("user's own")

    model = mixtral()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(KeyError, match="user's own"):
        trainer(MoESpeQStrategy(slabs(model, 2), draft_bits=None)).predict(Breaks(model), prompts())
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


# -- a draft that was made before --------------------------------------------------------------------------------------
def test_a_draft_is_written_once_and_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = mixtral()
    model.save_pretrained(tmp_path / "moe")
    draft = tmp_path / "draft.safetensors"
    assert convert(["convert", "moe-draft", str(tmp_path / "moe"), "--out", str(draft)]) == 0
    assert "rounded to nearest" in capsys.readouterr().out
    plain = [model.generate(row, do_sample=False, max_new_tokens=NEW) for row in prompts()]
    strategy = MoESpeQStrategy(slabs(model, 4) + 40_000, k=3, draft=str(draft))
    found = trainer(strategy).predict(Writes(model), prompts())
    assert found is not None and all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
    assert strategy.report.accepted > 0
    with pytest.raises(ValueError, match="--force"):
        convert(["convert", "moe-draft", str(tmp_path / "moe"), "--out", str(draft)])


@pytest.mark.parametrize("damage", ["cut", "other model"])
def test_a_draft_that_does_not_fit_is_refused_before_the_first_step(tmp_path: Path, damage: str) -> None:
    model, other = mixtral(), mixtral(seed=1)
    (other if damage == "other model" else model).save_pretrained(tmp_path / "moe")
    draft = tmp_path / "draft.safetensors"
    convert(["convert", "moe-draft", str(tmp_path / "moe"), "--out", str(draft)])
    if damage == "cut":
        draft.write_bytes(draft.read_bytes()[:-100])
    with pytest.raises(ValueError, match="draft"):
        trainer(MoESpeQStrategy(slabs(model, 4) + 40_000, draft=str(draft))).predict(Writes(model), prompts())
    assert model.generate(next(iter(prompts())), do_sample=False, max_new_tokens=2).shape[1] == 9


# -- larger than memory ------------------------------------------------------------------------------------------------
_LIMITED = """
import json, resource, sys
import lightning.pytorch as L, torch
import ygglight
from torch.utils.data import DataLoader
from ygglight.modules import CausalLM
from ygglight.strategies import MoESpeQStrategy
import transformers.models.mixtral.modeling_mixtral

folder, room = sys.argv[1], int(sys.argv[2])
taken = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData")) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (taken + room, taken + room))
torch.set_num_threads(1)


class Writes(CausalLM):
    def predict_step(self, batch, batch_idx):
        return self.model.generate(batch, do_sample=False, max_new_tokens=4)


module = Writes(folder, experts=sys.argv[3], dtype="float32")
strategy = MoESpeQStrategy("32MiB", draft_bits=None)
trainer = L.Trainer(
    strategy=strategy, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False,
)
rows = trainer.predict(module, DataLoader(torch.arange(6)[None], batch_size=1))
print("tokens", json.dumps(rows[0].tolist()))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_DATA is enforced by Linux")
def test_a_checkpoint_larger_than_the_memory_limit_predicts_to_the_end(tmp_path: Path) -> None:
    model = mixtral(hidden_size=256, intermediate_size=1024, num_hidden_layers=6)
    room = 120 * 2**20
    assert sum(p.nbytes for p in model.parameters()) > 1.2 * room
    model.save_pretrained(tmp_path / "moe", max_shard_size="40MB")
    plain = model.generate(torch.arange(6)[None], do_sample=False, max_new_tokens=4).tolist()

    def run(experts: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", _LIMITED, str(tmp_path / "moe"), str(room), experts]
        return subprocess.run(command, capture_output=True, text=True, timeout=240)

    done = run("disk")
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"tokens {plain}" in done.stdout
    assert run("memory").returncode != 0, "the limit lets the whole model in: it proves nothing"


def test_experts_on_disk_go_with_nothing_that_needs_them_whole(tmp_path: Path) -> None:
    mixtral().save_pretrained(tmp_path / "moe")
    with pytest.raises(ValueError, match="drop init"):
        CausalLM(str(tmp_path / "moe"), experts="disk", init="random")
