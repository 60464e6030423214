"""What kernel tests share: a comparison that can fail, poisoned memory, and compilation without a GPU."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

# Bytes of shared memory that one block can have (CUDA C++ programming guide, compute capabilities 8.0 and 9.0).
SHARED_MEMORY_LIMIT = {80: 163 * 1024, 90: 227 * 1024}


def rms_ratio(actual: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of the expected tensor, in float64.

    Args:
        actual: any shape.
        expected: same shape.

    Returns:
        The ratio; NaN or Inf when either holds one, the plain rms of the difference when the expected is all zero.
    """
    difference = (actual.double() - expected.double()).square().mean().sqrt()
    size = expected.double().square().mean().sqrt()
    return float(difference / size) if float(size) else float(difference)


def assert_close(actual: Tensor, expected: Tensor, ratio: float, name: str = "tensor") -> None:
    """Fails when two tensors differ by more than `ratio` in root mean square; a NaN always fails.

    Args:
        actual: any shape.
        expected: same shape and dtype.
        ratio: largest allowed `rms_ratio`.
        name: for the message.

    Raises:
        AssertionError: shapes or dtypes differ, or the difference is too large or not a number.
    """
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{name}: dtype {actual.dtype}, expected {expected.dtype}"
    measured = rms_ratio(actual, expected) if actual.numel() else 0.0
    assert measured <= ratio, f"{name}: rms difference {measured:.3g} of the expected rms, allowed {ratio:.3g}"


def _poison(tensor: Tensor) -> Tensor:
    if tensor.is_floating_point():
        return tensor.fill_(torch.nan)
    return tensor.fill_(True) if tensor.dtype is torch.bool else tensor.fill_(0x5A)


@contextlib.contextmanager
def poisoned_empty() -> Iterator[None]:
    """Makes `torch.empty` and `torch.empty_like` return NaN (integers: 0x5A), so that a read before a write shows."""
    empty, empty_like = torch.empty, torch.empty_like
    with (
        mock.patch.object(torch, "empty", lambda *a, **k: _poison(empty(*a, **k))),
        mock.patch.object(torch, "empty_like", lambda *a, **k: _poison(empty_like(*a, **k))),
    ):
        yield


def run_interpreted(script: Path) -> list[str]:
    """Runs a script of checks with Triton's interpreter, in a process of its own: Triton reads the switch once.

    Args:
        script: prints a line a check, which begins with "ok " if it holds.

    Returns:
        The lines.

    Raises:
        AssertionError: it ended with an error, or a line is not "ok".
    """
    source = Path(__file__).parents[2]
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "YGGLIGHT_KERNELS": "triton",
        "PYTHONPATH": os.pathsep.join([str(source), os.environ.get("PYTHONPATH", "")]),
    }
    run = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stderr[-3000:]
    lines = [line for line in run.stdout.splitlines() if line]
    assert [line for line in lines if not line.startswith("ok ")] == []
    return lines


def compile_ahead(fn: Any, signature: dict[str, str], constexprs: dict[str, Any], target: int, **options: Any) -> Any:
    """Compiles a Triton kernel for an NVIDIA GPU that need not be there.

    Args:
        fn: a `triton.jit` or `gluon.jit` function (not the interpreter's).
        signature: argument name to Triton type ("*bf16", "i32", "fp32", ...), constexprs left out.
        constexprs: constexpr name to value.
        target: compute capability, 80 or 90.
        **options: launch options, e.g. num_warps=4, num_ctas=2, enable_fp_fusion=False.

    Returns:
        Triton's compiled kernel: `.asm["cubin"]`, `.metadata.shared`.

    Pointers and 64-bit integers are assumed divisible by 16, as torch's allocator gives them.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    # Gluon's lies beside the class of its functions; the package itself does not name it in older versions.
    kind = getattr(sys.modules[type(fn).__module__], "GluonASTSource", ASTSource)
    names = [parameter.name for parameter in fn.params]
    types = {name: "constexpr" if name in constexprs else signature[name] for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types[name].startswith("*")}
    source = kind(fn=fn, signature=types, constexprs=constexprs, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes: registers a thread, bytes of stack (spills) a thread, bytes of shared memory."""

    registers: int
    spill_bytes: int
    shared_bytes: int


def find_cuobjdump() -> str | None:
    """The `cuobjdump` that Triton ships, else the one of a CUDA toolkit; None when there is none."""
    import triton

    shipped = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    for candidate in (str(shipped), "/usr/local/cuda/bin/cuobjdump"):
        if os.access(candidate, os.X_OK):
            return candidate
    return shutil.which("cuobjdump")


def resources(compiled: Any) -> Resources | None:
    """Reads registers and spills from the cubin, since Triton's metadata of an ahead-of-time build holds neither.

    Args:
        compiled: from `compile_ahead`.

    Returns:
        The kernel's resources, or None when no `cuobjdump` was found.
    """
    tool = find_cuobjdump()
    if tool is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        command = [tool, "--dump-resource-usage", str(cubin)]
        listing = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", listing.stdout)
    if found is None:
        raise RuntimeError(f"no resource line in the output of {tool}: {listing.stdout[:500]}")
    registers, stack, _, local = (int(number) for number in found.groups())
    return Resources(registers, max(stack, local), compiled.metadata.shared)
