"""Activation codecs: pack and unpack of int4, int8 and mask, against a copy of the same tensor.

``copy_share`` is the bandwidth of the codec (bytes it must read and write, payload included) over that of ``clone`` of
the same tensor (bytes read and written), timed in the same rounds; ``clone`` takes new memory as the codecs do, which
costs page faults on a CPU and nothing on CUDA (``copy`` has its target already). On a CPU the plain torch twin runs, on
CUDA the Triton kernel; the goal of 70 % is for the kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import BadInput, Goal, Incorrect, Options, Report, Result, Variant, measure, quantile
from ygglight.kernels import _dispatch
from ygglight.kernels.act_codec import INT4, INT8, MASK, CodecSpec, pack, unpack

MEGA = 2**20
SIZES = {("cpu", False): (1, 16), ("cpu", True): (1,), ("cuda", False): (1, 16, 64), ("cuda", True): (1,)}
"""Millions (2**20) of elements."""
GOAL = 0.7
COLUMNS = ("ns_per_element", "GB_per_s", "copy_share", "bits")
CODECS: tuple[CodecSpec, ...] = (INT4, INT8, MASK)
_STEPS = {"int4": 15, "int8": 255}


def run(options: Options) -> list[Report]:
    """One report per size and dtype.

    Args:
        options: from the command line; ``size`` is a number of 2**20 elements.
    """
    if options.size and not options.size.isdigit():
        raise BadInput(f"size {options.size!r}: give a number of 2**20 elements, e.g. 16")
    millions = (int(options.size),) if options.size else SIZES[options.device, options.quick]
    dtypes = (torch.float32, torch.bfloat16) if options.device == "cuda" or not options.quick else (torch.float32,)
    return [_run(count * MEGA, dtype, options) for count in millions for dtype in dtypes]


def _run(numel: int, dtype: torch.dtype, options: Options) -> Report:
    implementation = _dispatch.implementation("act_codec", options.device).implementation
    case = f"{numel // MEGA} Mi elements, {str(dtype).removeprefix('torch.')}, {implementation}"
    print(f"act_codec: {case}")
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(numel, generator=generator).to(dtype)
    data[:: numel // 1000] *= 25  # a few channels stick out, as in transformers
    data = data.to(options.device)
    results = measure(_variants(data, options), options)
    report = Report("act_codec", case, results, ("clone",), COLUMNS)
    clone = report.get("clone")
    for result in results:
        if result.ok:
            result.metrics["ns_per_element"] = result.p50 / numel * 1e9
            result.metrics["GB_per_s"] = result.metrics["moved_bytes"] / result.p50 / 1e9
            if clone is not None and clone.ok:
                result.metrics["copy_share"] = copy_share(result, clone)
    if options.device == "cuda" and numel >= 16 * MEGA:  # smaller ones wait for launches
        for result in results:
            share = result.metrics.get("copy_share")
            if share is not None and result.name not in ("copy", "clone"):
                report.goals.append(Goal(f"{result.name}: {share:.0%} of copy bandwidth (goal 70%)", share >= GOAL))
    else:
        report.goals.append(Goal("70% of copy bandwidth: a goal for the Triton kernel on large tensors", None))
    return report


def copy_share(result: Result, copy: Result) -> float:
    """Bandwidth of ``result`` over that of ``copy``, the median of paired repeats (both name their ``moved_bytes``)."""
    moved = result.metrics["moved_bytes"] / copy.metrics["moved_bytes"]
    return quantile([moved * c / r for r, c in zip(result.seconds, copy.seconds, strict=True)], 0.5)


def _variants(data: Tensor, options: Options) -> Iterator[Variant]:
    nbytes = data.numel() * data.element_size()
    # Short work is repeated within one timing: on CUDA until it dwarfs the synchronisation, on a CPU once is enough.
    inner = 20 if options.device == "cuda" else 1
    target = torch.empty_like(data)
    yield Variant("clone", data.clone, lambda: {"moved_bytes": 2 * nbytes}, inner=inner)
    yield Variant("copy", partial(target.copy_, data), lambda: {"moved_bytes": 2 * nbytes}, inner=inner)
    for spec in CODECS:
        values = (data > 0).to(data.dtype) * 1.25 if spec is MASK else data
        packed = pack(values, spec, 1)
        moved = {"moved_bytes": nbytes + packed.nbytes, "bits": packed.bits_per_element}
        check = partial(_check, values, spec, moved)
        yield Variant(f"pack-{spec.name}", partial(pack, values, spec, 1), check, inner=inner)
        yield Variant(f"unpack-{spec.name}", partial(unpack, packed), check, inner=inner)


def _check(values: Tensor, spec: CodecSpec, moved: dict[str, Any]) -> dict[str, Any]:
    """What comes back is the same (mask), or within one step of its group's range (affine)."""
    back = unpack(pack(values, spec, 1))
    if spec.name == "mask":
        if not torch.equal(back, values):
            raise Incorrect("a mask did not come back as it was")
        return moved
    groups, kept = values.float().view(-1, spec.group), back.float().view(-1, spec.group)
    step = (groups.amax(1) - groups.amin(1)) / _STEPS[spec.name]
    rounding = torch.finfo(values.dtype).eps * groups.abs().amax(1)  # of what comes out
    worst = float((((kept - groups).abs().amax(1) - rounding) / step).max())
    if not worst <= 1.05:  # the scale is stored in bfloat16
        raise Incorrect(f"an element is {worst:.2f} steps of its group off")
    return moved | {"worst_step": worst}
