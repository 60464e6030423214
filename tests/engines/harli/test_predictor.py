"""The two-stage predictor against synthetic machines: checks P1 and P2 of the brief, outliers, drift, cold start."""

from __future__ import annotations

import itertools
import json
import math
import random

import numpy as np
import pytest

from ygglight.engines.harli.corun import DEFAULT_ALONE, DEFAULT_BESIDE, EXPIRY
from ygglight.engines.harli.partitions import Partition, alone, idle, slices
from ygglight.engines.harli.predictor import LatencyPredictor
from ygglight.engines.harli.solo import LevelRegression, nonnegative_least_squares

UNITS = 8
PHASES = {"forward": 1.0, "backward": 1.3, "optimizer": 0.5}
CONCURRENT = [Partition(d, UNITS - d, True) for d in (2, 4, 6)]


class Machine:
    """Ground truth: seconds of a decode step, linear alone, slowed beside finetuning by what both ask of the memory."""

    def __init__(self, seed: int, noise: float = 0.04) -> None:
        self.random, self.noise, self.scale = random.Random(seed), noise, 1.0

    def solo(self, batch: int, context: int, units: int) -> float:
        share = 0.4 + 0.6 * UNITS / units  # part of the work does not scale
        return self.scale * (4e-3 * share + 3e-4 * share * batch + 6e-7 * context)

    def slowdown(self, batch: int, context: int, partition: Partition, phase: str | None) -> float:
        if phase is None or not partition.concurrent:
            return 1.0
        pressure = 0.12 + 0.02 * math.log2(batch) + 0.01 * math.log2(context)
        return 1.0 + pressure * PHASES[phase] * partition.finetune / UNITS

    def step(self, batch: int, context: int, partition: Partition, phase: str | None) -> float:
        mean = self.solo(batch, context, partition.decode) * self.slowdown(batch, context, partition, phase)
        return mean * math.exp(self.random.gauss(0, self.noise))

    def load(self) -> tuple[int, int]:
        batch = self.random.randint(1, 32)
        return batch, batch * self.random.randint(64, 1024)


def trained(machine: Machine, samples: int = 12_000) -> LatencyPredictor:
    predictor = LatencyPredictor(UNITS)
    for number in range(samples):
        batch, context = machine.load()
        partition = machine.random.choice([alone(UNITS), *CONCURRENT])
        phase = machine.random.choice(list(PHASES)) if partition.concurrent and number % 3 else None
        predictor.observe_decode(batch, context, partition, machine.step(batch, context, partition, phase), phase)
    return predictor


def errors(predictor: LatencyPredictor, machine: Machine, beside: bool, count: int = 3000) -> dict[str, np.ndarray]:
    """Of held-out steps: relative errors of expectation and of stage one alone, and actual / upper bound."""
    found: dict[str, list[float]] = {"error": [], "solo": [], "over": []}
    for _ in range(count):
        batch, context = machine.load()
        partition = machine.random.choice(CONCURRENT if beside else [alone(UNITS), *CONCURRENT])
        phase = machine.random.choice(list(PHASES)) if beside else None
        actual = machine.step(batch, context, partition, phase)
        expected, upper = predictor.decode_step(batch, context, partition, phase)
        found["error"].append(abs(expected / actual - 1))
        found["solo"].append(abs(predictor.solo(batch, context, partition) / actual - 1))
        found["over"].append(actual / upper)
    return {name: np.array(values) for name, values in found.items()}


@pytest.mark.parametrize("seed", [0, 1])
def test_held_out_steps_are_predicted(seed: int) -> None:
    predictor = trained(Machine(seed))
    solo = errors(predictor, Machine(seed + 100), beside=False)
    corun = errors(predictor, Machine(seed + 200), beside=True)
    assert solo["error"].mean() <= 0.10
    assert corun["error"].mean() <= 0.15
    assert np.quantile(solo["over"], 0.99) <= 1.0
    assert np.quantile(corun["over"], 0.99) <= 1.0
    # Bounds are of use: not just large. And stage two earns its place: without it, more than twice the error.
    assert np.median(corun["over"]) > 0.75
    assert corun["solo"].mean() > 2 * corun["error"].mean()


def test_the_bound_is_no_formality() -> None:
    """Negative control: stage one alone breaks the bound, and so does a machine that is 20 % slower than the learnt."""
    predictor, slower = trained(Machine(0), 4000), Machine(5)
    assert (errors(predictor, Machine(6), beside=True)["solo"] > 0.10).mean() > 0.3
    slower.scale = 1.2
    assert np.quantile(errors(predictor, slower, beside=True)["over"], 0.99) > 1.0


def test_known_coefficients_are_recovered() -> None:
    truth = {2: (8e-3, 9e-4, 2e-6), 4: (5e-3, 5e-4, 1.5e-6), 8: (4e-3, 3e-4, 1e-6)}
    for noise, tolerance in ((0.0, 1e-3), (0.05, 0.10)):
        predictor, rng = LatencyPredictor(UNITS), random.Random(1)
        for _ in range(6000):
            units = rng.choice(list(truth))
            batch, context = rng.randint(1, 32), rng.randint(100, 20_000)
            a, b, g = truth[units]
            seconds = (a + b * batch + g * context) * math.exp(rng.gauss(0, noise))
            predictor.observe_decode(batch, context, Partition(units, 0, False), seconds, None)
        predictor.decode.refit()
        for units, expected in truth.items():
            assert predictor.decode.solo.coefficients[units] == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("samples", [3, 40, 400])
def test_more_load_takes_longer_and_more_units_less(samples: int) -> None:
    """Whatever the noise and however few the samples."""
    machine, predictor = Machine(3, noise=0.3), LatencyPredictor(UNITS)
    for _ in range(samples):
        batch, context = machine.load()
        partition = alone(machine.random.choice([2, 4, 8]))
        predictor.observe_decode(batch, context, partition, machine.step(batch, context, partition, None), None)
    batches, contexts, units = (1, 2, 7, 16, 40), (10, 100, 3000, 50_000), (1, 2, 3, 4, 6, 8)
    table = {
        at: predictor.solo(at[0], at[1], Partition(at[2], 0, False))
        for at in itertools.product(batches, contexts, units)
    }
    assert all(math.isfinite(seconds) and seconds > 0 for seconds in table.values())
    for at, seconds in table.items():
        for other, more in table.items():
            if other[0] >= at[0] and other[1] >= at[1] and other[2] <= at[2]:
                assert more >= seconds * (1 - 1e-9), (at, other)


def test_padded_batches_cost_what_their_edge_costs() -> None:
    predictor = LatencyPredictor(UNITS, batch_edges=(1, 2, 4, 8))
    for batch, context in itertools.product((1, 2, 4, 8), (100, 1000, 10_000)):
        predictor.observe_decode(batch, context, alone(UNITS), 1e-3 * batch + 1e-6 * context, None)
    assert predictor.solo(5, 1000, alone(UNITS)) == predictor.solo(8, 1000, alone(UNITS))
    assert predictor.solo(9, 1000, alone(UNITS)) > predictor.solo(8, 1000, alone(UNITS))


def test_outliers_move_neither_stage() -> None:
    clean, dirty = LatencyPredictor(UNITS), LatencyPredictor(UNITS)
    for predictor, share in ((clean, 0.0), (dirty, 0.005)):
        machine, coin = Machine(4), random.Random(9)
        for _ in range(6000):
            batch, context = machine.load()
            partition = machine.random.choice([alone(UNITS), *CONCURRENT])
            phase = "forward" if partition.concurrent and machine.random.random() < 0.7 else None
            seconds = machine.step(batch, context, partition, phase) * (50 if coin.random() < share else 1)
            predictor.observe_decode(batch, context, partition, seconds, phase)
    for partition in (alone(UNITS), CONCURRENT[1]):
        expected = clean.solo(20, 9000, partition)
        assert dirty.solo(20, 9000, partition) == pytest.approx(expected, rel=0.05)
    bound = clean.corun(20, 9000, CONCURRENT[1], "forward")
    assert dirty.corun(20, 9000, CONCURRENT[1], "forward") == pytest.approx(bound, rel=0.15)


def test_one_bad_moment_does_not_close_a_cell_for_ever() -> None:
    predictor = LatencyPredictor(UNITS)
    for _ in range(20):
        predictor.observe_decode(4, 1000, alone(UNITS), 0.01, None)
    predictor.observe_decode(4, 1000, CONCURRENT[1], 5.0, "forward")
    assert predictor.corun(4, 1000, CONCURRENT[1], "forward") >= 5.0
    for _ in range(EXPIRY + 1):
        predictor.observe_decode(4, 1000, alone(UNITS), 0.01, None)
    assert predictor.corun(4, 1000, CONCURRENT[1], "forward") == pytest.approx(0.02 * DEFAULT_BESIDE, rel=0.01)


def test_a_cold_start_promises_nothing() -> None:
    predictor = LatencyPredictor(UNITS)
    assert predictor.corun(1, 10, alone(UNITS), None) == math.inf
    assert predictor.quantum("forward", 100, slices(UNITS)) == (math.inf, math.inf)
    assert predictor.prefill(16, 0, alone(UNITS)) == (math.inf, math.inf)
    assert predictor.prefill(0, 0, alone(UNITS)) == (0.0, 0.0)
    assert predictor.work("forward", 100) > 0
    # One sample bounds everything that is no more than so many times as much.
    predictor.observe_decode(2, 100, alone(UNITS), 0.01, None)
    assert predictor.solo(2, 100, alone(UNITS)) == pytest.approx(0.01)
    assert predictor.solo(4, 100, alone(UNITS)) == pytest.approx(0.02)
    assert predictor.solo(2, 300, alone(UNITS)) == pytest.approx(0.03)
    assert predictor.solo(2, 100, Partition(4, 4, True)) == pytest.approx(0.02)
    assert predictor.corun(4, 100, alone(UNITS), None) >= 0.02 * DEFAULT_ALONE


def test_unseen_cells_take_the_bound_of_those_that_dominate() -> None:
    predictor = LatencyPredictor(UNITS)
    for batch, context in itertools.product((1, 8, 32), (100, 1000, 30_000)):
        for _ in range(4):
            predictor.observe_decode(batch, context, alone(UNITS), 1e-3 * (4 + batch) + 1e-7 * context, None)
    heavy = Partition(4, 4, True)
    for _ in range(10):
        predictor.observe_decode(32, 30_000, heavy, 2 * 2.5 * predictor.solo(32, 30_000, alone(UNITS)), "backward")
    light = predictor.corun(4, 500, heavy, "backward") / predictor.solo(4, 500, heavy)
    other = predictor.corun(4, 500, heavy, "forward") / predictor.solo(4, 500, heavy)
    assert light == pytest.approx(2.5 * 1.05, rel=0.02)  # floor over the one factor seen
    assert other == pytest.approx(DEFAULT_BESIDE)  # another phase says nothing


def test_a_machine_that_became_slower_is_noticed() -> None:
    machine, predictor = Machine(7), LatencyPredictor(UNITS)

    def run(steps: int) -> float:
        missed = 0
        for _ in range(steps):
            batch, context = machine.load()
            seconds = machine.step(batch, context, alone(UNITS), None)
            missed += seconds > predictor.corun(batch, context, alone(UNITS), None)
            predictor.observe_decode(batch, context, alone(UNITS), seconds, None)
        return missed / steps

    run(3000)
    before = predictor.refits
    assert run(1000) < 0.03
    assert predictor.refits == before  # steady: nothing to notice
    machine.scale = 2.0
    run(600)
    assert predictor.refits > before
    assert run(1000) < 0.03
    batch, context = 16, 8000
    assert predictor.solo(batch, context, alone(UNITS)) == pytest.approx(machine.solo(batch, context, UNITS), rel=0.1)


def test_quanta_are_learnt_by_phase_and_units() -> None:
    predictor, rng = LatencyPredictor(UNITS), random.Random(2)
    for _ in range(300):
        for phase, count, cost in (("forward", 4, 1.0), ("loss", 1, 0.5), ("backward", 4, 2.0)):
            tokens, units = rng.choice([64, 128, 256]), rng.choice([4, 8])
            for _ in range(count):
                seconds = cost * (1e-3 + 1e-5 * tokens) * 8 / units * math.exp(rng.gauss(0, 0.03))
                predictor.observe_quantum(phase, tokens, units, seconds, concurrent=False)
    for phase, cost in (("forward", 1.0), ("loss", 0.5), ("backward", 2.0)):
        mean, upper = predictor.quantum(phase, 128, idle(UNITS))
        assert mean == pytest.approx(cost * 2.28e-3, rel=0.05)
        assert mean < upper < 1.3 * mean
        assert predictor.quantum(phase, 128, Partition(4, 4, True))[0] > 1.8 * mean
    # A whole micro-batch is worth its tokens, and its parts what they take.
    parts = [predictor.work("forward", 128)] * 4 + [predictor.work("loss", 128)] + [predictor.work("backward", 128)] * 4
    assert sum(parts) == pytest.approx(128, rel=0.02)
    assert parts[-1] == pytest.approx(2 * parts[0], rel=0.1)


def test_prefill_grows_faster_than_its_tokens() -> None:
    predictor = LatencyPredictor(UNITS)
    for tokens, context in itertools.product((16, 32, 64, 128, 256), (0, 100, 1000)):
        seconds = 1e-3 + 2e-5 * tokens + 1e-8 * tokens * (context + tokens / 2)
        for _ in range(2):
            predictor.observe_prefill(tokens, context, alone(UNITS), seconds, None)
    mean, upper = predictor.prefill(200, 500, alone(UNITS))
    assert mean == pytest.approx(1e-3 + 4e-3 + 1.2e-3, rel=0.02)
    assert mean < upper < 1.1 * mean * DEFAULT_ALONE


def test_state_is_primitives_and_brings_everything_back() -> None:
    predictor = trained(Machine(8), 1500)
    for phase in ("forward", "backward"):
        for _ in range(20):
            predictor.observe_quantum(phase, 100, 4, 0.01, concurrent=True)
    predictor.observe_prefill(16, 0, alone(UNITS), 0.02, None)
    state = json.loads(json.dumps(predictor.state_dict()))
    fresh = LatencyPredictor(UNITS)
    fresh.load_state_dict(state)
    predictor.decode.refit()
    for phase in (None, "forward"):
        for partition in (alone(UNITS), *CONCURRENT):
            assert fresh.corun(9, 4000, partition, phase) == pytest.approx(predictor.corun(9, 4000, partition, phase))
    assert fresh.quantum("forward", 100, idle(UNITS)) == predictor.quantum("forward", 100, idle(UNITS))
    assert fresh.work("backward", 100) == pytest.approx(predictor.work("backward", 100))
    with pytest.raises(ValueError, match="measure again"):
        LatencyPredictor(UNITS + 1).load_state_dict(state)


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf])
def test_what_is_no_time_is_not_learnt(seconds: float) -> None:
    predictor = LatencyPredictor(UNITS)
    predictor.observe_decode(1, 1, alone(UNITS), seconds, None)
    predictor.observe_prefill(1, 1, alone(UNITS), seconds, None)
    predictor.observe_quantum("forward", 1, 1, seconds, False)
    assert predictor.corun(1, 1, alone(UNITS), None) == math.inf


def test_nonnegative_least_squares_meets_the_optimality_conditions() -> None:
    rng = np.random.default_rng(0)
    clipped = 0
    for _ in range(50):
        a, b = rng.normal(size=(30, 6)), rng.normal(size=30)
        x = nonnegative_least_squares(a.T @ a, a.T @ b)
        gradient = a.T @ (a @ x - b)
        assert (x >= 0).all()
        assert np.allclose(gradient[x > 0], 0, atol=1e-8)
        assert (gradient[x == 0] >= -1e-8).all()
        clipped += (x == 0).any()
    assert clipped > 25  # the constraint bites


def test_a_level_without_samples_lies_between_its_neighbours() -> None:
    regression = LevelRegression(2)
    for level, cost in ((2, 4.0), (8, 1.5)):
        for load in range(1, 11):
            regression.observe(level, (load,), (1.0, float(load)), cost * load, load)
    regression.fit()
    assert regression.predict(4, (1.0, 5.0)) == pytest.approx(15.0)  # no more than twice what twice the units take
    assert regression.predict(1, (1.0, 5.0)) == pytest.approx(40.0)
    assert regression.predict(16, (1.0, 5.0)) == pytest.approx(7.5)
    assert regression.predict(8, (1.0, 40.0)) == pytest.approx(60.0)  # beyond all that was seen: in proportion


@pytest.mark.parametrize("wrong", [{"units": 0}, {"decode": -1}])
def test_impossible_machines_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="units"):
        if "units" in wrong:
            LatencyPredictor(0)
        else:
            Partition(-1, 0, False)
