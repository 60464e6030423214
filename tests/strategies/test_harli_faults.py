"""What goes wrong while HarliStrategy serves and trains: memory, a dead thread, Ctrl-C, errors of the user's own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import openai
import pytest
import torch

from ygglight.engines.harli.partitions import alone
from ygglight.engines.harli.requests import Closing
from ygglight.engines.harli.scheduler import Decision
from ygglight.modules import CausalLM
from ygglight.strategies import HarliStrategy

from .harli_cases import (
    PROMPT,
    Asked,
    At,
    Beside,
    Tuned,
    adapter,
    client,
    close,
    eventually,
    fit,
    loader,
    strategy,
    trainer,
)  # fmt: skip

LONG: dict[str, Any] = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.3, "max_steps": 3}


def blocks(module: Any) -> list[Any]:
    return [m for m in module.modules() if type(m).__name__ == "LlamaDecoderLayer"]


class Trouble(L.Callback):
    """Does something late in the forward or the backward of the blocks, in the given micro-batches, once each.

    Its hooks come before harli's own, which are put there by the first step.
    """

    def __init__(self, phase: str, do: Callable[[], None], batches: tuple[int, ...] = (1, 2)) -> None:
        self.phase, self.do, self.left = phase, do, set(batches)
        self.batch, self.times = -1, 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        def once() -> None:
            if self.batch in self.left:
                self.left.discard(self.batch)
                self.times += 1
                self.do()

        def forward(block: Any, args: Any, output: Any) -> None:
            if self.phase == "forward":
                once()
            elif torch.is_grad_enabled():
                tensor = output if isinstance(output, torch.Tensor) else output[0]
                tensor.register_hook(lambda grad: once())

        late = blocks(pl_module)[-1 if self.phase == "forward" else 0]
        self.handle = late.register_forward_hook(forward)

    def on_train_batch_start(self, *_: Any) -> None:
        self.batch += 1

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.handle.remove()


def raises() -> None:
    raise torch.OutOfMemoryError("injected: out of memory")


def two(engine: Any) -> list[Asked]:
    return [Asked(engine, [5, 6, 7], 60), Asked(engine, [9, 8], 60, "adapter")]


@pytest.fixture
def module(tiny: Path, request: pytest.FixtureRequest) -> Callable[[], Any]:
    """Two kinds of module, both with counts and logs that a replay must not repeat."""
    if getattr(request, "param", "user") == "user":
        return lambda: Tuned(tiny)
    return lambda: CausalLM(str(tiny), lora={"r": 4, "lora_dropout": 0.1})


@pytest.mark.parametrize("module", ["user", "causal_lm"], indirect=True)
@pytest.mark.parametrize("phase", ["forward", "backward"])
@pytest.mark.parametrize("fault", ["abort", "out of memory"])
def test_a_replay_repeats_neither_logs_nor_counts(module: Callable[[], Any], phase: str, fault: str) -> None:
    plain, served = module(), module()
    expected = fit(plain, **LONG)
    chosen = strategy()
    trouble = Trouble(phase, raises if fault == "out of memory" else lambda: chosen.engine.gate.abort())  # type: ignore[union-attr]
    beside = Beside(chosen, two)
    found = fit(served, chosen, beside, trouble, **LONG)
    assert trouble.times == 2 and chosen.report is not None and chosen.report.replays == 2
    assert found.losses == pytest.approx(expected.losses, abs=1e-6)
    assert found.logged == [pytest.approx(row, abs=1e-6) for row in expected.logged]
    assert close(adapter(served), adapter(plain))
    assert chosen.report.micro_batches == 6 and [asked.ended for asked in beside.asked] == ["length"] * 2


def test_what_is_always_out_of_memory_is_an_error_and_requests_are_finished(tiny: Path) -> None:
    chosen = strategy()
    beside = Beside(chosen, two)

    def again() -> None:
        never.left.add(1)
        raises()

    never = Trouble("backward", again)
    with pytest.raises(torch.OutOfMemoryError, match="injected"):
        fit(Tuned(tiny), chosen, beside, never)
    assert never.times == 4  # the first, and three replays
    assert [asked.ended for asked in beside.asked] == ["length"] * 2 and chosen.engine is None


def test_the_kv_side_gets_back_what_finetuning_holds(tiny: Path) -> None:
    """A burst comes when the step holds nearly all of the arena; it is served at once, and the losses stay."""
    data = {"data": loader(16, length=128, size=8), "max_steps": 2}
    plain, served = Tuned(tiny), Tuned(tiny)
    expected = fit(plain, **data)
    chosen = strategy(memory="1MiB", max_context=200)
    asked: list[Asked] = []
    held: list[int] = []
    lowered: list[int] = []

    def burst() -> None:
        engine: Any = chosen.engine
        held.append(engine.arena.counts().leased)
        asked.extend(Asked(engine, [1 + i] * 150, 40) for i in range(4))
        assert eventually(lambda: engine.arena.pressure > 0)  # at the next boundary finetuning is told

    class Watch(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            session: Any = chosen._session
            lowered.append(session.activations.dropped + session.activations.offloaded + session.counts.retreats)
            assert eventually(lambda: all(a.ended for a in asked))

    found = fit(served, chosen, Trouble("forward", burst, (0,)), Watch(), **data)
    assert held[0] > 0 and lowered[0] > 0
    assert [a.ended for a in asked] == ["length"] * 4 and all(len(a.tokens) == 40 for a in asked)
    assert found.losses == pytest.approx(expected.losses, abs=1e-6) and close(adapter(served), adapter(plain))


def test_finetuning_goes_on_when_the_decode_thread_dies(tiny: Path) -> None:
    plain, served = Tuned(tiny), Tuned(tiny)
    expected = fit(plain, max_steps=6)
    chosen = strategy(server={"port": 0})
    told: list[Any] = []

    def break_it(*_: Any) -> None:
        engine: Any = chosen.engine
        asked = Asked(engine, [5, 6], 200)

        def broken() -> None:
            raise RuntimeError("decoding is broken")

        engine.batcher.next_work = broken
        assert eventually(lambda: asked.ended is not None and not engine.alive)
        told.append(asked.events[-1])
        with pytest.raises(Closing):
            Asked(engine, [5, 6], 2)
        with client(chosen.url) as made, pytest.raises(openai.InternalServerError) as refused:
            made.completions.create(model="base", prompt=PROMPT, max_tokens=1)
        told.append(refused.value.response.status_code)

    found = fit(served, chosen, At(2, break_it), max_steps=6)
    assert told[0].finish_reason == "error" and "decoding is broken" in told[0].error and told[1] == 503
    assert found.losses == pytest.approx(expected.losses, abs=1e-6) and close(adapter(served), adapter(plain))


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Lightning ignores Ctrl-C for good once it came."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


class Pauses(HarliStrategy):
    """Never lets finetuning on; ``end`` is called when it waits."""

    end: Callable[[], None]

    def policy(self, ladder: Any, predictor: Any) -> Any:
        whole = alone(max(rung.decode for rung in ladder))
        strategy = self

        class Policy:
            def decide(self, situation: Any) -> Decision:
                if strategy.engine is not None and strategy.engine.gate.waiting_for is not None:
                    strategy.end()
                return Decision(whole, 0, 0.0, "paused")

        return Policy()


def test_a_pause_ends_with_the_decode_thread(tiny: Path) -> None:
    def broken() -> None:
        raise ValueError("no decision can be made")

    chosen = Pauses(server=False, memory="8MiB")
    chosen.end = broken
    assert len(fit(Tuned(tiny), chosen).losses) == 4


def test_a_pause_ends_with_ctrl_c(tiny: Path, interruptible: None) -> None:
    chosen = Pauses(server=False, memory="8MiB", tpot_slo_ms=20)
    sent: list[None] = []

    def once() -> None:
        if not sent:
            sent.append(os.kill(os.getpid(), signal.SIGINT))

    chosen.end = once
    asked: list[Asked] = []
    with pytest.raises(SystemExit):
        fit(Tuned(tiny), chosen, At(0, lambda *_: asked.extend(two(chosen.engine))))
    assert [a.ended for a in asked] == ["length"] * 2 and Path("harli-interrupted.ckpt").exists()


@pytest.mark.parametrize("where", ["training", "validation", "end"])
def test_an_error_of_the_users_own_comes_through_and_leaves_nothing_behind(tiny: Path, where: str) -> None:
    class Wrong(Tuned):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if where == "training" and batch_idx == 2:
                raise KeyError("mine")
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if where == "validation":
                raise KeyError("mine")

        def on_train_end(self) -> None:
            if where == "end":
                raise KeyError("mine")

    module, chosen = Wrong(tiny), strategy(server={"port": 0}, keep_serving=True)
    beside = Beside(chosen, two)
    with pytest.raises(KeyError, match="mine"):
        trainer(chosen, [beside], val_check_interval=4).fit(module, loader(), loader(4))
    assert chosen.engine is None and chosen.url is None and "log" not in module.__dict__
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    assert eventually(lambda: all(asked.ended == "length" for asked in beside.asked))


# -- Ctrl-C ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("phase", ["forward", "backward", "clip", "optimizer"])
def test_resuming_after_ctrl_c_anywhere_in_a_step_is_like_an_unbroken_run(
    tiny: Path, phase: str, interruptible: None
) -> None:
    whole, broken = Tuned(tiny, dropout=0.0), Tuned(tiny, dropout=0.0)
    # A loader begins anew after a break, so that all batches are the same one.
    data = {"data": loader(2), "max_epochs": -1, "gradient_clip_val": 0.3}
    fit(whole, max_steps=6, **data)
    chosen = strategy()

    def arm(*_: Any) -> None:
        gate: Any = chosen.engine.gate  # type: ignore[union-attr]
        boundary = gate.boundary

        def interrupt(quantum: Any) -> None:
            boundary(quantum)
            if quantum.phase == phase:
                gate.boundary = boundary
                signal.raise_signal(signal.SIGINT)

        gate.boundary = interrupt

    beside = Beside(chosen, two)
    with pytest.raises(SystemExit):
        fit(broken, chosen, beside, At(3, arm), max_steps=6, **data)
    assert all(asked.ended for asked in beside.asked) and chosen.engine is None
    saved = torch.load("harli-interrupted.ckpt", weights_only=True)
    assert saved["global_step"] == (3 if phase in ("forward", "backward") else 4)
    resumed = Tuned(tiny, dropout=0.0)
    fit(resumed, strategy(), max_steps=6, ckpt_path="harli-interrupted.ckpt", **data)
    assert close(adapter(resumed), adapter(whole))


def start(folder: Path, model: Path, *arguments: str) -> tuple[subprocess.Popen[str], str]:
    """A fit in a process of its own, and where it serves, once it trains."""
    script = Path(__file__).with_name("harli_process.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    process = subprocess.Popen(
        [sys.executable, str(script), str(model), *arguments], cwd=folder, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if line.startswith("training at "):
            return process, line.split()[-1]
    raise AssertionError("".join(seen))


def test_ctrl_c_saves_a_checkpoint_drains_and_exits(tiny: Path, tmp_path: Path) -> None:
    process, url = start(tmp_path, tiny)
    try:
        with client(url) as made:
            ask = made.completions.create
            stream = ask(model="base", prompt=PROMPT, max_tokens=200, stream=True, extra_body={"ignore_eos": True})
            pieces = iter(stream)
            next(pieces)
            process.send_signal(signal.SIGINT)
            assert list(pieces)[-1].choices[0].finish_reason == "length"
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 1 and "interrupted; trained so far in" in output, output
    saved = torch.load(tmp_path / "harli-interrupted.ckpt", weights_only=True)
    assert saved["global_step"] > 0
    module = Tuned(tiny)
    record = fit(module, strategy(), max_steps=saved["global_step"] + 2, ckpt_path=tmp_path / "harli-interrupted.ckpt",
                 max_epochs=-1)  # fmt: skip
    assert len(record.losses) == 2


def test_after_kill_9_the_last_checkpoint_resumes(tiny: Path, tmp_path: Path) -> None:
    process, url = start(tmp_path, tiny)
    port = int(url.rsplit(":", 1)[1])
    kept = tmp_path / "kept" / "last.ckpt"
    try:
        assert eventually(kept.exists)
    finally:
        process.kill()
        process.communicate()
    saved = torch.load(kept, weights_only=True)
    chosen = strategy(server={"port": port})
    record = fit(Tuned(tiny), chosen, max_steps=saved["global_step"] + 2, ckpt_path=kept, max_epochs=-1)
    assert len(record.losses) == 2 and saved["global_step"] > 0
