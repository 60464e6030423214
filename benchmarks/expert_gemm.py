"""Experts of few tokens: grouped int4 against int4 expert by expert, and against weights in the dtype of the model.

A time is of all layers of a size, one after the other: with one alone the caches would hold its weights from the time
before. ``read_bytes`` is what the experts that were routed to take, once each, and ``bandwidth_GB_per_s`` that over the
time. ``loop`` and ``int4-loop`` know the routes beforehand: they pay no host read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.harness import BadInput, Goal, Incorrect, Options, Report, Variant, measure, paired_ratio
from ygglight.engines.moe_speq.quantize import choose_group, quantize_nearest
from ygglight.kernels import _dispatch
from ygglight.kernels.expert_gemm import (
    CpuInt4Weight,
    Int4Weight,
    allocate,
    expert_mlp,
    expert_mlp_int4,
    expert_mlp_int4_reference,
    expert_mlp_reference,
)
from ygglight.kernels.testing import rms_ratio

TOKENS = (1, 8)
COLUMNS = ("bandwidth_GB_per_s", "read_bytes", "rms_error")
RATIO = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""Largest error against float64, of the output's rms."""


@dataclass(frozen=True)
class Size:
    """The routed experts of a layer, and how many layers there are."""

    hidden: int
    inner: int
    experts: int
    top_k: int
    layers: int


SIZES = {
    "smollm2-8x": Size(576, 1536, 8, 2, 6),
    "olmoe": Size(2048, 1024, 64, 8, 4),
    "mixtral": Size(4096, 14336, 8, 2, 2),
    "qwen3-30b": Size(2048, 768, 128, 8, 4),
}
DEFAULTS = {
    ("cpu", True): ("smollm2-8x",),
    ("cpu", False): ("smollm2-8x",),
    ("cuda", True): ("olmoe",),
    ("cuda", False): ("olmoe", "qwen3-30b", "mixtral"),
}
Layer = tuple[Tensor, Tensor, Any, Any]


def run(options: Options) -> list[Report]:
    """One report per size, dtype and number of tokens.

    Args:
        options: from the command line; ``size`` is a key of ``SIZES``.
    """
    if options.size and options.size not in SIZES:
        raise BadInput(f"size {options.size!r}: there are {', '.join(SIZES)}")
    names = (options.size,) if options.size else DEFAULTS[options.device, options.quick]
    dtypes = (torch.float32, torch.bfloat16) if options.device == "cpu" else (torch.bfloat16,)
    return [_run(name, dtype, tokens, options) for name in names for dtype in dtypes for tokens in TOKENS]


def _run(name: str, dtype: torch.dtype, tokens: int, options: Options) -> Report:
    implementation = _dispatch.implementation("expert_gemm", options.device).implementation
    case = f"{name}, T={tokens}, {str(dtype).removeprefix('torch.')}, {implementation}"
    print(f"expert_gemm: {case}")
    results = measure(_variants(SIZES[name], dtype, tokens, options), options)
    report = Report("expert_gemm", case, results, ("loop", "int4-loop"), COLUMNS)
    for result in results:
        if result.ok:
            result.metrics["bandwidth_GB_per_s"] = result.metrics["read_bytes"] / result.p50 / 1e9
    int4, loop, int4_loop = (report.get(each) for each in ("int4", "loop", "int4-loop"))
    if int4 is not None and loop is not None and int4.ok and loop.ok:
        ratio = paired_ratio(int4.seconds, loop.seconds)
        report.goals.append(Goal(f"int4 is faster than whole weights ({ratio:.2f} of the time)", ratio < 1))
    if options.device == "cuda" and int4 is not None and int4_loop is not None and int4.ok and int4_loop.ok:
        ratio = paired_ratio(int4_loop.seconds, int4.seconds)
        report.goals.append(Goal(f"grouped is 1.5 times as fast as expert by expert ({ratio:.2f})", ratio >= 1.5))
    return report


def _layer(size: Size, dtype: torch.dtype, device: str, generator: torch.Generator) -> Layer:
    """Both matrices of each expert, whole and in four bits."""
    shapes = ((2 * size.inner, size.hidden), (size.hidden, size.inner))
    groups = tuple(choose_group(columns, "a matrix") for _, columns in shapes)
    whole = [torch.empty(size.experts, *shape, dtype=dtype, device=device) for shape in shapes]
    coded = allocate(size.experts, shapes, (groups[0], groups[1]), device)
    for stack, weight, (rows, columns) in zip(whole, coded, shapes, strict=True):
        for expert in range(size.experts):
            matrix = torch.randn(rows, columns, generator=generator, device=device) / columns**0.5
            stack[expert].copy_(matrix)
            weight.write(expert, *quantize_nearest(matrix, weight.group))
    return whole[0], whole[1], *coded


def _variants(size: Size, dtype: torch.dtype, tokens: int, options: Options) -> Iterator[Variant]:
    generator = torch.Generator(options.device).manual_seed(0)
    layers = [_layer(size, dtype, options.device, generator) for _ in range(size.layers)]
    x = torch.randn(tokens, size.hidden, generator=generator, device=options.device).to(dtype)
    x = x.repeat_interleave(size.top_k, dim=0)
    routes = [
        torch.rand(tokens, size.experts, generator=generator, device=options.device)
        .topk(size.top_k, dim=-1)
        .indices.flatten()
        for _ in layers
    ]
    calls: dict[str, Callable[[int], Tensor]] = {
        "loop": partial(_loop, x, layers, [_groups(each) for each in routes]),
        "grouped": lambda i: expert_mlp(x, routes[i], *layers[i][:2], activation="silu"),
        "int4-loop": partial(_int4_loop, x, layers, [_groups(each) for each in routes]),
        "int4": lambda i: expert_mlp_int4(x, routes[i], *layers[i][2:], activation="silu"),
    }
    for name, call in calls.items():
        check = partial(_check, call, x, routes, layers, name.startswith("int4"), dtype)
        every = partial(_every, call, size.layers)
        yield Variant(name, every, check, inner=10 if options.device == "cuda" else 1)
        if options.device == "cuda":  # eager launches hide what decoding in graphs sees
            yield Variant(f"{name}-graph", _record(every).replay, check, inner=10)


def _every(call: Callable[[int], Tensor], layers: int) -> None:
    for number in range(layers):
        call(number)


def _groups(experts: Tensor) -> list[tuple[int, Tensor]]:
    return [(expert, (experts == expert).nonzero().flatten()) for expert in experts.unique().tolist()]


def _loop(x: Tensor, layers: list[Layer], groups: list[list[tuple[int, Tensor]]], number: int) -> Tensor:
    """As transformers' ``eager`` experts, without its search for the routes."""
    gate_up, down, *_ = layers[number]
    out = torch.empty_like(x)
    for expert, rows in groups[number]:
        gate, up = functional.linear(x[rows], gate_up[expert]).chunk(2, dim=-1)
        out[rows] = functional.linear(functional.silu(gate) * up, down[expert])
    return out


def _int4_loop(x: Tensor, layers: list[Layer], groups: list[list[tuple[int, Tensor]]], number: int) -> Tensor:
    """One call of the int4 product an expert, as a loop over quantised linear layers does it."""
    *_, gate_up, down = layers[number]
    out = torch.empty_like(x)
    for expert, rows in groups[number]:
        one = torch.zeros(len(rows), dtype=torch.int64, device=x.device)
        out[rows] = expert_mlp_int4(x[rows], one, _only(gate_up, expert), _only(down, expert), activation="silu")
    return out


def _only(weight: Any, expert: int) -> Any:
    return type(weight)(weight.packed[expert : expert + 1], weight.scale[expert : expert + 1])


def _record(call: Callable[[], None]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def _check(
    call: Callable[[int], Tensor], x: Tensor, routes: list[Tensor], layers: list[Layer], coded: bool, dtype: torch.dtype
) -> dict[str, Any]:
    """Against float64 with the same weights, whole or in four bits."""
    gate_up, down, *codes = layers[0]
    used = sum(len(each.unique()) for each in routes)
    if coded:
        plain = [_portable(weight) for weight in codes]
        expected = expert_mlp_int4_reference(x.double(), routes[0], plain[0], plain[1], "silu")
        read = sum(weight.nbytes for weight in codes) // len(gate_up) * used
    else:
        ids, places = routes[0].unique(return_inverse=True)
        expected = expert_mlp_reference(x.double(), places, gate_up[ids].double(), down[ids].double(), "silu")
        read = (gate_up[0].nbytes + down[0].nbytes) * used
    error = rms_ratio(call(0), expected)
    # The CPU's int4 product rounds rows to bfloat16, whatever they were.
    allowed = RATIO[torch.bfloat16 if coded and isinstance(codes[0], CpuInt4Weight) else dtype]
    if not error <= allowed:
        raise Incorrect(f"{error:.2g} of the rms off, allowed {allowed:.2g}")
    return {"read_bytes": read, "rms_error": error}


def _portable(weight: Any) -> Int4Weight:
    if isinstance(weight, Int4Weight):
        return weight
    packed, scale = zip(*weight.read(), strict=True)
    return Int4Weight(torch.stack(packed), torch.stack(scale))
