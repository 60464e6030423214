"""`ygglight doctor`: what is installed, what runs where, and what is missing."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

import torch

from ygglight import __version__
from ygglight.compat.extras import missing_extras, pip_line
from ygglight.registry import STRATEGIES
from ygglight_launcher.recipes import list_recipes, recipes_dir, table

PACKAGES = (
    "torch", "lightning", "jsonargparse", "transformers", "safetensors", "PuLP", "numpy",
    "triton", "peft", "gguf", "accelerate", "bitsandbytes", "deepspeed", "matplotlib",
)  # fmt: skip


def versions() -> list[tuple[str, str]]:
    """Package and version of everything that ygglight may use; `-` for what is not installed."""
    found = [("ygglight", __version__), ("python", platform.python_version())]
    for package in PACKAGES:
        try:
            found.append((package, version(package)))
        except PackageNotFoundError:
            found.append((package, "-"))
    return found


def devices() -> list[tuple[str, str]]:
    """Each device that a Trainer could use, with its memory or its threads."""
    rows = [("cpu", f"{platform.machine()}, {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads")]
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        capability = f"sm_{found.major}{found.minor}"
        rows.append((f"cuda:{index}", f"{found.name}, {found.total_memory / 2**30:.1f} GiB, {capability}"))
    if torch.backends.mps.is_available():
        rows.append(("mps", "Apple GPU"))
    return rows


def kernels() -> list[tuple[str, str, str]]:
    """Name, implementation and reason of every kernel, as the kernel layer reports it."""
    from ygglight.kernels import list_kernels

    return [(kernel.name, kernel.implementation, kernel.reason) for kernel in list_kernels()]


def clusters() -> list[tuple[str, str]]:
    """Each CUDA device with the sizes of thread-block clusters that the fused decode block has there, or why none."""
    from ygglight.kernels.cluster_decode import cluster_support

    return cluster_support()


def main(argv: Sequence[str]) -> int:
    """Prints the report."""
    argparse.ArgumentParser(
        prog="ygglight doctor", description="Versions, device, kernels and missing extras."
    ).parse_args(argv[1:])
    print(table([("PACKAGE", "VERSION"), *versions()]), end="\n\n")
    print(table([("DEVICE", ""), *devices()]), end="\n\n")
    print(table([("KERNEL", "RUNS AS", "WHY"), *kernels()]), end="\n\n")
    print(table([("CLUSTERS", ""), *clusters()]), end="\n\n")
    names = [(row.name, "refuses: " + row.refusal if row.refusal else row.description) for row in STRATEGIES]
    print(table([("STRATEGY", ""), *names]), end="\n\n")
    print(f"{len(list_recipes())} recipes in {recipes_dir()}")
    missing = missing_extras()
    if not missing:
        print("no extra is missing")
    for extra, modules in missing.items():
        print(f"missing extra {extra} ({', '.join(modules)}): {pip_line(extra)}")
    return 0
