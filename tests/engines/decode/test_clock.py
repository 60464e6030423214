"""A clock that forgets no time."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from ygglight.engines.decode import clock as module
from ygglight.engines.decode.clock import STAGES, Clock


def test_all_time_is_somewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    report = SimpleNamespace(seconds=dict.fromkeys(STAGES, 0.0))
    clock = Clock(report, torch.device("cpu"))
    for stage, seconds, between in (("prefill", 1.0, 0.25), ("draft", 2.0, 0.5), ("verify", 3.0, 0.0)):
        with clock.stage(stage):
            now[0] += seconds
        now[0] += between
    with pytest.raises(KeyError), clock.stage("draft"):
        now[0] += 0.125
        raise KeyError("time is counted all the same")
    clock.close()
    assert report.seconds == {"prefill": 1.0, "draft": 2.125, "verify": 3.0, "host": 0.75}
