"""Which tokens of a drafted chain stay (exact speculative sampling), and what a chain's text is drawn with.

Each drafted token came from the draft's processed distribution q; it stays with probability min(1, p / q), where p is
the target's at the same place, processed the same way. The first that does not stay is replaced by a draw from the
rest, max(0, p - q) renormalised, so that the text is distributed as the target's (Leviathan et al. 2023,
arXiv:2211.17192). A greedy text is the case in which both put all mass on their best token. Drawing from the target and
keeping what happens to match is exact, too, but keeps fewer tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ygglight.engines.decode.drawing import Drawing, sample


class ChainDrawing(Drawing):
    """Draws drafted tokens and verifies them, without a host read before the verdict.

    Args:
        processors: of the logits, the draft's and the target's. do_sample: draw, or take the best token.
        generator: of the draws; None: torch's own.
    """

    def draft(self, logits: Tensor, text: Tensor, drafted: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Draw the next drafted token.

        Args:
            logits: ``[V]``, the draft's. text: int64 ``[L]``, all tokens up to and including the root.
            drafted: The tokens drafted since, int64 ``[1]`` each.

        Returns:
            The token, int64 ``[1]``, and the distribution that it was drawn from, float32 ``[V]``; None for a greedy
            text.
        """
        scores = logits[None]
        if self.processors:
            prefix = torch.cat([text, *drafted])
            scores = self.processors.rows(scores, prefix[None], torch.tensor([len(prefix)], device=logits.device))
        if not self.do_sample:
            return scores.argmax(dim=-1), None
        q = torch.softmax(scores.float(), dim=-1)
        return sample(q, self.generator), q[0]

    def verify(self, logits: Tensor, text: Tensor, drafted: Tensor, q: Tensor | None) -> Tensor:
        """The verdict on a chain.

        Args:
            logits: ``[k + 1, V]``, the target's after the root and after each drafted token. text: See :meth:`draft`.
            drafted: int64 ``[k]``. q: float ``[k, V]``, the distributions they were drawn from; None: greedy.

        Returns:
            int64 ``[k + 2]``: how many drafted tokens stay, then the text's next tokens, of which so many and one more
            count.
        """
        scores = logits
        if self.processors:
            prefixes, lengths = _prefixes(text, drafted)
            scores = self.processors.rows(logits, prefixes, lengths)
        if q is None:
            return accept_best(scores.argmax(dim=-1), drafted)
        return accept_drawn(torch.softmax(scores.float(), dim=-1), q, drafted, self.generator)


def accept_best(best: Tensor, drafted: Tensor) -> Tensor:
    """The verdict where text is greedy.

    Args:
        best: int64 ``[k + 1]``, the target's tokens. drafted: int64 ``[k]``.

    Returns:
        See :meth:`ChainDrawing.verify`.
    """
    count = (best[:-1] == drafted).long().cumprod(0).sum()
    return torch.cat([count[None], best])  # up to the count both are the same


def accept_drawn(p: Tensor, q: Tensor, drafted: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """The verdict where text is sampled.

    Args:
        p: float ``[k + 1, V]``, the target's distributions. q: float ``[k, V]``, the draft's.
        drafted: int64 ``[k]``, token i drawn from ``q[i]``. generator: Of the draws; None: torch's own.

    Returns:
        See :meth:`ChainDrawing.verify`.
    """
    where = drafted[:, None]
    chance = torch.rand(len(drafted), dtype=q.dtype, device=q.device, generator=generator)
    stays = chance * q.gather(1, where)[:, 0] < p[:-1].gather(1, where)[:, 0]
    count = stays.long().cumprod(0).sum()
    nothing = torch.zeros_like(p[:1])  # after the last drafted token there is nothing to subtract
    there = p.index_select(0, count[None])
    rest = (there - torch.cat([q, nothing]).index_select(0, count[None])).clamp_min(0)
    # A refusal where p and q are equal but for rounding leaves no mass: then p itself is the rest.
    rest = torch.where(rest.sum() > 0, rest, there)
    bonus = sample(rest, generator)
    tokens = torch.cat([drafted, bonus]).scatter(0, count[None], bonus)
    return torch.cat([count[None], tokens])


def _prefixes(text: Tensor, drafted: Tensor) -> tuple[Tensor, Tensor]:
    """The prefix of every place of a chain, flushed right, -1 before it: ``[k + 1, L + k]``, and its length."""
    k = len(drafted)
    whole = torch.cat([text, drafted]).expand(k + 1, -1)
    place = torch.arange(k + 1, device=text.device)
    index = torch.arange(whole.shape[1], device=text.device)[None, :] - (k - place)[:, None]
    return torch.where(index >= 0, whole.gather(1, index.clamp_min(0)), -1), len(text) + place
