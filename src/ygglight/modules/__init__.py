"""LightningModules that the recipes use. Imported lazily: Lightning costs seconds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ygglight.modules.causal_lm import CausalLM

__all__ = ["CausalLM"]


def __getattr__(name: str) -> Any:
    if name == "CausalLM":
        from ygglight.modules.causal_lm import CausalLM

        return CausalLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
