"""Experts without a model: sites of random weights, a store to slow, stop or break, an instant link."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ygglight.engines.moe_speq.link import Cause, State, ThreadLink, Ticket

HIDDEN, INTER = 16, 8


@dataclass(frozen=True)
class FakeLayout:
    """Two tensors an expert, one after the other."""

    dtype: torch.dtype = torch.float32

    @property
    def nbytes(self) -> int:
        return 3 * HIDDEN * INTER * self.dtype.itemsize

    def views(self, slabs: Tensor) -> dict[str, Tensor]:
        flat, split = slabs.view(self.dtype), 2 * HIDDEN * INTER
        lead = slabs.shape[:-1]
        return {
            "gate_up_proj": flat[..., :split].unflatten(-1, (2 * INTER, HIDDEN)).view(*lead, 2 * INTER, HIDDEN),
            "down_proj": flat[..., split:].unflatten(-1, (HIDDEN, INTER)).view(*lead, HIDDEN, INTER),
        }


@dataclass(frozen=True)
class FakeSite:
    """A sparse layer of which nothing is computed but the experts."""

    index: int
    experts: int = 8
    top_k: int = 2
    layout: FakeLayout = FakeLayout()
    gated: bool = True
    transposed: bool = False
    fused_activation: str | None = "silu"

    def activate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return functional.silu(gate) * up


class Store:
    """Random experts that are read through ``read_into``, as from a disk.

    Args:
        sites: Whose. seconds: A read. seed: Of the weights.
    """

    kind = "disk"

    def __init__(self, sites: list[FakeSite], seconds: float = 0.0, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.data = [
            (torch.randn(s.experts, s.layout.nbytes // s.layout.dtype.itemsize, generator=draw) / 4)
            .to(s.layout.dtype)
            .view(torch.uint8)
            for s in sites
        ]
        self.nbytes = sites[0].layout.nbytes
        self.seconds = seconds
        self.reads: Counter[tuple[int, int]] = Counter()
        self.broken: set[tuple[int, int]] = set()
        self.gate: threading.Semaphore | None = None  # a read takes one
        self.entered = threading.Event()

    def slab(self, layer: int, expert: int) -> Tensor | None:
        return None

    def read_into(self, layer: int, expert: int, out: Tensor) -> None:
        self.entered.set()
        if self.gate is not None:
            self.gate.acquire()
        out.fill_(255)  # NaN: what reads a slab too early is not right by luck
        if self.seconds:
            time.sleep(self.seconds)
        if (layer, expert) in self.broken:
            raise OSError(5, "the disk is gone")
        out.copy_(self.data[layer][expert])
        self.reads[layer, expert] += 1

    def close(self) -> None:
        """Nothing is open."""


class HostStore(Store):
    """The same, in memory: copied by the link."""

    kind = "host"

    def slab(self, layer: int, expert: int) -> Tensor | None:
        self.reads[layer, expert] += 1
        return self.data[layer][expert]


class InstantLink(ThreadLink):
    """Every copy has ended when it was submitted: infinite bandwidth."""

    def submit(self, layer: int, expert: int, out: Tensor, cause: Cause, after: Any = None) -> Ticket:
        ticket = super().submit(layer, expert, out, cause, after)
        until(lambda: ticket.state in (State.DONE, State.FAILED))
        return ticket


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait, and fail rather than hang."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(1e-4)


def sites(layers: int = 2, experts: int = 8, top_k: int = 2, dtype: torch.dtype = torch.float32) -> list[FakeSite]:
    return [FakeSite(index, experts, top_k, FakeLayout(dtype)) for index in range(layers)]


def routes(site: FakeSite, tokens: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, distinct experts for each token, and their weights."""
    hidden = torch.randn(tokens, HIDDEN, generator=generator).to(site.layout.dtype)
    index = torch.rand(tokens, site.experts, generator=generator).topk(site.top_k, dim=-1).indices
    return hidden, index, torch.rand(tokens, site.top_k, generator=generator).to(site.layout.dtype)


def dense(store: Store, site: FakeSite, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The layer in float64, pair by pair."""
    out = torch.zeros(hidden.shape, dtype=torch.float64)
    for token in range(len(hidden)):
        for j, expert in enumerate(index[token].tolist()):
            tensors = {n: t.double() for n, t in site.layout.views(store.data[site.index][expert]).items()}
            inner = site.activate(tensors["gate_up_proj"] @ hidden[token].double())
            out[token] += weights[token, j].double() * (tensors["down_proj"] @ inner)
    return out
