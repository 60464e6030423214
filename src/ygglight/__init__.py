"""ygglight: recent systems papers as ordinary PyTorch Lightning strategies, callbacks and recipes.

`import ygglight` registers the strategy names, after which `Trainer(strategy="adacc")` works. Lightning offers no
entry point for strategies and checks a name before it loads any plugin, so the import is what makes a name known.
That is also why this module imports Lightning, and why the console script lives beside it in `ygglight_launcher`.
"""

from __future__ import annotations

import importlib
from typing import Any

from ygglight.registry import load, register_strategies

__version__ = "0.1.0"

_SUBPACKAGES = ("callbacks", "data", "engines", "kernels", "modules", "strategies")

_FUNCTIONS = {
    "moe_speq": "ygglight.engines.moe_speq.generate:MoESpeQGenerate",
    "yggdrasil": "ygglight.engines.yggdrasil.generate:TreeGenerate",
}
"""`model.generate(..., custom_generate=ygglight.yggdrasil(draft))`: systems in the form in which others take them."""

__all__ = ["__version__", *_FUNCTIONS, *_SUBPACKAGES]

register_strategies()


def __getattr__(name: str) -> Any:
    if name in _FUNCTIONS:
        return load(_FUNCTIONS[name])
    if name in _SUBPACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
