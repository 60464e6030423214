"""One forward of an unmodified causal language model over masks and a KV cache of ours."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ygglight.compat.attention import FULL, attending_by, configs_of, layer_kinds, text_config
from ygglight.engines.decode import attention

PENDING = 2
"""Tokens that a draft may have to take in before it drafts: longer runs are prompts."""
SHAPES = 64
"""Widths that may be compiled. After 8, dynamo's default, which all models share, it would go on uncompiled."""


@dataclass(frozen=True)
class Step:
    """What a forward returns.

    Args:
        logits: ``[B, W, V]`` in the dtype of the model. On a GPU a buffer that the next forward of this width
            overwrites.
        hidden: ``[B, W, H]``, the input of the output embedding; None if the model has none that can be watched.
    """

    logits: Tensor
    hidden: Tensor | None


class ModelCall:
    """Runs the model with our attention function in place of its own, for the time of the call.

    Args:
        model: Any causal LM of transformers whose attention goes through its attention interface.
        compile: Run its forward through ``torch.compile`` with static shapes.
    """

    def __init__(self, model: Any, *, compile: bool = False) -> None:
        attention.register()
        self.model: Any = model
        self.config = text_config(model)
        self.device: torch.device = model.device
        self.kinds = layer_kinds(self.config)
        """Kind of layer -> window in tokens, None: all."""
        self._configs = configs_of(model)
        self._head: nn.Module | None = model.get_output_embeddings()
        self._trims = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._forward: Callable[..., Any] = _compiled(model) if compile else model

    def __call__(
        self,
        tokens: Tensor,
        positions: Tensor,
        masks: dict[str, Tensor],
        cache: Cache,
        *,
        last_only: bool = False,
        table: Tensor | None = None,
    ) -> Step:
        """Run ``W`` tokens of each of ``B`` sequences.

        Args:
            tokens: int64 ``[B, W]``. positions: int64 ``[B, W]``, for the position embedding.
            masks: Kind of layer -> bool ``[B or 1, 1, W, C]``, True where a token attends.
            cache: Writes keys and values, and returns those that the masks speak of.
            last_only: Logits and hidden state of the last token alone.
            table: int64 ``[B, N]``; then the cache returns pages, and the masks speak of the pages of the table.
        """
        mask: Any = masks if len(masks) > 1 or FULL not in masks else masks[FULL]
        extra = {"logits_to_keep": 1} if last_only and self._trims else {}
        seen: list[Tensor] = []
        # Prompts come in all lengths, and each length would be compiled anew.
        forward = self.model if last_only and tokens.shape[1] > PENDING else self._forward
        name = attention.NAME
        reading: AbstractContextManager[None] = nullcontext()
        if table is not None:
            name, reading = attention.PAGED, attention.reading_pages(table)
        with _watching(self._head, seen), attending_by(name, self._configs), reading, torch.no_grad():
            output = forward(
                input_ids=tokens, position_ids=positions, attention_mask=mask, past_key_values=cache,
                use_cache=True, return_dict=True, **extra,
            )  # fmt: skip
        logits, hidden = output.logits, seen[0] if seen else None
        return Step(
            logits[:, -1:] if last_only else logits, hidden[:, -1:] if last_only and hidden is not None else hidden
        )


def _compiled(model: Any) -> Callable[..., Any]:
    options: dict[str, Any] = {"recompile_limit": SHAPES, "isolate_recompiles": True}  # not yet in torch 2.11
    known = inspect.signature(torch.compile).parameters
    return torch.compile(model, dynamic=False, **{k: v for k, v in options.items() if k in known})  # type: ignore[no-any-return]


def _watching(head: nn.Module | None, seen: list[Tensor]) -> AbstractContextManager[Any]:
    """Collects the input of the output embedding."""
    if head is None:
        return nullcontext()
    return _Hook(head.register_forward_pre_hook(lambda module, args: seen.append(args[0]) if args else None))


class _Hook(AbstractContextManager[None]):
    def __init__(self, handle: Any) -> None:
        self.handle = handle

    def __exit__(self, *exception: object) -> None:
        self.handle.remove()
