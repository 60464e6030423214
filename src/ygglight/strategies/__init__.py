"""Lightning strategies, one file a system, on one shared base."""

from __future__ import annotations

from typing import Any

from ygglight.registry import STRATEGY_CLASSES, load

__all__ = list(STRATEGY_CLASSES)


def __getattr__(name: str) -> Any:
    if name in STRATEGY_CLASSES:
        return load(STRATEGY_CLASSES[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *STRATEGY_CLASSES})
