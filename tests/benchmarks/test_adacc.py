"""The formulas of the Adacc benchmark, and its variants on a model small enough for seconds."""

from __future__ import annotations

import pytest
import torch

from benchmarks import act_codec, adacc, adacc_baselines
from benchmarks.adacc_goals import goals, recovered, recovered_share
from benchmarks.harness import DoesNotFit, Incorrect, Options, Report, Result
from benchmarks.sizes import DEFAULTS, SIZES, Size, sizes
from benchmarks.workload import Workload

TINY = Size(
    "smollm2", 1, 64, "float32",
    (("num_hidden_layers", 3), ("hidden_size", 64), ("intermediate_size", 128), ("num_attention_heads", 4),
     ("num_key_value_heads", 2), ("vocab_size", 256)),
)  # fmt: skip


@pytest.fixture(scope="module")
def work() -> Workload:
    made = Workload(TINY, "cpu")
    made.remember_exact()
    return made


# -- formulas --------------------------------------------------------------------------------------------------------
def timed(name: str, *seconds: float, **metrics: object) -> Result:
    return Result(name, seconds=list(seconds), metrics=dict(metrics))


@pytest.mark.parametrize(("ratio", "share"), [(0.8, 1.0), (1.0, 0.0), (0.9, 0.5), (1.2, -1.0)])
def test_recovered_share(ratio: float, share: float) -> None:
    assert recovered_share(ratio, 0.8) == pytest.approx(share)


def test_nothing_to_recover_where_full_is_free() -> None:
    assert recovered_share(0.9, 1.0) is None


def test_recovered_pairs_the_rounds() -> None:
    plain, full = timed("plain", 1.0, 10.0), timed("full", 2.0, 20.0)
    mine = timed("adacc-0.5", 1.5, 15.0)
    report = Report("adacc", "c", [plain, full, mine], ("plain", "full"))
    assert [recovered(report, r) for r in report.results] == [pytest.approx(v) for v in (1.0, 0.0, 0.5)]
    assert recovered(report, Result("lost", status="failed: x")) is None


def test_goals_name_the_best_other_that_fits() -> None:
    common = {"gradient_error": 0.0}
    results = [
        timed("plain", 1.0, peak_bytes=100, **common),
        timed("full", 2.0, peak_bytes=20, **common),
        timed("sac-fit-0.5", 1.4, peak_bytes=50, **common),
        timed("int4-everything", 1.1, peak_bytes=30, gradient_error=0.5),
        timed("adacc-0.5", 1.3, peak_bytes=49, budget_bytes=50, recovered=0.7, **common),
        timed("adacc-0.7", 1.5, peak_bytes=71, budget_bytes=70, recovered=0.5, **common),
        timed("adacc-keep", 1.05, peak_bytes=100, budget_bytes=100, **common),
    ]
    found = {goal.text: goal.met for goal in goals(Report("adacc", "c", results, ("plain", "full")), "cpu")}
    assert found == {
        "adacc-0.5: peak 98.0% of its budget": True,
        "adacc-0.5: recovers 70% (goal 50%)": True,
        "adacc-0.5: 0.929 of the time of the best other that fits (sac-fit-0.5)": True,
        "adacc-0.7: peak 101.4% of its budget": False,
        "adacc-0.7: recovers 50% (goal 75%)": False,
        "adacc-0.7: 1.071 of the time of the best other that fits (sac-fit-0.5)": False,
        "adacc-keep: +5.0% over plain (goal 2%)": False,
        "1.37x over full recomputation: a goal for GPUs only": None,
    }


@pytest.mark.parametrize(("budget", "count"), [(100, 0), (99, 1), (45, 6), (10, 9)])
def test_smallest_that_fits(budget: int, count: int) -> None:
    assert adacc_baselines.smallest_that_fits(lambda n: 100 - 10 * n, 9, budget) == count
    with pytest.raises(DoesNotFit, match="smallest peak"):
        adacc_baselines.smallest_that_fits(lambda n: 100 - 10 * n, 9, 9)


def test_sizes() -> None:
    assert sizes("cpu", False, None) == ("smollm2-1x512",)
    assert {name for names in DEFAULTS.values() for name in names} <= set(SIZES)
    with pytest.raises(ValueError, match="there are"):
        sizes("cpu", False, "huge")


# -- variants --------------------------------------------------------------------------------------------------------
def test_check_is_red_for_a_wrong_gradient(work: Workload) -> None:
    assert work.check(work.step) == 0.0
    with pytest.raises(Incorrect, match="relative gradient error"):
        work.check(lambda: work.backward(work.loss() * 1.000001))
    with pytest.raises(Incorrect, match="not finite"):
        work.check(lambda: work.backward(work.loss() * float("nan")), bound=None)
    with pytest.raises(Incorrect, match="no gradient"):
        work.check(lambda: None)


def test_fixed_variants_are_exact_and_hold_less(work: Workload) -> None:
    plain = adacc_baselines.plain(work).prepare()
    found = {variant.name: variant.prepare() for variant in adacc_baselines.fixed(work)}
    assert list(found) == ["full", "sac-all", "sac-half", "save_on_cpu", "int4-everything"]
    held = {name: metrics["held_bytes"] for name, metrics in found.items()}
    assert held["full"] < held["sac-half"] < held["sac-all"] < plain["held_bytes"]
    assert held["int4-everything"] < 0.3 * plain["held_bytes"]
    assert 0 < found["int4-everything"]["gradient_error"] < 1
    assert all(m["gradient_error"] == 0 for name, m in found.items() if name != "int4-everything")


def test_fitted_variants_fit_and_leave_nothing_behind(work: Workload) -> None:
    plain_peak = work.peak(work.step)
    for variant in adacc_baselines.fitted(work, 0.8, plain_peak):
        metrics = variant.prepare()
        assert metrics["peak_bytes"] <= 0.8 * plain_peak
        assert metrics["layers"] >= 1
    assert not work.network.is_gradient_checkpointing
    assert not work.network.get_input_embeddings()._forward_hooks
    assert work.peak(work.step) == plain_peak


def test_adacc_variants_keep_their_promises(work: Workload) -> None:
    exact = adacc.Adacc(work, "adacc-0.8-exact", 0.8, compress=False).prepare()
    assert exact["peak_bytes"] <= exact["budget_bytes"]
    assert exact["gradient_error"] == 0.0
    assert exact["recompute_bytes"] > 0
    keep = adacc.Adacc(work, "adacc-keep", 1.0, compress=False).prepare()
    assert keep["recompute_bytes"] == keep["compress_bytes"] == 0
    one = adacc.Adacc(work, "adacc-one-per-block", 1.0, compress=False, one_per_block=True).prepare()
    assert 0 < one["recompute_bytes"] < one["keep_bytes"]
    assert "budget_bytes" not in one
    with pytest.raises(DoesNotFit, match="budget"):
        adacc.Adacc(work, "adacc-tiny", 0.01, compress=False).prepare()
    assert not any(layer._forward_hooks for layer in work.layers)
    assert work.check(work.step) == 0.0


def test_act_codec_checks_what_comes_back() -> None:
    values = torch.randn(1024)
    assert act_codec._check(values, act_codec.INT8, {})["worst_step"] <= 1.05
    assert act_codec._check((values > 0).float() * 2, act_codec.MASK, {}) == {}
    with pytest.raises(Incorrect, match="mask"):
        act_codec._check(values, act_codec.MASK, {})


def test_act_codec_runs() -> None:
    (report,) = act_codec.run(Options(quick=True, repeats=1))
    assert all(result.ok for result in report.results)
    assert len(report.results) == 8
    assert report.get("clone").metrics["copy_share"] == 1.0  # type: ignore[union-attr]
