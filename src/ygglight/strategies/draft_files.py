"""Loading a draft model that a user named, and checking that it speaks the target's tokens."""

from __future__ import annotations

from typing import Any

import torch

from ygglight.compat import transformers as hf
from ygglight.data.assets import check_model, resolve_model
from ygglight.engines.yggdrasil.drafts import check_vocabulary


def load_draft(name: str, target: Any, dtype: str | None, module: Any) -> Any:
    """A draft model by directory, .gguf file or packaged name.

    Args:
        name: As ``model`` of CausalLM. target: The model that it drafts for. dtype: Of its weights; None: the target's.
        module: The user's LightningModule, whose ``tokenizer``, if it has one, is compared with the draft's.

    Raises:
        FileNotFoundError: there is no such model. ValueError: it has another vocabulary or other tokens.
    """
    check_model(name)
    directory = resolve_model(name)
    config = hf.load_config(directory)
    vocabulary = int(target.config.get_text_config(decoder=True).vocab_size)
    check_vocabulary(_Configured(config), vocabulary)
    _check_tokenizer(name, directory, module)
    parameter = next(p for p in target.parameters() if p.is_floating_point())
    model: Any = hf.load_causal_lm(directory, dtype=parameter.dtype if dtype is None else getattr(torch, dtype))
    return model.requires_grad_(False).eval()


class _Configured(torch.nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config


def _check_tokenizer(name: str, directory: Any, module: Any) -> None:
    """Same size is not same tokens: compare, where both tokenizers are at hand."""
    theirs = getattr(module, "tokenizer", None)
    if theirs is None or not hasattr(theirs, "get_vocab"):
        return
    try:
        ours = hf.load_tokenizer(directory)
    except ValueError:
        return  # a draft directory without a tokenizer is allowed: drafts take and give token ids
    mine, other = theirs.get_vocab(), ours.get_vocab()
    wrong = [token for token, index in other.items() if mine.get(token, index) != index]
    if wrong or len(set(mine) & set(other)) < 0.9 * len(mine):
        shared = len(set(mine) & set(other))
        why = f"token {wrong[0]!r} has another id" if wrong else f"{shared} of {len(mine)} tokens in common"
        raise ValueError(f"the draft {name!r} has another vocabulary than the model ({why})")
