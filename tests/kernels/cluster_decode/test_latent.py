"""The latent block: its fast torch form against the reference, what runs where, and inputs that it refuses."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from ygglight.kernels import _dispatch, list_kernels
from ygglight.kernels.cluster_decode import (
    BlockWeights,
    LatentSpec,
    choose_path,
    decode_block,
    latent_block,
    latent_ways,
)
from ygglight.kernels.cluster_decode.mla import latent_block_reference
from ygglight.kernels.cluster_decode.testing import make_spec
from ygglight.kernels.testing import rms_ratio

from .test_choose import machine  # noqa: F401
from .test_cluster_mla import LITE, SMALL, in_dtype, run, sample

pytestmark = pytest.mark.usefixtures("one_thread")

ODD = LatentSpec(48, 3, 12, 10, 6, 20, 1e-6, 1e-5, 0.2)
OPTIONS: list[dict[str, Any]] = [
    {"bias": True, "mask": True},
    {"query": 28, "slots": True, "rotary": "unzipped"},
    {"query": 28, "bias": True, "mask": True, "slots": True, "rotary": "halves"},
]
CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def finite(arguments: dict[str, Any]) -> dict[str, Any]:
    return arguments | {name: arguments[name].nan_to_num(0.7) for name in ("latents", "rotated")}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", OPTIONS)
def test_torch_agrees_with_the_reference(options: dict[str, Any], dtype: torch.dtype) -> None:
    arguments = finite(sample(ODD, [30, 1, 17], 32, dtype=dtype, **options))
    exact = run(latent_block_reference, in_dtype(arguments, torch.float64))
    rounded = run(latent_block_reference, arguments)
    for got, expected, reference in zip(run(latent_block, arguments), exact, rounded, strict=True):
        # More is rounded on the way than in the reference: each product, to the dtype of the weights.
        assert rms_ratio(got, expected) <= max(3 * rms_ratio(reference, expected), 1e-9)
    scaled = dataclasses.replace(arguments["spec"], scale=0.3)
    for change in ({"sin": -arguments["sin"]}, {"lengths": arguments["lengths"] // 2}, {"spec": scaled}):
        wrong = run(latent_block, arguments | change)[0]
        assert rms_ratio(wrong, exact[0]) > 3 * max(rms_ratio(rounded[0], exact[0]), 1e-9)


@torch.no_grad()
def test_a_floating_mask_is_added() -> None:
    arguments = finite(sample(ODD, [30, 8, 17], 32, dtype=torch.float64, mask=True))
    hidden = torch.zeros(3, 32, dtype=torch.float64).masked_fill(~arguments["mask"], -torch.inf)
    for block in (latent_block, latent_block_reference):
        assert rms_ratio(run(block, arguments | {"mask": hidden})[0], run(block, arguments)[0]) < 1e-12
        half = run(block, arguments | {"mask": hidden.clamp(min=-0.5)})[0]
        assert rms_ratio(half, run(block, arguments)[0]) > 1e-3
    assert rms_ratio(half, run(latent_block, arguments | {"mask": hidden.clamp(min=-0.5)})[0]) < 1e-12


def test_nothing_is_committed_yet() -> None:
    arguments = sample(ODD, [0, 0], 0, dtype=torch.float32)
    assert rms_ratio(run(latent_block, arguments)[0], run(latent_block_reference, arguments)[0]) < 1e-5


def test_what_is_written_is_the_slot_and_nothing_else() -> None:
    arguments = finite(sample(ODD, [30, 8], 32, dtype=torch.float32, slots=True))
    before = arguments["latents"].clone()
    new = arguments["latents"].clone(), arguments["rotated"].clone()
    latent_block(**arguments, new_latents=new[0], new_rotated=new[1])
    changed = (new[0] != before).any(-1)
    assert changed.nonzero().tolist() == [[0, 28], [1, 6]]


@pytest.mark.usefixtures("machine")
def test_the_path_follows_the_machine_and_the_block(machine: Any) -> None:  # noqa: F811
    def chosen(spec: LatentSpec = LITE, dtype: torch.dtype = torch.bfloat16, **options: Any) -> tuple[str, str]:
        choice = choose_path(spec, dtype, options.pop("device", CUDA), **options)
        return choice.path, choice.reason

    assert chosen()[0] == "cluster"
    assert chosen(device=CPU) == ("torch", "tensors on 'cpu', not on CUDA")
    for choice, words in (
        (chosen(dtype=torch.float32), "float32"),
        (chosen(dtype=torch.float64), "float64"),
        (chosen(batch=32), "32 sequences"),
        (chosen(mask=torch.bfloat16), "masks of bool"),
        (chosen(dataclasses.replace(LITE, latent=384)), "powers of two"),
    ):
        assert choice[0] == "torch" and words in choice[1]
    machine((3, 7), (9, 0))
    assert chosen()[0] == "torch" and "Triton 3.7" in chosen()[1]
    machine((3, 9), (8, 0))
    assert chosen()[0] == "torch" and "8.0" in chosen()[1] and list(latent_ways(CUDA)[0]) == ["torch"]


@pytest.mark.usefixtures("machine")
def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for word, ways in (("torch", ["torch"]), ("cluster", [f"cluster {n}" for n in (1, 2, 4, 8)]), ("split_k", [])):
        monkeypatch.setenv("YGGLIGHT_CLUSTER_DECODE", word)
        assert list(latent_ways(CUDA)[0]) == ways
        assert list(latent_ways(CPU)[0]) == (["torch"] if word == "torch" else [])
        assert word != "split_k" or all("no split-K" in latent_ways(device)[1] for device in (CUDA, CPU))
    with pytest.raises(RuntimeError, match="latent attention has no split-K"):
        choose_path(LITE, torch.bfloat16, CUDA)
    monkeypatch.setenv("YGGLIGHT_CLUSTER_DECODE", "cluster")
    with pytest.raises(RuntimeError, match="not on CUDA"):
        choose_path(LITE, torch.bfloat16, CPU)


def test_doctor_says_what_runs(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    def listed() -> _dispatch.KernelInfo:
        return next(info for info in list_kernels() if info.name == "latent_decode")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert listed().implementation == "torch" and "absorbed weights in plain torch" in listed().reason
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert listed().implementation == "triton" and listed().reason.startswith("cluster: ")
    machine((3, 9), (8, 6))
    assert listed().implementation == "torch" and "8.6" in listed().reason
    monkeypatch.setenv("YGGLIGHT_CLUSTER_DECODE", "split_k")
    assert listed().implementation == "unavailable"


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("blocks", [None, 4, 0])
def test_blocks_are_handed_on(monkeypatch: pytest.MonkeyPatch, blocks: int | None) -> None:
    pytest.importorskip("triton")
    import ygglight.kernels.cluster_decode.latent as module
    from ygglight.kernels.cluster_decode import cluster_mla
    from ygglight.kernels.cluster_decode.choose import Choice

    seen: list[Any] = []
    monkeypatch.setattr(cluster_mla, "launch", lambda *args, **named: seen.append(named["blocks"]) or args[0])
    monkeypatch.setattr(module, "choose_path", lambda *args, **named: Choice("cluster", ""))
    arguments = finite(sample(SMALL, [3], 4))
    run(decode_block_of_latents, arguments, blocks=blocks)
    assert seen == ([] if blocks == 0 else [blocks])


def test_spec_and_weights_of_two_kinds_are_refused() -> None:
    arguments = finite(sample(ODD, [3], 4, dtype=torch.float32))
    for other in ({"spec": make_spec(2, 2, 16, 48)}, {"weights": BlockWeights(*[torch.zeros(1)] * 5)}):
        with pytest.raises(ValueError, match="give both of one kind"):
            decode_block_of_latents(**arguments | other, new_latents=torch.zeros(1), new_rotated=torch.zeros(1))


def decode_block_of_latents(**arguments: Any) -> Any:
    names = ("x", "weights", "spec", "cos", "sin", "latents", "rotated", "lengths", "new_latents", "new_rotated")
    inputs = [arguments.pop(name) for name in names]
    return decode_block(*inputs, **arguments)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(2, 47)}, "give .batch, 48."),
        ({"cos": torch.zeros(2, 10)}, "one number a pair"),
        ({"latents": torch.zeros(2, 1, 32, 20)}, "latents are"),
        ({"rotated": torch.zeros(2, 31, 10)}, "rotated are"),
        ({"lengths": torch.zeros(2, dtype=torch.int64)}, "give int32"),
        ({"mask": torch.zeros(3, 32, dtype=torch.bool)}, "the mask is"),
        ({"mask": torch.zeros(2, 32, dtype=torch.int32)}, "give bool"),
        ({"slots": torch.zeros(2, dtype=torch.int64)}, "new_latents are"),
        ({"spec": dataclasses.replace(ODD, heads=2)}, "the weights q are"),
    ],
)
def test_what_is_refused(change: dict[str, Any], words: str) -> None:
    arguments = finite(sample(ODD, [30, 8], 32, dtype=torch.float32)) | change
    new = torch.zeros(2, 20), torch.zeros(2, 10)
    with pytest.raises(ValueError, match=words):
        latent_block(**arguments, new_latents=new[0], new_rotated=new[1])


def test_gradients_are_refused() -> None:
    arguments = finite(sample(ODD, [3], 4, dtype=torch.float32))
    arguments["x"].requires_grad_()
    with pytest.raises(ValueError, match="no backward pass"):
        run(latent_block, arguments)
