"""What goes wrong in the middle of a run under MoESpeQStrategy: one clear error, and no half state after it."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import Tensor

import ygglight  # noqa: F401  (registers the names)
from ygglight.engines.moe_speq.disk import _File
from ygglight.engines.moe_speq.layout import find_sites
from ygglight.modules import CausalLM
from ygglight.strategies import MoESpeQStrategy
from ygglight_launcher import raised_on_purpose

from .sparse import NEW, Writes, mixtral, plain, prompts, same, slabs, trainer
from .sparse import alone as alone  # a fixture


def strategy(model: Any, k: int = 0) -> MoESpeQStrategy:
    return MoESpeQStrategy(slabs(model, 2) + (40_000 if k else 0), k=k)


def files(folder: Path) -> list[Path]:
    return list(folder.rglob("experts.slabs"))


class Acts(Writes):
    """Does something after the first batch.

    Args:
        model: The model. act: What to do.
    """

    def __init__(self, model: Any, act: Any) -> None:
        super().__init__(model)
        self.act = act

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        found = super().predict_step(batch, batch_idx)
        self.act()
        return found


@pytest.mark.parametrize("k", [0, 3])
@pytest.mark.parametrize("reads", [0, 30])
def test_a_disk_error_inside_a_step_surfaces_and_the_next_run_is_right(
    k: int, reads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the very first forward, where the model is tried out, and later."""
    model, right, left = mixtral(), _File.read, [10**9]
    expected, before = plain(model), {name: t.clone() for name, t in model.state_dict().items()}

    def read(self: _File, out: Tensor, offset: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        right(self, out, offset)

    class Breaks(Writes):
        def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            left[0] = reads
            try:
                return super().predict_step(batch, batch_idx)
            finally:
                left[0] = 10**9

    monkeypatch.setattr(_File, "read", read)
    used = strategy(model, k)
    with pytest.raises(OSError, match=r"expert \d of sparse layer \d .*experts\.slabs") as caught:
        trainer(used).predict(Breaks(model), prompts())
    assert raised_on_purpose(caught.value), "the command prints it in one line"
    assert not used.report.fallbacks, "a fault is no reason to go on in another way"
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert same(trainer(strategy(model, k)).predict(Writes(model), prompts()), expected)


def test_experts_that_cannot_be_read_back_are_said_to_be_lost_and_are_not_used() -> None:
    """The parameters were views of the file; to touch pages that are gone would have killed the process."""
    folder, model = Path(os.environ["YGGLIGHT_CACHE"]), mixtral()
    cut = Acts(model, lambda: [os.truncate(file, 4096) for file in files(folder)])
    with pytest.raises(OSError, match=r"experts are lost, load it again.*the file ends before it") as caught:
        trainer(strategy(model)).predict(cut, prompts())
    assert raised_on_purpose(caught.value)
    with pytest.raises(ValueError, match="hold no values"):
        trainer(strategy(model)).predict(Writes(model), prompts())
    again = mixtral()
    with pytest.raises(ValueError, match="delete it"):
        trainer(strategy(again)).predict(Writes(again), prompts())
    expected = plain(again)
    for file in files(folder):
        file.unlink()
    assert same(trainer(strategy(again)).predict(Writes(again), prompts()), expected), "and then it is written anew"


def test_a_file_that_is_deleted_under_a_run_is_read_to_the_end() -> None:
    folder, model = Path(os.environ["YGGLIGHT_CACHE"]), mixtral()
    expected = plain(model)
    found = trainer(strategy(model)).predict(Acts(model, lambda: [f.unlink() for f in files(folder)]), prompts())
    assert same(found, expected) and same(plain(model), expected)


def test_a_fault_of_a_checkpoint_whose_experts_stay_in_it(tmp_path: Path) -> None:
    class WritesTokens(CausalLM):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            found = self.generate(batch, do_sample=False, max_new_tokens=NEW)
            if cut:
                os.truncate(weights, whole // 2)
            return found

    model = mixtral()
    expected = plain(model)
    model.save_pretrained(tmp_path / "moe")
    weights = tmp_path / "moe" / "model.safetensors"
    whole, good, cut = weights.stat().st_size, weights.read_bytes(), True
    module = WritesTokens(str(tmp_path / "moe"), experts="disk")
    with pytest.raises(OSError, match=r"cannot read .*model\.safetensors"):
        trainer(strategy(model)).predict(module, prompts())
    with open(weights, "r+b") as file:
        file.write(good)
    cut = False
    assert same(trainer(strategy(model)).predict(module, prompts()), expected)


@pytest.mark.parametrize("why", ["no folder", "full"])
def test_a_cache_that_cannot_be_written_is_named_with_its_mend(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    model, folder = mixtral(), Path(os.environ["YGGLIGHT_CACHE"])
    expected = plain(model)
    if why == "full":
        monkeypatch.setattr("ygglight.engines.moe_speq.slab_file._write_all", full)
    else:
        folder.write_text("a file")
    with pytest.raises(OSError, match="YGGLIGHT_CACHE") as caught:
        trainer(strategy(model)).predict(Writes(model), prompts())
    assert raised_on_purpose(caught.value)
    assert same(plain(model), expected) and not [f for f in folder.rglob("*") if f.is_file()]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_gives_the_experts_back_and_ends_the_thread(error: type[BaseException]) -> None:
    class Stops(L.Callback):
        def on_predict_batch_end(self, *args: Any) -> None:
            raise error("enough")

    model, threads = mixtral(), threading.active_count()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(SystemExit if error is KeyboardInterrupt else error):
        trainer(strategy(model, 2), callbacks=[Stops()]).predict(Writes(model), prompts())
    assert threading.active_count() == threads and find_sites(model)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_an_error_in_teardown_leaves_out_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two models, the one whose experts come back badly does not keep the other from getting its own."""

    class Two(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = mixtral(0), mixtral(1)

        def predict_step(self, batch: Tensor, batch_idx: int) -> Any:
            return [model.generate(batch, max_new_tokens=2) for model in (self.first, self.second)]

    module, used = Two(), MoESpeQStrategy("1MiB", draft_bits=None)

    class Breaks(L.Callback):
        def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            def fails() -> None:
                raise OSError("gone")

            monkeypatch.setattr(used.engines["first"].store, "close", fails)

    expected = plain(module.second)
    with pytest.raises(OSError, match="gone"):
        trainer(used, callbacks=[Breaks()]).predict(module, prompts())
    assert find_sites(module.second) and same(plain(module.second), expected)
