"""What is measured at the start, with a fake clock and a decoder that takes what it is told to."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ygglight.engines.harli.executors import ThreadPools, TimeSlices
from ygglight.engines.harli.gate import Gate, Quantum
from ygglight.engines.harli.measure import BESIDE_STEPS, PHASES, Measurements
from ygglight.engines.harli.partitions import alone
from ygglight.engines.harli.predictor import LatencyPredictor
from ygglight.engines.memory.arena import Arena

PAGE = 16


class FakeDecoder:
    """Takes a millisecond, and a microsecond a page."""

    page = PAGE

    def __init__(self, arena: Arena) -> None:
        self.arena, self.now, self.seen = arena, 0.0, []  # type: ignore[var-annotated]

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // PAGE)

    def _step(self, kind: str, pages: int, count: int) -> Any:
        self.now += 1e-3 + 1e-6 * pages
        self.seen.append((kind, pages, count))
        return SimpleNamespace(logits=torch.zeros(count, 1, 4))

    def decode(self, tables: list[list[int]], lengths: list[int], tokens: torch.Tensor) -> Any:
        assert len({page for table in tables for page in table}) == sum(map(len, tables)), "pages are shared"
        return self._step("decode", sum(map(len, tables)), len(tokens))

    def prefill(self, pages: list[int], start: int, tokens: torch.Tensor) -> Any:
        return self._step("prefill", len(pages), 1)


class HeldGate(Gate):
    """As if a quantum ran all the time."""

    held: Quantum | None = None

    @property
    def running(self) -> bool:
        return self.held is not None

    @property
    def current(self) -> Quantum | None:
        return self.held

    @contextmanager
    def decoding(self) -> Any:
        yield


def measurements(executor: Any, chunks: int = 64, **sizes: int) -> tuple[Measurements, FakeDecoder, LatencyPredictor]:
    decoder, predictor = FakeDecoder(Arena(64, chunks)), LatencyPredictor(executor.units)
    options = {"max_batch": 4, "prefill_chunk": 32, "max_context": 128} | sizes
    made = Measurements(decoder, executor, predictor, clock=lambda: decoder.now, **options)  # type: ignore[arg-type]
    return made, decoder, predictor


@pytest.fixture(autouse=True)
def threads_as_before() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_alone_every_size_is_told_and_all_pages_come_back() -> None:
    made, decoder, predictor = measurements(TimeSlices(2))
    made.alone(Gate())
    assert {kind for kind, _, _ in decoder.seen} == {"decode", "prefill"}
    assert {count for kind, _, count in decoder.seen if kind == "decode"} == {1, 2, 4}
    assert predictor.solo(4, 4 * 112, alone(2)) == pytest.approx(1.03e-3, rel=0.05)
    assert decoder.arena.counts().free == 64


def test_a_size_that_does_not_fit_now_is_left_out_and_presses_nobody() -> None:
    made, decoder, _ = measurements(TimeSlices(2))
    taken = decoder.arena.allocate_kv(62)
    assert taken is not None
    made.alone(Gate())
    assert decoder.seen and max(pages for _, pages, _ in decoder.seen) <= 2
    assert decoder.arena.pressure == 0 and decoder.arena.counts().free == 2


def test_time_slices_have_nothing_beside_them() -> None:
    made, _, _ = measurements(TimeSlices(2))
    assert not made.beside_left


def test_beside_is_measured_until_each_phase_was_seen_often() -> None:
    made, decoder, predictor = measurements(ThreadPools(2))
    gate = HeldGate()
    made.alone(gate)
    rung = next(rung for rung in made._executor.ladder if rung.concurrent)
    unseen = predictor.corun(4, 4 * 112, rung, "forward")
    made.beside(gate, stop=lambda: False)
    seen = len(decoder.seen)
    gate.held = Quantum("optimizer", 0, 8)
    made.beside(gate, stop=lambda: False)
    assert len(decoder.seen) == seen, "nothing ran that could be measured beside"
    gate.held = Quantum("forward", 0, 8)
    made.beside(gate, stop=lambda: True)
    assert len(decoder.seen) == seen, "somebody waited"
    for phase in ("forward", "backward"):
        assert made.beside_left
        gate.held = Quantum(phase, 0, 8)  # type: ignore[arg-type]
        for _ in range(BESIDE_STEPS):
            made.beside(gate, stop=lambda: False)
    assert not made.beside_left and phase in PHASES
    assert predictor.corun(4, 4 * 112, rung, "forward") < unseen
