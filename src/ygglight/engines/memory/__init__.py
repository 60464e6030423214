"""Counting bytes (sizes as text, the live bytes of a training step), and one arena of them for two owners."""

from ygglight.engines.memory.arena import Arena, ArenaCounts, ArenaFull, Lease
from ygglight.engines.memory.meter import LiveBytes
from ygglight.engines.memory.sizes import format_bytes, parse_bytes

__all__ = ["Arena", "ArenaCounts", "ArenaFull", "Lease", "LiveBytes", "format_bytes", "parse_bytes"]
