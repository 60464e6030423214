"""Tree attention: W queries under a tree mask over a static KV cache, against sdpa and the plain products.

``bandwidth`` is the bytes that must be read (keys and values of the slots in use, once) over the time; on CUDA
``bandwidth_share`` is that over the bandwidth of a copy of the same keys and values, timed in the same rounds. The
cache is three quarters full, as static caches are: what reads all slots reads a third more. ``paged`` is ``ours`` with
the same keys and values in pages of 16 slots, in random order in an arena.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import BadInput, Goal, Incorrect, Options, Report, Variant, measure, paired_ratio, quantile
from ygglight.kernels import _dispatch
from ygglight.kernels.testing import rms_ratio
from ygglight.kernels.tree_attention import tree_attention, tree_attention_reference
from ygglight.kernels.tree_attention.testing import into_pages

WIDTHS = (1, 8, 32, 64)
COLUMNS = ("bandwidth_GB_per_s", "bandwidth_share", "rms_error")
PAGE = 16
"""Slots of a page, as of a paged decoder's."""
RATIO = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
"""Largest error against float64, of the output's rms; `eager` in 16 bits may miss it, for it rounds its scores."""


@dataclass(frozen=True)
class Size:
    """Heads of a model and slots of its cache."""

    query_heads: int
    key_heads: int
    head: int
    slots: int


SIZES = {
    "smollm2-1k": Size(9, 3, 64, 1024),
    "smollm2-4k": Size(9, 3, 64, 4096),
    "llama8b-1k": Size(32, 8, 128, 1024),
    "llama8b-4k": Size(32, 8, 128, 4096),
    "llama8b-16k": Size(32, 8, 128, 16384),
}
DEFAULTS = {
    ("cpu", True): ("smollm2-1k",),
    ("cpu", False): ("smollm2-1k", "smollm2-4k", "llama8b-4k"),
    ("cuda", True): ("llama8b-1k",),
    ("cuda", False): ("smollm2-4k", "llama8b-1k", "llama8b-4k", "llama8b-16k"),
}


def run(options: Options) -> list[Report]:
    """One report per size, dtype and number of queries.

    Args:
        options: from the command line; ``size`` is a key of ``SIZES``.
    """
    if options.size and options.size not in SIZES:
        raise BadInput(f"size {options.size!r}: there are {', '.join(SIZES)}")
    names = (options.size,) if options.size else DEFAULTS[options.device, options.quick]
    dtypes: tuple[torch.dtype, ...]
    dtypes = (torch.float32, torch.bfloat16) if options.device == "cpu" else (torch.bfloat16, torch.float16)
    dtypes = dtypes[-1:] if options.quick and options.device == "cpu" else dtypes
    return [_run(name, dtype, width, options) for name in names for dtype in dtypes for width in WIDTHS]


def _run(name: str, dtype: torch.dtype, width: int, options: Options) -> Report:
    size = SIZES[name]
    implementation = _dispatch.implementation("tree_attention", options.device).implementation
    case = f"{name}, W={width}, {str(dtype).removeprefix('torch.')}, {implementation}"
    print(f"tree_attention: {case}")
    results = measure(_variants(size, dtype, width, options), options)
    report = Report("tree_attention", case, results, ("sdpa",), COLUMNS)
    copy, ours, sdpa = (report.get(each) for each in ("copy", "ours", "sdpa"))
    for result in results:
        if not result.ok:
            continue
        result.metrics["bandwidth_GB_per_s"] = result.metrics["moved_bytes"] / result.p50 / 1e9
        if copy is not None and copy.ok and options.device == "cuda":
            moved = result.metrics["moved_bytes"] / copy.metrics["moved_bytes"]
            pairs = zip(result.seconds, copy.seconds, strict=True)
            result.metrics["bandwidth_share"] = quantile([moved * c / r for r, c in pairs], 0.5)
    if ours is not None and sdpa is not None and ours.ok and sdpa.ok:
        ratio = paired_ratio(ours.seconds, sdpa.seconds)
        report.goals.append(Goal(f"no slower than sdpa ({ratio:.2f} of its time)", ratio <= 1.05))
    paged = report.get("paged")
    if options.device == "cuda" and ours is not None and paged is not None and ours.ok and paged.ok:
        ratio = paired_ratio(paged.seconds, ours.seconds)
        report.goals.append(Goal(f"pages cost at most a tenth ({ratio:.2f} of the time without)", ratio <= 1.1))
    return report


def _inputs(size: Size, dtype: torch.dtype, width: int, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A full text under a random tree, in three quarters of the slots."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).to(device)

    query = normal(1, size.query_heads, width, size.head)
    key, value = (normal(1, size.key_heads, size.slots, size.head) for _ in range(2))
    text = size.slots * 3 // 4 - width
    mask = torch.zeros(1, 1, width, size.slots, dtype=torch.bool)
    mask[..., :text] = True
    tree = torch.eye(width, dtype=torch.bool)
    for node in range(1, width):  # each node sees what its parent sees
        tree[node] |= tree[int(torch.randint(0, node, (1,), generator=generator))]
    mask[0, 0, :, text : text + width] = tree
    return query, key, value, mask.to(device)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    return nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=True)


def _eager(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """As transformers' ``eager`` attention: scores in the dtype of the model, softmax in float32."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    scores = torch.matmul(query, key.mT) * scale
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return torch.matmul(torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype), value)


def _variants(size: Size, dtype: torch.dtype, width: int, options: Options) -> Iterator[Variant]:
    inputs = _inputs(size, dtype, width, options.device)
    query, key, value, mask = inputs
    scale = size.head**-0.5
    used = size.slots * 3 // 4
    moved = 2 * size.key_heads * used * size.head * key.element_size()
    expected = tree_attention_reference(query.double(), key.double(), value.double(), mask, scale)
    inner = 50 if options.device == "cuda" else 1
    both = torch.stack([key[:, :, :used], value[:, :, :used]])
    target = torch.empty_like(both)
    yield Variant("copy", partial(target.copy_, both), lambda: {"moved_bytes": 2 * moved}, inner=inner)
    key_pages, value_pages, page_mask, table = into_pages(key, value, mask, PAGE)
    calls: dict[str, Callable[[], Tensor]] = {
        "sdpa": partial(_sdpa, *inputs, scale),
        "eager": partial(_eager, *inputs, scale),
        "ours": partial(tree_attention, *inputs, scale),
        "paged": partial(tree_attention, query, key_pages, value_pages, page_mask, scale, table=table),
    }
    for name, call in calls.items():
        yield Variant(name, call, partial(_check, name, call, expected, dtype, moved), inner=inner)
    if options.device == "cuda":  # eager launches hide what decoding in graphs sees
        for name, call in calls.items():
            check = partial(_check, name, call, expected, dtype, moved)
            yield Variant(f"{name}-graph", record(call).replay, check, inner=inner)


def record(call: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of a call, after three warm-ups on a side stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def _check(name: str, call: Callable[[], Tensor], expected: Tensor, dtype: torch.dtype, moved: int) -> dict[str, Any]:
    error = rms_ratio(call(), expected)
    if not error <= RATIO[dtype] and name != "eager":
        raise Incorrect(f"{error:.2g} of the rms off, allowed {RATIO[dtype]:.2g}")
    return {"moved_bytes": moved, "rms_error": error}
