"""Experts over their rows. What comes out for an expert depends on nothing but its weights and its own rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from ygglight.engines.moe_speq.slots import Slab, SlotBank, Weights
from ygglight.kernels.expert_gemm import expert_mlp

if TYPE_CHECKING:
    from ygglight.engines.moe_speq.layout import Site


class Grouping(NamedTuple):
    """The rows of a pass, expert by expert.

    Args:
        ranked: Unique experts: those with most rows first, then those that come first. spans: Expert -> its rows of
            the sorted order, from and to. order: Position in the sorted order -> pair ``token * k + j``.
        routes: Experts of the pairs, on the host.
    """

    ranked: list[int]
    spans: dict[int, tuple[int, int]]
    order: Tensor
    routes: list[int]


def group(index: Tensor) -> Grouping:
    """Sort the pairs of a pass by expert; the one time in a layer that the host waits for the device.

    Args:
        index: int64 ``[T, k]``.
    """
    flat = index.reshape(-1)
    order = flat.argsort(stable=True)
    routes = flat.tolist()
    counts = Counter(routes)
    spans, start = {}, 0
    for expert in sorted(counts):
        spans[expert] = (start, start + counts[expert])
        start += counts[expert]
    return Grouping(sorted(counts, key=counts.__getitem__, reverse=True), spans, order, routes)


class Batch(NamedTuple):
    """One expert and its rows.

    Args:
        slab: Where it lies. start: First of its rows in the sorted order. stop: Behind the last.
    """

    slab: Slab
    start: int
    stop: int


class Compute(Protocol):
    """Runs experts."""

    def run(self, x: Tensor, batches: Sequence[Batch], out: Tensor) -> None:
        """Fill the rows of some experts.

        Args:
            x: ``[S, H]``, sorted by expert. batches: Which of them. out: Like ``x``.
        """


class LoopCompute:
    """One expert after the other: on a CPU a matrix product costs far more than the call.

    Args:
        layer: Number of the layer. site: The layer.
    """

    def __init__(self, layer: int, site: Site) -> None:
        self._layer, self._layout, self._activate = layer, site.layout, site.activate
        self._first, self._second = ("gate_up_proj" if site.gated else "up_proj"), "down_proj"
        self._linear: Callable[..., Tensor] = _transposed if site.transposed else functional.linear

    def run(self, x: Tensor, batches: Sequence[Batch], out: Tensor) -> None:
        """See :class:`Compute`."""
        for slab, start, stop in batches:
            weights = slab.weights(self._layer, self._layout)
            hidden = self._activate(self._product(x[start:stop], weights, self._first))
            out[start:stop] = self._product(hidden, weights, self._second)

    def _product(self, x: Tensor, weights: Weights, name: str) -> Tensor:
        return self._linear(x, weights[name], weights.get(f"{name}_bias"))


class GroupedCompute:
    """All experts of a call in two launches: on a GPU a launch costs more than most experts.

    Args:
        layer: Number of the layer. site: The layer. bank: Whose stacks hold the experts.
    """

    def __init__(self, layer: int, site: Site, bank: SlotBank) -> None:
        self._layer, self._bank, self._site = layer, bank, site
        self._first, self._second = ("gate_up_proj" if site.gated else "up_proj"), "down_proj"
        self._activation = site.fused_activation or site.activate

    def run(self, x: Tensor, batches: Sequence[Batch], out: Tensor) -> None:
        """See :class:`Compute`."""
        for staged in (False, True):
            some = [batch for batch in batches if batch.slab.staged is staged]
            if some:
                self._run(x, some, out, staged)

    def _run(self, x: Tensor, batches: Sequence[Batch], out: Tensor, staged: bool) -> None:
        stack = self._bank.stack(self._layer, staged=staged)
        rows = [row for batch in batches for row in range(batch.start, batch.stop)]
        slots = [batch.slab.index for batch in batches for _ in range(batch.start, batch.stop)]
        where, experts = torch.tensor([rows, slots]).to(x.device, non_blocking=True)
        first, second = (stack.get(f"{name}_bias") for name in (self._first, self._second))
        biases = None if first is None or second is None else (first, second)
        out[where] = expert_mlp(
            x[where], experts, stack[self._first], stack[self._second],
            activation=self._activation, biases=biases, transposed=self._site.transposed,
        )  # fmt: skip


def combine(out: Tensor, grouping: Grouping, weights: Tensor) -> Tensor:
    """Weigh and sum the experts of each token, in the order of its routes, as transformers does.

    Args:
        out: ``[S, H]`` in the sorted order. grouping: Of the pass. weights: ``[T, k]``.

    Returns:
        ``[T, H]``.
    """
    tokens, k = weights.shape
    pairs = torch.empty_like(out).index_copy_(0, grouping.order, out)
    return (pairs * weights.reshape(-1, 1)).view(tokens, k, out.shape[1]).sum(1).to(out.dtype)


def _transposed(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x @ weight if bias is None else torch.addmm(bias, x, weight)
