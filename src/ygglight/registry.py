"""The tables of the house: which names exist, and where the code behind each of them lives.

A new system adds one row here and one file there. Nothing in this module imports a system: targets are strings that are
loaded when a user asks for them, so that `import ygglight` stays cheap.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.fabric.strategies import _StrategyRegistry


@dataclass(frozen=True)
class StrategyRow:
    """One name that `Trainer(strategy=...)` understands once ygglight is imported.

    Args:
        name: The name. Lower case always: the Trainer lower-cases what the user typed and the registry does not, so a
            capital makes a name that nobody can reach. No `ddp` or `deepspeed` in it unless it belongs to that
            family, for Lightning tests for these substrings.
        target: `"module:Class"`, imported when the name is first used.
        description: One line, shown by Lightning.
        presets: Constructor arguments that come with the name.
        refusal: When set, the name exists only to say in one line why it cannot be used, and what to use instead.
    """

    name: str
    target: str
    description: str
    presets: Mapping[str, Any] = field(default_factory=dict)
    refusal: str | None = None


STRATEGIES: tuple[StrategyRow, ...] = (
    StrategyRow(
        "adacc",
        "ygglight.strategies.adacc:AdaccStrategy",
        "Adacc on one device: keep, compress or recompute each activation to stay within a memory budget",
    ),
    StrategyRow(
        "adacc_ddp",
        "ygglight.strategies.adacc:AdaccDDPStrategy",
        "Adacc on every rank of DistributedDataParallel",
    ),
    StrategyRow(
        "adacc_fsdp2",
        "ygglight.strategies.adacc:AdaccModelParallelStrategy",
        "Adacc over Lightning's ModelParallelStrategy (FSDP2)",
    ),
    StrategyRow(
        "adacc_deepspeed",
        "",
        "Not offered yet: says so, and names what to use",
        refusal="strategy='adacc_deepspeed' is not offered: Adacc over DeepSpeed has never passed its test on a GPU. "
        "Use strategy='adacc' (one device), 'adacc_ddp' (replicas) or 'adacc_fsdp2' (sharded).",
    ),
    StrategyRow(
        "harli",
        "ygglight.strategies.harli:HarliStrategy",
        "Harli on one device: finetune a LoRA adapter while clients are served from the same weights, within a target",
    ),
    StrategyRow(
        "moe_speq",
        "ygglight.strategies.moe_speq:MoESpeQStrategy",
        "MoE-SpeQ on one device: experts that do not fit lie in host memory or on disk, and are fetched ahead",
    ),
    StrategyRow(
        "yggdrasil",
        "ygglight.strategies.yggdrasil:YggdrasilStrategy",
        "Yggdrasil on one device: generate drafts a tree of tokens and verifies it in one pass; same text, sooner",
    ),
)

# Public name -> "module:attribute", by package; served lazily by the `__getattr__` of that package.
STRATEGY_CLASSES: dict[str, str] = {
    "OneDeviceStrategy": "ygglight.strategies.base:OneDeviceStrategy",
    "AdaccStrategy": "ygglight.strategies.adacc:AdaccStrategy",
    "AdaccDDPStrategy": "ygglight.strategies.adacc:AdaccDDPStrategy",
    "AdaccModelParallelStrategy": "ygglight.strategies.adacc:AdaccModelParallelStrategy",
    "HarliStrategy": "ygglight.strategies.harli:HarliStrategy",
    "MoESpeQStrategy": "ygglight.strategies.moe_speq:MoESpeQStrategy",
    "YggdrasilStrategy": "ygglight.strategies.yggdrasil:YggdrasilStrategy",
}

# `ygglight demo SYSTEM`: a function `run(short: bool, out: Path) -> None`.
DEMOS: dict[str, str] = {
    "adacc": "ygglight.demos.adacc:run",
    "harli": "ygglight.demos.harli:run",
    "moe_speq": "ygglight.demos.moe_speq:run",
    "yggdrasil": "ygglight.demos.yggdrasil:run",
}


def load(target: str) -> Any:
    """Imports what `"module:attribute"` names."""
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


class StrategyFactory:
    """What stands in Lightning's registry for a row: a callable that imports the class only when it is asked for."""

    def __init__(self, row: StrategyRow) -> None:
        self.row = row

    def __call__(self, **init_params: Any) -> Any:
        """Builds the strategy, or raises the row's refusal."""
        if self.row.refusal is not None:
            raise ValueError(self.row.refusal)
        return load(self.row.target)(**init_params)

    def __repr__(self) -> str:
        return f"StrategyFactory({self.row.name!r} -> {self.row.target!r})"


def register_strategies(registry: _StrategyRegistry | None = None) -> None:
    """Registers every row of `STRATEGIES`; calling it again changes nothing.

    Only `lightning.pytorch`'s registry is served: `pytorch_lightning` has another one, and Fabric a third, which the
    Trainer never reads. A name that somebody else registered before is left alone with a warning.

    Args:
        registry: Where to register. Default: `lightning.pytorch.strategies.StrategyRegistry`.
    """
    if registry is None:
        from lightning.pytorch.strategies import StrategyRegistry as registry
    assert registry is not None
    for row in STRATEGIES:
        if row.name in registry:
            owner = registry[row.name]["strategy"]
            # By name and not by isinstance: a reload of this module makes a new class.
            if type(owner).__name__ != StrategyFactory.__name__:
                warnings.warn(
                    f"strategy name {row.name!r} is already taken by {owner!r} and ygglight leaves it alone: "
                    f"pass an object of {row.target.replace(':', '.')} instead of the name"
                )
            continue
        registry.register(row.name, StrategyFactory(row), description=row.description, **row.presets)
