"""Adacc through the Trainer, on a module that knows nothing of it: same results, within the budget."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import Tensor, nn

import ygglight  # noqa: F401  (registers the names)
from ygglight.callbacks import AdaccMonitor
from ygglight.engines.adacc.frame import Handle
from ygglight.strategies.adacc import CHECKPOINT_KEY, AdaccStrategy

from .conftest import Fit, UserGPT, tokens


def exact(budget: Any, **kwargs: Any) -> AdaccStrategy:
    return AdaccStrategy(memory_budget=budget, compress=False, **kwargs)


def loader(*args: Any, **kwargs: Any) -> Any:
    return torch.utils.data.DataLoader(tokens(*args, **kwargs), batch_size=None)


@pytest.mark.parametrize("budget", [0.9, 0.7, 0.5])
def test_exact_plans_train_bit_for_bit_like_plain_lightning(fit: Fit, budget: float) -> None:
    plain, _ = fit()
    strategy = exact(budget)
    managed, _ = fit(strategy)
    assert managed.losses == plain.losses
    for (name, a), b in zip(plain.named_parameters(), managed.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert strategy.plan is not None and not strategy.plan.all_keep, "nothing was managed, so nothing was shown"


def test_peaks_stay_within_the_budget_as_predicted_and_fall_with_it(fit: Fit) -> None:
    unmanaged = AdaccMonitor(every_n_steps=2)
    fit(callbacks=[unmanaged])
    plain = max(peak for _, peak in unmanaged.peaks)
    peaks = []
    for share in (0.9, 0.8, 0.7, 0.6):
        monitor, strategy = AdaccMonitor(every_n_steps=2), exact(int(share * plain))
        fit(strategy, callbacks=[monitor])
        peak = max(peak for _, peak in monitor.peaks)
        assert strategy.plan is not None
        assert peak <= share * plain
        assert peak >= 0.9 * share * plain, "much of the budget is left over"
        assert abs(strategy.plan.predicted_peak_bytes / peak - 1) < 0.05
        peaks.append(peak)
    assert peaks == sorted(peaks, reverse=True)


def test_a_float_budget_is_the_share_of_the_unmanaged_peak(fit: Fit) -> None:
    monitor = AdaccMonitor(every_n_steps=2)
    fit(callbacks=[monitor])
    strategy = exact(0.7)
    fit(strategy)
    plan = strategy.plan
    assert plan is not None and plan.budget_bytes is not None
    assert abs(plan.plain_peak_bytes / monitor.peaks[-1][1] - 1) < 0.05
    assert plan.budget_bytes == int(0.7 * plan.plain_peak_bytes)


def test_nine_tenths_of_what_autograd_saves_have_an_action_of_their_own(fit: Fit) -> None:
    strategy = exact(0.6)
    model, _ = fit(strategy)
    seen: dict[int, int] = {}
    state = {p.untyped_storage().data_ptr() for p in model.parameters()}
    batch = tokens()[0]

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in state:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    kept: list[Any] = []  # alive until counted, or an address would come twice
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept.append(model.loss(batch))
    inputs = len(model.blocks) + 1  # each region's own input stays, whatever the plan
    leaves = inputs * batch.shape[0] * (batch.shape[1] - 1) * 32 * 4
    assert strategy.plan is not None
    assert sum(strategy.plan.saved_bytes.values()) >= 0.9 * (sum(seen.values()) - leaves)


def test_slot_names_are_stable_and_readable(fit: Fit) -> None:
    first, second = exact(0.6), exact(0.6)
    fit(first)
    fit(second)
    assert first.plan is not None and second.plan is not None
    assert first.plan.actions.keys() == second.plan.actions.keys()
    assert set(first.plan.actions.values()) <= {"keep", "compress", "recompute"}
    assert "blocks.3.up/aten.addmm:0" in first.plan.actions
    assert '"predicted_peak_bytes"' in first.plan.to_json()


def test_validation_and_predict_never_meet_it(fit: Fit) -> None:
    plain, plain_trainer = fit(val_check_interval=2)
    calls: list[str] = []
    strategy = exact(0.6)
    original = Handle.__init__

    def counted(self: Handle, *args: Any) -> None:
        calls.append("train" if model.training else "eval")
        original(self, *args)

    model = UserGPT()
    Handle.__init__ = counted  # type: ignore[method-assign]
    try:
        _, trainer = fit(strategy, model=model, val_check_interval=2)
        trainer.validate(model, loader(2), verbose=False)
        predictions = trainer.predict(model, loader(2))
    finally:
        Handle.__init__ = original  # type: ignore[method-assign]
    assert calls and "eval" not in calls
    assert model.validated[: len(plain.validated)] == plain.validated
    expected = plain_trainer.predict(plain, loader(2))
    assert predictions is not None and expected is not None
    assert all(torch.equal(a, b) for a, b in zip(predictions, expected, strict=True))


def test_accumulation_gives_the_same_losses_and_plans_only_between_steps(fit: Fit) -> None:
    plain, _ = fit(accumulate_grad_batches=2, max_steps=4)
    strategy = exact(0.6, monitor_every=1)
    seen: list[tuple[int, int]] = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            assert strategy.plan is not None
            seen.append((batch_idx, id(strategy.plan)))

    managed, _ = fit(strategy, accumulate_grad_batches=2, max_steps=4, callbacks=[Watch()])
    assert managed.losses == plain.losses
    for (index, before), (_, after) in pairwise(seen):
        if index % 2 == 0 and index > 0:  # both micro-batches of one optimizer step
            assert before == after


def test_manual_optimization(fit: Fit) -> None:
    plain, _ = fit(model=UserGPT(automatic=False))
    strategy = exact(0.8)
    managed, _ = fit(strategy, model=UserGPT(automatic=False))
    assert managed.losses == plain.losses
    assert strategy.plan is not None and not strategy.plan.all_keep


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_low_precision(fit: Fit, precision: Any) -> None:
    plain, _ = fit(precision=precision)
    strategy = exact(0.8)
    managed, _ = fit(strategy, precision=precision)
    assert managed.losses == plain.losses
    assert strategy.plan is not None and not strategy.plan.all_keep


def test_batches_of_many_lengths(fit: Fit) -> None:
    lengths = [32, 16, 24, 31, 32, 9, 40, 33]
    data = [tokens(1, 4, n)[0] for n in lengths]
    plain, _ = fit(data=torch.utils.data.DataLoader(data, batch_size=None), max_steps=8)
    strategy = exact(0.7)
    managed, _ = fit(strategy, data=torch.utils.data.DataLoader(data, batch_size=None), max_steps=8)
    assert managed.losses == plain.losses
    assert strategy.runtime is not None and strategy.runtime.surprises == 0
    assert len(strategy.runtime.history) > 1


class Plain(L.LightningModule):
    """No repeated blocks at all."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(32, 256), nn.Linear(256, 256), nn.Linear(256, 8)
        self.losses: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        h = torch.relu(self.b(torch.nn.functional.silu(self.a(batch))))
        loss = self.c(h).square().mean()
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_a_model_without_repeated_blocks(fit: Fit) -> None:
    data = [torch.randn(512, 32) for _ in range(6)]
    plain, _ = fit(model=Plain(), data=torch.utils.data.DataLoader(data, batch_size=None))
    strategy = exact(0.9)
    managed, _ = fit(strategy, model=Plain(), data=torch.utils.data.DataLoader(data, batch_size=None))
    assert managed.losses == plain.losses
    assert strategy.plan is not None and "recompute" in strategy.plan.actions.values()


def test_by_name_with_the_budget_missing_it_says_what_to_pass(fit: Fit) -> None:
    with pytest.raises(ValueError, match="memory_budget='600MiB'"):
        fit("adacc")


def test_a_budget_below_the_floor_stops_before_the_first_optimizer_step(fit: Fit) -> None:
    model = UserGPT()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"too small: the smallest that works is .*blocks\.") as caught:
        fit(exact("100KiB"), model=model)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    floor = caught.value.floor_bytes  # type: ignore[attr-defined]
    fit(exact(int(floor)))  # the budget that it named works


@pytest.mark.parametrize(
    ("budget", "message"),
    [("8 gigs", "cannot read the size"), (1.5, r"must lie in \(0, 1\]"), (-3, "positive"), (1, "means 1 bytes")],
)
def test_budgets_that_do_not_parse(budget: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdaccStrategy(memory_budget=budget)


def test_two_devices_are_sent_to_ddp() -> None:
    with pytest.raises(ValueError, match="adacc_ddp"):
        L.Trainer(strategy=exact(0.5), accelerator="cpu", devices=2, logger=False)


def test_a_pytorch_lightning_callback_is_one_clear_error(fit: Fit) -> None:
    foreign = pytest.importorskip("pytorch_lightning", reason="the other package is not installed")
    with pytest.raises(TypeError, match=r"lightning\.pytorch"):
        fit(exact(0.5), callbacks=[foreign.Callback()])


def test_compiled_parts_are_refused_or_switch_it_off(fit: Fit) -> None:
    model = UserGPT()
    model.blocks[0] = torch.compile(model.blocks[0], backend="eager")  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"torch\.compile"):
        fit(exact(0.5, enabled=True), model=model)
    with pytest.warns(UserWarning, match="adacc is off"):
        _, trainer = fit(exact(0.5), model=model)
    assert trainer.strategy.runtime is None  # type: ignore[attr-defined]


def test_disabled_it_does_nothing(fit: Fit) -> None:
    plain, _ = fit()
    strategy = exact(None, enabled=False)
    managed, _ = fit(strategy)
    assert managed.losses == plain.losses and strategy.runtime is None


def test_a_checkpoint_loads_without_ygglight_and_resumes_with_it(fit: Fit, tmp_path: Any) -> None:
    strategy = exact(0.7)
    _, trainer = fit(strategy, max_steps=4)
    path = tmp_path / "a.ckpt"
    trainer.save_checkpoint(path)
    state = torch.load(path, weights_only=True)
    assert CHECKPOINT_KEY in state
    plain, _ = fit(max_steps=4)
    plain.load_state_dict(state["state_dict"])

    resumed = exact(0.7)
    other = UserGPT()
    second = L.Trainer(
        strategy=resumed, accelerator="cpu", devices=1, max_steps=6, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    second.fit(other, loader(), ckpt_path=path)
    assert strategy.plan is not None and resumed.plan is not None
    assert resumed.plan.actions == strategy.plan.actions
    assert resumed.plan.version == strategy.plan.version
    assert resumed.runtime is not None and resumed.runtime.optimizer_steps == 6
    assert resumed.runtime.history == strategy.runtime.history  # type: ignore[union-attr]


def test_an_exception_mid_step_leaves_nothing_behind(fit: Fit) -> None:
    class Fails(UserGPT):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
            loss = super().training_step(batch, batch_idx)
            if batch_idx == 2:
                raise RuntimeError("by the user")
            return loss

    with pytest.raises(RuntimeError, match="by the user"):
        fit(exact(0.7), model=Fails())
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None


def test_the_monitor_writes_a_picture(fit: Fit, tmp_path: Any) -> None:
    picture = tmp_path / "memory.png"
    fit(exact(0.7), callbacks=[AdaccMonitor(every_n_steps=2, picture=str(picture))])
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_plan_only_trains_nothing_and_finds_the_largest_batch(fit: Fit) -> None:
    model = UserGPT(p=0.0)
    before = [p.clone() for p in model.parameters()]

    class Data(L.LightningDataModule):
        def train_dataloader(self) -> Any:
            return loader()

    def trainer(strategy: AdaccStrategy) -> L.Trainer:
        return L.Trainer(
            strategy=strategy, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, max_steps=3,
        )  # fmt: skip

    strategy = exact("700KiB")
    report = strategy.plan_only(trainer(strategy), model, Data(), max_batch=True)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert report.max_batch is not None and report.max_batch >= 4
    assert report.predicted_peak_bytes <= 700 * 1024
    assert "largest batch" in report.table()

    def feasible(size: int) -> bool:
        data = torch.utils.data.DataLoader(tokens(2, size), batch_size=None)
        try:
            fit(exact("700KiB"), model=UserGPT(p=0.0), data=data, max_steps=1)
        except ValueError:
            return False
        return True

    assert feasible(report.max_batch) and not feasible(report.max_batch + 2)
