"""UpcycledMoE: a dense model becomes a mixture of experts whose routers decide, and a directory like any other."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from ygglight.data.assets import MADE, check_model, made_folder, resolve_model
from ygglight.modules import UpcycledMoE
from ygglight.modules.routing import RoutingStatistics
from ygglight.modules.testing import tiny_causal_lm
from ygglight.modules.upcycling import balance_loss, centroid_router, normalised_entropy, run_experts, upcycle

Sample = dict[str, Tensor]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_causal_lm(tmp_path_factory.mktemp("dense"), num_hidden_layers=3, initializer_range=0.15)


@pytest.fixture
def text() -> DataLoader[Sample]:
    ids = torch.randint(1, 300, (32, 24), generator=torch.Generator().manual_seed(2))
    samples: Any = [{"input_ids": row, "labels": row} for row in ids]
    return DataLoader(samples, batch_size=8)


pytestmark = pytest.mark.usefixtures("own_cache")


def trainer(**options: Any) -> L.Trainer:
    defaults: dict[str, Any] = {
        "max_steps": 4, "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
        "enable_checkpointing": False,
    }  # fmt: skip
    return L.Trainer(accelerator="cpu", devices=1, **defaults | options)


def made(dense: Path, output: str = "moe", **options: Any) -> UpcycledMoE:
    defaults = {"layers": [0, 2], "experts": 4, "dense_steps": 2, "warmup_steps": 1}
    return UpcycledMoE(str(dense), output, **defaults | options)


def model_of(directory: Path | str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(directory), local_files_only=True).eval()


# -- statistics against cases made by hand ---------------------------------------------------------------------------
def test_entropies_of_hand_made_routes() -> None:
    sure = torch.eye(4)[[0, 1, 2, 3]] * 100  # each token sure, loads equal
    unsure = torch.zeros(4, 4)
    unsure[:, 0] = 1e-3  # nobody decided, and the first expert always chosen
    statistics = RoutingStatistics(top_k=1)
    statistics.add([sure, unsure], torch.ones(1, 4))
    routing = statistics.result()
    assert routing.token == pytest.approx([0, 1], abs=1e-5)
    assert routing.load == pytest.approx([1, 0], abs=1e-9)
    assert routing.reuse == [0, 1] and routing.chance == pytest.approx([0.25, 1])
    assert not routing.decided, "a mean of 0.5 and 0.5"
    two = torch.tensor([[math.log(0.75), math.log(0.25)]])
    expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(2)
    assert normalised_entropy(two.softmax(-1)) == pytest.approx(expected, abs=1e-7)


def test_a_router_that_decides_and_is_balanced_routes_for_real() -> None:
    logits = torch.eye(4).repeat(5, 1) * 5
    for scale, decided in ((1.0, True), (0.01, False)):
        statistics = RoutingStatistics(top_k=1)
        statistics.add([logits * scale], torch.ones(1, 20))
        assert statistics.result().decided == decided
    statistics = RoutingStatistics(top_k=1)
    statistics.add([logits[:1].repeat(20, 1)], torch.ones(1, 20))
    assert not statistics.result().decided, "one expert does everything"


def test_reuse_is_counted_between_neighbours_of_one_sequence_and_not_at_padding() -> None:
    first, second = [3.0, 2.0, 0.0, 0.0], [0.0, 3.0, 2.0, 0.0]  # experts {0, 1} and {1, 2}
    far = [0.0, 0.0, 2.0, 3.0]
    logits = torch.tensor([first, first, second, far, first, far])  # two sequences of three
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    statistics = RoutingStatistics(top_k=2)
    statistics.add([logits], mask)
    routing = statistics.result()
    assert routing.reuse == pytest.approx([(2 + 1 + 0) / 3 / 2])
    share = torch.tensor([3, 4, 2, 1]) / 10  # of the five tokens that count
    assert routing.load == pytest.approx([float(torch.special.entr(share).sum()) / math.log(4)], abs=1e-6)
    with pytest.raises(ValueError, match="neighbouring"):
        RoutingStatistics(top_k=2).result()


def test_balance_is_one_when_loads_are_equal_and_sees_each_layer() -> None:
    even = torch.eye(4).repeat(2, 1) * 9
    assert float(balance_loss([even], 1)) == pytest.approx(1, abs=1e-5)
    lopsided = [torch.eye(4)[[e]].repeat(8, 1) * 99 for e in range(4)]  # each layer to one expert, together even
    assert float(balance_loss(lopsided, 1)) == pytest.approx(4, abs=1e-5)


# -- routers -----------------------------------------------------------------------------------------------------------
def clusters(sizes: list[int], spread: float = 0.3) -> tuple[Tensor, Tensor]:
    """Points about a few centres, with the large common mean that a norm leaves in front of a router."""
    generator = torch.Generator().manual_seed(3)
    centres = torch.randn(len(sizes), 32, generator=generator)
    labels = torch.cat([torch.full((size,), i) for i, size in enumerate(sizes)])
    noise = spread * torch.randn(len(labels), 32, generator=generator)
    return centres[labels] + noise + 5 * torch.randn(32, generator=generator), labels


def test_centroids_route_as_sharply_as_asked_and_evenly() -> None:
    points, _ = clusters([900, 700, 500, 300] + [100] * 16)
    held_out = torch.arange(len(points)) % 4 == 0
    for entropy in (0.3, 0.6):
        logits = points[held_out] @ centroid_router(points[~held_out], 8, entropy).T
        statistics = RoutingStatistics(top_k=2)
        statistics.add([logits], torch.ones(1, len(logits)))
        routing = statistics.result()
        assert routing.token == pytest.approx([entropy], abs=0.05)
        assert routing.load[0] > 0.93, "also on points that it was not made from"
    random = torch.randn(8, 32, generator=torch.Generator().manual_seed(1))
    statistics = RoutingStatistics(top_k=2)
    statistics.add([points @ random.T], torch.ones(1, len(points)))
    assert statistics.result().load[0] < 0.8, "random routers are lopsided here"


def test_centroids_find_clusters() -> None:
    points, labels = clusters([250] * 4)
    chosen = (points @ centroid_router(points, 4, 0.1).T).argmax(1)
    counts = torch.stack([torch.bincount(chosen[labels == label], minlength=4) for label in range(4)])
    assert float(counts.max(1).values.sum()) / len(points) > 0.95


def test_bad_routers() -> None:
    with pytest.raises(ValueError, match="3 inputs for 8 experts"):
        centroid_router(torch.randn(3, 4), 8, 0.5)
    with pytest.raises(ValueError, match="entropy=1"):
        centroid_router(torch.randn(30, 4), 8, 1.0)


# -- the mixture -------------------------------------------------------------------------------------------------------
def test_it_begins_as_the_layers_it_was_made_of(dense: Path) -> None:
    whole = model_of(dense)
    moe = upcycle(whole, [0, 2], experts=4, top_k=2).eval()
    tokens = torch.randint(1, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    del whole.model.layers[1]
    whole.config.num_hidden_layers = 2
    with torch.no_grad():
        expected, got = whole(tokens, use_cache=False).logits, moe(tokens, use_cache=False).logits
        assert torch.allclose(expected, got, atol=1e-4)
        moe.model.layers[0].mlp.experts.down_proj[1] *= 2
        assert not torch.allclose(expected, moe(tokens, use_cache=False).logits, atol=1e-4)
    with pytest.raises(ValueError, match=r"layers=\[0, 7\]"):
        upcycle(whole, [0, 7], 4, 2)


def test_the_experts_function_for_training_equals_transformers(dense: Path) -> None:
    moe = upcycle(model_of(dense), [0], experts=4, top_k=2)
    block = moe.model.layers[0].mlp
    with torch.no_grad():
        for weight in block.experts.parameters():
            weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(5)) / 8)
    hidden = torch.randn(10, 32, generator=torch.Generator().manual_seed(6)).requires_grad_()
    _, weights, index = block.gate(hidden)
    index = index.masked_fill(index == 3, 2)  # an expert that nobody chose
    results = []
    for function in (run_experts, lambda *args: block.experts(*args[1:])):
        out = function(block.experts, hidden, index, weights)
        inputs = [hidden, *block.experts.parameters()]
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs, retain_graph=True)])
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
    assert float(results[0][2][3].abs().max()) == 0


def test_two_phases(dense: Path, text: DataLoader[Sample]) -> None:
    """Identical copies when the second begins, with one another's optimizer state; different ones when it ends."""
    seen: dict[int, list[Tensor]] = {}

    class Look(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
            weight = pl_module.moe.model.layers[0].mlp.experts.down_proj
            state = trainer.optimizers[0].state[weight]["exp_avg_sq"]
            seen[trainer.global_step] = [weight.detach().clone(), state.clone()]

    module = made(dense, dense_steps=3, learning_rate=1e-2)
    run = trainer(max_steps=8, callbacks=[Look()])
    run.validate(module, text, verbose=False)
    before = float(run.callback_metrics["val_loss"])
    run.fit(module, text, text)
    start = module._teacher[0].model.layers[0].mlp.down_proj.weight
    assert torch.equal(seen[3][0][1], start) and not torch.equal(seen[3][0][0], start), "one expert learns alone"
    assert all(not torch.equal(seen[8][0][0], seen[8][0][e]) for e in range(1, 4))
    moved = [float((seen[4][0][e] - seen[3][0][0]).norm() / (seen[3][0][0] - start).norm()) for e in range(4)]
    assert max(moved) < 1, f"the copies began elsewhere: {moved}"
    assert all(float(seen[4][1][e].max()) > 0 for e in range(4)), "the copies have a past"
    assert float(run.callback_metrics["val_loss"]) < 0.9 * before

    written = model_of("moe")
    assert written.config.model_type == "mixtral" and written.config.num_local_experts == 4
    for name, value in module.moe.state_dict().items():
        assert torch.equal(value, written.state_dict()[name]), name
    assert Path("moe/tokenizer.json").is_file() and not list(Path().glob(".writing*"))
    tokens = next(iter(text))["input_ids"]
    with torch.no_grad():
        p, q = (F.log_softmax(m(tokens).logits.double(), -1) for m in (module._teacher[0], written))
    module.eval()
    with torch.no_grad():
        assert float(module._compare({"input_ids": tokens})[0]) == pytest.approx(
            float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4
        )


def test_a_run_goes_on_in_either_phase(dense: Path, tmp_path: Path, loader: Any) -> None:
    import copy

    options = {"schedule": "constant", "dense_steps": 3}
    whole = made(dense, "whole", **options)
    trainer(max_steps=6).fit(whole, copy.copy(loader))
    for stop in (2, 4):
        run = trainer(max_steps=stop, enable_checkpointing=True, default_root_dir=tmp_path / str(stop))
        run.fit(made(dense, "first", **options), copy.copy(loader))
        path = run.checkpoint_callback.best_model_path  # type: ignore[union-attr]
        state = torch.load(path, weights_only=True)["state_dict"]
        assert bool(state["_split"]) == (stop == 4) and all(n.startswith(("moe.", "_split")) for n in state)
        rest = made(dense, "rest", **options)
        trainer(max_steps=6).fit(rest, copy.copy(loader), ckpt_path=path)
        if stop == 4:  # before the split the clusters are of the batches that the run has seen itself
            for name, value in whole.moe.state_dict().items():
                assert torch.equal(value, rest.moe.state_dict()[name]), name


def test_a_run_that_ends_in_the_first_phase_still_gives_a_mixture(dense: Path, text: DataLoader[Sample]) -> None:
    module = made(dense, dense_steps=50)
    trainer(max_steps=3).fit(module, text)
    experts = model_of("moe").model.layers[1].mlp.experts.down_proj
    start = module._teacher[0].model.layers[2].mlp.down_proj.weight
    assert all(torch.equal(experts[0], experts[e]) for e in range(1, 4)) and not torch.equal(experts[0], start)


def test_a_broken_run_writes_beside_the_finished_one(dense: Path, text: DataLoader[Sample]) -> None:
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            raise RuntimeError("broken off")

    with pytest.raises(RuntimeError, match="broken off"):
        trainer(callbacks=[Stop()]).fit(made(dense), text)
    assert not Path("moe").exists() and model_of("moe-interrupted").config.num_local_experts == 4


def test_the_name_of_what_the_recipe_makes(dense: Path, text: DataLoader[Sample]) -> None:
    (name,) = MADE
    with pytest.raises(FileNotFoundError, match=r"ygglight fit --config moe_speq/fit_upcycled_smollm2\.yaml"):
        check_model(name)
    trainer(max_steps=1).fit(made(dense, name), text)
    assert resolve_model(name) == made_folder(name)
    assert model_of(resolve_model(name)).config.num_hidden_layers == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [({"top_k": 4}, "top_k=4 of experts=4"), ({"entropy": 0.0}, "entropy=0.0"), ({"balance": -1.0}, "balance=-1.0")],
)
def test_bad_numbers(dense: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(dense, **options)
