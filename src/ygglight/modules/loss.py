"""The language-model loss, with and without the whole logits in memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ygglight.compat import transformers as hf
from ygglight.kernels.linear_cross_entropy import linear_cross_entropy

__all__ = ["IGNORE", "chunked_loss", "full_loss", "next_tokens"]

IGNORE = -100


def next_tokens(labels: Tensor) -> Tensor:
    """Return what each position must predict: the labels one to the left, and nothing at the last position.

    Shifting the labels leaves the hidden states whole, which are far bigger and would have to be copied.

    Args:
        labels: Token ids [batch, length]; -100 where nothing is to be learnt.
    """
    target = torch.full_like(labels, IGNORE)
    target[:, :-1] = labels[:, 1:]
    return target


def chunked_loss(
    model: nn.Module,
    input_ids: Tensor,
    labels: Tensor,
    attention_mask: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Mean cross-entropy per token, computed from the last hidden state so that no full logits ever exist.

    Args:
        model: A transformers or peft model whose logits are ``softcap(head(hidden))``.
        input_ids: Token ids [batch, length].
        labels: As for :func:`next_tokens`.
        attention_mask: 0 at padding; None if there is none.
        softcap: See :func:`ygglight.compat.transformers.linear_head`.
    """
    inner = hf.unwrap(model)
    output = inner.get_decoder()(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    hidden, target = output.last_hidden_state.flatten(0, 1), next_tokens(labels).flatten()
    head = inner.get_output_embeddings()
    return linear_cross_entropy(hidden, head.weight, target, ignore_index=IGNORE, softcap=softcap, bias=head.bias)


def full_loss(model: nn.Module, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """The loss as the transformers model computes it, with all its logits (and a router's own loss, if it has one).

    Args:
        model: A transformers or peft model.
        input_ids: Token ids [batch, length].
        labels: As for :func:`next_tokens`.
        attention_mask: 0 at padding; None if there is none.
    """
    return model(input_ids=input_ids, attention_mask=attention_mask, labels=labels, use_cache=False).loss
