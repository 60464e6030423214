"""What a user can type today to train in less activation memory, without Adacc; each at its best."""

from __future__ import annotations

import inspect
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from benchmarks.harness import DoesNotFit, Variant
from benchmarks.workload import Workload
from ygglight.engines.memory.sizes import format_bytes
from ygglight.kernels.act_codec import INT4, Packed, pack, unpack

aten = torch.ops.aten
MATMULS = {aten.mm.default, aten.addmm.default, aten.bmm.default}
ATTENTION = {
    getattr(aten, name).default
    for name in (
        "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_attention_math",
    )
    if hasattr(aten, name)
}  # fmt: skip
MATMULS_PER_LAYER = 7
"""q, k, v, o, gate, up, down of a Llama-like layer."""


# -- checkpointing ---------------------------------------------------------------------------------------------------
def checkpoint_arguments(context_fn: Callable[[], Any] | None = None) -> dict[str, Any]:
    """Keyword arguments for ``torch.utils.checkpoint.checkpoint``: all that this torch wants to be told."""
    arguments: dict[str, Any] = {"use_reentrant": False}
    if context_fn is not None:
        arguments["context_fn"] = context_fn
        if "respect_saved_tensors_hooks" in inspect.signature(checkpoint).parameters:  # torch >= 2.14
            arguments["respect_saved_tensors_hooks"] = True
    return arguments


def save_all(state: Counter[str], op: Any) -> bool:
    """Save every matrix product and attention: only cheap operators run twice."""
    return op in MATMULS or op in ATTENTION


def save_half(state: Counter[str], op: Any) -> bool:
    """Save attention and every second matrix product, as torchtitan does."""
    if op in MATMULS:
        state["products"] += 1
        return state["products"] % 2 == 0
    return op in ATTENTION


def save_lean(state: Counter[str], op: Any) -> bool:
    """As :func:`save_all`, without the layer's last product: nothing in its backward reads that output."""
    if op in MATMULS:
        state["products"] += 1
        return state["products"] < MATMULS_PER_LAYER
    return op in ATTENTION


def selective(policy: Callable[[Counter[str], Any], bool]) -> Callable[[], Any]:
    """The ``context_fn`` for a policy, with counters that start anew in every forward and every recomputation."""

    def contexts() -> Any:
        counters: dict[bool, Counter[str]] = {False: Counter(), True: Counter()}

        def decide(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
            saved = policy(counters[bool(context.is_recompute)], op)
            return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

        return create_selective_checkpoint_contexts(decide)

    return contexts


@contextmanager
def checkpointing(
    work: Workload, *, context_fn: Callable[[], Any] | None = None, layers: int | None = None, rest: Any = None
) -> Iterator[None]:
    """Hugging Face's ``gradient_checkpointing`` inside, nothing outside.

    Args:
        context_fn: of selective checkpointing; None: full. layers: only so many first layers (the later ones set the
            peak by their workspace, the earlier ones by what they hold). rest: a ``context_fn`` for the others; None
            leaves those alone.
    """
    network = work.network
    network.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpoint_arguments(context_fn))
    for index, layer in enumerate(work.layers):
        if layers is not None and index >= layers:
            layer.gradient_checkpointing = rest is not None
            layer._gradient_checkpointing_func = partial(checkpoint, **checkpoint_arguments(rest))  # type: ignore
    try:
        yield
    finally:
        network.gradient_checkpointing_disable()
        network.disable_input_require_grads()  # enabling leaves one more hook on the embedding each time


# -- hooks -----------------------------------------------------------------------------------------------------------
@contextmanager
def save_on_cpu(work: Workload) -> Iterator[None]:
    """``torch.autograd.graph.save_on_cpu`` as its documentation shows it: it moves saved weights too."""
    with torch.autograd.graph.save_on_cpu(pin_memory=work.device.type == "cuda"):
        yield


@contextmanager
def uniform_int4(work: Workload) -> Iterator[None]:
    """Every floating tensor that autograd saves, parameters excepted, in int4; each once, however often it is saved."""
    state = {p.untyped_storage()._cdata for p in (*work.module.parameters(), *work.module.buffers())}
    known: dict[tuple[Any, ...], tuple[Any, Packed]] = {}
    counter = iter(range(2**31))

    def packing(tensor: Tensor) -> Any:
        storage = tensor.untyped_storage()
        if not tensor.is_floating_point() or storage._cdata in state:
            return tensor
        key = (storage._cdata, tensor._version, tensor.shape, tensor.stride(), tensor.storage_offset())
        entry = known.get(key)
        if entry is None:
            packed = pack(tensor.detach().reshape(-1), INT4, next(counter))
            # The address of a storage that died may be given to another one.
            entry = known[key] = (weakref.ref(storage, lambda _: known.pop(key, None)), packed)
        return entry[1], tensor.shape

    def unpacking(saved: Any) -> Tensor:
        return saved if isinstance(saved, Tensor) else unpack(saved[0]).view(saved[1])

    with torch.autograd.graph.saved_tensors_hooks(packing, unpacking):
        yield


# -- variants --------------------------------------------------------------------------------------------------------
def _variant(work: Workload, name: str, around: Callable[[], Any], bound: float | None = 0.0) -> Variant:
    def prepare() -> dict[str, Any]:
        return {"gradient_error": work.check(work.step, around, bound)} | work.bytes_of(work.step, around)

    return Variant(name, work.step, prepare, lambda: _fresh(work, around))


@contextmanager
def _fresh(work: Workload, around: Callable[[], Any]) -> Iterator[None]:
    work.clear()
    with around():
        yield


def plain(work: Workload) -> Variant:
    """Nothing at all."""
    return _variant(work, "plain", _nothing)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def fixed(work: Workload) -> Iterator[Variant]:
    """The ways without a budget to set."""
    yield _variant(work, "full", lambda: checkpointing(work))
    for policy in (save_all, save_half):
        name = "sac-" + policy.__name__.removeprefix("save_")
        yield _variant(work, name, partial(checkpointing, work, context_fn=selective(policy)))
    yield _variant(work, "save_on_cpu", lambda: save_on_cpu(work))
    yield _variant(work, "int4-everything", lambda: uniform_int4(work), bound=None)


def fitted(work: Workload, share: float, plain_peak: int) -> Iterator[Variant]:
    """Checkpointing on as few layers as the budget needs: what a user ends up with who tunes by hand.

    Args:
        share: of the plain peak. plain_peak: measured bytes.
    """
    lean = selective(save_lean)

    def full_layers(count: int) -> Callable[[], Any]:
        return lambda: checkpointing(work, layers=count)

    def lean_layers(count: int) -> Callable[[], Any]:  # beyond all layers lean, further ones become full
        more = count - len(work.layers)
        if more <= 0:
            return lambda: checkpointing(work, context_fn=lean, layers=count)
        return lambda: checkpointing(work, layers=more, rest=lean)

    yield _fitted_variant(work, f"full-fit-{share}", full_layers, len(work.layers), int(share * plain_peak))
    yield _fitted_variant(work, f"sac-fit-{share}", lean_layers, 2 * len(work.layers), int(share * plain_peak))


def _fitted_variant(
    work: Workload, name: str, make: Callable[[int], Callable[[], Any]], most: int, budget: int
) -> Variant:
    chosen: list[Callable[[], Any]] = []

    def prepare() -> dict[str, Any]:
        count = smallest_that_fits(lambda n: work.peak(work.step, make(n)), most, budget)
        chosen.append(make(count))
        error = work.check(work.step, chosen[0])
        return {"gradient_error": error, "layers": count} | work.bytes_of(work.step, chosen[0])

    return Variant(name, work.step, prepare, lambda: _fresh(work, chosen[0]))


def smallest_that_fits(peak: Callable[[int], int], most: int, budget: int) -> int:
    """The smallest count in 0..``most`` whose peak is within the budget, by bisection.

    Raises:
        DoesNotFit: not even ``most`` is.
    """
    least = peak(most)
    if least > budget:
        raise DoesNotFit(f"its smallest peak is {format_bytes(least)}, the budget {format_bytes(budget)}")
    low, high = -1, most  # peak(low) is over, peak(high) within
    while high - low > 1:
        middle = (low + high) // 2
        if peak(middle) <= budget:
            high = middle
        else:
            low = middle
    return high
