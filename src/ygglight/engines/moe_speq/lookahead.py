"""What the draft's routers chose, and which experts to send ahead for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

OBSERVED = 0.2
"""Share of a draft that is only watched: the first routes alone would choose too narrowly."""

Counts = list[dict[int, int]]
"""By layer: expert -> drafted tokens that chose it."""


class Lookahead:
    """Counts on the device, for a read back in every layer would make the host wait for each of them.

    Args:
        layers: Sparse layers. experts: Most experts of a layer. device: Of the routes.
    """

    def __init__(self, layers: int, experts: int, device: torch.device) -> None:
        with torch.inference_mode(False):
            self._counts = torch.zeros(layers, experts, dtype=torch.int32, device=device)
            self._rows = list(self._counts)
            self._one = torch.ones((), dtype=torch.int32, device=device)
        self.empty = True
        """Nothing was drafted; to be set by who drafts, for a replayed CUDA graph runs :meth:`note` without Python."""

    def note(self, layer: int, index: Tensor) -> None:
        """Routes of drafted tokens.

        Args:
            layer: Which. index: int64 ``[T, k]``.
        """
        chosen = index.reshape(-1)
        self._rows[layer].scatter_add_(0, chosen, self._one.expand_as(chosen))

    def read(self) -> Counts:
        """All counts above zero, with one read back."""
        found: Counts = [{} for _ in self._rows]
        if self.empty:
            return found
        counts = self._counts.cpu()
        where = counts.nonzero()
        for (layer, expert), count in zip(where.tolist(), counts[where[:, 0], where[:, 1]].tolist(), strict=True):
            found[layer][expert] = count
        return found

    def clear(self) -> None:
        """Forget what was drafted."""
        if not self.empty:
            self._counts.zero_()
            self.empty = True


class LayerView(NamedTuple):
    """What a plan has to know of a layer's cache.

    Args:
        residents: Experts in slots, being copied there included. room: Slots that may be given away. nbytes: Of an
            expert.
    """

    residents: Sequence[int]
    room: int
    nbytes: int


def plan_prefetch(counts: Counts, layers: Sequence[LayerView], cap: int) -> list[tuple[int, int]]:
    """Choose what to send ahead.

    Missing experts that most drafted tokens chose come first (ties: the earlier layer), as many as there is room and
    bytes for. They are sent in the order of the layers, in which they are needed.

    Args:
        counts: From :meth:`Lookahead.read`. layers: One each. cap: Bytes in all.

    Returns:
        (layer, expert) in the order to send.
    """
    wishes: list[tuple[int, int, int]] = []
    for layer, (drawn, view) in enumerate(zip(counts, layers, strict=True)):
        held = set(view.residents)
        missing = sorted((-count, expert) for expert, count in drawn.items() if expert not in held)
        wishes.extend((least, layer, expert) for least, expert in missing[: view.room])
    chosen = []
    for least, layer, expert in sorted(wishes):
        cap -= layers[layer].nbytes
        if cap < 0:
            break
        chosen.append((layer, least, expert))
    return [(layer, expert) for layer, _, expert in sorted(chosen)]


def observed_steps(k: int) -> int:
    """Drafted tokens before the first plan.

    Args:
        k: Tokens to draft.
    """
    return max(1, math.floor(OBSERVED * k))


def steps_until_sent(seconds: float, draft_token: float) -> int:
    """Drafted tokens until it makes sense to plan again: as many as the copies take.

    Args:
        seconds: Of the copies that were just queued. draft_token: Seconds a drafted token.
    """
    return max(1, math.ceil(seconds / draft_token)) if draft_token > 0 else 1
