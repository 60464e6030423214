"""What of a LightningModule is the LoRA model, and what of it belongs in a checkpoint."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from torch import nn

from ygglight.compat import transformers as hf
from ygglight.compat.extras import require
from ygglight.data.assets import resolve_model


def lora_models(module: nn.Module) -> list[Any]:
    """The transformers models with LoRA layers inside a module; peft's wrapper around one if there is one."""
    if importlib.util.find_spec("peft") is None:
        return []
    import peft
    from peft.tuners import tuners_utils as tuners
    from transformers import PreTrainedModel

    wrapped = [m for m in module.modules() if isinstance(m, peft.PeftModel)]
    inside = {id(hf.unwrap(m)) for m in wrapped}
    bare = [
        m for m in module.modules()
        if isinstance(m, PreTrainedModel) and id(m) not in inside and m.get_output_embeddings() is not None
        and any(isinstance(part, tuners.BaseTunerLayer) for part in m.modules())
    ]  # fmt: skip
    return wrapped + bare


def find_lora_model(module: nn.Module) -> Any:
    """The one of :func:`lora_models`.

    Raises:
        TypeError: there is none, or there are several.
    """
    require("peft", "lora")
    found = lora_models(module)
    if len(found) == 1:
        return found[0]
    if not found:
        raise TypeError(
            f"{type(module).__name__} holds no LoRA model, so there is no adapter to finetune beside serving: use "
            "modules.CausalLM(lora={'r': 16}), or wrap your model with peft.get_peft_model before fit starts "
            "(in __init__ or configure_model)"
        )
    raise TypeError(
        f"{type(module).__name__} holds {len(found)} LoRA models, and one can be served: finetune one at a time"
    )


def find_tokenizer(module: Any, trainer: Trainer, directory: str | None) -> Any:
    """The tokenizer that requests are read with.

    Args:
        module: Looked at first, then the Trainer's data module. directory: From the user; goes before both.

    Raises:
        ValueError: there is none.
    """
    if directory is not None:
        return hf.load_tokenizer(resolve_model(directory))
    for owner in (module, getattr(trainer, "datamodule", None)):
        tokenizer = getattr(owner, "tokenizer", None)
        if hasattr(tokenizer, "decode"):
            return tokenizer
    raise ValueError(
        f"{type(module).__name__} has no attribute `tokenizer`, and prompts are text: set it, or pass "
        "HarliStrategy(tokenizer='directory of the model')"
    )


def kept_state(module: Any, lora: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """The part of a module's state that a checkpoint needs: not the LoRA model's frozen weights and buffers."""
    frozen = _frozen_names(module, lora)
    return {name: value for name, value in state.items() if name not in frozen}


def load_adapter(module: Any, lora: nn.Module, state: dict[str, Any]) -> None:
    """Load what :func:`kept_state` kept; a whole state is fine too.

    Raises:
        ValueError: the state lacks weights that are trained, or has unknown ones.
    """
    missing, unexpected = module.load_state_dict(state, strict=False)
    frozen = _frozen_names(module, lora)
    lacking = [name for name in missing if name not in frozen]
    if lacking or unexpected:
        odd = f"lacks {lacking[0]}" if lacking else f"has {unexpected[0]}, which the model has not"
        raise ValueError(f"the checkpoint {odd}: was it saved with another `lora` or another model?")


def _frozen_names(module: Any, lora: nn.Module) -> set[str]:
    own = {id(tensor) for tensor in (*lora.parameters(), *lora.buffers()) if not tensor.requires_grad}
    tensors = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    names = {name for name, tensor in tensors if id(tensor) in own}
    # bitsandbytes keeps a weight's statistics under names of its own.
    weights = tuple(f"{name}." for name in names)
    return names | {name for name in module.state_dict() if weights and name.startswith(weights)}


def adapter_folder(filepath: Any) -> Path:
    """Folder beside a checkpoint in peft's own form."""
    path = Path(filepath)
    return path.with_name(f"{path.stem}-adapter")


def save_adapter(lora: Any, filepath: Any) -> None:
    """Write it in peft's own form beside a checkpoint."""
    # Layers that were injected without a wrapper cannot say so: `save_pretrained` would write the whole base.
    if hasattr(lora, "get_base_model") or getattr(lora, "_hf_peft_config_loaded", False):
        lora.save_pretrained(adapter_folder(filepath))


def remove_adapter_folder(filepath: Any) -> None:
    """Delete it, if it is there."""
    shutil.rmtree(adapter_folder(filepath), ignore_errors=True)
