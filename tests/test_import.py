"""What `import ygglight` does, and what it must not do. Each case in a fresh interpreter."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import warnings

import pytest
from lightning.fabric.strategies import STRATEGY_REGISTRY
from lightning.pytorch.strategies import SingleDeviceStrategy, StrategyRegistry

import ygglight
from ygglight import registry


def fresh(code: str) -> str:
    """Standard output of a program run by a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_adds_little_to_importing_lightning() -> None:
    out = fresh(
        "import json, sys, time\n"
        "import lightning\n"
        "before = set(sys.modules)\n"
        "start = time.perf_counter()\n"
        "import ygglight\n"
        "took = time.perf_counter() - start\n"
        "print(json.dumps([took, sorted(set(sys.modules) - before)]))"
    )
    took, loaded = json.loads(out.splitlines()[-1])
    assert took < 0.3
    packages = {name.split(".")[0] for name in loaded}
    assert not packages & {"triton", "peft", "transformers", "pulp", "gguf", "matplotlib", "bitsandbytes", "deepspeed"}
    assert {name for name in loaded if name.startswith("ygglight")} == {"ygglight", "ygglight.registry"}


def test_imports_without_triton() -> None:
    """As on macOS and Windows, where there is none."""
    fresh(
        "import sys\n"
        "sys.modules['triton'] = None\n"
        "import ygglight\n"
        "from ygglight import callbacks, data, engines, kernels, modules, strategies\n"
        "kernels.list_kernels()\n"
        "from ygglight.strategies import AdaccStrategy"
    )


def test_names_are_known_to_the_trainer_and_lower_case() -> None:
    for row in registry.STRATEGIES:
        assert row.name in StrategyRegistry
        assert row.name == row.name.lower(), "the Trainer lower-cases what the user types: a capital is out of reach"
        assert StrategyRegistry[row.name]["description"]
        assert row.name not in STRATEGY_REGISTRY, "Fabric's registry is another, which the Trainer never reads"


def test_names_say_ddp_and_deepspeed_only_when_they_are() -> None:
    """Lightning refuses names with these substrings on Apple GPUs."""
    for row in registry.STRATEGIES:
        if "ddp" in row.name or "deepspeed" in row.name:
            assert row.name in ("adacc_ddp", "adacc_deepspeed")


def test_registering_again_changes_nothing() -> None:
    before = dict(StrategyRegistry)
    registry.register_strategies()
    importlib.reload(registry).register_strategies()
    importlib.reload(ygglight)
    assert dict(StrategyRegistry) == before


def test_a_name_taken_by_others_is_left_alone_with_a_warning() -> None:
    StrategyRegistry.register("adacc", SingleDeviceStrategy, override=True)
    with pytest.warns(UserWarning, match="'adacc' is already taken"):
        registry.register_strategies()
    assert StrategyRegistry["adacc"]["strategy"] is SingleDeviceStrategy


def test_the_other_package_learns_no_name() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from pytorch_lightning.strategies import StrategyRegistry as Other
    assert "adacc" not in Other


def test_every_target_exists() -> None:
    targets = [row.target for row in registry.STRATEGIES if row.refusal is None]
    for target in [*targets, *registry.STRATEGY_CLASSES.values(), *registry.DEMOS.values()]:
        assert callable(registry.load(target)), target


def test_subpackages_come_on_demand() -> None:
    from ygglight import strategies

    assert ygglight.strategies is strategies
    assert "AdaccStrategy" in dir(strategies) and "strategies" in dir(ygglight)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ygglight.nothing
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = strategies.Nothing
