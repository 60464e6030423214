"""OpenAI-compatible HTTP in front of a decode engine: completions and chat, streaming, limits, metrics.

FastAPI, uvicorn and prometheus_client are the extra ``serve``, so what needs them is imported when it is asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ygglight.compat.extras import require
from ygglight.serving.backend import Backend
from ygglight.serving.limits import Limits, api_key_from_env

if TYPE_CHECKING:
    from ygglight.serving.app import build_app
    from ygglight.serving.server import ServerThread

_MODULES = {"build_app": "app", "ServerThread": "server"}

__all__ = ["Backend", "Limits", "ServerThread", "api_key_from_env", "build_app"]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        for package in ("fastapi", "uvicorn", "prometheus_client"):
            require(package, "serve")
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
