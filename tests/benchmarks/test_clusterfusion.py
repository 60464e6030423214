"""The ClusterFusion benchmark on a CPU: every line of it that needs no GPU, and gates that can fail."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from benchmarks import clusterfusion
from benchmarks import clusterfusion_latent as latent
from benchmarks.clusterfusion_blocks import SHAPES, dense_step, latent_step, make_layer
from benchmarks.harness import BadInput, Incorrect, Options
from ygglight.engines.decode.fused import FusedAttention
from ygglight.kernels.cluster_decode import decode_block
from ygglight.kernels.testing import rms_ratio

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_quick_run() -> None:
    reports = clusterfusion.run(Options(quick=True, repeats=1))
    names = ["tiny", "tiny-latent", "tiny-latent-layer", "tiny-latent-layer", "tiny-model"]
    assert [report.case.partition(",")[0] for report in reports] == names
    for report in reports[:2]:
        status = {result.name: result.status for result in report.results}
        assert {name for name, told in status.items() if told == "ok"} == {"copy", "eager", "torch"}
        assert all("CUDA" in status[name] for name in ("compiled", "split_k", "cluster-4"))
        ours = report.get("torch")
        assert ours is not None and ours.metrics["us_per_layer"] > 0
        assert 0 < ours.metrics["error"] <= 1.5 * ours.metrics["unfused_error"] < 0.05
    for report in reports[2:4]:
        assert {result.name: result.status for result in report.results} == dict.fromkeys(
            ("transformers", "transformers-eager", "torch"), "ok"
        )
        ours = report.get("torch")
        assert ours is not None and 0 < ours.metrics["error"] < (1e-5 if "float32" in report.case else 0.05)
        assert report.goals[0].met is not None
    status = {result.name: (result.status, result.metrics.get("way")) for result in reports[4].results}
    assert status["plain"] == ("ok", "plain") and status["fused"] == ("ok", "torch") and status["auto"][0] == "ok"
    fused = reports[4].get("fused")
    assert fused is not None and 0 < fused.metrics["logits_off"] < 1e-4 and fused.metrics["tpot_ms"] > 0


def test_a_wrong_block_in_a_model_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets past no proof, and then the step is the model's own, which is no fused one."""

    def off(*args: Any, **named: Any) -> Any:
        return decode_block(*args, **named) * 1.5

    monkeypatch.setattr(latent, "FusedAttention", partial(FusedAttention, block=off))
    report = latent.run("tiny-latent-layer", 20, torch.float32, Options(quick=True, repeats=1), ())
    ours = report.get("torch")
    assert ours is not None and ours.status.startswith("incorrect: it did not run: the block gives other results")
    assert report.goals[0].met is None


def test_an_unknown_size() -> None:
    with pytest.raises(BadInput, match="llama2-7b"):
        clusterfusion.run(Options(size="llama"))


@pytest.mark.parametrize("name", ["tiny", "tiny-latent"])
def test_what_is_wrong_is_not_timed(name: str) -> None:
    layer = make_layer(SHAPES[name], 2, 70, "cpu", 0)
    step = dense_step if name == "tiny" else latent_step
    exact = layer.exact()
    error = rms_ratio(layer.unfused(step)(), exact[0])
    assert 1e-3 < error < 0.02
    good = layer.fused("torch")
    clusterfusion._check("torch", good, layer, exact, error)
    with pytest.raises(Incorrect, match="of the rms off, plain bfloat16"):
        clusterfusion._check("torch", lambda: good() * (1 + 3 * error), layer, exact, error)
    with pytest.raises(Incorrect, match="appended"):
        clusterfusion._check("torch", good, layer, (exact[0], *(part * 1.02 for part in exact[1:])), error)


def test_bytes_are_those_of_a_step() -> None:
    tiny = make_layer(SHAPES["tiny"], 2, 64, "cpu", 0)
    weights = 256 + (4 + 2 + 2) * 64 * 256 + 256 * 256
    assert tiny.moved == 2 * (weights + 2 * 2 * 2 * 64 * 64)
    assert torch.isfinite(tiny.unfused(dense_step)()).all()
