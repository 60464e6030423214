"""Timing widths side by side, on a clock that the tests turn themselves."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import pytest
import torch

from ygglight.engines.profiling import measure, measure_widths
from ygglight.engines.yggdrasil.objective import Latency

CPU = torch.device("cpu")
WIDTHS = (1, 2, 4, 8)


class Machine:
    """Runs take what ``cost(width, calls so far of this width, time)`` says, and nothing else takes any time."""

    def __init__(self, cost: Callable[[int, int, float], float]) -> None:
        self.cost, self.now, self.calls = cost, 0.0, list[int]()

    def __call__(self, width: int) -> None:
        seconds = self.cost(width, self.calls.count(width), self.now)
        self.calls.append(width)
        self.now += seconds


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Machine, dict[int, float]]]:
    def run(
        cost: Callable[[int, int, float], float], widths: Sequence[int] = WIDTHS, **options: float
    ) -> tuple[Machine, dict[int, float]]:
        machine = Machine(cost)
        monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: machine.now))
        return machine, measure_widths(machine, widths, CPU, **options)

    return run


Run = Callable[..., tuple[Machine, dict[int, float]]]


def test_the_times_are_found(on: Run) -> None:
    _, found = on(lambda width, *_: 0.01 + 0.001 * width)
    assert list(found) == list(WIDTHS)
    assert found == pytest.approx({width: 0.01 + 0.001 * width for width in WIDTHS})


def test_rounds_go_over_all_widths_in_turn(on: Run) -> None:
    machine, _ = on(lambda *_: 0.001)
    first = [width for width in WIDTHS for _ in range(2)]  # to warm up, and the first time
    assert machine.calls == first + list(WIDTHS) * (measure.ROUNDS - 1)


def test_drift_hits_all_alike(on: Run) -> None:
    """A machine that gets slower and slower: widths that are equally fast stay so, in turns; one after the other they
    would not."""

    def cost(width: int, calls: int, now: float) -> float:
        return 0.01 * (1 + now)

    _, found = on(cost)
    assert found[8] / found[1] < 1.1
    machine, alone = Machine(cost), {}
    for width in WIDTHS:
        times = []
        for _ in range(measure.ROUNDS):
            before = machine.now
            machine(width)
            times.append(machine.now - before)
        alone[width] = statistics.median(times)
    assert alone[8] / alone[1] > 1.2


def test_the_first_run_does_not_count(on: Run) -> None:
    """It compiles, records graphs, fills caches."""
    _, found = on(lambda width, calls, _: 1.0 if calls == 0 else 0.001 * width)
    assert found == pytest.approx({width: 0.001 * width for width in WIDTHS})


def test_a_disturbed_round_does_not_count(on: Run) -> None:
    _, found = on(lambda width, calls, _: 0.5 if calls in (3, 5) else 0.001 * width)
    assert found == pytest.approx({width: 0.001 * width for width in WIDTHS})


def test_a_wider_one_is_never_faster(on: Run) -> None:
    seconds = {1: 0.002, 2: 0.001, 4: 0.004, 8: 0.003}
    _, found = on(lambda width, *_: seconds[width])
    assert list(found.values()) == pytest.approx([0.002, 0.002, 0.004, 0.004])


@pytest.mark.parametrize("budget", [0.0, 1.0, 5.0, 20.0, 60.0])
def test_the_budget_is_kept(on: Run, budget: float) -> None:
    machine, found = on(lambda *_: 1.0, budget_seconds=budget)
    # Over it by what was under way: the second width's start, and one round that every width is due.
    assert machine.now <= max(budget, 2.0) + 2 + len(found)
    assert found[1] == 1.0 and 1 in machine.calls
    for width in found:
        assert machine.calls.count(width) >= 3, "a warm-up and two times"
    assert set(machine.calls) == set(found)
    whole = len(WIDTHS) * (measure.ROUNDS + 1)
    assert (len(machine.calls) == whole) == (budget >= whole), "time that is there is used"


def test_a_single_width(on: Run) -> None:
    machine, found = on(lambda *_: 1.0, widths=(3,), budget_seconds=0.0)
    assert found == {3: 1.0} and len(machine.calls) == 3


def test_beyond_a_width_that_cannot_win_nothing_is_run(on: Run) -> None:
    seconds = {1: 0.001, 2: 0.002, 4: 0.1, 8: 0.2}
    machine, found = on(lambda width, *_: seconds[width], give_up=9.0)
    assert 8 not in machine.calls and list(found) == [1, 2, 4]
    machine, found = on(lambda width, *_: seconds[width])
    assert 8 in machine.calls and list(found) == list(WIDTHS)


def test_the_width_that_cannot_win_stays_as_a_warning(on: Run) -> None:
    """Without it the table would end at 0.001 s, and say so of all that is wider."""
    _, found = on(lambda width, *_: 0.001 if width == 1 else 0.1, give_up=9.0)
    assert Latency(tuple(found), tuple(found.values()))(8) >= 0.1


def test_errors_of_the_work_are_passed_on() -> None:
    def broken(width: int) -> None:
        raise MemoryError(f"no room for {width}")

    with pytest.raises(MemoryError, match="no room for 1"):
        measure_widths(broken, WIDTHS, CPU)


def test_on_the_real_clock() -> None:
    """More work takes longer, by about as much."""
    matrix = torch.randn(160, 160)

    def work(width: int) -> None:
        for _ in range(20 * width):
            matrix @ matrix

    found = measure_widths(work, (1, 16), CPU, budget_seconds=1.0)
    assert 4 < found[16] / found[1] < 64
