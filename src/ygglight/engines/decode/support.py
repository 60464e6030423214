"""Can a model be run over trees? Said by its make, and proven by a small tree."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn

from ygglight.compat.attention import layer_kinds, text_config, uses_attention_interface
from ygglight.engines.decode.decoder import Decoder

_PREFIX, _TREE = 5, 6
# A wrong mask or position moves logits by tens of per cent; other kernels and other shapes by far less.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2, torch.bfloat16: 0.3, torch.float16: 0.1}
_QUANTISED = 0.3  # its matrix products round activations to 8 bits, whatever the dtype of the logits
_proven: weakref.WeakKeyDictionary[nn.Module, str | None] = weakref.WeakKeyDictionary()


class UnsupportedModel(ValueError):
    """The model cannot be run over a tree; the text says why."""


def why_unsupported(model: nn.Module) -> str | None:
    """Why the model's make rules it out, or None. Costs nothing.

    Args:
        model: A transformers model.
    """
    name = type(model).__name__
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_output_embeddings"):
        return f"{name} is not a causal language model of transformers"
    if getattr(config, "is_encoder_decoder", False):
        return f"{name} is an encoder-decoder"
    if not uses_attention_interface(model):
        return f"the attention of {name} does not go through transformers' attention interface"
    odd = [kind for kind, window in layer_kinds(text_config(model)).items() if window == -1]
    if odd:
        return f"{name} has layers of {', '.join(odd)}, which keep no keys and values a token"
    return None


def check_tree_support(model: nn.Module) -> None:
    """Run a small tree and compare every node with a plain forward over its path; once a model.

    Args:
        model: A transformers model.

    Raises:
        UnsupportedModel: its make rules it out, or a node differs (say, because the model counts positions itself).
    """
    if model not in _proven:
        training = model.training
        model.eval()
        try:
            _proven[model] = why_unsupported(model) or _mismatch(model)
        finally:
            model.train(training)
    reason = _proven[model]
    if reason is not None:
        raise UnsupportedModel(reason)


def _mismatch(model: nn.Module) -> str | None:
    name = type(model).__name__
    try:
        decoder = Decoder(model, _PREFIX + _TREE + 5, graphs=False)
        tokens = (torch.arange(_PREFIX + _TREE, device=decoder.device) * 7 + 3) % decoder.vocabulary
        parents = [-1, 0, 0, 1, 2, 4]
        tree = tokens[_PREFIX:]
        decoder.append(tokens[:_PREFIX])
        ancestors, depths = _ancestors(parents)
        logits = decoder.nodes(
            tree, depths.to(tree.device), torch.arange(_TREE, device=tree.device), ancestors.to(tree.device)
        ).logits[0]
    except OSError:
        raise  # a disk's fault says nothing about the model
    except Exception as error:  # whatever a model that is made otherwise stumbles over
        return f"{name} cannot be run over a tree ({type(error).__name__}: {str(error).splitlines()[0]})"
    worst = 0.0
    for node in range(_TREE):
        path = tree[ancestors[node].to(tree.device)]
        with torch.no_grad():
            plain: Tensor = model(input_ids=torch.cat([tokens[:_PREFIX], path])[None], use_cache=False).logits[0, -1]
        spread = (plain.float() - plain.float().mean()).norm()
        worst = max(worst, float((logits[node].float() - plain.float()).norm() / spread))
    if not worst <= (_QUANTISED if getattr(model, "is_quantized", False) else _TOLERANCE.get(plain.dtype, 0.3)):
        return f"{name} gives other logits over a tree than over plain text ({worst:.1%} off)"
    return None


def _ancestors(parents: list[int]) -> tuple[Tensor, Tensor]:
    count = len(parents)
    ancestors, depths = torch.zeros(count, count, dtype=torch.bool), torch.zeros(count, dtype=torch.long)
    for node, parent in enumerate(parents):
        if parent >= 0:
            ancestors[node], depths[node] = ancestors[parent], depths[parent] + 1
        ancestors[node, node] = True
    return ancestors, depths
