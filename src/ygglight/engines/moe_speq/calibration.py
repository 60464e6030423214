"""What drafting and verifying take on this machine, measured while copies run and kept from run to run."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from ygglight.engines.decode import Decoder
from ygglight.engines.moe_speq.link import Cause
from ygglight.engines.moe_speq.machine import Machine, widths
from ygglight.engines.moe_speq.runtime import Runtime
from ygglight.engines.profiling import fingerprint, measure_widths, remember

log = logging.getLogger(__name__)

TEXT = 256
"""Tokens of text that calibrating passes attend to, if the cache has so many."""
LOAD = 512
"""Copies that keep the link busy meanwhile; what is not needed is withdrawn."""
REPEATS = 5
LAYERS, EXPERTS = 8, 8
"""Most layers, and experts of each, over which the seconds of an expert are measured."""


def measure_machine(
    decoder: Decoder, runtime: Runtime, most: int, *, ahead: float, slots: int, seconds: float, key: dict[str, Any]
) -> Machine:
    """The costs of cycles. The cache of experts and all statistics begin anew.

    A verifying pass is measured on copies of one token: its experts are there after the first time, as a pass that
    waits for none must be. What more experts cost is measured beside that. A drafted token is taken to cost what a pass
    over one token does: there is no draft yet, and the first cycles with one will tell.

    Args:
        decoder: Its text is forgotten. runtime: Its slots are filled and emptied. most: Tokens that may be drafted.
        ahead: See :class:`Machine`. slots: As there. seconds: To spend. key: What else decides how long things take.
    """
    sites, layout = runtime.sites, runtime.sites[0].layout

    def measure() -> dict[str, Any]:
        log.info("moe_speq: measuring what drafting and verifying take")
        return _measure(decoder, runtime, most, seconds)

    what = {"what": "moe_speq 2", "most": most, "capacity": decoder.capacity}
    found = remember(fingerprint(decoder.model, decoder.device) | what | key, measure)
    verify = {int(n): float(s) for n, s in found["verify"].items()}
    return Machine(
        verify[1], verify, float(found["expert"]), runtime.link.speed.seconds(layout.nbytes), len(sites),
        max(site.top_k for site in sites), slots, runtime.staging, ahead,
    )  # fmt: skip


def _measure(decoder: Decoder, runtime: Runtime, most: int, seconds: float) -> dict[str, Any]:
    decoder.reset()
    decoder.length = max(0, min(TEXT, decoder.capacity - most - 1))  # the cache's zeros are as slow as any text
    one = torch.ones(most + 1, dtype=torch.long, device=decoder.device)
    places = torch.arange(most + 1, device=decoder.device)

    def verify(width: int) -> None:
        alone = torch.eye(width, dtype=torch.bool, device=decoder.device)
        with runtime.window(prefill=False):
            decoder.nodes(one[:width], torch.zeros_like(places[:width]), places[:width], alone)

    decoder.replays = False
    try:
        verify(1)
        with _busy(runtime):
            table = measure_widths(verify, widths(most), decoder.device, budget_seconds=seconds)
        expert = _seconds_of_an_expert(runtime)
    finally:
        decoder.reset()
        with runtime.window(prefill=False):
            pass  # forgets what was noted
        runtime.clear()
        runtime.stats.reset()
    return {"expert": expert, "verify": {str(n): s for n, s in table.items()}}


def _seconds_of_an_expert(runtime: Runtime) -> float:
    """What one expert more takes to compute: rows through several experts, and the same rows through one."""
    sites = runtime.sites[:LAYERS]
    count = min(runtime.slots, EXPERTS, *(site.experts for site in sites))
    if count < 2:
        return 0.0
    layout = sites[0].layout
    wide = layout.views(torch.empty(layout.nbytes, dtype=torch.uint8, device="meta"))["down_proj"]
    size = wide.shape[-1] if sites[0].transposed else wide.shape[-2]
    hidden = torch.zeros(count, size, dtype=layout.dtype, device=runtime.device)
    weights = torch.ones(count, 1, dtype=layout.dtype, device=runtime.device)
    several = torch.arange(count, device=runtime.device)[:, None]

    def run(index: torch.Tensor) -> None:
        with runtime.window(prefill=False):
            for number in range(len(sites)):
                out = runtime.forward(number, hidden, index, weights)
        out[0, 0].item()

    taken = [_median(partial(run, index)) for index in (several, torch.zeros_like(several))]
    return max(0.0, taken[0] - taken[1]) / (count - 1) / len(sites)


def _median(run: Any) -> float:
    taken = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


@contextmanager
def _busy(runtime: Runtime) -> Iterator[None]:
    """Within, experts travel to where nobody reads them: copies and computing share memory and cores."""
    site = runtime.sites[0]
    with torch.inference_mode(False):
        out = torch.empty(site.layout.nbytes, dtype=torch.uint8, device=runtime.device)
    tickets = [runtime.link.submit(0, i % site.experts, out, Cause.PREFETCH) for i in range(LOAD)]
    try:
        yield
    finally:
        running = [ticket for ticket in reversed(tickets) if not runtime.link.cancel(ticket)]
        for ticket in running[:1]:
            runtime.link.wait(ticket)
