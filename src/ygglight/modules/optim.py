"""The optimizer and the learning-rate schedule of CausalLM."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from ygglight.compat.extras import require

__all__ = ["build_optimizer", "rate", "warmup_schedule"]


def _groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict]:
    """Split what is trainable: matrices decay, norms and biases do not."""
    trainable = [p for p in parameters if p.requires_grad]
    matrices, rest = [p for p in trainable if p.ndim >= 2], [p for p in trainable if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(
    name: str, parameters: Iterable[nn.Parameter], learning_rate: float, weight_decay: float, fused: bool | None = None
) -> torch.optim.Optimizer:
    """Build an optimizer over the parameters that require gradients.

    Args:
        name: ``adamw``, or ``adamw8bit`` (bitsandbytes, a quarter of the state).
        parameters: All parameters of the network.
        learning_rate: The peak.
        weight_decay: For matrices only.
        fused: Of ``adamw``: one pass over the weights instead of ten. Lightning cannot clip its gradients.
    """
    groups = _groups(parameters, weight_decay)
    if not groups:
        raise ValueError("nothing in this model is trainable: quantised weights are frozen, so add `lora: {r: 16}`")
    if name == "adamw8bit":
        return require("bitsandbytes", "bnb").optim.AdamW8bit(groups, lr=learning_rate)
    return torch.optim.AdamW(groups, lr=learning_rate, fused=fused)


def rate(step: int, warmup: int, total: float, schedule: str) -> float:
    """Return the factor on the peak learning rate at a step.

    Args:
        step: Optimizer steps done.
        warmup: Steps of linear rise.
        total: Steps in all; infinite if the Trainer has no end, which makes every schedule constant.
        schedule: ``cosine`` or ``linear`` fall to a tenth, or ``constant``.
    """
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant" or not math.isfinite(total):
        return 1.0
    done = min(1.0, (step - warmup) / max(1.0, total - warmup))
    left = 0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1 - done
    return 0.1 + 0.9 * left


def warmup_schedule(optimizer: torch.optim.Optimizer, warmup: int, total: float, schedule: str) -> LambdaLR:
    """Attach :func:`rate` to an optimizer.

    Args:
        optimizer: The optimizer.
        warmup: See :func:`rate`.
        total: See :func:`rate`.
        schedule: See :func:`rate`.
    """
    return LambdaLR(optimizer, lambda step: rate(step, warmup, total, schedule))
