"""What runs where, and that nothing needs Triton to be imported."""

import subprocess
import sys

import pytest
import torch

from ygglight.kernels import _dispatch, act_codec, list_kernels


def test_every_operation_is_listed_with_a_reason(monkeypatch):
    monkeypatch.delenv("YGGLIGHT_KERNELS", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    listed = {info.name: info for info in list_kernels()}
    assert listed["act_codec"].implementation == "reference"
    assert listed["act_codec"].reason == "no CUDA device"
    assert listed["linear_cross_entropy"].implementation == "torch"


def test_choice_follows_device_and_installation(monkeypatch):
    monkeypatch.delenv("YGGLIGHT_KERNELS", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(_dispatch.importlib.util, "find_spec", lambda name: object())
    assert _dispatch.implementation("act_codec", "cuda").implementation == "triton"
    assert _dispatch.implementation("act_codec", "cpu").implementation == "reference"
    monkeypatch.setattr(_dispatch.importlib.util, "find_spec", lambda name: None)
    info = _dispatch.implementation("act_codec", "cuda")
    assert (info.implementation, info.reason) == ("reference", "triton is not installed")


def test_override(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(_dispatch.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setenv("YGGLIGHT_KERNELS", "reference")
    assert _dispatch.implementation("act_codec", "cuda").reason == "YGGLIGHT_KERNELS=reference"
    monkeypatch.setenv("YGGLIGHT_KERNELS", "triton")
    assert _dispatch.implementation("act_codec", "cuda").implementation == "triton"
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        _dispatch.implementation("act_codec", "cpu")
    monkeypatch.setattr(_dispatch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="pip install triton"):
        _dispatch.implementation("act_codec", "cuda")
    monkeypatch.setenv("YGGLIGHT_KERNELS", "fast")
    with pytest.raises(ValueError, match="fast"):
        _dispatch.implementation("act_codec", "cpu")
    assert {info.implementation for info in list_kernels()} == {"unavailable", "torch"}


def test_a_spec_without_a_kernel_runs_the_twin_on_cuda():
    assert not act_codec.PER_TENSOR_INT4.has_kernel
    assert not act_codec.CodecSpec("int4", 128, 4).has_kernel


def test_works_where_triton_cannot_be_imported():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from ygglight.kernels import list_kernels\n"
        "from ygglight.kernels.act_codec import INT4, pack, unpack\n"
        "assert unpack(pack(torch.ones(9), INT4, 0)).sum() == 9\n"
        "assert list_kernels()\n"
        "assert not [name for name in sys.modules if name.startswith('ygglight') and 'triton' in name]\n"
    )
    # The package's own __init__ may import more than the kernels do, so the kernels stand under a bare parent.
    bare = (
        "import sys, types; p = types.ModuleType('ygglight'); p.__path__ = [sys.argv[1]]; sys.modules['ygglight'] = p\n"
    )
    folder = str(next(iter(act_codec.__path__)).rsplit("/kernels", 1)[0])
    run = subprocess.run([sys.executable, "-c", bare + code, folder], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-2000:]
