"""What CausalLM refuses before any weight is read."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

import torch

from ygglight.compat.extras import pip_line
from ygglight.data.assets import check_model

__all__ = ["check_arguments"]

_CHOICES = {
    "quantization": (None, "4bit", "8bit"),
    "schedule": ("cosine", "linear", "constant"),
    "optimizer": ("adamw", "adamw8bit"),
    "dtype": ("float32", "bfloat16", "float16", "auto"),
    "loss": ("chunked", "full"),
    "init": ("pretrained", "random"),
    "experts": ("memory", "disk"),
}
_WHOLE = {"lora": None, "quantization": None, "init": "pretrained", "config_overrides": None}
_LEAST = {"learning_rate": 0, "weight_decay": 0, "warmup_steps": 0, "max_new_tokens": 1}


def check_arguments(p: Mapping[str, Any]) -> None:
    """Raise one clear error for the first argument that cannot work here.

    Args:
        p: The constructor arguments of CausalLM.
    """
    for name, allowed in _CHOICES.items():
        if p[name] not in allowed:
            raise ValueError(f"{name}={p[name]!r} is not one of {', '.join(map(repr, allowed))}")
    for name, least in _LEAST.items():
        if p[name] < least:
            raise ValueError(f"{name}={p[name]} must be at least {least}")
    if p["experts"] == "disk":
        changed = [name for name, default in _WHOLE.items() if p[name] != default]
        if changed:
            raise ValueError(f"experts='disk' runs a model as its files have it: drop {', '.join(changed)}")
    if p["quantization"] and p["init"] == "random":
        raise ValueError("quantization applies to pretrained weights: drop init='random'")
    if p["quantization"] and not torch.cuda.is_available():
        raise ValueError("quantization runs on CUDA only and there is none here: drop it, or use dtype='bfloat16'")
    if p["lora"] is not None or p["quantization"]:
        _installed("peft", "lora")
    if p["quantization"] or p["optimizer"] == "adamw8bit":
        _installed("bitsandbytes", "bnb")
    check_model(p["model"])


def _installed(module: str, extra: str) -> None:
    # Only looked for, not imported: peft takes seconds and a constructor is cheap.
    if importlib.util.find_spec(module) is None:
        raise ModuleNotFoundError(f"this needs {module}: {pip_line(extra)}", name=module)
