"""The gradients of a module as they are before a backward, to have them back if it is given up."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

MOST_BYTES = 1 << 30
"""More is not copied. At 8B parameters the gradients of LoRA are some 160 MB, those of all weights 16 GB."""


class Gradients:
    """See module docstring. Where nothing is accumulated yet there is nothing to copy.

    Args:
        parameters: Those that may have gradients; frozen ones are passed over.
        most_bytes: Of copies.

    Attributes:
        complete: False if they are larger than that: then :meth:`restore` must not be called.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], most_bytes: int = MOST_BYTES) -> None:
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        size = sum(p.grad.numel() * p.grad.element_size() for p in trained if p.grad is not None)
        self.complete = size <= most_bytes
        self._saved: list[tuple[nn.Parameter, Tensor | None, Tensor | None]] = []
        if self.complete:
            self._saved = [(p, p.grad, None if p.grad is None else p.grad.detach().clone()) for p in trained]

    @torch.no_grad()
    def restore(self) -> None:
        """Put them back: the same tensors with the same values."""
        for parameter, grad, values in self._saved:
            if grad is not None and values is not None:
                grad.copy_(values)
            parameter.grad = grad
