"""Latencies kept from run to run: measured once for a key, measured anew for another, and never a reason to crash."""

from __future__ import annotations

import copy
import json
import logging
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ygglight.engines.profiling import fingerprint, remember, store

CPU = torch.device("cpu")
KEY = {"model": "Tiny", "hardware": "a chip", "context": 512}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("YGGLIGHT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Measuring:
    """Gives other numbers every time, and counts."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> dict[str, Any]:
        self.count += 1
        return {"widths": [1, 2], "seconds": [0.25 * self.count, 0.5 * self.count]}


def files(cache: Path) -> list[Path]:
    return sorted(path for path in cache.rglob("*") if path.is_file())


# -- remembering -----------------------------------------------------------------------------------------------------
def test_measured_once(cache: Path) -> None:
    measuring = Measuring()
    first = remember(KEY, measuring)
    again = remember(dict(reversed(KEY.items())), measuring)  # the same, said in another order
    assert first == again == {"widths": [1, 2], "seconds": [0.25, 0.5]} and measuring.count == 1
    assert len(files(cache)) == 1


@pytest.mark.parametrize("change", [{"context": 1024}, {"hardware": "another chip"}, {"more": True}])
def test_another_key_is_measured_anew(cache: Path, change: dict[str, Any]) -> None:
    measuring = Measuring()
    first = remember(KEY, measuring)
    other = remember(KEY | change, measuring)
    assert measuring.count == 2 and other != first
    assert remember(KEY, measuring) == first and remember(KEY | change, measuring) == other and measuring.count == 2


DAMAGES: dict[str, Any] = {
    "empty": lambda data: b"",
    "half": lambda data: data[: len(data) // 2],
    "binary": lambda data: b"\xff\xfe\x00" + data,
    "a list": lambda data: b"[1, 2]",
    "a number": lambda data: b"3",
    "null": lambda data: b"null",
    "no measurement": lambda data: json.dumps({"key": KEY}).encode(),
    "a measurement that is none": lambda data: json.dumps({"key": KEY, "measured": 3}).encode(),
    "another key": lambda data: json.dumps({"key": {"model": "Huge"}, "measured": {"seconds": [9]}}).encode(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_measured_anew_and_mended(cache: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    measuring = Measuring()
    remember(KEY, measuring)
    (file,) = files(cache)
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    with caplog.at_level(logging.WARNING, "ygglight.engines.profiling.store"):
        assert remember(KEY, measuring)["seconds"] == [0.5, 1.0]
    assert measuring.count == 2
    assert len(caplog.records) == (damage != "another key")
    assert all(str(file) in record.getMessage() for record in caplog.records)
    assert remember(KEY, measuring)["seconds"] == [0.5, 1.0] and measuring.count == 2, "the file was not mended"


def test_a_measurement_that_fails_leaves_nothing(cache: Path) -> None:
    def broken() -> dict[str, Any]:
        raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        remember(KEY, broken)
    assert not files(cache)
    measuring = Measuring()
    remember(KEY, measuring)
    assert measuring.count == 1


# -- writing ---------------------------------------------------------------------------------------------------------
def test_a_full_disk_costs_only_the_memory(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(value: Any, file: Any) -> None:
        file.write('{"key": {"mod')
        raise OSError(28, "No space left on device")

    measuring = Measuring()
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "ygglight.engines.profiling.store"):
        patch.setattr(store.json, "dump", full)
        assert remember(KEY, measuring)["seconds"] == [0.25, 0.5]
    assert "No space left" in caplog.text and not files(cache), "half a file was left"
    remember(KEY, measuring)
    remember(KEY, measuring)
    assert measuring.count == 2 and len(files(cache)) == 1


def test_a_file_appears_whole(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the last moment nothing stands under the name that is read, and then all of it."""
    replace, seen = os.replace, []

    def watched(source: str, place: Path) -> None:
        assert not Path(place).exists()
        seen.append(json.loads(Path(source).read_text()))
        replace(source, place)

    monkeypatch.setattr(store.os, "replace", watched)
    remember(KEY, Measuring())
    assert seen == [{"key": KEY, "measured": {"widths": [1, 2], "seconds": [0.25, 0.5]}}]
    assert [file.suffix for file in files(cache)] == [".json"]


def test_a_cache_that_cannot_be_written_costs_only_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("mine")
    monkeypatch.setenv("YGGLIGHT_CACHE", str(tmp_path / "file"))
    measuring = Measuring()
    with caplog.at_level(logging.WARNING, "ygglight.engines.profiling.store"):
        remember(KEY, measuring)
        remember(KEY, measuring)
    assert measuring.count == 2 and "cannot be kept" in caplog.text and (tmp_path / "file").read_text() == "mine"


def test_processes_that_measure_at_once_do_not_disturb_each_other(cache: Path) -> None:
    found: list[dict[str, Any]] = []
    barrier = threading.Barrier(4)

    def one() -> None:
        def measured() -> dict[str, Any]:
            barrier.wait(10)  # all have looked, and nobody has written
            return {"seconds": [0.5]}

        found.append(remember(KEY, measured))

    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [{"seconds": [0.5]}] * 4 and len(files(cache)) == 1
    measuring = Measuring()
    assert remember(KEY, measuring) == {"seconds": [0.5]} and measuring.count == 0


# -- what tells machines and models apart ----------------------------------------------------------------------------
def llama(**changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"vocab_size": 31, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**shape | {"num_attention_heads": 2, "num_key_value_heads": 2} | changes))


def test_a_fingerprint_is_of_primitives_and_of_the_shape_alone() -> None:
    model = llama()
    same = copy.deepcopy(model)
    for parameter in same.parameters():
        parameter.data.add_(1.0)
    key = fingerprint(model, CPU)
    assert json.loads(json.dumps(key)) == key
    assert fingerprint(same, CPU) == key == fingerprint(llama(), CPU)


@pytest.mark.parametrize(
    "other",
    [
        lambda: llama(num_hidden_layers=2),
        lambda: llama(num_attention_heads=4, num_key_value_heads=1, head_dim=4),
        lambda: llama(sliding_window=4),
        lambda: llama().bfloat16(),
        lambda: nn.Linear(3, 3),
    ],
    ids=["layers", "heads", "window", "dtype", "class"],
)
def test_other_models_have_other_fingerprints(other: Any) -> None:
    assert fingerprint(other(), CPU) != fingerprint(llama(), CPU)


def test_other_machines_have_other_fingerprints(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    key = fingerprint(model, CPU)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert fingerprint(model, CPU) != key
    finally:
        torch.set_num_threads(threads)
    assert fingerprint(model, CPU) == key
    monkeypatch.setattr(store, "_processor", lambda: "a chip of next year")
    assert fingerprint(model, CPU) != key
