"""Measurements kept from one run to the next, by what they were made on."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ygglight.compat.folders import cache_root

log = logging.getLogger(__name__)


def hardware(device: torch.device) -> str:
    """The name of a device, with all that changes its speed and that torch can tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {torch.get_num_threads()} threads"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def fingerprint(model: nn.Module, device: torch.device) -> dict[str, Any]:
    """What decides how fast a model runs: primitives, to be a key."""
    parameters = list(model.parameters())
    config: Any = getattr(model, "config", None)
    shape = config.to_json_string(use_diff=True) if config is not None else type(model).__name__
    return {
        "model": type(model).__name__,
        "config": hashlib.sha256(shape.encode()).hexdigest()[:16],
        "dtypes": sorted({str(p.dtype) for p in parameters}),
        "values": sum(p.numel() for p in parameters),
        "hardware": hardware(device),
        "torch": torch.__version__,
    }


def remember(key: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was measured under this key, or else what ``measure`` finds now.

    A file that cannot be read is measured anew, and a folder that cannot be written only costs the memory.

    Args:
        key: primitives. measure: gives primitives.
    """
    text = json.dumps(key, sort_keys=True)
    path = cache_root() / "latencies" / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"
    try:
        stored = json.loads(path.read_text())
        if stored["key"] == key:
            return dict(stored["measured"])
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("the stored latencies in %s cannot be read (%s): measuring again", path, error)
    measured = measure()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        try:
            with os.fdopen(handle, "w") as file:
                json.dump({"key": key, "measured": measured}, file)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        log.warning("latencies cannot be kept in %s (%s)", path.parent, error.strerror)
    return measured
