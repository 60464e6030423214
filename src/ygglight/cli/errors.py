"""What LightningCLI and jsonargparse say too late, too long or not at all, said in one line."""

from __future__ import annotations

import importlib
import re
from typing import Any, NoReturn

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.strategies import StrategyRegistry

from ygglight.compat.lightning import is_foreign_class
from ygglight_launcher.recipes import near


class TerseParser(LightningArgumentParser):
    """A parser whose errors are the error: not sixty lines of usage above it."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises, for `ygglight_launcher` to print in one piece and exit with 2."""
        raise ValueError(message + _foreign_hint(message)) from ex


def _foreign_hint(message: str) -> str:
    for path in dict.fromkeys(re.findall(r"[A-Za-z_][\w.]*\.[A-Za-z_]\w*", message)):
        found = _find_class(path)
        if found is not None and is_foreign_class(found):
            return (
                f"\n{path} is built on `pytorch_lightning`, which does not share classes with `lightning.pytorch`: "
                "in its file, import from `lightning.pytorch` instead."
            )
    return ""


def _find_class(path: str) -> type | None:
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except Exception:  # whatever a stranger's module does when imported: this only looks for a hint
        return None
    return found if isinstance(found, type) else None


def check_strategy_name(strategy: Any) -> None:
    """Refuses a strategy name that Lightning would refuse with a traceback.

    A dotted path is taken for a name by Lightning, lower-cased and not found (Lightning issue 19682).

    Args:
        strategy: The value of `trainer.strategy`; anything but a string passes.

    Raises:
        ValueError: Says how to write it.
    """
    if not isinstance(strategy, str) or strategy == "auto" or strategy.lower() in StrategyRegistry:
        return
    if "." in strategy:
        raise ValueError(
            f"trainer.strategy={strategy}: a class is given as a mapping, {{class_path: {strategy}, "
            "init_args: {...}} in a config, or on the command line with an argument after it "
            "(--trainer.strategy.memory_budget=0.5)"
        )
    hint = near(strategy.lower(), StrategyRegistry)
    raise ValueError(f"trainer.strategy={strategy}: no such strategy{hint} (`ygglight doctor` lists ygglight's own)")


def raise_constructor_error(config: Namespace) -> None:
    """Builds each class that a config names, plainly, so that the one whose constructor failed raises its own error.

    jsonargparse takes an error in a constructor for a type mismatch where the argument is a Union, as
    `trainer.strategy`, `model` and all the others are, and reports "does not validate against any of the Union
    subtypes".

    Args:
        config: The parsed config of one subcommand whose instantiation has failed.
    """
    for key in ("trainer", "model", "data"):
        _build(config.get(key))


def _build(value: Any) -> Any:
    if isinstance(value, list):
        return [_build(inner) for inner in value]
    if not isinstance(value, Namespace):
        return value
    arguments = {key: _build(inner) for key, inner in vars(value.get("init_args", value)).items()}
    found = _find_class(value["class_path"]) if "class_path" in value else None
    return found(**arguments, **value.get("dict_kwargs", {})) if found is not None else arguments
