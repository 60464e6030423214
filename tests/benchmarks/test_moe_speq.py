"""The benchmark of offloaded experts on a tiny model: every way is right, a wrong one is caught, bytes are counted."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks import moe_models, moe_speq
from benchmarks.harness import BadInput, Incorrect, Options, Report, Skip
from benchmarks.moe_models import CASES, NoisyStore, Subject

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def report() -> Report:
    return moe_speq.run(Options(quick=True))[0]


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject(CASES["quick"], 2)


def test_every_way_says_what_the_unoffloaded_model_says(report: Report) -> None:
    assert {r.status for r in report.results} == {"ok"}
    names = {r.name for r in report.results}
    assert names >= {"accelerate", "lru-sc", "lru-sm", "k-8", "k-4-no-prefetch", "k-4-no-int4-kernel", "moe-speq"}
    for result in report.results:
        assert result.metrics["same"] == "1/1" and len(result.seconds) == 1
        assert result.seconds[0] == pytest.approx(1 / result.metrics["tokens_per_s"])
    assert len(report.goals) == 6


def test_bytes_are_those_of_the_rules(report: Report, subject: Subject) -> None:
    """All experts a pass by accelerate's hooks; what was missing by ours, and less where there are more slots."""
    metrics = {r.name: r.metrics for r in report.results}
    layers, slab = len(subject.sites), subject.store.nbytes / 1e6
    assert metrics["accelerate"]["demand_MB_per_token"] == pytest.approx(8 * layers * slab)
    for name in ("lru-sc", "lru-sm"):
        missed = metrics[name]["misses"] * 2 * layers * slab  # top-2
        assert metrics[name]["demand_MB_per_token"] == pytest.approx(missed)
    assert metrics["lru-sm"]["slots"] > metrics["lru-sc"]["slots"] == CASES["quick"].slots
    assert metrics["lru-sm"]["misses"] < metrics["lru-sc"]["misses"]
    assert metrics["k-4-no-prefetch"]["prefetch_MB_per_token"] == 0 < metrics["k-4"]["prefetch_MB_per_token"]
    for name in ("accelerate", "lru-sc"):  # the link is at least as slow as it says; a busy machine makes it slower
        assert 0 < metrics[name]["link_GB_per_s"] * 1e9 <= 1.02 * (CASES["quick"].bandwidth or 0.0)


def test_memory_is_equal_but_for_what_makes_no_slot(report: Report, subject: Subject) -> None:
    peaks = {r.name: r.metrics.get("peak_bytes", 0) for r in report.results}
    assert peaks["lru-sc"] < peaks["lru-sm"] <= subject.budget()
    assert peaks["k-4"] <= subject.budget() < peaks["lru-sm"] + len(subject.sites) * subject.store.nbytes


def test_a_way_that_says_something_else_is_caught(subject: Subject) -> None:
    bench = moe_speq.Bench(subject)
    way = moe_speq.Plain("liar", bench)
    answer = list(bench.expected(0))
    way._check(0, answer)
    way._check(0, answer[:3])  # a shorter text
    with pytest.raises(Incorrect, match="token 2 of prompt 0 differs"):
        way._check(0, [*answer[:2], (answer[2] + 1) % 97, *answer[3:]])
    with pytest.raises(Incorrect, match="tokens, the unoffloaded model"):
        way._check(0, [*answer, 1])


def test_a_wrong_expert_is_caught(subject: Subject) -> None:
    """Through accelerate's hooks as through ours: the text comes from the store."""
    bench = moe_speq.Bench(subject)
    noisy = NoisyStore(subject.store, subject.sites, 1.0)
    subject_store, subject.store = subject.store, noisy
    try:
        for way in (moe_speq.Hooked("accelerate", bench), moe_speq.Ours("lru-sc", bench, draft=False)):
            with pytest.raises(Incorrect, match="differs"):
                way._prepare()
            way.close()
    finally:
        subject.store = subject_store


def test_a_noisy_draft_is_accepted_less(subject: Subject) -> None:
    accepted = []
    for noise in (0.0, 3.0):
        subject = Subject(replace(CASES["quick"], noise=noise, bandwidth=None, tokens=32), 1)
        way = moe_speq.Ours("k-4", moe_speq.Bench(subject), k=4)
        way._prepare()
        with way._around():
            way._step()
        accepted.append(way.metrics()["accepted"])
        way.close()
    assert accepted[1] < accepted[0] - 0.1


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match="there are: quick, fast"):
        moe_speq.run(Options(size="tall"))
    with pytest.raises(Skip, match="begins with gpu"):
        Subject(CASES["slow"], 1, "cuda")
    assert all(CASES[name].bandwidth is None for name in moe_models.DEFAULTS["cuda"])

    def missing(name: str) -> None:
        raise FileNotFoundError(f"{name!r} is not there yet; this makes it: ygglight fit")

    monkeypatch.setattr(moe_models.assets, "resolve_model", missing)
    found = moe_speq.run(Options(size="mixture", repeats=1))[0]
    assert [r.status for r in found.results] == [
        "skipped: 'smollm2-moe-8x10' is not there yet; this makes it: ygglight fit"
    ]
