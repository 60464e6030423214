"""Latency tables of a target and its draft on this machine, measured once and kept."""

from __future__ import annotations

import logging
from typing import Any

import torch

from ygglight.engines.decode import Decoder
from ygglight.engines.profiling import fingerprint, measure_widths, remember
from ygglight.engines.yggdrasil.config import BUCKETS, WIDTHS, Config
from ygglight.engines.yggdrasil.objective import FREE, Costs, Latency

log = logging.getLogger(__name__)

FIXED_SECONDS = {"cpu": 3e-4, "cuda": 1e-4}
"""An iteration's own work where nothing was measured yet: tree, walk, compaction. Replaced by what runs show."""


def measure_costs(target: Decoder, draft: Any, context: int, config: Config) -> Costs:
    """What forwards of target and draft take at one length of text.

    Args:
        target: a decoder; its text is forgotten. draft: the draft model, or None for one that costs nothing.
        context: tokens of text. config: sizes and time to spend.
    """
    ours = _latency(target, context, (1, *BUCKETS), config)
    if draft is None:
        return Costs(ours, FREE, _fixed(target))
    decoder = Decoder(draft, target.capacity, compile=config.compile)
    return Costs(ours, _latency(decoder, context, tuple(dict.fromkeys((1, 2, *WIDTHS))), config), _fixed(target))


def _fixed(decoder: Decoder) -> float:
    return FIXED_SECONDS.get(decoder.device.type, 1e-4)


def _latency(decoder: Decoder, context: int, widths: tuple[int, ...], config: Config) -> Latency:
    widths = tuple(sorted(w for w in widths if w <= max(config.max_verify, config.max_width)))
    capacity = decoder.capacity if decoder.device.type == "cuda" else 0
    key = fingerprint(decoder.model, decoder.device) | {
        "what": "tree forward", "context": context, "capacity": capacity, "compile": config.compile
    }  # fmt: skip

    def measure() -> dict[str, Any]:
        log.info("yggdrasil: measuring forwards of %s at %d tokens", type(decoder.model).__name__, context)
        return _measure(decoder, context, widths, config).to_dict()

    return Latency.from_dict(remember(key, measure))


def _measure(decoder: Decoder, context: int, widths: tuple[int, ...], config: Config) -> Latency:
    device = decoder.device
    most = max(widths)
    decoder.reset()
    decoder.length = max(0, min(context, decoder.capacity - most))  # the cache's zeros are as slow as any text

    def forward(width: int) -> None:
        ids = torch.arange(width, device=device)
        lower = ids[:, None] >= ids[None, :]
        decoder.nodes(torch.ones_like(ids), ids, ids, lower)

    try:
        # A tree of depth D yields at most D + 1 tokens, so widths slower than that many plain steps never win.
        limit = config.max_depth + 1.0
        found = measure_widths(forward, widths, device, budget_seconds=config.profile_seconds / 2, give_up=limit)
    finally:
        decoder.reset()
    return Latency(tuple(found), tuple(found.values()))
