"""What has to pass on a GPU: slabs are neither read too early nor overwritten too early, with both ends kept busy."""

from __future__ import annotations

import random

import pytest
import torch

from ygglight.engines.moe_speq.link import Cause, State
from ygglight.engines.moe_speq.runtime import Runtime

from .fakes import FakeSite, Store, routes, sites, until

pytestmark = pytest.mark.gpu


class PinnedStore(Store):
    """Slabs that the copy engine reads by itself."""

    def __init__(self, these: list[FakeSite]) -> None:
        super().__init__(these)
        self.data = [layer.pin_memory() for layer in self.data]

    def slab(self, layer: int, expert: int) -> torch.Tensor | None:
        self.reads[layer, expert] += 1
        return self.data[layer][expert]


class Draft:
    """Returns its input."""

    def forward(self, site: FakeSite, hidden: torch.Tensor, *routes: torch.Tensor) -> torch.Tensor:
        return hidden


@pytest.mark.parametrize("kind", [PinnedStore, Store])
@pytest.mark.parametrize("slots", [1, 3, 8])
def test_same_to_the_bit_whatever_the_slots_hold(kind: type[Store], slots: int) -> None:
    these = sites(dtype=torch.bfloat16)
    store = kind(these)
    whole = Runtime(these, store, slots=8, device="cuda")  # type: ignore[arg-type]
    part = Runtime(these, store, slots=slots, staging=1, draft=Draft(), device="cuda")  # type: ignore[arg-type]
    draw, generator = random.Random(slots), torch.Generator().manual_seed(slots)
    busy = torch.randn(2048, 2048, device="cuda")
    try:
        for step in range(60):
            layer = step % 2
            batch = [each.cuda() for each in routes(these[layer], draw.choice([1, 2, 9, 17]), generator)]
            if draw.random() < 0.7:
                with part.drafting():
                    part.forward(layer, *(each[:1] for each in batch))
                part.prefetch(1 << 30)
            if draw.random() < 0.5:
                busy = (busy @ busy).tanh()  # the device is behind the host
            with part.window(prefill=draw.random() < 0.2):
                out = part.forward(layer, *batch)
            assert torch.equal(out, whole.forward(layer, *batch))
        copies = part.stats.traffic.copies
        until(lambda: sum(part.stats.traffic.nbytes.values()) == sum(copies.values()) * store.nbytes)
    finally:
        part.close()
        whole.close()


def test_a_copy_waits_for_the_last_use_of_its_slab() -> None:
    these = sites()
    store = PinnedStore(these)
    runtime = Runtime(these, store, slots=2, device="cuda")  # type: ignore[arg-type]
    link, slab = runtime.link, runtime._bank.slab(0, 0)
    try:
        first = link.submit(0, 1, slab.data, Cause.DEMAND, slab.last_use)
        link.wait(first)
        torch.cuda._sleep(200_000_000)
        seen = slab.data.clone()  # reads behind the sleep
        last = link.submit(0, 2, slab.data, Cause.DEMAND, link.mark())
        until(lambda: last.state is State.DONE)
        assert torch.equal(seen.cpu(), store.data[0][1]) and torch.equal(slab.data.cpu(), store.data[0][2])
    finally:
        runtime.close()
