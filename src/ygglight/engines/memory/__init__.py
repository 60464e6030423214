"""Counting bytes: sizes as text, and the live bytes of a training step."""

from ygglight.engines.memory.meter import LiveBytes
from ygglight.engines.memory.sizes import format_bytes, parse_bytes

__all__ = ["LiveBytes", "format_bytes", "parse_bytes"]
