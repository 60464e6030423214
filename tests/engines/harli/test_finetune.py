from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from ygglight.engines.harli import finetune
from ygglight.engines.harli.finetune import FinetuneSession, out_of_memory
from ygglight.engines.harli.gate import Gate, Retreat
from ygglight.engines.memory.arena import Arena

from .training import FAMILIES, PoisonedArena, ScriptedGate, batches, gpt, hooks_of, llama, plain, same, through_session

CHUNK = 512


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Two threads on such small tensors mostly wait for each other, and long where the machine is shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def press(arena: Arena) -> None:
    """KV asks for all that there is: nothing may stay leased."""
    assert arena.allocate_kv(arena.chunks) is None or pytest.fail("nothing was leased")


@pytest.fixture(scope="module")
def truth(one_thread: None) -> dict[str, Any]:
    return {name: plain(family) for name, family in FAMILIES.items()}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("arena_chunks", [None, 3, 4000])
def test_sliced_training_is_the_plain_loop(name: str, arena_chunks: int | None) -> None:
    arena = None if arena_chunks is None else PoisonedArena(CHUNK, arena_chunks)
    outcome, session = through_session(FAMILIES[name], ScriptedGate(), arena, micro_batches=4)
    assert same(outcome, plain(FAMILIES[name], micro_batches=4))
    assert session.counts.micro_batches == 4 and session.counts.replays == 0
    if arena is not None:
        assert arena.counts().leased == 0
        assert (arena.counts().peak_leased > 3) == (arena_chunks > 3)


def test_the_comparison_can_fail(truth: dict[str, Any]) -> None:
    assert not same(plain(gpt, accumulate=1), truth["gpt"])
    without_dropout, _ = through_session(gpt, ScriptedGate(), None, configure=lambda s: s.module.eval() and None)
    assert not same(without_dropout, truth["gpt"])


@pytest.mark.parametrize("name", FAMILIES)
def test_all_blocks_dropped_from_the_start(name: str, truth: dict[str, Any]) -> None:
    def drop_all(session: FinetuneSession) -> None:
        session.first_kept = 100

    outcome, session = through_session(FAMILIES[name], ScriptedGate(), PoisonedArena(CHUNK, 4000), configure=drop_all)
    assert same(outcome, truth[name])
    assert session.first_kept == 98  # one block more is kept after every micro-batch without pressure


@pytest.mark.parametrize(
    ("name", "at"),
    [*[("gpt", at) for at in (2, 4, 5, 6, 8, 9, 10, 11, 12, 13)], ("llama", 2), ("llama", 4), ("llama", 6),
     ("llama, two forwards", 3), ("llama, two forwards", 6), ("llama, two forwards", 9)],
)  # fmt: skip
def test_pressure_drops_and_offloads(name: str, at: int, truth: dict[str, Any]) -> None:
    arena = PoisonedArena(CHUNK, 4000)
    left: list[int] = []

    def squeeze() -> None:
        press(arena)
        gate.script[len(gate.passed)] = look

    def look() -> None:
        left.append(arena.pressure)
        arena.withdraw()

    gate = ScriptedGate({at: squeeze})
    outcome, session = through_session(FAMILIES[name], gate, arena)
    assert same(outcome, truth[name])
    assert left == [0], "the pressure was to be gone one quantum later"
    assert session.activations.dropped > 0 or session.activations.offloaded > 0
    assert session.counts.retreats == 0


def test_dropping_comes_before_offloading() -> None:
    arena = PoisonedArena(CHUNK, 4000)

    def need_one_block() -> None:
        assert arena.allocate_kv(arena.counts().free + 1) is None

    gate = ScriptedGate({4: need_one_block})
    _, session = through_session(gpt, gate, arena, micro_batches=1)
    assert session.activations.dropped == 1 and session.activations.offloaded == 0


@pytest.mark.parametrize(
    ("name", "at"),
    [*[("gpt", at) for at in (0, 1, 3, 5, 7, 8, 9, 11, 14, 15, 25, 28)], *[("llama", at) for at in (0, 3, 7, 15)],
     ("llama, checkpointed", 6), ("llama, reentrant", 6), ("llama, two forwards", 6), ("llama, two forwards", 11)],
)  # fmt: skip
def test_abort_anywhere_is_replayed(name: str, at: int, truth: dict[str, Any]) -> None:
    gate = ScriptedGate()
    gate.script = {at: gate.abort}
    outcome, session = through_session(FAMILIES[name], gate, PoisonedArena(CHUNK, 4000))
    assert same(outcome, truth[name])
    assert session.counts.retreats == session.counts.replays == 1


def test_abort_of_the_second_accumulated_micro_batch_and_of_its_replay(truth: dict[str, Any]) -> None:
    gate = ScriptedGate()
    aborted: list[str] = []

    def abort_backward() -> None:
        if gate.passed[-1].phase == "backward" and gate.passed[-1].index == 1 and len(aborted) < 3 and second:
            aborted.append("")
            gate.abort()

    second: list[int] = []

    class Watching(ScriptedGate):
        def boundary(self, quantum: Any) -> None:
            if quantum.phase == "other" and session_counts()[0] == 1:
                second.append(1)
            self.passed.append(quantum)
            abort_backward()
            Gate.boundary(self, quantum)

    gate = Watching()
    sessions: list[FinetuneSession] = []

    def session_counts() -> tuple[int, ...]:
        return (sessions[0].counts.micro_batches,)

    outcome, session = through_session(gpt, gate, PoisonedArena(CHUNK, 4000), configure=sessions.append)
    assert same(outcome, truth["gpt"])
    assert session.counts.replays == 3


def test_a_micro_batch_gives_way_three_times_and_then_no_more(truth: dict[str, Any]) -> None:
    class Hostile(Gate):
        def boundary(self, quantum: Any) -> None:
            self.abort()
            super().boundary(quantum)

    outcome, session = through_session(gpt, Hostile(), PoisonedArena(CHUNK, 4000))
    assert same(outcome, truth["gpt"])
    assert session.counts.retreats == 2 * finetune.MAX_REPLAYS


def test_no_room_on_the_host_means_retreat(truth: dict[str, Any]) -> None:
    arena = PoisonedArena(CHUNK, 4000)

    def squeeze() -> None:
        press(arena)
        gate.script[len(gate.passed)] = arena.withdraw

    gate = ScriptedGate({4: squeeze})
    outcome, session = through_session(gpt, gate, arena, host_bytes=0)
    assert same(outcome, truth["gpt"])
    assert session.counts.retreats == 1 and session.activations.offloaded == 0


def test_held_back_under_pressure_then_keeps_less(truth: dict[str, Any]) -> None:
    arena = PoisonedArena(CHUNK, 40)
    taken = arena.allocate_kv(20)
    assert taken and arena.allocate_kv(30) is None
    outcome, session = through_session(gpt, Gate(), arena, hold_seconds=0.01)
    assert same(outcome, truth["gpt"])
    assert session.counts.held == 2 and session.first_kept > 0
    assert arena.counts().peak_leased == 0


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("x"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_out_of_memory_is_replayed_with_checkpoints(where: str, error: Exception, truth: dict[str, Any]) -> None:
    gate = ScriptedGate()

    def fail() -> None:
        raise error

    gate.script = {3 if where == "forward" else 11: fail}
    outcome, session = through_session(gpt, gate, PoisonedArena(CHUNK, 4000))
    assert same(outcome, truth["gpt"])
    assert session.counts.out_of_memory == 1 and session.first_kept > 0


def test_out_of_memory_for_ever_is_an_error_after_three_replays() -> None:
    class Full(Gate):
        runs = 0

        def boundary(self, quantum: Any) -> None:
            self.runs += quantum.phase == "other"
            super().boundary(quantum)
            if quantum.phase == "backward":
                raise torch.OutOfMemoryError("out of memory")

    gate = Full()
    arena = PoisonedArena(CHUNK, 4000)
    with pytest.raises(torch.OutOfMemoryError):
        through_session(gpt, gate, arena)
    assert gate.runs == 1 + finetune.MAX_REPLAYS
    assert not gate.inside and arena.counts().leased == 0


def test_errors_leave_nothing_behind() -> None:
    module, blocks, loss_of = gpt()
    gate, arena = Gate(), PoisonedArena(CHUNK, 4000)
    session = FinetuneSession(module, blocks, gate, arena, "cpu", smallest=512)
    session.attach()
    hooked = hooks_of(module)
    batch = batches(1)[0]

    def bad() -> torch.Tensor:
        loss_of(batch)
        raise ValueError("a bug of the user's")

    with pytest.raises(ValueError, match="a bug"):
        session.forward(bad, 30)
    assert hooks_of(module) == 0 < hooked
    assert not gate.inside and arena.counts().leased == 0 and gate.relieve is None
    loss = session.forward(lambda: loss_of(batch), 30)  # and the next step is cut again
    with pytest.raises(ZeroDivisionError):
        session.backward(lambda: 1 / 0, loss.backward)
    assert hooks_of(module) == 0 and arena.counts().leased == 0
    with pytest.raises(RuntimeError, match="given up"):
        loss.backward()


def test_what_cannot_be_replayed_is_never_given_up() -> None:
    module, blocks, loss_of = gpt()
    gate = ScriptedGate()
    session = FinetuneSession(module, blocks, gate, None, "cpu")
    gate.script = {2: gate.abort, 8: gate.abort}
    loss = session.forward(lambda: loss_of(batches(1)[0]), 30, replayable=False)
    session.backward(loss.backward)
    assert session.counts.retreats == 0 and blocks[0].up.weight.grad is not None
    with pytest.raises(Retreat):  # the control: asked to be replayable, a bare step lets the retreat out
        gate.script = {len(gate.passed) + 2: gate.abort}
        with session.step(30, replayable=True):
            loss_of(batches(1)[0])


def test_gradients_too_large_to_copy_are_not_given_up() -> None:
    gate = ScriptedGate()
    gate.script = {26: gate.abort}
    _, session = through_session(gpt, gate, None, most_gradient_bytes=16, micro_batches=2)
    assert gate.passed[26].phase == "backward"
    assert session.counts.retreats == 0
    gate = ScriptedGate()
    gate.script = {26: gate.abort}
    _, session = through_session(gpt, gate, None, micro_batches=2)
    assert session.counts.retreats == 1


def test_quanta_come_in_order() -> None:
    gate = ScriptedGate()
    through_session(gpt, gate, None, micro_batches=1, accumulate=1, elements=1 << 20)
    seen = [(q.phase, q.index) for q in gate.passed]
    assert seen == [
        ("other", 0), *[("forward", i) for i in range(4)], *[("loss", i) for i in range(3)],
        ("backward", 4), ("loss", 1), ("loss", 2), *[("backward", i) for i in (3, 2, 1, 0)],
        ("clip", 0), ("clip", 1), ("optimizer", 0),
    ]  # fmt: skip
    assert {q.tokens for q in gate.passed} == {30}


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_blocks_have_one_quantum_each_way(reentrant: bool) -> None:
    gate = ScriptedGate()
    through_session(lambda: llama(checkpointing=reentrant), gate, None, micro_batches=1)
    assert [q.index for q in gate.passed if q.phase == "forward"] == [0, 1, 2]
    assert [q.index for q in gate.passed if q.phase == "backward"] == [3, 2, 1, 0]


def test_paused_and_resumed_by_a_decode_thread_that_takes_memory() -> None:
    arena, gate, done = PoisonedArena(CHUNK, 600), Gate(), threading.Event()
    faults: list[str] = []

    def decode() -> None:
        turn = 0
        while not done.is_set():
            turn += 1
            gate.grant(0)
            if not gate.wait_spent(5.0):
                faults.append("finetuning did not come to a halt")
            wanted = 100 + 37 * turn % 450
            deadline = time.monotonic() + 5.0
            while (chunks := arena.allocate_kv(wanted)) is None:  # finetuning is paused: it must give way all the same
                if time.monotonic() > deadline:
                    faults.append(f"no {wanted} chunks: {arena.counts()}")
                    arena.withdraw()
                    chunks = []
                    break
                time.sleep(0.0005)
            if chunks:
                arena.data[chunks] = 255
            if turn % 7 == 0:
                gate.abort()
            arena.free_kv(chunks)
            gate.grant(1 + turn % 3)
            gate.wait_spent(5.0)
        gate.close()

    thread = threading.Thread(target=decode, name="ygglight-test-decode")
    thread.start()
    try:
        outcome, session = through_session(gpt, gate, arena, micro_batches=4)
    finally:
        done.set()
        gate.close()
        thread.join()
    assert not faults
    assert same(outcome, plain(gpt, micro_batches=4))
    assert session.counts.micro_batches == 4


def test_a_module_with_no_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="no repeated blocks"):
        FinetuneSession(nn.Linear(2, 2), [], Gate(), None, "cpu")


@pytest.mark.parametrize(
    ("error", "expected"),
    [(MemoryError(), True), (RuntimeError("CUDA out of memory"), True), (RuntimeError("shape mismatch"), False),
     (ValueError("out of memory"), False)],
)  # fmt: skip
def test_out_of_memory_is_told_from_other_errors(error: Exception, expected: bool) -> None:
    assert out_of_memory(error) is expected
