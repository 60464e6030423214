"""How the memory that routed experts may take is split."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ygglight.engines.memory.sizes import format_bytes
from ygglight.engines.moe_speq.layout import find_sites

SPARED = 0.1
"""Part of the free memory that is left for activations, the KV cache and others."""


@dataclass(frozen=True)
class Split:
    """Who gets what of the budget.

    Args:
        slots: Of the cache, a layer. slab: Bytes of one expert. layers: Sparse layers. staging: Buffers of one expert.
        draft: Bytes of the draft; 0: there is none. more_slots: A layer, that the draft's memory would make.
        note: What a user should know; None: nothing.
    """

    slots: int
    slab: int
    layers: int
    staging: int
    draft: int = 0
    more_slots: int = 0
    note: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes in all."""
        return self.draft + (self.slots * self.layers + self.staging) * self.slab


def split_budget(
    budget: int, *, layers: int, experts: int, slab: int, staging: int, draft: int, insists: bool = False
) -> Split:
    """Slots for what the draft leaves, or a cache without a draft where both do not fit.

    Args:
        budget: Bytes. layers: Sparse layers. experts: Most experts of a layer. slab: Bytes of one expert.
        staging: Buffers of one expert. draft: Bytes that a draft would take; 0: none is wanted.
        insists: Keep the draft even where all experts fit without it.

    Raises:
        ValueError: the budget is below one slot a layer and the staging buffers.
    """
    least = (layers + staging) * slab
    if budget < least:
        raise ValueError(
            f"expert_budget={format_bytes(budget)} is too small: {layers} sparse layers need a slot of "
            f"{format_bytes(slab)} each and {staging} staging buffers; give {least} bytes ({format_bytes(least)}) or "
            "more"
        )

    def slots(left: int) -> int:
        return min(experts, (left // slab - staging) // layers)

    alone = slots(budget)
    if draft and alone >= experts and not insists:
        return Split(alone, slab, layers, staging, note="all experts fit the budget: nothing is drafted")
    if draft and budget - draft < least:
        note = (
            f"no room for the draft ({format_bytes(draft)}) beside one slot a layer: decoding goes token by token; "
            f"speculation needs an expert_budget of {format_bytes(draft + least)}"
        )
        return Split(alone, slab, layers, staging, note=note)
    if draft:
        return Split(slots(budget - draft), slab, layers, staging, draft, alone)
    return Split(alone, slab, layers, staging)


def free_for_experts(model: Any, device: torch.device) -> int:
    """Bytes that routed experts may take where nobody said: what is free, less a tenth and the rest of the model.

    Args:
        model: Of a mixture of experts; what of it is on the device already counts as taken.
        device: Where it is to run.

    Raises:
        ValueError: nothing is free, or this system does not say what is.
    """
    sites = find_sites(model)
    routed = {id(tensor) for site in sites for tensor in site.module.parameters()}
    rest = sum(t.nbytes for t in model.parameters() if id(t) not in routed and t.device != device)
    free = int((1 - SPARED) * _free(device)) - rest
    if free <= 0:
        raise ValueError(f"no memory is free for experts on {device}: free some, or give expert_budget")
    return free


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f'this system does not say how much memory {device} has free: give expert_budget="8GiB"')
