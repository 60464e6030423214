"""Which path of the decode block runs where, and that Triton is not needed to ask."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from ygglight.kernels import _dispatch, list_kernels
from ygglight.kernels.cluster_decode import choose_path
from ygglight.kernels.cluster_decode.testing import make_spec

GQA = make_spec(8, 2, 128, 1024)
CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets what the machine looks like: Triton's version or None, and the GPU's compute capability."""
    import ygglight.kernels.cluster_decode.choose as module

    for name in ("YGGLIGHT_KERNELS", "YGGLIGHT_CLUSTER_DECODE", "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)

    def be(triton: tuple[int, int] | None, capability: tuple[int, int]) -> None:
        monkeypatch.setattr(_dispatch.importlib.util, "find_spec", lambda name: triton and object())
        monkeypatch.setattr(module, "_triton_version", lambda: triton or (0, 0))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    be((3, 9), (9, 0))
    return be


def test_the_path_follows_the_machine(machine: Any) -> None:
    def chosen(device: torch.device = CUDA) -> tuple[str, str]:
        choice = choose_path(GQA, torch.bfloat16, device)
        return choice.path, choice.reason

    assert chosen()[0] == "cluster"
    assert chosen(CPU) == ("torch", "tensors on 'cpu', not on CUDA")
    for triton, capability, path, words in (
        ((3, 7), (9, 0), "split_k", "Triton 3.7"),
        ((3, 8), (9, 0), "cluster", "9.0"),
        ((3, 9), (8, 0), "split_k", "8.0"),
        ((3, 9), (12, 0), "split_k", "12.0"),
        (None, (9, 0), "torch", "not installed"),
    ):
        machine(triton, capability)
        assert chosen()[0] == path and words in chosen()[1]


@pytest.mark.parametrize(
    ("spec", "dtype", "mask", "path", "words"),
    [
        (GQA, torch.float32, None, "split_k", "float32"),
        (GQA, torch.float64, None, "torch", "float64"),
        (GQA, torch.float16, torch.bool, "cluster", ""),
        (GQA, torch.float16, torch.float16, "split_k", "masks of bool"),
        (replace(GQA, head_dim=72, rotary_dim=72), torch.float16, None, "split_k", "heads of 72"),
        (replace(GQA, head_dim=512, rotary_dim=0), torch.float16, None, "torch", "above"),
        (replace(GQA, heads=256), torch.float16, None, "torch", "above"),
    ],
)
def test_the_path_follows_the_block(machine: Any, spec: Any, dtype: Any, mask: Any, path: str, words: str) -> None:
    choice = choose_path(spec, dtype, CUDA, mask=mask)
    assert choice.path == path and words in choice.reason


def test_many_sequences_share_the_weights(machine: Any) -> None:
    assert choose_path(GQA, torch.float16, CUDA, batch=2).path == "cluster"
    choice = choose_path(GQA, torch.float16, CUDA, batch=32)
    assert choice.path == "split_k" and "32 sequences" in choice.reason


def test_environment(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YGGLIGHT_KERNELS", "reference")
    assert choose_path(GQA, torch.float16, CUDA).path == "torch"
    monkeypatch.setenv("YGGLIGHT_CLUSTER_DECODE", "split_k")
    with pytest.raises(RuntimeError, match="cannot run here"):
        choose_path(GQA, torch.float16, CUDA)
    monkeypatch.delenv("YGGLIGHT_KERNELS")
    assert choose_path(GQA, torch.float16, CUDA).path == "split_k"
    monkeypatch.setenv("YGGLIGHT_CLUSTER_DECODE", "torch")
    assert choose_path(GQA, torch.float16, CUDA).path == "torch"
    monkeypatch.setenv("YGGLIGHT_CLUSTER_DECODE", "cluster")
    assert choose_path(GQA, torch.float16, CUDA).path == "cluster"
    with pytest.raises(RuntimeError, match=r"cannot run here .*float32"):
        choose_path(GQA, torch.float32, CUDA)
    monkeypatch.setenv("YGGLIGHT_CLUSTER_DECODE", "fast")
    with pytest.raises(ValueError, match="fast"):
        choose_path(GQA, torch.float16, CUDA)


def test_doctor_names_the_path(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def listed() -> Any:
        return next(info for info in list_kernels() if info.name == "cluster_decode")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert listed().implementation == "triton" and listed().reason.startswith("cluster: ")
    machine((3, 9), (8, 6))
    assert listed().reason.startswith("split_k: compute capability 8.6")
    monkeypatch.setenv("YGGLIGHT_CLUSTER_DECODE", "fast")
    assert listed().implementation == "unavailable"
    monkeypatch.delenv("YGGLIGHT_CLUSTER_DECODE")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert listed().implementation == "reference"
