"""Which implementation of an operation runs: the Triton kernel or its plain torch twin, and why.

Triton is looked for with `importlib.util.find_spec`, never imported here, so that macOS, Windows and CPU-only boxes
can import every operation.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass

import torch

ENVIRONMENT_VARIABLE = "YGGLIGHT_KERNELS"
_CHOICES = ("auto", "reference", "triton")


@dataclass(frozen=True)
class KernelInfo:
    """What one operation runs, for `ygglight doctor`.

    Args:
        name: the operation, as its folder is called (or one of two in a folder: `latent_decode` is in
            `cluster_decode`).
        implementation: "triton", "reference" (plain torch twin) or "torch" (an operation that has no kernel, or whose
            torch path is made to be fast and is not the reference).
        reason: one line that says why.
    """

    name: str
    implementation: str
    reason: str


_has_kernel: dict[str, bool] = {}
_describe: dict[str, Callable[[KernelInfo], KernelInfo]] = {}


def register(name: str, *, has_kernel: bool, describe: Callable[[KernelInfo], KernelInfo] | None = None) -> None:
    """Names an operation; called once by each operation's package when it is imported.

    Args:
        name: the operation, as its folder is called (or one of two in a folder).
        has_kernel: whether a Triton kernel exists beside the plain torch code.
        describe: says in the list which of several kernels it would be; it may raise ValueError or RuntimeError, whose
            text is the reason then.
    """
    _has_kernel[name] = has_kernel
    if describe is not None:
        _describe[name] = describe


def _override() -> str:
    choice = os.environ.get(ENVIRONMENT_VARIABLE, "auto").strip().lower() or "auto"
    if choice not in _CHOICES:
        raise ValueError(f"{ENVIRONMENT_VARIABLE}={choice!r} is not one of {', '.join(_CHOICES)}: unset it or mend it")
    return choice


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").strip().lower() in ("1", "true", "on", "yes", "y")


def implementation(name: str, device_type: str) -> KernelInfo:
    """Decides what runs for an operation on tensors of one device type.

    Args:
        name: a registered operation.
        device_type: `tensor.device.type`, e.g. "cuda" or "cpu".

    Returns:
        The choice with its reason.

    Raises:
        KeyError: no operation of that name is registered.
        ValueError: YGGLIGHT_KERNELS holds an unknown word.
        RuntimeError: YGGLIGHT_KERNELS=triton on a machine or device where the kernel cannot run.
    """
    if not _has_kernel[name]:
        return KernelInfo(name, "torch", "plain torch on every device; it has no Triton kernel")
    choice = _override()
    if choice == "reference":
        return KernelInfo(name, "reference", f"{ENVIRONMENT_VARIABLE}=reference")
    installed = importlib.util.find_spec("triton") is not None
    runnable = device_type == "cuda" or _interpreting()
    if choice == "triton":
        if not installed:
            raise RuntimeError(f"{ENVIRONMENT_VARIABLE}=triton but triton is not installed: pip install triton")
        if not runnable:
            raise RuntimeError(
                f"{ENVIRONMENT_VARIABLE}=triton but the tensors are on {device_type!r}: move them to CUDA, "
                "set TRITON_INTERPRET=1 (slow, for tests), or unset the variable"
            )
        return KernelInfo(name, "triton", f"{ENVIRONMENT_VARIABLE}=triton")
    if device_type != "cuda":
        return KernelInfo(name, "reference", f"tensors on {device_type!r}, not on CUDA")
    if not installed:
        return KernelInfo(name, "reference", "triton is not installed")
    return KernelInfo(name, "triton", "CUDA tensors and triton installed")


def list_kernels() -> list[KernelInfo]:
    """Lists every operation of this layer with what it would run on this machine's best device.

    Returns:
        One entry an operation, sorted by name. Imports the operations, not Triton. A wrong YGGLIGHT_KERNELS is
        reported in the reason, not raised.
    """
    package = importlib.import_module("ygglight.kernels")
    for module in pkgutil.iter_modules(package.__path__):
        if module.ispkg:
            importlib.import_module(f"ygglight.kernels.{module.name}")
    has_device = torch.cuda.is_available()
    kinds = []
    for name in sorted(_has_kernel):
        try:
            info = implementation(name, "cuda" if has_device else "cpu")
            if info.implementation == "reference" and not has_device and _override() == "auto":
                info = KernelInfo(name, "reference", "no CUDA device")
            info = _describe[name](info) if name in _describe else info
        except (RuntimeError, ValueError) as error:
            info = KernelInfo(name, "unavailable", str(error))
        kinds.append(info)
    return kinds
