"""The base on one device: it sits where the Trainer says, and refuses what it cannot do. GPUs are faked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy, StrategyRegistry
from torch.utils.data import DataLoader

from ygglight.compat.lightning import is_foreign_class
from ygglight.strategies import OneDeviceStrategy
from ygglight.strategies.base import RefusesPytorchLightning

QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "max_steps": 1,
}


class Training(OneDeviceStrategy):
    several_devices_name = "adacc_ddp"


class Resident(OneDeviceStrategy):
    resident = True


class Plain(SingleDeviceStrategy):
    """What Lightning gives a subclass: the negative control of the tests below."""


class Tiny(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        return self.layer(batch).sum()

    def predict_step(self, batch: torch.Tensor) -> torch.Tensor:
        return self.layer(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters())


def loader() -> DataLoader:
    return DataLoader(torch.randn(4, 4), batch_size=2)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs that Lightning believes in, as in its own tests; no tensor is ever put there."""
    monkeypatch.setattr("lightning.fabric.accelerators.cuda.num_cuda_devices", lambda: 2)
    monkeypatch.setattr("lightning.pytorch.accelerators.cuda.num_cuda_devices", lambda: 2)
    monkeypatch.setattr("lightning.pytorch.accelerators.mps.MPSAccelerator.is_available", lambda: False)


@pytest.fixture(params=["object", "name"])
def chosen(request: pytest.FixtureRequest) -> Any:
    """The strategy as an object, and as a name of the registry."""
    if request.param == "object":
        return Training()
    StrategyRegistry.register("one_device_test", Training, override=True)
    return "one_device_test"


@pytest.mark.usefixtures("two_gpus")
def test_sits_on_the_gpu_that_the_trainer_chose(chosen: Any) -> None:
    trainer = Trainer(strategy=chosen, accelerator="gpu", devices=[1], **QUIET)
    assert trainer.strategy.root_device == torch.device("cuda", 1)


@pytest.mark.usefixtures("two_gpus")
def test_lightning_alone_leaves_it_on_the_cpu() -> None:
    """Lightning issue 18902. Once it is mended there, `parallel_devices` can go."""
    trainer = Trainer(strategy=Plain(), accelerator="gpu", devices=[1], **QUIET)
    assert trainer.strategy.root_device == torch.device("cpu")


@pytest.mark.usefixtures("two_gpus")
def test_refuses_two_gpus(chosen: Any) -> None:
    with pytest.raises(ValueError, match=r"Training runs on one device.* given 2: set devices=1, or use .*'adacc_ddp'"):
        Trainer(strategy=chosen, accelerator="gpu", devices=2, **QUIET)


def test_refuses_two_cpu_processes(chosen: Any) -> None:
    with pytest.raises(ValueError, match="adacc_ddp"):
        Trainer(strategy=chosen, accelerator="cpu", devices=2, **QUIET)


def test_lightning_alone_takes_two_devices_in_silence() -> None:
    assert Trainer(strategy=Plain(), accelerator="cpu", devices=2, **QUIET).strategy.root_device.type == "cpu"


def test_refuses_two_nodes(chosen: Any) -> None:
    with pytest.raises(ValueError, match=r"num_nodes=2: set num_nodes=1, or use strategy='adacc_ddp'"):
        Trainer(strategy=chosen, accelerator="cpu", devices=1, num_nodes=2, **QUIET)


def test_without_another_name_the_error_names_none() -> None:
    with pytest.raises(ValueError, match=r"set devices=1\."):
        Trainer(strategy=Resident(), accelerator="cpu", devices=2, **QUIET)


def test_one_node_is_reported() -> None:
    assert Trainer(strategy=Training(), accelerator="cpu", **QUIET).num_nodes == 1


@pytest.mark.usefixtures("two_gpus")
def test_a_second_trainer_chooses_again() -> None:
    """The device of the first Trainer must not stick to the strategy, nor its count of devices."""
    strategy = Training()
    Trainer(strategy=strategy, accelerator="cpu", devices=1, **QUIET)
    strategy._accelerator = None  # as Lightning asks for one accelerator, by strategy or by flag
    Trainer(strategy=strategy, accelerator="gpu", devices=[0], **QUIET)
    assert strategy.root_device == torch.device("cuda", 0)
    strategy._accelerator = None
    with pytest.raises(ValueError, match="given 2"):
        Trainer(strategy=strategy, accelerator="gpu", devices=2, **QUIET)


@pytest.mark.parametrize(("strategy", "stays"), [(Training, False), (Resident, True)])
def test_resident_stays_on_its_device(
    strategy: type[OneDeviceStrategy], stays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[str] = []
    monkeypatch.setattr(Tiny, "cpu", lambda self: moved.append("module") or self)
    monkeypatch.setattr(
        "lightning.pytorch.strategies.strategy._optimizers_to_device", lambda *_: moved.append("optimizers")
    )
    # Setup moves optimizers too: what counts is what happens after the last batch.
    for hook in ("on_train_end", "on_predict_end"):
        monkeypatch.setattr(Tiny, hook, lambda self: moved.clear(), raising=False)
    trainer = Trainer(strategy=strategy(), accelerator="cpu", devices=1, **QUIET)
    trainer.fit(Tiny(), loader())
    assert moved == ([] if stays else ["optimizers", "module"])
    trainer.predict(Tiny(), loader())
    assert moved == ([] if stays else ["optimizers", "module"])


def test_a_resident_strategy_still_tears_the_rest_down(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(strategy=Resident(), accelerator="cpu", devices=1, **QUIET)
    down: list[str] = []
    for part in ("precision_plugin", "accelerator", "checkpoint_io"):
        monkeypatch.setattr(getattr(trainer.strategy, part), "teardown", lambda part=part: down.append(part))
    trainer.fit(Tiny(), loader())
    assert down == ["precision_plugin", "accelerator", "checkpoint_io"]


def test_deepspeed_is_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match="'adacc_deepspeed' is not offered") as error:
        Trainer(strategy="adacc_deepspeed", accelerator="cpu", **QUIET)
    assert "\n" not in str(error.value) and "adacc_fsdp2" in str(error.value)


# -- objects of the other package ------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
class TestPytorchLightningObjects:
    """Subclasses in user code, which escape the test that Lightning itself makes."""

    @pytest.fixture
    def other(self) -> Any:
        return pytest.importorskip("pytorch_lightning")

    def test_callback(self, other: Any) -> None:
        class Mine(other.Callback): ...

        trainer = Trainer(strategy=Training(), accelerator="cpu", callbacks=[Mine()], **QUIET)
        with pytest.raises(TypeError, match=r"callback Mine: built on `pytorch_lightning`.*import lightning.pytorch"):
            trainer.fit(Tiny(), loader())

    @pytest.mark.parametrize("passed", ["datamodule", "position"])
    def test_data_module(self, other: Any, passed: str) -> None:
        class Mine(other.LightningDataModule):
            def train_dataloader(self) -> DataLoader:
                return loader()

        trainer = Trainer(strategy=Training(), accelerator="cpu", **QUIET)
        with pytest.raises(TypeError, match="data module Mine: built on `pytorch_lightning`"):
            trainer.fit(Tiny(), Mine()) if passed == "position" else trainer.fit(Tiny(), datamodule=Mine())

    def test_data_module_to_predict(self, other: Any) -> None:
        class Mine(other.LightningDataModule):
            def predict_dataloader(self) -> DataLoader:
                return loader()

        with pytest.raises(TypeError, match="data module Mine"):
            Trainer(strategy=Training(), accelerator="cpu", **QUIET).predict(Tiny(), datamodule=Mine())

    def test_logger(self, other: Any) -> None:
        from pytorch_lightning.loggers import CSVLogger

        trainer = Trainer(strategy=Training(), accelerator="cpu", **(QUIET | {"logger": CSVLogger(".")}))
        with pytest.raises(TypeError, match="logger CSVLogger"):
            trainer.fit(Tiny(), loader())

    def test_module_is_refused_by_lightning_before_the_strategy_sees_it(self, other: Any) -> None:
        class Mine(other.LightningModule): ...

        with pytest.raises(TypeError, match="must be a `LightningModule`"):
            Trainer(strategy=Training(), accelerator="cpu", **QUIET).fit(Mine(), loader())

    def test_over_another_base(self, other: Any) -> None:
        from lightning.pytorch.strategies import DDPStrategy

        class Mine(other.Callback): ...

        class Checked(RefusesPytorchLightning, DDPStrategy): ...

        strategy = Checked()
        trainer = Trainer(strategy=strategy, accelerator="cpu", devices=1, callbacks=[Mine()], **QUIET)
        module = Tiny()
        module.trainer = trainer
        with pytest.raises(TypeError, match="callback Mine"):
            strategy.connect(module)

    def test_by_the_mro(self, other: Any) -> None:
        class Mine(other.Callback): ...

        class Named:
            __module__ = "pytorch_lightning_extras.callbacks"

        assert is_foreign_class(Mine) and not is_foreign_class(Named) and not is_foreign_class(Tiny)


def test_own_objects_pass() -> None:
    from lightning.pytorch.callbacks import Timer

    Trainer(strategy=Training(), accelerator="cpu", callbacks=[Timer()], **QUIET).fit(Tiny(), loader())


def test_connects_without_a_trainer() -> None:
    strategy = Training()
    strategy.connect(Tiny())
    assert strategy.lightning_module is not None
