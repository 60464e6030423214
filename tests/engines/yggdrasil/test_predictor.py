"""The depth predictor: its curve, its censored loss against a life table, its files, and the way from log to text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ygglight.data import DecodeLogData
from ygglight.engines.yggdrasil.config import Config
from ygglight.engines.yggdrasil.decode_log import read_log
from ygglight.engines.yggdrasil.engine import Engine
from ygglight.engines.yggdrasil.generate import TreeGenerate
from ygglight.engines.yggdrasil.loop import Iteration
from ygglight.engines.yggdrasil.predictor import DepthPredictor
from ygglight.modules import DepthPredictorModule

from .conftest import SHAPE, close_calls, llama, plain, prompts

HIDDEN, DEPTH = 12, 6

pytestmark = pytest.mark.usefixtures("own_cache")


def rows(count: int = 64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, drafted depths from 1 to DEPTH, and accepted lengths up to those."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(count, HIDDEN, generator=generator)
    drafted = torch.randint(1, DEPTH + 1, (count,), generator=generator)
    would = torch.randint(0, DEPTH + 1, (count,), generator=generator)
    return hidden, torch.minimum(would, drafted), drafted


# -- the curve -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_survival_is_the_running_product_of_the_hazards(dtype: torch.dtype) -> None:
    predictor = DepthPredictor(HIDDEN, DEPTH, width=8)
    for parameter in predictor.parameters():
        parameter.data.add_(3 * torch.randn_like(parameter))
    hidden = (100 * torch.randn(7, 5, HIDDEN)).to(dtype)
    survival = predictor.survival(hidden)
    assert survival.shape == (7, 5, DEPTH) and survival.dtype == torch.float32 and not survival.requires_grad
    assert (survival[..., 1:] <= survival[..., :-1]).all() and (survival >= 0).all() and (survival <= 1).all()
    assert survival.std() > 0.1, "a constant curve would pass as well"
    hazards = torch.sigmoid(predictor(hidden))
    assert torch.allclose(survival[..., 2], hazards[..., 0] * hazards[..., 1] * hazards[..., 2])
    assert torch.allclose(predictor.survival(hidden[3, 2]), survival[3, 2], atol=1e-6), "one state as the loop gives it"


# -- the loss --------------------------------------------------------------------------------------------------------
def test_the_loss_by_hand() -> None:
    predictor = DepthPredictor(HIDDEN, DEPTH, width=8)
    hidden, accepted, drafted = rows()
    logits = predictor(hidden)
    terms = []
    for row in range(len(hidden)):
        for depth in range(1, int(drafted[row]) + 1):
            if depth <= accepted[row]:
                terms.append(-F.logsigmoid(logits[row, depth - 1]))
            else:
                terms.append(-F.logsigmoid(-logits[row, depth - 1]))
                break  # nobody knows what would have come after a refusal
    assert torch.allclose(predictor.loss(hidden, accepted, drafted), torch.stack(terms).mean(), atol=1e-6)


@pytest.mark.parametrize(
    ("accepted", "drafted", "seen"),
    [(0, 4, 1), (2, 4, 3), (3, 4, 4), (4, 4, 4), (2, 2, 2), (1, 1, 1), (DEPTH, DEPTH, DEPTH), (0, 1, 1)],
)
def test_hazards_that_were_not_seen_get_no_gradient(accepted: int, drafted: int, seen: int) -> None:
    predictor = DepthPredictor(HIDDEN, DEPTH, width=8)
    hidden = torch.randn(3, HIDDEN)
    predictor.loss(hidden, torch.full((3,), accepted), torch.full((3,), drafted)).backward()
    gradient = predictor.heads.bias.grad
    assert gradient is not None and (gradient[:seen] != 0).all() and (gradient[seen:] == 0).all()
    weight = predictor.heads.weight.grad
    assert weight is not None and (weight[seen:] == 0).all()
    # Depth d went well or not, which is the sign of its gradient.
    assert (gradient[: min(accepted, seen)] < 0).all() and (gradient[accepted:seen] > 0).all()


def test_rows_without_any_depth_are_no_loss() -> None:
    predictor = DepthPredictor(HIDDEN, DEPTH, width=8)
    none = torch.zeros(2, dtype=torch.long)
    loss = predictor.loss(torch.randn(2, HIDDEN), none, none)
    assert float(loss.detach()) == 0


def test_fitted_hazards_are_those_of_a_life_table() -> None:
    """With nothing to tell rows apart the best hazards are Kaplan and Meier's; counting refusals in censored rows, or
    leaving these rows out, gives others."""
    generator = torch.Generator().manual_seed(0)
    truth = 0.8
    would = (torch.rand(4000, 64, generator=generator) < truth).long().cumprod(1).sum(1)
    drafted = torch.randint(1, DEPTH + 1, (4000,), generator=generator)
    accepted = torch.minimum(would, drafted)
    depths = torch.arange(1, DEPTH + 1)
    reached = (accepted[:, None] >= depths - 1) & (drafted[:, None] >= depths)
    table = ((accepted[:, None] >= depths) & reached).sum(0) / reached.sum(0)
    naive = (accepted[:, None] >= depths).sum(0) / (accepted[:, None] >= depths - 1).sum(0)
    assert (table - truth).abs().max() < 0.06 and (naive - table).abs().max() > 0.15

    predictor = DepthPredictor(HIDDEN, DEPTH, width=4)
    hidden = torch.zeros(4000, HIDDEN)
    optimizer = torch.optim.LBFGS([predictor.heads.bias], max_iter=60)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = predictor.loss(hidden, accepted, drafted)
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    found = torch.sigmoid(predictor(hidden[0])).detach()
    assert torch.allclose(found, table, atol=5e-3)


# -- its files -------------------------------------------------------------------------------------------------------
def test_what_is_saved_is_what_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = DepthPredictor(HIDDEN, DEPTH, width=8)
    hidden = torch.randn(5, HIDDEN)
    predictor.save(tmp_path / "a" / "b")
    loaded = DepthPredictor.load(tmp_path / "a" / "b")
    assert (loaded.hidden_size, loaded.max_depth, loaded.width) == (HIDDEN, DEPTH, 8) and not loaded.training
    assert torch.equal(loaded.survival(hidden), predictor.survival(hidden))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert torch.equal(DepthPredictor.load("~/a/b").survival(hidden), predictor.survival(hidden))


def test_a_folder_without_a_predictor_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"fit_depth_predictor\.yaml"):
        DepthPredictor.load(tmp_path)


def test_a_predictor_of_another_model_is_refused(tmp_path: Path, target: Any) -> None:
    DepthPredictor(SHAPE["hidden_size"] + 8, DEPTH, width=8).save(tmp_path / "other")
    with pytest.raises(ValueError, match="hidden size 72, and this one's is 64") as error:
        Engine(target, "lookup", Config(predictor=str(tmp_path / "other")))
    assert "fit one to a log of this model" in str(error.value)
    made = TreeGenerate("lookup", predictor=str(tmp_path / "other"))
    with pytest.raises(ValueError, match="hidden size 72"):
        plain(target, prompts(1)[0], 4, custom_generate=made)
    DepthPredictor(SHAPE["hidden_size"], DEPTH, width=8).save(tmp_path / "own")
    assert Engine(target, "lookup", Config(predictor=str(tmp_path / "own"))).predictor is not None


# -- from log to text ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("static", [False, True])
def test_the_log_holds_what_was_seen(tmp_path: Path, target: Any, drafts: dict[str, Any], static: bool) -> None:
    """Every row is the target's hidden state before the root, which a plain forward gives too."""
    made = TreeGenerate(drafts["noisy"], tree={"width": 2, "depth": 4, "verify": 6}, log=str(tmp_path / "log"))
    made.engine(target).static = static
    seen: list[Iteration] = []
    made.watch = seen.append
    texts = [plain(target, ids, 24, custom_generate=made) for ids in prompts(2)]
    made.release()
    log = read_log(tmp_path / "log")
    drafted = [iteration for iteration in seen if iteration.shape is not None]
    assert len(log["hidden"]) == len(drafted) > 8
    assert log["accepted"].tolist() == [len(iteration.verdict.path) - 1 for iteration in drafted]
    assert (log["accepted"] <= log["drafted"]).all() and (log["drafted"] >= 1).all() and log["drafted"].max() <= 4
    assert 0 < log["accepted"].float().mean() < 4 and log["prompt"].unique().tolist() == [0, 1]
    for number, text in enumerate(texts):
        with torch.no_grad():
            states = target.model(text).last_hidden_state[0]
        mine = [row for row in range(len(drafted)) if log["prompt"][row] == number]
        for row in mine:
            expected = states[drafted[row].position - 2]  # the position counts the root, whose state is not known yet
            assert torch.allclose(log["hidden"][row], expected, atol=1e-4)
            assert not torch.allclose(log["hidden"][row], states[drafted[row].position - 1], atol=1e-2)


def test_from_log_to_predictor_to_the_same_text(tmp_path: Path, target: Any, drafts: dict[str, Any]) -> None:
    logging = TreeGenerate(drafts["noisy"], tree={"width": 2, "depth": 4}, log=str(tmp_path / "log"))
    for ids in prompts(6, seed=11):
        plain(target, ids, 24, custom_generate=logging)
    logging.release()

    run = L.Trainer(
        accelerator="cpu", devices=1, max_epochs=4, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    module = DepthPredictorModule(str(tmp_path / "predictor"), width=16)
    run.fit(module, datamodule=DecodeLogData(str(tmp_path / "log"), batch_size=32))
    assert "val_gain" in run.callback_metrics
    shape = json.loads((tmp_path / "predictor" / "predictor.json").read_text())
    assert shape == {"hidden_size": SHAPE["hidden_size"], "max_depth": 4, "width": 16}

    # Both ways of the loop, the tree left to the machine: the predictor is asked, and the text stays what it was.
    for static in (False, True):
        made = TreeGenerate(
            drafts["noisy"], predictor=str(tmp_path / "predictor"), max_depth=4, max_width=2, max_verify=8,
            profile_seconds=0.2,
        )  # fmt: skip
        engine = made.engine(target)
        engine.static = static
        asked: list[list[int]] = []
        survival = engine.predictor.survival  # type: ignore[union-attr]

        def watched(hidden: Tensor, survival: Any = survival, asked: Any = asked) -> Tensor:
            asked.append(list(hidden.shape))
            return survival(hidden)

        engine.predictor.survival = watched  # type: ignore[union-attr, method-assign]
        for ids in prompts(2):
            assert close_calls(target, plain(target, ids, 32), plain(target, ids, 32, custom_generate=made)) == 0
        assert asked and all(shape == [SHAPE["hidden_size"]] for shape in asked)
        assert not made.report.fallbacks


@pytest.mark.parametrize(("hope", "depth"), [(0.999, 4), (0.001, 1)])
def test_the_predictor_decides_the_depth(
    tmp_path: Path, drafts: dict[str, Any], target: Any, hope: float, depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A curve that never falls asks for the deepest tree, one that falls at once for the shallowest."""
    from ygglight.engines.yggdrasil import engine as engines
    from ygglight.engines.yggdrasil.objective import Costs, Latency

    costs = Costs(Latency((1, 64), (1.0, 1.1)), Latency((1, 8), (0.1, 0.1)))
    monkeypatch.setattr(engines, "measure_costs", lambda *args: costs)
    predictor = DepthPredictor(SHAPE["hidden_size"], 4, width=4)
    predictor.heads.weight.data.zero_()
    predictor.heads.bias.data.fill_(float(torch.logit(torch.tensor(hope))))
    predictor.save(tmp_path / "p")
    made = TreeGenerate(drafts["itself"], predictor=str(tmp_path / "p"), max_depth=4, max_width=2)
    shapes: list[Any] = []
    made.watch = lambda iteration: shapes.append(iteration.shape)
    ids = prompts(1)[0]
    assert torch.equal(plain(target, ids, 40), plain(target, ids, 40, custom_generate=made))
    assert {shape.depth for shape in shapes[:-2]} == {depth}  # near the end of the text trees are cut


def test_another_model_of_the_same_size_is_taken(tmp_path: Path) -> None:
    """Only the size is known: the same predictor may serve a fine-tuned model."""
    DepthPredictor(SHAPE["hidden_size"], DEPTH, width=8).save(tmp_path / "p")
    assert Engine(llama(3), "lookup", Config(predictor=str(tmp_path / "p"))).predictor is not None
