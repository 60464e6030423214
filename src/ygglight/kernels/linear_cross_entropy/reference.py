"""Linear cross entropy in plain torch, full logits and all: the truth for values and gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Mean cross entropy of a linear layer; arguments as in the package's `linear_cross_entropy`.

    Returns:
        Scalar, float32 (float64 for float64 inputs).
    """
    logits = F.linear(hidden, weight, bias)
    logits = logits if logits.dtype is torch.float64 else logits.float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, target, ignore_index=ignore_index)
