"""Lightning callbacks: monitors, writers, model patches."""

from __future__ import annotations

from typing import Any

from ygglight.registry import load

_CLASSES = {
    "AdaccMonitor": "ygglight.callbacks.adacc_monitor:AdaccMonitor",
    "ClusterFusion": "ygglight.callbacks.cluster_fusion:ClusterFusion",
    "GenerationWriter": "ygglight.callbacks.generation_writer:GenerationWriter",
    "HarliMonitor": "ygglight.callbacks.harli_monitor:HarliMonitor",
    "MoESpeQMonitor": "ygglight.callbacks.moe_speq_monitor:MoESpeQMonitor",
}

__all__ = list(_CLASSES)


def __getattr__(name: str) -> Any:
    if name in _CLASSES:
        return load(_CLASSES[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
