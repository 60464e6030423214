"""Which implementation of the decode block runs, and why; Triton is not imported to find out."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Literal, get_args

import torch

from ygglight.kernels import _dispatch
from ygglight.kernels.cluster_decode.mla import LatentSpec
from ygglight.kernels.cluster_decode.spec import BlockSpec

ENVIRONMENT_VARIABLE = "YGGLIGHT_CLUSTER_DECODE"
"""Narrows what YGGLIGHT_KERNELS leaves open: auto, or one path."""
CLUSTER_TRITON = (3, 8)
"""Before it neither reductions nor layout conversions cross the blocks of a cluster (triton-lang/triton#9221)."""
CLUSTER_CAPABILITY = (9, 0)
"""The cluster block was compiled and checked for Hopper only."""
CLUSTER_SIZES = (1, 2, 4, 8)
"""Blocks of a cluster; 8 is the largest that every Hopper GPU takes."""
CLUSTER_HEAD_DIMS = (64, 80, 96, 128, 256)
CLUSTER_BATCH = 8
"""Most sequences of the cluster block. A guess until measured: each has clusters of its own, which share L2 alone."""
MAX_HEAD_DIM = 256
"""Largest head of the Triton kernels."""
MAX_GROUP = 64
"""Most query heads of a key head: one program has them all."""

_NO_SPLIT_K = "latent attention has no split-K kernels"

Path = Literal["torch", "split_k", "cluster"]


@dataclass(frozen=True)
class Choice:
    """What runs.

    Args:
        path: "cluster" (one kernel on thread-block clusters), "split_k" (plain Triton) or "torch" (the reference; of
            latent attention a faster form of it, `mla_torch`).
        reason: One line that says why.
    """

    path: Path
    reason: str


def choose_path(
    spec: BlockSpec | LatentSpec,
    dtype: torch.dtype,
    device: torch.device,
    *,
    batch: int = 1,
    mask: torch.dtype | None = None,
) -> Choice:
    """Decides what runs a block.

    Args:
        spec: Of the block; latent attention has no split-K kernels. dtype: of its tensors. device: where they are.
        batch: sequences.
        mask: Dtype of the mask, None without one.

    Raises:
        RuntimeError: an environment variable asks for what cannot run here.
        ValueError: an environment variable holds an unknown word.
    """
    wish = _wish()
    if wish == "torch":
        return Choice("torch", f"{ENVIRONMENT_VARIABLE}=torch")
    info = _dispatch.implementation("cluster_decode", device.type)
    obstacle = info.reason if info.implementation != "triton" else _why_no_kernel(spec, dtype)
    if isinstance(spec, LatentSpec):
        obstacle = obstacle or _why_no_clusters(device) or _why_no_latent_cluster(spec, dtype, batch, mask)
        choice = Choice("cluster", _clusters_run()) if obstacle is None else Choice("torch", obstacle)
    elif obstacle is not None:
        choice = Choice("torch", obstacle)
    elif wish == "split_k":
        choice = Choice("split_k", f"{ENVIRONMENT_VARIABLE}=split_k")
    else:
        obstacle = _why_no_clusters(device) or _why_no_cluster_block(spec, dtype, batch, mask)
        choice = Choice("cluster", _clusters_run()) if obstacle is None else Choice("split_k", obstacle)
    if isinstance(spec, LatentSpec) and wish == "split_k":
        choice = Choice(choice.path, _NO_SPLIT_K)
    if wish not in ("auto", choice.path):
        raise RuntimeError(f"{ENVIRONMENT_VARIABLE}={wish} cannot run here ({choice.reason}): unset it")
    return choice


def possible_paths(device: torch.device, *, latent: bool = False) -> tuple[tuple[Path, ...], str]:
    """What may be faster than a model's own code on a device, whatever the block; one line that says why not more.

    Of latent attention that includes plain torch, for the models' own code expands all of the text at each step.

    Args:
        device: Where the tensors would be. latent: whether the block is one of latent attention.

    Raises:
        RuntimeError: an environment variable asks for what cannot run here.
        ValueError: an environment variable holds an unknown word.
    """
    wish = _wish()
    plain: tuple[Path, ...] = ("torch",) if latent else ()
    if wish == "torch":
        return plain, f"{ENVIRONMENT_VARIABLE}=torch"
    if latent and wish == "split_k":
        return (), f"{ENVIRONMENT_VARIABLE}=split_k, and {_NO_SPLIT_K}"
    info = _dispatch.implementation("cluster_decode", device.type)
    if info.implementation != "triton":
        return tuple(path for path in plain if wish in ("auto", path)), info.reason
    obstacle = _why_no_clusters(device)
    found: tuple[Path, ...] = plain if latent else ("split_k",)
    found = found if obstacle is not None else ("cluster", *found)
    return tuple(path for path in found if wish in ("auto", path)), obstacle or _clusters_run()


def cluster_support() -> list[tuple[str, str]]:
    """For `ygglight doctor`: each CUDA device, and which sizes of clusters the block has there or why none."""
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    if not devices:
        found = _triton_version()
        missing = f"Triton {_dotted(CLUSTER_TRITON)} or later" if found < CLUSTER_TRITON else ""
        wanted = f"a CUDA device of compute capability {_dotted(CLUSTER_CAPABILITY)}"
        return [("-", "none: needs " + " and ".join(part for part in (wanted, missing) if part))]
    rows = []
    for device in devices:
        obstacle, sizes = _why_no_clusters(device), ", ".join(map(str, CLUSTER_SIZES))
        rows.append((str(device), f"{sizes} blocks: {_clusters_run()}" if obstacle is None else f"none: {obstacle}"))
    return rows


def describe(info: _dispatch.KernelInfo) -> _dispatch.KernelInfo:
    """The entry of `ygglight doctor` with the path that this machine's first device takes.

    Args:
        info: From :func:`ygglight.kernels._dispatch.implementation`.
    """
    if info.implementation != "triton":
        return info
    wish = _wish()
    if wish != "auto":
        kind = "reference" if wish == "torch" else info.implementation
        return _dispatch.KernelInfo(info.name, kind, f"{ENVIRONMENT_VARIABLE}={wish}")
    obstacle = _why_no_clusters(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    reason = f"cluster: {_clusters_run()}" if obstacle is None else f"split_k: {obstacle}"
    return _dispatch.KernelInfo(info.name, info.implementation, reason)


def describe_latent(info: _dispatch.KernelInfo) -> _dispatch.KernelInfo:
    """The same of the block of latent attention, whose torch path is not the reference.

    Args:
        info: From :func:`ygglight.kernels._dispatch.implementation`.

    Raises:
        RuntimeError: an environment variable asks for what cannot run here.
    """
    wish, device = _wish(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    obstacle = info.reason if info.implementation != "triton" else _why_no_clusters(device)
    if wish == "torch":
        obstacle = f"{ENVIRONMENT_VARIABLE}=torch"
    elif wish == "split_k" or (wish == "cluster" and obstacle is not None):
        reason = obstacle if wish == "cluster" else _NO_SPLIT_K
        raise RuntimeError(f"{ENVIRONMENT_VARIABLE}={wish} cannot run here ({reason}): unset it")
    if obstacle is None:
        return _dispatch.KernelInfo(info.name, info.implementation, f"cluster: {_clusters_run()}")
    return _dispatch.KernelInfo(info.name, "torch", f"absorbed weights in plain torch: {obstacle}")


def why_no_latent_tiles(spec: LatentSpec) -> str | None:
    """Why the sizes of a block of latent attention do not fit the tiles of its cluster kernel, or None.

    Args:
        spec: Of the block.
    """
    sizes = (spec.nope_dim, spec.rope_dim, spec.value_dim, spec.latent)
    powers = all(size >= 32 and size & (size - 1) == 0 for size in sizes)
    tiles = spec.nope_dim // spec.rope_dim + 2
    if powers and spec.rope_dim <= spec.nope_dim and spec.value_dim <= 256 and tiles <= spec.latent // spec.rope_dim:
        return None
    wanted = "the cluster block takes powers of two as DeepSeek's, 128, 64, 128 and 512"
    return f"nope, rope, value and latent sizes are {sizes}: {wanted}"


def _wish() -> str:
    word = os.environ.get(ENVIRONMENT_VARIABLE, "auto").strip().lower() or "auto"
    known = ("auto", *get_args(Path))
    if word not in known:
        raise ValueError(f"{ENVIRONMENT_VARIABLE}={word!r} is not one of {', '.join(known)}: unset it or mend it")
    return word


def _why_no_kernel(spec: BlockSpec | LatentSpec, dtype: torch.dtype) -> str | None:
    """Why no Triton kernel has such a block; what the cluster kernel of latent attention takes, is asked elsewhere."""
    if dtype is torch.float64:
        return "float64 is plain torch's alone"
    if isinstance(spec, LatentSpec):
        return None
    if spec.head_dim > MAX_HEAD_DIM:
        return f"heads of {spec.head_dim} are above the kernels' {MAX_HEAD_DIM}"
    if spec.group > MAX_GROUP:
        return f"{spec.group} query heads a key head are above the kernels' {MAX_GROUP}"
    return None


def _why_no_clusters(device: torch.device) -> str | None:
    found = _triton_version()
    if found < CLUSTER_TRITON:
        return f"Triton {'.'.join(map(str, found))} has no reductions across a cluster, {_dotted(CLUSTER_TRITON)} has"
    if device.type != "cuda":
        return "clusters are not interpreted"
    if torch.version.hip is not None:
        return "ROCm has no thread-block clusters"
    capability = torch.cuda.get_device_capability(device)
    if capability != CLUSTER_CAPABILITY:
        return f"compute capability {_dotted(capability)}, the cluster block is for {_dotted(CLUSTER_CAPABILITY)}"
    return None


def _why_no_cluster_block(spec: BlockSpec, dtype: torch.dtype, batch: int, mask: torch.dtype | None) -> str | None:
    if spec.head_dim not in CLUSTER_HEAD_DIMS:
        return f"the cluster block has no heads of {spec.head_dim}"
    return _why_no_cluster_call(dtype, batch, mask)


def _why_no_latent_cluster(spec: LatentSpec, dtype: torch.dtype, batch: int, mask: torch.dtype | None) -> str | None:
    return why_no_latent_tiles(spec) or _why_no_cluster_call(dtype, batch, mask)


def _why_no_cluster_call(dtype: torch.dtype, batch: int, mask: torch.dtype | None) -> str | None:
    if batch > CLUSTER_BATCH:
        return f"{batch} sequences would each read the weights anew in the cluster block"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"the cluster block takes float16 and bfloat16, not {dtype}"
    if mask not in (None, torch.bool):
        return f"the cluster block takes masks of bool, not {mask}"
    return None


def _clusters_run() -> str:
    return f"Triton {_dotted(_triton_version())} on compute capability {_dotted(CLUSTER_CAPABILITY)}"


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))


@functools.cache
def _triton_version() -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in version("triton").split("+")[0].split(".")[:2])
    except (PackageNotFoundError, ValueError):  # built from source without a number: the plain kernels run anywhere
        return (0, 0)
