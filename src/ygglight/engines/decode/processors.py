"""The logits processors that `generate` prepares, applied to the nodes of a tree, each with its own prefix.

Two ways to the same scores. ``row`` gives transformers' own processors the very prefix of one node: used where nodes
are looked at one by one (a CPU). ``rows`` does all nodes at once without a host read (a GPU): processors that look at
the scores alone run as they are, those that look at the prefix are written anew for padded prefixes. Processors that
keep state between calls, or that we do not know, cannot be run over a tree at all: :func:`unknown` names them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Read the scores of a row and nothing else.
SCORES_ONLY = {
    "TemperatureLogitsWarper", "TopPLogitsWarper", "TopKLogitsWarper", "MinPLogitsWarper", "TypicalLogitsWarper",
    "EpsilonLogitsWarper", "EtaLogitsWarper", "TopHLogitsWarper", "InfNanRemoveLogitsProcessor", "LogitNormalization",
    "SuppressTokensLogitsProcessor",
}  # fmt: skip
# Read the prefix as well; `_PREFIX_RULES` below.
PREFIX = {
    "RepetitionPenaltyLogitsProcessor", "MinLengthLogitsProcessor", "MinNewTokensLengthLogitsProcessor",
    "ForcedEOSTokenLogitsProcessor", "NoRepeatNGramLogitsProcessor",
}  # fmt: skip


def unknown(processors: Sequence[Any]) -> list[str]:
    """Names of the processors that cannot be run over a tree.

    Subclasses count as unknown: what they changed is not known. So does a repetition penalty on part of the prompt.
    """
    names = []
    for processor in processors:
        kind = type(processor)
        ours = kind.__module__.startswith("transformers.")
        if not ours or kind.__name__ not in SCORES_ONLY | PREFIX:
            names.append(kind.__name__)
        elif getattr(processor, "prompt_ignore_length", None):
            names.append(f"{kind.__name__}(prompt_ignore_length)")
    return names


class NodeProcessors:
    """Logits processors over tree nodes.

    Args:
        processors: A ``LogitsProcessorList``.

    Raises:
        ValueError: one of them is unknown.
    """

    def __init__(self, processors: Any) -> None:
        names = unknown(processors)
        if names:
            raise ValueError(f"logits processors that cannot be run over a tree: {', '.join(names)}")
        self._all = processors

    def __bool__(self) -> bool:
        return len(self._all) > 0

    def row(self, scores: Tensor, prefix: Tensor) -> Tensor:
        """The processed scores of one node.

        Args:
            scores: ``[V]`` logits. prefix: int64 ``[L]``, all tokens up to the node and the node's own.

        Returns:
            float32 ``[V]``.
        """
        return self._all(prefix[None], scores.to(torch.float32, copy=True)[None])[0]  # type: ignore[no-any-return]

    def rows(self, scores: Tensor, prefixes: Tensor, lengths: Tensor) -> Tensor:
        """The processed scores of all nodes.

        Args:
            scores: ``[K, V]`` logits.
            prefixes: int64 ``[K, L]``, each row a node's prefix flushed right; what lies before it is -1.
            lengths: int64 ``[K]``, of the prefixes.

        Returns:
            float32 ``[K, V]``.
        """
        scores = scores.to(torch.float32, copy=True)
        for processor in self._all:
            rule = _PREFIX_RULES.get(type(processor).__name__)
            scores = processor(prefixes, scores) if rule is None else rule(processor, prefixes, lengths, scores)
        return scores


def _repetition_penalty(processor: Any, prefixes: Tensor, lengths: Tensor, scores: Tensor) -> Tensor:
    # Padding repeats a token that is there (the last), which is penalised once however often it occurs.
    tokens = torch.where(prefixes < 0, prefixes[:, -1:], prefixes)
    found = scores.gather(1, tokens)
    found = torch.where(found < 0, found * processor.penalty, found / processor.penalty)
    return scores.scatter(1, tokens, found)


def _forbid(scores: Tensor, rows: Tensor, tokens: Tensor) -> Tensor:
    hit = torch.zeros(scores.shape[1], dtype=torch.bool, device=scores.device)
    hit[tokens.to(scores.device)] = True
    return scores.masked_fill(rows[:, None] & hit[None, :], -torch.inf)


def _min_length(processor: Any, prefixes: Tensor, lengths: Tensor, scores: Tensor) -> Tensor:
    return _forbid(scores, lengths < processor.min_length, processor.eos_token_id)


def _min_new_tokens(processor: Any, prefixes: Tensor, lengths: Tensor, scores: Tensor) -> Tensor:
    short = lengths - processor.prompt_length_to_skip < processor.min_new_tokens
    return _forbid(scores, short, processor.eos_token_id)


def _forced_eos(processor: Any, prefixes: Tensor, lengths: Tensor, scores: Tensor) -> Tensor:
    at_end = (lengths == processor.max_length - 1)[:, None]
    forced = torch.full_like(scores, -torch.inf)
    forced[:, processor.eos_token_id.to(scores.device)] = 0
    return torch.where(at_end, forced, scores)


def _no_repeat_ngram(processor: Any, prefixes: Tensor, lengths: Tensor, scores: Tensor) -> Tensor:
    size = processor.ngram_size
    if prefixes.shape[1] < size:
        return scores
    windows = prefixes.unfold(1, size, 1)  # [K, L - size + 1, size]; those with a -1 in them match nothing
    tail = prefixes[:, prefixes.shape[1] - size + 1 :]
    same = (windows[..., : size - 1] == tail[:, None, :]).all(-1) & (windows >= 0).all(-1)
    banned = torch.zeros_like(scores, dtype=torch.int32)
    banned.scatter_add_(1, windows[..., -1].clamp_min(0), same.to(torch.int32))
    return scores.masked_fill(banned > 0, -torch.inf)


_PREFIX_RULES = {
    "RepetitionPenaltyLogitsProcessor": _repetition_penalty,
    "MinLengthLogitsProcessor": _min_length,
    "MinNewTokensLengthLogitsProcessor": _min_new_tokens,
    "ForcedEOSTokenLogitsProcessor": _forced_eos,
    "NoRepeatNGramLogitsProcessor": _no_repeat_ngram,
}
