from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from ygglight.engines.harli.gate import Gate, Phase, Quantum, Retreat

LONG = 20.0  # seconds; only a broken gate takes them


def quantum(index: int, phase: Phase = "forward") -> Quantum:
    return Quantum(phase, index, 8)


class Trainer:
    """A thread that goes through boundaries and tells how far it came."""

    def __init__(self, gate: Gate, quanta: int, work: Callable[[int], None] = lambda index: None) -> None:
        self.gate, self.quanta, self.work = gate, quanta, work
        self.done: list[int] = []
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, name="ygglight-test-trainer", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            with self.gate.training():
                for index in range(self.quanta):
                    self.gate.boundary(quantum(index))
                    self.work(index)
                    self.done.append(index)
        except BaseException as error:
            self.error = error

    def join(self) -> None:
        self.thread.join(LONG)
        assert not self.thread.is_alive(), "the training thread hangs"


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.close()


def test_runs_freely_until_told_otherwise(gate: Gate) -> None:
    trainer = Trainer(gate, 5)
    trainer.join()
    assert trainer.done == [0, 1, 2, 3, 4] and not gate.inside


def test_exactly_the_granted_quanta_run(gate: Gate) -> None:
    gate.grant(0)
    trainer = Trainer(gate, 6)
    while not gate.inside:
        time.sleep(0.0005)
    assert gate.wait_spent(LONG) and trainer.done == []
    assert gate.waiting_for == quantum(0) and not gate.running
    gate.grant(2)
    assert gate.wait_spent(LONG) and trainer.done == [0, 1] and gate.waiting_for == quantum(2)
    gate.grant(3)
    assert gate.wait_spent(LONG) and trainer.done == [0, 1, 2, 3, 4]
    gate.grant(None)
    assert gate.wait_spent(LONG)  # outside in the end
    trainer.join()
    assert len(trainer.done) == 6


def test_a_grant_replaces_the_one_before(gate: Gate) -> None:
    gate.grant(100)
    gate.grant(1)
    trainer = Trainer(gate, 3)
    while not trainer.done:
        time.sleep(0.0005)
    assert gate.wait_spent(LONG) and trainer.done == [0]
    gate.close()
    trainer.join()


def test_waiting_for_what_never_ends_times_out(gate: Gate) -> None:
    go = threading.Event()
    trainer = Trainer(gate, 1, lambda index: go.wait(LONG) and None)
    while not gate.running or gate.current is None:
        time.sleep(0.0005)
    assert not gate.wait_spent(0.01)
    assert gate.current == quantum(0)
    go.set()
    trainer.join()
    assert gate.wait_spent(0.0)


def test_nothing_is_gated_outside_of_training(gate: Gate) -> None:
    gate.grant(0)
    gate.boundary(quantum(0))  # would wait for ever inside
    assert gate.wait_spent(0.0) and gate.spans() == []


def test_close_frees_everybody_for_ever(gate: Gate) -> None:
    gate.grant(0)
    trainer = Trainer(gate, 50)
    while gate.waiting_for is None:
        time.sleep(0.0005)
    gate.close()
    trainer.join()
    assert len(trainer.done) == 50 and gate.wait_spent(0.0)
    gate.grant(0)
    gate.abort()
    late = Trainer(gate, 3)
    late.join()
    assert late.done == [0, 1, 2] and late.error is None


def test_abort_reaches_a_thread_that_waits(gate: Gate) -> None:
    gate.abortable = True
    gate.grant(0)
    trainer = Trainer(gate, 3)
    while gate.waiting_for is None:
        time.sleep(0.0005)
    gate.abort()
    trainer.join()
    assert isinstance(trainer.error, Retreat) and trainer.done == [] and not gate.inside


def test_abort_of_what_cannot_be_aborted_is_forgotten(gate: Gate) -> None:
    gate.abort()  # nothing is under way
    gate.abortable = True
    with gate.training():
        gate.boundary(quantum(0))
        gate.abortable = False
        gate.abort()
        gate.boundary(quantum(0, "clip"))
        gate.abortable = True
        gate.boundary(quantum(0, "other"))


def test_retreat_passes_those_who_catch_errors() -> None:
    with pytest.raises(Retreat):
        try:
            raise Retreat
        except Exception:
            pytest.fail("a step's own error handling must not see it")


def test_spans_hold_the_work_and_not_the_waiting() -> None:
    now = [0.0]
    gate = Gate(clock=lambda: now[0])

    def wait() -> None:
        now[0] += 100.0

    gate.relieve = wait
    with gate.training():
        gate.boundary(quantum(0))
        now[0] += 1.0
        with gate.decoding():
            gate.boundary(quantum(1))
            now[0] += 2.0
        gate.boundary(quantum(2))
        with gate.decoding():
            now[0] += 3.0
        now[0] += 1.0
    threads = torch.get_num_threads()
    assert gate.spans() == [
        (quantum(0), 1.0, threads, True), (quantum(1), 2.0, threads, True), (quantum(2), 4.0, threads, True),
    ]  # fmt: skip
    assert gate.spans() == []
    with gate.training():
        gate.boundary(quantum(3))
    assert [concurrent for *_, concurrent in gate.spans()] == [False]


def test_threads_are_set_at_the_boundary_and_put_back(gate: Gate) -> None:
    before = torch.get_num_threads()
    gate.grant(None, threads=before + 1)
    assert torch.get_num_threads() == before
    with gate.training():
        assert torch.get_num_threads() == before
        gate.boundary(quantum(0))
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    assert [threads for _, _, threads, _ in gate.spans()] == [before + 1]


def test_another_thread_of_the_step_keeps_its_threads(gate: Gate) -> None:
    before = torch.get_num_threads()
    gate.grant(None, threads=before + 1)
    seen: list[int] = []

    def device_thread() -> None:
        own = torch.get_num_threads()
        gate.boundary(quantum(0))
        seen.append(torch.get_num_threads() - own)

    with gate.training():
        thread = threading.Thread(target=device_thread)
        thread.start()
        thread.join(LONG)
    assert seen == [0]


def test_memory_is_given_back_while_waiting(gate: Gate) -> None:
    looked = threading.Semaphore(0)
    gate.relieve = looked.release
    gate.grant(0)
    trainer = Trainer(gate, 1)
    assert all(looked.acquire(timeout=LONG) for _ in range(3))
    assert trainer.done == []
    gate.close()
    trainer.join()


def test_leaving_when_the_step_raises(gate: Gate) -> None:
    with pytest.raises(ZeroDivisionError), gate.training(), gate.training():
        gate.boundary(quantum(0))
        1 / 0  # noqa: B018
    assert not gate.inside and len(gate.spans()) == 1
    with pytest.raises(RuntimeError, match="without enter"):
        gate.leave()


def test_holding_is_nothing_to_wait_for(gate: Gate) -> None:
    gate.grant(5)
    asked: list[bool] = []

    def until() -> bool:
        asked.append(gate.wait_spent(0.0))
        return len(asked) == 3

    with gate.training():
        assert gate.hold(until, LONG)
        assert not gate.hold(lambda: False, 0.0)
    assert asked == [True, True, True]


@pytest.mark.parametrize(("quanta", "threads", "name"), [(-1, None, "quanta"), (1, 0, "threads")])
def test_bad_grants_are_refused(gate: Gate, quanta: int, threads: int | None, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        gate.grant(quanta, threads)


def test_a_device_that_lags_behind_is_waited_for() -> None:
    class Device:
        """Marks are numbers; those up to `reached` have passed."""

        marks, reached = 0, 0
        waited: list[int]

        def mark(self) -> int:
            self.marks += 1
            return self.marks

        def passed(self, mark: int) -> bool:
            return mark <= self.reached

        def wait(self, mark: int) -> None:
            self.waited.append(mark)
            self.reached = max(self.reached, mark)

        def seconds(self, start: int, stop: int) -> float:
            return float(stop - start)

    device = Device()
    device.waited = []
    gate = Gate(stopwatch=device)
    with gate.training():
        for index in range(4):
            gate.boundary(quantum(index))
        # Marks: start 1, stop 2, start 3, stop 4, ...: the host is one quantum ahead of what it waited for, no more.
        assert device.waited == [2, 4] and device.marks == 7
    assert not gate.wait_spent(0.001)
    assert len(gate.spans()) == 2
    device.reached = 99
    assert gate.wait_spent(0.0) and len(gate.spans()) == 2
