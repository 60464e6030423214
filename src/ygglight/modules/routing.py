"""Statistics of the routers of a mixture of experts: are tokens decided, are experts loaded alike, what is reused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Routing", "RoutingStatistics"]


@dataclass(frozen=True)
class Routing:
    """How some routers route; a value a layer, and entropies as a share of ln(experts).

    Args:
        token: Mean entropy of a token's probabilities: 1 is a router that knows nothing.
        load: Entropy of the shares in which the experts are chosen: 1 is perfect balance.
        reuse: Part of a token's experts that the token before it used as well.
        chance: What ``reuse`` would be if every token drew from those shares by itself.
    """

    token: list[float]
    load: list[float]
    reuse: list[float]
    chance: list[float]

    @property
    def decided(self) -> bool:
        """Whether it routes for real: token entropy under 0.8 and load entropy over 0.9, as means over the layers."""
        return _mean(self.token) < 0.8 and _mean(self.load) > 0.9

    def summary(self) -> dict[str, float]:
        """Means over the layers, by name."""
        return {name: _mean(getattr(self, name)) for name in ("token", "load", "reuse", "chance")}

    def table(self) -> str:
        """A line a layer and the means."""
        rows = [*zip(self.token, self.load, self.reuse, self.chance, strict=True), tuple(self.summary().values())]
        names = [*(str(layer) for layer in range(len(self.token))), "mean"]
        lines = [f"{'layer':>5}  token entropy  load entropy  reuse  (chance)"]
        for name, (token, load, reuse, chance) in zip(names, rows, strict=True):
            lines.append(f"{name:>5}  {token:13.3f}  {load:12.3f}  {reuse:5.3f}  {chance:8.3f}")
        return "\n".join(lines)


class RoutingStatistics:
    """Adds up over batches what :class:`Routing` tells.

    Args:
        top_k: Experts a token.
    """

    def __init__(self, top_k: int) -> None:
        self.top_k = top_k
        self._tokens = self._pairs = 0
        self._entropy: Tensor | None = None
        self._load: Tensor | None = None
        self._reused: Tensor | None = None

    def add(self, logits: Sequence[Tensor], mask: Tensor) -> None:
        """Count a batch.

        Args:
            logits: Of each layer's router, ``[B * S, E]``. mask: ``[B, S]``, False at padding.
        """
        p = torch.stack(list(logits)).double().softmax(-1)  # [L, B * S, E]
        chosen = F.one_hot(p.topk(self.top_k).indices, p.shape[-1]).sum(2).double()
        rows = mask.flatten().bool()
        entropy = torch.special.entr(p[:, rows]).sum((1, 2))
        load = chosen[:, rows].sum(1)
        grid = chosen.unflatten(1, mask.shape)
        pairs = mask[:, 1:].bool() & mask[:, :-1].bool()
        reused = ((grid[:, :, 1:] * grid[:, :, :-1]).sum(-1) * pairs).sum((1, 2))
        self._entropy = entropy if self._entropy is None else self._entropy + entropy
        self._load = load if self._load is None else self._load + load
        self._reused = reused if self._reused is None else self._reused + reused
        self._tokens += int(rows.sum())
        self._pairs += int(pairs.sum())

    def result(self) -> Routing:
        """What was counted so far.

        Raises:
            ValueError: nothing was.
        """
        if self._entropy is None or self._load is None or self._reused is None or not self._pairs:
            raise ValueError("no batch with two neighbouring tokens was counted")
        share = self._load / self._load.sum(1, keepdim=True)
        most = math.log(share.shape[1])
        return Routing(
            token=(self._entropy / self._tokens / most).tolist(),
            load=(torch.special.entr(share).sum(1) / most).tolist(),
            reuse=(self._reused / self._pairs / self.top_k).tolist(),
            chance=(self.top_k * share.square().sum(1)).tolist(),
        )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
