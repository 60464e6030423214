"""LightningModules that the recipes use. Imported lazily: Lightning costs seconds."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ygglight.modules.causal_lm import CausalLM
    from ygglight.modules.depth_predictor import DepthPredictorModule
    from ygglight.modules.distilled_draft import DistilledDraft
    from ygglight.modules.upcycled_moe import UpcycledMoE

_MODULES = {
    "CausalLM": "causal_lm",
    "DepthPredictorModule": "depth_predictor",
    "DistilledDraft": "distilled_draft",
    "UpcycledMoE": "upcycled_moe",
}

__all__ = ["CausalLM", "DepthPredictorModule", "DistilledDraft", "UpcycledMoE"]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
