"""Fixtures for all tests: a quiet CPU machine with two threads, and after each test a look for what it left behind."""

from __future__ import annotations

import os
import random
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

# Before torch and transformers are imported. Nothing may be fetched: no hub is reachable where the tests run.
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", MPLBACKEND="Agg")
os.environ.setdefault("OMP_NUM_THREADS", "2")

import numpy as np
import pytest
import torch

THREADS = min(2, os.cpu_count() or 1)

# Set by Lightning, torch or a solver in the course of ordinary work; put back like the rest, but no sign of a leak.
_MAY_CHANGE = {
    "COLUMNS", "CUBLAS_WORKSPACE_CONFIG", "CUDA_MODULE_LOADING", "KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK",
    "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "PL_GLOBAL_SEED", "PL_SEED_WORKERS",
    "PYTEST_CURRENT_TEST", "PYTORCH_NVML_BASED_CUDA_CHECK", "RANK", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR",
    "WORLD_SIZE",
}  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    """Hides GPUs unless the selection asks for `gpu` tests, so that the default run is the same on every machine."""
    if "not gpu" in config.getoption("markexpr", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips `gpu` tests with a reason where there is no GPU."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(scope="session", autouse=True)
def two_threads() -> None:
    """Caps torch at two threads: more only fight where several processes share the machine."""
    torch.set_num_threads(THREADS)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers in a test whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs each test in a folder of its own, so that `lightning_logs` never lands in the repository."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache folder of its own: latencies, files and models that a test makes are nobody else's."""
    monkeypatch.setenv("YGGLIGHT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For operations on a few KiB a second thread only waits: on a busy machine tests took 20 times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_leaked_environment() -> Iterator[None]:
    """Puts environment and import path back; fails the test that changed a variable for good."""
    environment, path = dict(os.environ), list(sys.path)
    yield
    changed = {name for name in {*environment, *os.environ} if environment.get(name) != os.environ.get(name)}
    for name in changed:
        os.environ.pop(name, None)
        if name in environment:
            os.environ[name] = environment[name]
    sys.path[:] = path
    leaked = sorted(changed - _MAY_CHANGE)
    assert not leaked, f"the test changed environment variables and left them: {leaked}"


def torch_state() -> dict[str, object]:
    """What in torch is global and must be after a test as it was before.

    The three private names have no public twin. A dispatch mode or a pair of saved-tensor hooks left active would act
    on every later test in silence.
    """
    return {
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
        "function modes": torch._C._len_torch_function_stack(),
        "saved-tensor hooks": torch._C._autograd._top_saved_tensors_default_hooks(True) is not None,
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"),
        "default dtype": torch.get_default_dtype(),
        "default device": str(torch.get_default_device()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
        "process group": torch.distributed.is_available() and torch.distributed.is_initialized(),
    }


@pytest.fixture(autouse=True)
def no_leaked_torch_state() -> Iterator[None]:
    """Fails the test that leaves a mode, a hook, a process group or a changed default behind, and mends what it can."""
    before = torch_state()
    yield
    after = torch_state()
    if after["process group"] and not before["process group"]:
        torch.distributed.destroy_process_group()
    torch.set_grad_enabled(bool(before["grad mode"]))
    torch.set_default_dtype(before["default dtype"])  # type: ignore[arg-type]
    torch.use_deterministic_algorithms(bool(before["deterministic"]))
    torch.set_num_threads(int(before["threads"]))  # type: ignore[call-overload]
    leaked = {name: (before[name], after[name]) for name in before if before[name] != after[name]}
    assert not leaked, f"the test left torch changed, as (before, after): {leaked}"


@pytest.fixture(autouse=True)
def no_leaked_threads() -> Iterator[None]:
    """Fails the test that leaves a thread of ygglight's running; by name, for the libraries keep pools of their own."""
    yield
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("ygglight")]
    assert not left, f"the test left threads running: {left}"


@pytest.fixture(autouse=True)
def no_leaked_strategies() -> Iterator[None]:
    """Puts Lightning's strategy registry back; the first test to import ygglight fills it, and that may stay."""
    from lightning.pytorch.strategies import StrategyRegistry

    import ygglight  # noqa: F401

    before = dict(StrategyRegistry)
    yield
    StrategyRegistry.clear()
    StrategyRegistry.update(before)
