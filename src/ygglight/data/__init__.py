"""LightningDataModules that the recipes use, and the table of packaged weights and text.

``ygglight.data.assets`` needs no Lightning, so the data modules are imported lazily.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ygglight.data.text import TextData

__all__ = ["TextData"]


def __getattr__(name: str) -> Any:
    if name == "TextData":
        from ygglight.data.text import TextData

        return TextData
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
