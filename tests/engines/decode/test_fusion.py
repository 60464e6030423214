"""A decoder's passes of one token: fused when asked for or when that measures faster, and the text stays the same."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from ygglight.engines.decode import Decoder, decoder, fused, fusion
from ygglight.engines.decode.fused import FusedAttention
from ygglight.kernels.cluster_decode import Choice, decode_block

from .test_fused import make

TOKENS = torch.arange(9) * 5 % 97

pytestmark = pytest.mark.usefixtures("own_cache", "one_thread")


def write(made: Decoder, count: int = 8) -> Tensor:
    logits = [made.append(TOKENS).logits[0, -1]]
    for _ in range(count):
        logits.append(made.append(logits[-1].argmax()[None]).logits[0, -1])
    return torch.stack(logits)


def test_when_asked_for() -> None:
    model = make("llama")
    expected, fused = write(Decoder(model, 64, fused=False)), Decoder(model, 64, fused=True)
    decision = fused.single.decision
    assert decision is not None and decision.way == "torch" and decision.fused is not None
    before = decision.fused.calls
    actual = write(fused)
    assert decision.fused.calls - before == 8 * 3  # the prompt is not among them
    assert float((actual - expected).norm() / expected.norm()) < 1e-5
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_cpu_and_compiled_passes_are_left_alone() -> None:
    model = make("llama")
    plain = Decoder(model, 64)
    write(plain, 1)
    assert plain.single.decision is None  # nothing is recorded, nothing is measured
    decision = Decoder(model, 64, compile=True, fused=True).single.decision
    assert decision is not None and decision.fused is None


class Replays:
    """Stands for CUDA graphs."""

    def __init__(self, run: Any) -> None:
        self.run, self.seen = run, []

    def __call__(self, *inputs: Any) -> Any:
        self.seen.append(inputs)
        return self.run(*inputs)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A device with two ways, whose times are given; what was timed is in ``.steps``."""

    machine = SimpleNamespace(seconds={}, steps=[])

    def block(name: str) -> Any:
        def run(*args: Any, **kwargs: Any) -> Tensor:
            ran.append(name)
            return decode_block(*args, **kwargs)

        return run

    def timed(run: Any, width: int, device: torch.device) -> float:
        ran.clear()
        run(width)
        return float(machine.seconds[ran[0] if ran else "plain"])

    ran: list[str] = []
    ways = {name: block(name) for name in ("split_k", "cluster 4")}
    monkeypatch.setattr(fusion, "block_ways", lambda device: (ways, "made up"))
    monkeypatch.setattr(fusion, "timed", timed)
    monkeypatch.setattr(fused, "choose_path", lambda *args: Choice("cluster", "made up"))
    monkeypatch.setattr(decoder, "Graphs", lambda run: machine.steps.append(Trial(run)) or machine.steps[-1])
    return machine


class Trial(Replays):
    """The first call records with what is in place; later ones replay that."""

    now: Any = None

    def __call__(self, *inputs: Any) -> Any:
        single = self.run.__self__.single
        if not self.seen:
            self.now = single._now
        before, single._now = single._now, self.now
        try:
            return super().__call__(*inputs)
        finally:
            single._now = before


def recorded(model: Any) -> Decoder:
    """A decoder that believes in graphs."""
    made = Decoder(model, 64)
    made._graphs = Replays(made._run)  # type: ignore[assignment]
    return made


@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize("way", ["split_k", "cluster 4", "plain"])
def test_what_measures_fastest_is_taken_in_the_midst_of_a_text(machine: Any, kind: str, way: str) -> None:
    model = make(kind)
    expected = write(Decoder(model, 64, fused=False))
    machine.seconds = {"plain": 2e-3, "split_k": 3e-3, "cluster 4": 3e-3} | {way: 1e-3}
    made = recorded(model)
    actual = write(made)
    decision = made.single.decision
    assert decision is not None and decision.way == way
    assert float((actual - expected).norm() / expected.norm()) < 1e-5
    assert (decision.fused is not None) == (way != "plain")
    assert len(machine.steps) == 3
    for trial in machine.steps:  # half of the cache is attended to, at least, as far as the window goes
        masks = trial.seen[0][3]
        for name, window in made.kinds.items():
            attended = int(masks[name].sum())
            assert attended >= 32 if window is None else window <= attended <= 2 * window
    machine.seconds[way] = 9.0
    again = recorded(model)
    write(again, 1)
    assert again.single.decision is not None and again.single.decision.way == way  # remembered
    assert not any("forward" in vars(module) for module in model.modules())


def test_under_a_block_that_is_in_place_already(machine: Any) -> None:
    """A callback's: nothing is left to measure, its block runs, and it is still there afterwards."""
    model = make("llama")
    machine.seconds = {"plain": 2e-3, "split_k": 1e-3, "cluster 4": 1e-3}
    earlier = Decoder(model, 64, fused=True)
    with FusedAttention(model) as outer:
        calls = outer.calls
        made = recorded(model)
        write(made, 2)
        assert made.single.decision is not None and "forward of its own" in made.single.decision.reason
        assert outer.calls - calls == 2 * 3
        write(earlier, 2)  # its own block, inside
        assert outer.calls - calls == 2 * 3
        write(made, 1)
        assert outer.calls - calls == 3 * 3
    assert not any("forward" in vars(module) for module in model.modules())


CPU = torch.device("cpu")


def test_clusters_that_would_run_something_else_are_not_measured(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All layers are of float32, which the cluster block does not take."""
    model, prepared = make("llama"), []
    machine.seconds = {"plain": 2e-3, "split_k": 3e-3, "cluster 4": 1e-3}
    monkeypatch.setattr(fused, "choose_path", lambda *args: Choice("split_k", "it takes no float32"))

    def prepare(fused: FusedAttention | None) -> fusion.Trial:
        prepared.append(fused)
        return fusion.Trial(lambda: model(TOKENS[None]))

    decision = fusion.decide(model, CPU, prepare, key={"of": "both"})
    assert set(decision.seconds) == {"plain", "split_k"} and len(prepared) == 2
    decision = fusion.decide(model, CPU, prepare, cluster_size=4, key={"of": "clusters"})
    assert decision.way == "plain" and decision.reason == "it takes no float32"


@pytest.mark.parametrize(
    ("failure", "words"),
    [(torch.OutOfMemoryError, "memory"), (MemoryError, "memory"), (OSError, "OSError: made up")],
)
def test_a_lack_of_memory_is_not_remembered(
    machine: Any, monkeypatch: pytest.MonkeyPatch, failure: type[Exception], words: str
) -> None:
    def fails(*args: Any, **kwargs: Any) -> Tensor:
        raise failure("made up")

    model = make("llama")
    machine.seconds = {"plain": 2e-3, "split_k": 1e-3, "cluster 4": 3e-3}
    ways = fusion.block_ways(CPU)

    def decide() -> fusion.Decision:
        def prepare(fused: FusedAttention | None) -> fusion.Trial:
            cache = DynamicCache(config=model.config)
            model(TOKENS[None], past_key_values=cache)
            return fusion.Trial(lambda: model(TOKENS[None, :1], past_key_values=cache), lambda: fused or nullcontext())

        with torch.no_grad():
            return fusion.decide(model, CPU, prepare, key={})

    with monkeypatch.context() as patch:
        patch.setattr(fusion, "block_ways", lambda device: (dict.fromkeys(ways[0], fails), "made up"))
        decision = decide()
    assert decision.way == "plain" and words in decision.reason
    assert not any("forward" in vars(module) for module in model.modules())
    assert decide().way == "split_k"
