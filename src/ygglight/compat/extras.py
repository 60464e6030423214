"""Optional dependencies: imported where they are needed, with an error that names the extra."""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec
from types import ModuleType

__all__ = ["EXTRAS", "missing_extras", "pip_line", "require"]

# Extra -> the modules that it brings. The first half of pyproject's optional-dependencies; a test compares the two.
EXTRAS: dict[str, tuple[str, ...]] = {
    "lora": ("peft",),
    "gguf": ("gguf", "accelerate"),
    "bnb": ("bitsandbytes",),
    "deepspeed": ("deepspeed",),
    "triton": ("triton",),
    "plot": ("matplotlib",),
    "serve": ("fastapi", "uvicorn", "prometheus_client"),
}

# Where an extra has nothing to install: pip skips it by its marker, so nobody should be told to install it there.
_ABSENT_ON: dict[str, tuple[str, ...]] = {
    "bnb": ("darwin",),
    "deepspeed": ("darwin", "win32"),
    "triton": ("darwin", "win32"),
}


def pip_line(*extras: str) -> str:
    """The command that installs some extras."""
    return f"pip install 'ygglight[{','.join(extras)}]'"


def require(module: str, extra: str) -> ModuleType:
    """Import an optional dependency, or say how to install it.

    Args:
        module: Name to import, e.g. ``peft``.
        extra: The extra of this package that brings it, e.g. ``lora``.

    Returns:
        The imported module.

    Raises:
        ModuleNotFoundError: The dependency is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise  # the dependency is here and is itself broken: hiding that would send the user the wrong way
        mend = f"has no build for {sys.platform}" if not offered(extra) else pip_line(extra)
        raise ModuleNotFoundError(f"this needs {module}: {mend}", name=error.name) from None


def offered(extra: str) -> bool:
    """Whether an extra has anything to install on this platform."""
    return sys.platform not in _ABSENT_ON.get(extra, ())


def missing_extras() -> dict[str, list[str]]:
    """Extra -> those of its modules that are not installed, for extras that could be. Imports none of them."""
    missing = {extra: [name for name in names if find_spec(name) is None] for extra, names in EXTRAS.items()}
    return {extra: names for extra, names in missing.items() if names and offered(extra)}
