"""How a transformers model is made to compute its experts by our function; written for 5.17, tried on 5.23.

transformers is imported inside the functions, as everywhere in `compat`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ygglight.compat.transformers import _quiet

__all__ = [
    "Parts", "act_name", "checkpoint_parts", "experts_config", "has_default_gate", "is_experts_module", "load_without",
    "meta_causal_lm", "register_experts", "why_odd_experts",
]  # fmt: skip

_FLAGS = ("is_concatenated", "is_transposed", "has_bias", "has_gate", "config")


def register_experts(name: str, function: Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]) -> None:
    """Make an experts function known under a name; doing it again changes nothing.

    ``generate`` swaps the name "grouped_mm" for another on some devices and leaves every other name alone.

    Args:
        name: As in ``config._experts_implementation``.
        function: ``(module, hidden [T, H], top_k_index [T, k], top_k_weights [T, k]) -> [T, H]``.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if name not in ALL_EXPERTS_FUNCTIONS.valid_keys():
        ALL_EXPERTS_FUNCTIONS.register(name, function)


def experts_config(config: Any, name: str) -> Any:
    """A copy of a configuration that names another experts function.

    An experts module reads the name from its own ``config``, which it shares with the model and with every other model
    built from it. Given a copy, only this module changes, and what ``generate`` or the user sets elsewhere stays so.

    Args:
        config: Of the experts module. name: A registered experts function.
    """
    own = copy.copy(config)
    own._experts_implementation_internal = name
    return own


def is_experts_module(module: nn.Module) -> bool:
    """Whether a module's class went through transformers' ``use_experts_implementation``."""
    return all(hasattr(module, flag) for flag in _FLAGS)


def has_default_gate(module: nn.Module) -> bool:
    """Whether the activation is ``act_fn(gate) * up`` of concatenated halves."""
    from transformers.integrations.moe import _default_apply_gate

    return getattr(type(module), "_apply_gate", None) is _default_apply_gate


def act_name(module: nn.Module) -> str | None:
    """ "silu" or "gelu" (the exact one) where that is the module's ``act_fn``, else None."""
    from transformers.activations import GELUActivation, SiLUActivation

    function = getattr(module, "act_fn", None)
    if isinstance(function, (nn.SiLU, SiLUActivation)):
        return "silu"
    if isinstance(function, nn.GELU):
        return "gelu" if function.approximate == "none" else None
    return "gelu" if isinstance(function, GELUActivation) else None


def why_odd_experts(module: nn.Module) -> str | None:
    """What a decorated experts module does besides two products and a gate, or None."""
    if getattr(module, "_is_expert_parallel", False) or any(hasattr(p, "device_mesh") for p in module.parameters()):
        return "its experts are shared out among processes (expert or tensor parallel): load the model whole"
    if getattr(module, "_hf_hook", None) is not None:
        return "accelerate moves its experts (device_map): load the model without a device_map"
    if not getattr(module, "has_gate", True):
        return "its experts have no gate (up_proj alone), which is not supported"
    if getattr(module, "has_post_expert_norm", False):
        return "its experts end in a norm of their own, which is not supported"
    return None


def meta_causal_lm(config: Any, dtype: torch.dtype) -> Any:
    """A causal language model whose tensors have shapes and no values.

    Args:
        config: Of the model. dtype: Of its weights.
    """
    from transformers import AutoModelForCausalLM

    with _quiet(), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def load_without(directory: Path, skeleton: Any, dtype: torch.dtype, tensors: dict[str, Tensor]) -> Any:
    """``from_pretrained`` of everything but the routed experts, whose parameters are those of the skeleton.

    It is given the tensors rather than the files: safetensors maps each file whole, as memory of the process's own.

    Args:
        directory: A Hugging Face model directory. skeleton: Of :func:`meta_causal_lm`. dtype: Of the weights.
        tensors: Of the checkpoint, those that are no experts.
    """
    from transformers import GenerationConfig

    real = type(skeleton)

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        real.__init__(self, *args, **kwargs)
        for module in filter(is_experts_module, self.modules()):
            module._parameters.clear()
            module._is_hf_initialized = True  # nothing is left that could start from random numbers

    bare: Any = type(real.__name__, (real,), {"__init__": __init__, "__module__": real.__module__})
    with _quiet():
        model = bare.from_pretrained(None, config=copy.deepcopy(skeleton.config), state_dict=tensors, dtype=dtype)
        if (directory / "generation_config.json").exists():
            model.generation_config = GenerationConfig.from_pretrained(str(directory), local_files_only=True)
    model.__class__ = real
    for name, module in skeleton.named_modules():
        if is_experts_module(module):
            model.get_submodule(name)._parameters.update(module._parameters)
    return model


Parts = dict[str, list[tuple[str, int | None, int]]]


def checkpoint_parts(skeleton: Any, keys: Iterable[str]) -> tuple[Parts, list[str]]:
    """Which tensors of a checkpoint make up each parameter of the experts, and which make up the rest of the model.

    Args:
        skeleton: Of :func:`meta_causal_lm`. keys: Names of the tensors in the files.

    Returns:
        Parameter -> (tensor, its expert or None for all, 0 for gate or all, 1 for up); and the names of the others.
        Tensors that the model has no place for are in neither.

    Raises:
        ValueError: transformers changes the values on the way, and not only puts them beside each other.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(skeleton)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    names, prefix = skeleton.state_dict(), skeleton.base_model_prefix
    wanted = {
        f"{path}.{name}"
        for path, module in skeleton.named_modules()
        if is_experts_module(module)
        for name in module._parameters
    }
    parts: Parts = {name: [] for name in wanted}
    rest: list[str] = []
    for key in keys:
        target, pattern = rename_source_key(key, renamings, converters, prefix, names)
        if target not in names and key in names:
            target, pattern = key, None
        if target not in wanted:
            rest += [key] if target in names else []
            continue
        expert, half = None, 0
        if pattern is not None:
            converter = by_pattern[pattern]
            steps = [(type(step).__name__, getattr(step, "dim", None)) for step in converter.operations]
            found = re.search(pattern.replace("*", r"(\d+)"), key)
            if steps not in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)]) or not found:
                raise ValueError(
                    f"{key} is rearranged by transformers when it is loaded ({', '.join(name for name, _ in steps)}) "
                    "and cannot be read from the file as it is: load the model whole"
                )
            expert, half = int(found[1]), converter.source_patterns.index(pattern)
        parts[target].append((key, expert, half))
    return parts, rest
