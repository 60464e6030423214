"""Where a text ends: the stopping criteria that `generate` prepares, asked token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

ENDLESS = 1024
"""Tokens of an answer that nothing else bounds."""


class Stopping:
    """Stopping criteria over accepted tokens.

    End tokens and the length are looked up on the host; all other criteria (stop strings, time, the user's own) are
    asked with the very prefix that they would have seen in transformers' loop, and without scores.

    Args:
        criteria: A ``StoppingCriteriaList``. device: where criteria expect tokens.
    """

    def __init__(self, criteria: Any, device: torch.device | str = "cpu") -> None:
        self.ends: set[int] = set()
        self.max_length: int | None = None
        self._others: list[Any] = []
        self._device = torch.device(device)
        for criterion in criteria:
            name = type(criterion).__name__
            if name == "MaxLengthCriteria":
                found = int(criterion.max_length)
                self.max_length = found if self.max_length is None else min(self.max_length, found)
            elif name == "EosTokenCriteria":
                self.ends.update(criterion.eos_token_id.tolist())
            else:
                self._others.append(criterion)

    def room(self, length: int, shown: int, most: int | None) -> int:
        """Tokens that the answer may have, one at least.

        Args:
            length: Tokens of the prompt. shown: With the padding before it.
            most: Prompt and answer together; None: any.

        Raises:
            ValueError: the prompt leaves no room.
        """
        if most is not None and length >= most:
            raise ValueError(
                f"the prompt has {length} tokens and max_tokens is {most}, prompt and answer together: raise it or "
                "shorten the prompt"
            )
        if self.max_length is None:
            return ENDLESS if most is None else most - length
        wanted = self.max_length - shown
        return max(1, wanted if most is None else min(wanted, most - length))

    def cut(self, text: Sequence[int], added: Sequence[int]) -> tuple[int, bool]:
        """How many of the ``added`` tokens belong to the text, and whether it ends there.

        Args:
            text: All tokens before them, the prompt too. added: New tokens in order.
        """
        for count, token in enumerate(added, start=1):
            length = len(text) + count
            done = token in self.ends or (self.max_length is not None and length >= self.max_length)
            if not done and self._others:
                done = self._ask([*text, *added[:count]])
            if done:
                return count, True
        return len(added), False

    def _ask(self, tokens: list[int]) -> bool:
        prefix: Tensor = torch.tensor([tokens], device=self._device)
        return any(bool(torch.as_tensor(criterion(prefix, None)).all()) for criterion in self._others)
