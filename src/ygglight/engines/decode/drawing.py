"""From logits to tokens as ``generate`` goes: processors, then the best token or a draw."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ygglight.engines.decode.processors import NodeProcessors


class Drawing:
    """The rule by which one text's tokens come from logits.

    Args:
        processors: of the logits. do_sample: draw, or take the best token (lowest index among equals).
        generator: of the draws; None: torch's own.
    """

    def __init__(self, processors: NodeProcessors, *, do_sample: bool, generator: torch.Generator | None) -> None:
        self.processors, self.do_sample, self.generator = processors, do_sample, generator

    def first(self, logits: Tensor, text: Sequence[int]) -> int:
        """The token after a prompt.

        Args:
            logits: ``[V]``. text: the prompt.
        """
        return self.token(logits, torch.tensor(text, device=logits.device))

    def token(self, logits: Tensor, prefix: Tensor) -> int:
        """The token after one prefix; the host waits for it.

        Args:
            logits: ``[V]``. prefix: int64 ``[L]``.
        """
        if not self.processors and not self.do_sample:
            return int(logits.argmax())
        scores = self.processors.row(logits, prefix) if self.processors else logits.float()
        if not self.do_sample:
            return int(scores.argmax())
        return int(torch.multinomial(torch.softmax(scores, dim=-1), 1, generator=self.generator))


def sample(probabilities: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw one token a row by an exponential race, which a CUDA graph can replay with fresh numbers.

    Args:
        probabilities: float ``[K, V]``. generator: of the device; None: torch's own.

    Returns:
        int64 ``[K]``.
    """
    noise = torch.empty_like(probabilities).exponential_(generator=generator)
    # The race of two impossible tokens (0/x) is lost by both, unless all are: rows without mass give token 0.
    return (probabilities / noise.clamp_min(torch.finfo(noise.dtype).tiny)).argmax(dim=-1)
