"""Executors: what they ask of gate and torch, with a fake gate and the real one; SM splits with a fake driver."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ygglight.engines.harli import sm_split
from ygglight.engines.harli.executors import (
    RUNGS,
    ThreadPools,
    TimeSlices,
    Unavailable,
    choose_executor,
    usable_cores,
)
from ygglight.engines.harli.executors_cuda import GreenContexts, PriorityStreams
from ygglight.engines.harli.gate import Gate, Quantum
from ygglight.engines.harli.partitions import Partition, alone, idle, slices
from ygglight.engines.harli.scheduler import Decision
from ygglight.engines.harli.sm_split import SMSplit


class FakeGate:
    """Writes down what it is asked; quanta take as long as it is told."""

    threads: int | None

    def __init__(self, spent: bool = True) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.spent = spent
        self.running, self.threads = False, None

    def grant(self, quanta: int | None, threads: int | None = None) -> None:
        self.calls.append(("grant", quanta, threads))

    def wait_spent(self, timeout: float) -> bool:
        self.calls.append(("wait", timeout))
        return self.spent


def decision(partition: Partition, quanta: int | None, wait: float = 0.0) -> Decision:
    return Decision(partition, quanta, 0.0, "", wait)


def on_a_thread(work: Any) -> None:
    """Thread counts of torch belong to a thread: a decode thread of its own leaves the test's alone."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="ygglight-test")
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


def test_slices_let_quanta_run_after_the_step_only() -> None:
    executor, gate = TimeSlices(4), FakeGate()
    executor.begin(decision(slices(4), 3, 0.5), gate)  # type: ignore[arg-type]
    assert gate.calls == [("grant", 0, None)]
    executor.end(decision(slices(4), 3, 0.5), gate)  # type: ignore[arg-type]
    assert gate.calls[1:] == [("grant", 3, None), ("wait", 0.5)]
    assert executor.overruns == 0


def test_a_pause_grants_and_waits_for_nothing() -> None:
    executor, gate = TimeSlices(4), FakeGate()
    executor.begin(decision(alone(4), 0), gate)  # type: ignore[arg-type]
    executor.end(decision(alone(4), 0), gate)  # type: ignore[arg-type]
    assert gate.calls == [("grant", 0, None)]


def test_without_requests_finetuning_runs_freely() -> None:
    executor, gate = TimeSlices(4), FakeGate()
    executor.begin(decision(idle(4), None), gate)  # type: ignore[arg-type]
    executor.end(decision(idle(4), None), gate)  # type: ignore[arg-type]
    assert gate.calls == [("grant", None, None)]


def test_a_slow_quantum_is_left_behind() -> None:
    executor, gate = TimeSlices(4), FakeGate(spent=False)
    executor.end(decision(slices(4), 5, 0.01), gate)  # type: ignore[arg-type]
    assert gate.calls == [("grant", 5, None), ("wait", 0.01), ("grant", 0, None)]
    assert executor.overruns == 1


def test_after_a_step_beside_pools_give_quanta_all_cores() -> None:
    executor, gate = ThreadPools(8), FakeGate(spent=False)
    follow = Decision(Partition(3, 5, True), 2, 0.0, "", wait_seconds=0.25, after=4)
    on_a_thread(lambda: executor.end(follow, gate))  # type: ignore[arg-type]
    assert gate.calls == [("grant", 4, 8), ("wait", 0.25), ("grant", 0, None)]
    assert executor.afterwards == 8 and TimeSlices(8).afterwards == 0


def test_a_quantum_on_more_cores_than_are_left_is_waited_for() -> None:
    executor, gate = ThreadPools(8), FakeGate()
    beside = Decision(Partition(3, 5, True), 2, 0.0, "")
    for running, threads, waits in ((False, None, False), (True, 5, False), (True, 8, True)):
        gate.calls.clear()
        gate.running, gate.threads = running, threads
        on_a_thread(lambda: executor.begin(beside, gate))  # type: ignore[arg-type]
        assert (gate.calls[0] == ("grant", 0, None)) == waits
        assert gate.calls[-1] == ("grant", 2, 5)


def test_pools_set_the_threads_of_both_sides() -> None:
    def work() -> None:
        before = torch.get_num_threads()
        executor, gate = ThreadPools(8), FakeGate()
        executor.begin(decision(Partition(3, 5, True), 2), gate)  # type: ignore[arg-type]
        assert torch.get_num_threads() == 3
        executor.end(decision(Partition(3, 5, True), 2), gate)  # type: ignore[arg-type]
        assert gate.calls == [("grant", 2, 5)]  # and no waiting: it runs beside
        executor.begin(decision(alone(8), 0), gate)  # type: ignore[arg-type]
        assert torch.get_num_threads() == 8
        executor.begin(decision(idle(8), None), gate)  # type: ignore[arg-type]
        assert gate.calls[-1] == ("grant", None, 8)
        executor.close()
        assert torch.get_num_threads() == before

    mine = torch.get_num_threads()
    on_a_thread(work)
    assert torch.get_num_threads() == mine


@pytest.mark.parametrize("cores", [2, 3, 4, 5, 16, 96])
def test_ladders_of_pools_share_the_cores(cores: int) -> None:
    ladder = ThreadPools(cores).ladder
    assert ladder[:2] == [alone(cores), slices(cores)]
    assert len(set(ladder)) == len(ladder) <= 2 + 2 * RUNGS
    beside = ladder[2:]
    assert beside and all(rung.concurrent and rung.decode + rung.finetune <= cores for rung in beside)
    assert {Partition(1, cores - 1, True), Partition(cores - 1, 1, True)} <= set(beside)


def test_one_core_cannot_be_pools() -> None:
    with pytest.raises(Unavailable, match="1 core"):
        ThreadPools(1)


def test_the_choice_falls_back_with_one_reason(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert choose_executor("cpu", cores=2).name == "thread_pools"
        assert not caplog.records
        assert choose_executor("cpu", cores=1).name == "time_slices"
    assert len(caplog.records) == 1 and "1 core" in caplog.text
    assert 1 <= usable_cores() <= torch.get_num_threads()
    with pytest.raises(ValueError, match="cores"):
        choose_executor("cpu", cores=0)


def test_a_kind_can_be_asked_for() -> None:
    assert choose_executor("cpu", cores=4, kind="slices").name == "time_slices"
    assert choose_executor("cpu", cores=4, kind="threads").name == "thread_pools"
    with pytest.raises(ValueError, match=r"streams.*threads, slices"):
        choose_executor("cpu", cores=4, kind="streams")


@pytest.mark.parametrize(
    ("missing", "name", "reasons"),
    [((), "green", 0), (("green",), "priority", 1), (("green", "priority"), "time_slices", 2)],
)
def test_the_choice_on_cuda_goes_down_one_by_one(
    missing: tuple[str, ...], name: str, reasons: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def executor(kind: str) -> Any:
        def make(device: torch.device) -> SimpleNamespace:
            if kind in missing:
                raise Unavailable(f"no {kind} here")
            return SimpleNamespace(name=kind)

        return make

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=132))
    monkeypatch.setattr("ygglight.engines.harli.executors_cuda.GreenContexts", executor("green"))
    monkeypatch.setattr("ygglight.engines.harli.executors_cuda.PriorityStreams", executor("priority"))
    with caplog.at_level(logging.INFO):
        assert choose_executor("cuda").name == name
    assert [record.getMessage().split(": ")[1] for record in caplog.records] == [f"no {m} here" for m in missing]
    assert len(caplog.records) == reasons


# With the real gate: a training thread that comes to a boundary before each quantum.


@contextmanager
def trainer(gate: Gate, quanta: int, release: threading.Event | None = None) -> Iterator[list[int]]:
    """A thread that does so many quanta; the second waits for `release`, if that is given. Yields what it has done."""
    done: list[int] = []

    def work() -> None:
        with gate.training():
            for number in range(quanta):
                gate.boundary(Quantum("forward", number, 8))
                if number == 1 and release is not None:
                    release.wait()
                done.append(number)

    thread = threading.Thread(target=work, name="ygglight-trainer")
    gate.grant(0)
    thread.start()
    try:
        while gate.waiting_for is None:
            threading.Event().wait(0.001)
        yield done
    finally:
        if release is not None:
            release.set()
        gate.close()
        thread.join()


def test_exactly_the_granted_quanta_run_between_two_steps() -> None:
    executor, gate = TimeSlices(1), Gate()
    with trainer(gate, 20) as done:
        for number, count in enumerate(itertools.accumulate([3, 1, 2, 4])):
            granted = [3, 1, 2, 4][number]
            before = len(done)
            executor.begin(decision(slices(1), granted, 30.0), gate)
            assert len(done) == before  # nothing runs during the step
            executor.end(decision(slices(1), granted, 30.0), gate)
            assert len(done) == count
    assert executor.overruns == 0


def test_decoding_goes_on_beside_a_quantum_that_does_not_end() -> None:
    executor, gate, release = TimeSlices(1), Gate(), threading.Event()
    with trainer(gate, 6, release) as done:
        executor.end(decision(slices(1), 3, 0.05), gate)  # returns, though the second quantum hangs
        assert executor.overruns == 1
        assert len(done) == 1 and gate.running
        release.set()
        assert gate.wait_spent(30.0)
        assert len(done) == 2  # the third was called back


def test_pools_run_quanta_beside_the_step() -> None:
    executor, gate = ThreadPools(2), Gate()

    def work() -> None:
        with trainer(gate, 6) as done:
            executor.begin(decision(Partition(1, 1, True), 4), gate)
            assert gate.wait_spent(30.0)  # during the step, before end()
            assert len(done) == 4
            executor.end(decision(Partition(1, 1, True), 4), gate)
            assert {threads for _, _, threads, _ in gate.spans()} == {1}
        executor.close()

    on_a_thread(work)


# SM sets, with a driver that keeps account.


class Driver:
    """The calls of ``cuda.bindings.driver`` that a split needs, for a device of so many SMs."""

    CUdevResourceType = SimpleNamespace(CU_DEV_RESOURCE_TYPE_SM=1)
    CUgreenCtxCreate_flags = SimpleNamespace(CU_GREEN_CTX_DEFAULT_STREAM=1)
    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)

    def __init__(self, sms: int, fails: str = "") -> None:
        self.sms, self.fails = sms, fails
        self.splits = 0
        self.live: dict[int, set[int]] = {}
        self.streams: dict[int, set[int]] = {}

    def resource(self, sms: set[int]) -> SimpleNamespace:
        return SimpleNamespace(sm=SimpleNamespace(smCount=len(sms)), owned=sms)

    def status(self, name: str) -> int:
        return 801 if name == self.fails else 0

    def cuInit(self, flags: int) -> tuple[int]:
        return (self.status("cuInit"),)

    def cuDeviceGet(self, index: int) -> tuple[int, int]:
        return 0, index

    def cuDeviceGetDevResource(self, device: int, kind: int) -> tuple[int, Any]:
        return self.status("cuDeviceGetDevResource"), self.resource(set(range(self.sms)))

    def cuDevSmResourceSplitByCount(self, wanted: int, whole: Any, flags: int, least: int) -> tuple[Any, ...]:
        self.splits += 1
        ids = sorted(whole.owned)
        groups = [self.resource(set(ids[i * least : (i + 1) * least])) for i in range(wanted)]
        return self.status("cuDevSmResourceSplitByCount"), groups, wanted, self.resource(set(ids[wanted * least :]))

    def cuDevResourceGenerateDesc(self, parts: list[Any], count: int) -> tuple[int, set[int]]:
        assert count == len(parts)
        return 0, set().union(*(part.owned for part in parts))

    def cuGreenCtxCreate(self, description: set[int], device: int, flags: int) -> tuple[int, int]:
        handle = len(self.live) + 1000
        if not self.status("cuGreenCtxCreate"):
            self.live[handle] = description
        return self.status("cuGreenCtxCreate"), handle

    def cuGreenCtxStreamCreate(self, context: int, flags: int, priority: int) -> tuple[int, int]:
        self.streams[len(self.streams) + 1] = self.live[context]
        return self.status("cuGreenCtxStreamCreate"), len(self.streams)

    def cuGreenCtxDestroy(self, context: int) -> tuple[int]:
        del self.live[context]
        return (0,)


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams are their handles: there is no CUDA here."""
    monkeypatch.setattr(sm_split.torch.cuda, "ExternalStream", lambda handle, device: handle)


CUDA = torch.device("cuda", 0)


@pytest.mark.usefixtures("streams")
@pytest.mark.parametrize("sms", [32, 108, 132, 148])
def test_levels_of_one_split_are_disjoint_and_use_every_sm(sms: int) -> None:
    driver = Driver(sms)
    split = SMSplit(CUDA, driver=driver)
    assert sum(split.sizes) == split.sms == sms
    for count in range(1, len(split.sizes)):
        decode = driver.streams[int(split.stream(range(count)))]  # type: ignore[call-overload]
        finetune = driver.streams[int(split.stream(range(count, len(split.sizes))))]  # type: ignore[call-overload]
        assert not decode & finetune
        assert decode | finetune == set(range(sms))
        assert len(decode) == sum(split.sizes[:count])
        assert min(len(decode), len(finetune)) >= 16
    assert driver.splits == 1
    split.close()
    assert not driver.live


@pytest.mark.parametrize(
    ("driver", "reason"),
    [
        (Driver(20), "two groups"),
        (Driver(132, fails="cuInit"), "cuInit failed"),
        (Driver(132, fails="cuDeviceGetDevResource"), "cuDeviceGetDevResource failed"),
        (Driver(132, fails="cuDevSmResourceSplitByCount"), "Split"),
        (SimpleNamespace(), "cuda-bindings"),
    ],
)
def test_what_cannot_be_split_says_why(driver: Any, reason: str) -> None:
    with pytest.raises(Unavailable, match=reason):
        SMSplit(CUDA, driver=driver)


def test_no_bindings_is_a_reason_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cuda.bindings.driver", None)
    with pytest.raises(Unavailable, match="pip install cuda-bindings"):
        SMSplit(CUDA)


# Streams, with a CUDA that only says which stream is current and who waited for whom.


class Stream:
    """A stream by name."""

    def __init__(self, name: object = "plain", priority: int = 0) -> None:
        self.name, self.priority, self.waited, self.synchronized = name, priority, list[Stream](), 0

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return 0, -5

    def wait_stream(self, other: Stream) -> None:
        self.waited.append(other)

    def synchronize(self) -> None:
        self.synchronized += 1


class Split:
    """Groups of 16 SMs; a stream carries the groups that it was made of."""

    sizes = [16] * 7 + [20]

    def __init__(self) -> None:
        self.made: list[Stream] = []
        self.closed = False

    def stream(self, groups: range, priority: int = 0) -> Stream:
        self.made.append(Stream(set(groups), priority))
        return self.made[-1]

    def close(self) -> None:
        assert all(stream.synchronized for stream in self.made)  # work on them is over before their SMs go
        self.closed = True


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> dict[str, Stream]:
    state = {"current": Stream("default")}
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: state["current"])
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: state.update(current=stream))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=132))
    return state


def test_decoding_moves_between_streams_in_order(cuda: dict[str, Stream]) -> None:
    default, gate = cuda["current"], FakeGate()
    executor = PriorityStreams(CUDA)
    assert executor.ladder == [alone(132), slices(132), Partition(132, 132, True)]
    executor.begin(decision(executor.ladder[2], 2), gate)  # type: ignore[arg-type]
    stream = cuda["current"]
    assert stream.priority == -5 and stream.waited == [default]
    assert executor.bind().priority == 0 and executor.held is None  # all SMs: nothing is held from decoding
    executor.begin(decision(alone(132), 0), gate)  # type: ignore[arg-type]
    assert cuda["current"] is stream and stream.waited == [default]
    executor.close()
    assert cuda["current"] is default and stream.synchronized


def test_green_contexts_give_both_sides_other_groups(cuda: dict[str, Stream]) -> None:
    default, gate, split = cuda["current"], FakeGate(), Split()
    executor = GreenContexts(CUDA, split=split)  # type: ignore[arg-type]
    beside = executor.ladder[2:]
    assert [(rung.decode, rung.finetune) for rung in beside] == [(16 * k, 132 - 16 * k) for k in range(1, 8)]
    before = default
    for count, rung in enumerate(beside, 1):
        executor.begin(decision(rung, 2), gate)  # type: ignore[arg-type]
        decode, finetune = cuda["current"], executor.bind()
        assert decode.name == set(range(count)) and finetune.name == set(range(count, 8))  # type: ignore[attr-defined]
        assert decode.waited == [before] and executor.held == rung.finetune
        executor.unbind()
        before = decode
    assert executor.held is None
    # A micro-batch keeps what it was bound to, whatever comes; decoding in turn has the whole device.
    bound = executor.bind()
    executor.begin(decision(slices(132), 1), gate)  # type: ignore[arg-type]
    assert executor.held == 20 and cuda["current"].name == CUDA
    assert gate.calls[-1] == ("grant", 0, None)
    executor.unbind()
    assert executor.bind() is not bound and executor.held == 132
    executor.close()
    assert split.closed and cuda["current"] is default


@pytest.mark.parametrize("call", ["cuGreenCtxCreate", "cuGreenCtxStreamCreate"])
def test_contexts_that_cannot_be_made_are_a_reason_and_leave_none_behind(call: str, cuda: dict[str, Stream]) -> None:
    driver = Driver(132, fails=call)
    with pytest.raises(Unavailable, match=f"{call} failed"):
        GreenContexts(CUDA, split=SMSplit(CUDA, driver=driver))
    assert not driver.live


def test_one_priority_is_no_priority(cuda: dict[str, Stream], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stream, "priority_range", staticmethod(lambda: (0, 0)))
    with pytest.raises(Unavailable, match="one stream priority"):
        PriorityStreams(CUDA)
