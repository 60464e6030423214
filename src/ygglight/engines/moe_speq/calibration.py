"""What drafting and verifying take on this machine, measured while copies run and kept from run to run."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ygglight.engines.decode import Decoder
from ygglight.engines.moe_speq.governor import Machine
from ygglight.engines.moe_speq.link import Cause
from ygglight.engines.moe_speq.runtime import Runtime
from ygglight.engines.profiling import fingerprint, measure_widths, remember

log = logging.getLogger(__name__)

WIDTHS = (1, 2, 3, 5, 9, 13, 17, 25, 33, 65)
TEXT = 256
"""Tokens of text that calibrating passes attend to, if the cache has so many."""
LOAD = 512
"""Copies that keep the link busy meanwhile; what is not needed is withdrawn."""
REPEATS = 5


def measure_machine(
    decoder: Decoder, runtime: Runtime, most: int, *, hideable: float, seconds: float, key: dict[str, Any]
) -> Machine:
    """The costs of cycles. The cache of experts and all statistics begin anew.

    A verifying pass is measured on copies of one token: its experts are there after the first time, as a pass that
    waits for none must be. That it asks for fewer experts than different tokens do is put right by what cycles take.

    Args:
        decoder: Its text is forgotten. runtime: Without a draft nothing is drafted. most: Tokens that may be drafted.
        hideable: See :class:`Machine`. seconds: To spend. key: What else decides how long things take.
    """
    sites, store = runtime.sites, runtime.sites[0].layout

    def measure() -> dict[str, Any]:
        log.info("moe_speq: measuring what drafting and verifying take")
        return _measure(decoder, runtime, most, seconds)

    what = {"what": "moe_speq", "most": most, "capacity": decoder.capacity, "draft": runtime.draft is not None}
    found = remember(fingerprint(decoder.model, decoder.device) | what | key, measure)
    return Machine(
        float(found["draft_base"]), float(found["draft_token"]), {int(n): s for n, s in found["verify"].items()},
        runtime.link.speed.seconds(store.nbytes), len(sites), max(site.experts for site in sites),
        max(site.top_k for site in sites), hideable,
    )  # fmt: skip


def _measure(decoder: Decoder, runtime: Runtime, most: int, seconds: float) -> dict[str, Any]:
    widths = [n for n in WIDTHS if n <= most] + [most + 1]
    decoder.reset()
    decoder.length = max(0, min(TEXT, decoder.capacity - most - 1))  # the cache's zeros are as slow as any text
    one = torch.ones(max(widths), dtype=torch.long, device=decoder.device)
    places = torch.arange(max(widths), device=decoder.device)

    def verify(width: int) -> None:
        alone = torch.eye(width, dtype=torch.bool, device=decoder.device)
        with runtime.window(prefill=False):
            decoder.nodes(one[:width], torch.zeros_like(places[:width]), places[:width], alone)

    def draft() -> None:
        with runtime.drafting():
            decoder.replays = True
            logits = decoder.nodes(one[:1], places[:1], places[:1], one[:1, None].bool()).logits
            decoder.replays = False
            logits[0, -1].argmax().item()

    decoder.replays = False
    try:
        verify(1)
        with _busy(runtime):
            table = measure_widths(verify, widths, decoder.device, budget_seconds=seconds)
            token, base = (_median(draft), _median(lambda: runtime.prefetch(0))) if runtime.draft else (0.0, 0.0)
    finally:
        decoder.reset()
        decoder.replays = False
        with runtime.window(prefill=False):
            pass  # forgets what was noted
        runtime.clear()
        runtime.stats.reset()
    return {"draft_base": base, "draft_token": token, "verify": {str(n): s for n, s in table.items()}}


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
