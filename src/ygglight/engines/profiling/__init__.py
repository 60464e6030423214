"""Measured latencies of this machine, and where they are kept."""

from ygglight.engines.profiling.measure import measure_widths
from ygglight.engines.profiling.store import fingerprint, remember

__all__ = ["fingerprint", "measure_widths", "remember"]
