"""LightningDataModules that the recipes use, and the table of packaged weights and text.

``ygglight.data.assets`` needs no Lightning, so the data modules are imported lazily.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ygglight.data.decode_log import DecodeLogData
    from ygglight.data.text import TextData

_MODULES = {"DecodeLogData": "decode_log", "TextData": "text"}

__all__ = ["DecodeLogData", "TextData"]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
