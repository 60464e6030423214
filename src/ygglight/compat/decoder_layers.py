"""What has been done to modules of a decoder layer besides training them; written for torch 2.13, transformers 5.17."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

__all__ = ["attention_name", "has_hooks", "why_altered"]


def attention_name(attention: nn.Module) -> str | None:
    """The attention function that a transformers attention module uses now."""
    return getattr(getattr(attention, "config", None), "_attn_implementation", None)


def has_hooks(modules: Iterable[nn.Module]) -> bool:
    """Whether any module has forward hooks; those by which transformers collects outputs, and are idle, do not count.

    Args:
        modules: To look at.
    """
    return any(
        module._forward_pre_hooks or any(not _collects(hook) for hook in module._forward_hooks.values())
        for module in modules
    )


def _collects(hook: Any) -> bool:
    return getattr(hook, "__module__", None) == "transformers.utils.output_capturing"


def why_altered(module: nn.Module) -> str | None:
    """Why a module's own class does not say what it computes, or None.

    Args:
        module: Of a decoder layer.
    """
    if getattr(module, "_hf_hook", None) is not None:
        return "is moved by accelerate (device_map)"
    if "forward" in vars(module):
        return "has a forward of its own"
    if has_hooks([module]):
        return "has forward hooks"
    return None
