"""What a run with experts on demand did: tokens, drafts, cache, bytes, and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from ygglight.engines.decode.clock import STAGES, Timed
from ygglight.engines.memory.sizes import format_bytes

CAUSES = ("demand", "prefetch", "prefill")
COUNTS = ("requests", "hits", "late", "misses", "prefetched", "unused", "evicted")


KEPT = 1024
"""Entries of the lists: a server runs for months."""


@dataclass
class Report(Timed):
    """Totals over any number of generations.

    Args:
        tokens: New tokens. cycles: Passes of the target after the prompt. drafted: Tokens that were drafted.
        accepted: Of them. generations: Prompts. drafting: k -> cycles. seconds: By stage. moved: Bytes to the device by
            cause. experts: Counts over unique (layer, expert) of each pass after the prompt: requests = hits + late
            (still on the way) + misses; prefetched = sent ahead; unused, evicted = of those, never asked for, and
            thrown out before they could be.
        memory: Bytes by use. bandwidth: Bytes a second of the link, measured while the model ran. copy_seconds: Fixed
            part of a copy. choices: (k, cycles) in order, the last ones. errors: Predicted
            over measured seconds of the last cycles, less 1.
        fallbacks: Reason -> prompts that went to transformers' own loop. notes: What a user should know.
    """

    tokens: int = 0
    cycles: int = 0
    drafted: int = 0
    accepted: int = 0
    generations: int = 0
    drafting: Counter[int] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    moved: Counter[str] = field(default_factory=Counter)
    experts: Counter[str] = field(default_factory=Counter)
    memory: dict[str, int] = field(default_factory=dict)
    bandwidth: float | None = None
    copy_seconds: float | None = None
    choices: list[tuple[int, int]] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    fallbacks: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    @property
    def tokens_per_cycle(self) -> float:
        """New tokens a pass of the target, its own among them: 1.0 is plain decoding."""
        return (self.tokens - self.generations) / self.cycles if self.cycles else 0.0

    @property
    def bytes_per_token(self) -> float:
        """Bytes of experts that travelled for a new token, prompts apart."""
        return (self.moved["demand"] + self.moved["prefetch"]) / self.tokens if self.tokens else 0.0

    @property
    def median_error(self) -> float | None:
        """Of the governor's predictions of a cycle's seconds, as a part; None: nothing was predicted."""
        ordered = sorted(map(abs, self.errors))
        return ordered[len(ordered) // 2] if ordered else None

    def add(self, other: Report) -> None:
        """Take the counts of another report in; of what does not add up, the later holds."""
        for name in ("tokens", "cycles", "drafted", "accepted", "generations"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for stage, seconds in other.seconds.items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds
        for name in ("drafting", "moved", "experts", "fallbacks"):
            getattr(self, name).update(getattr(other, name))
        for k, cycles in other.choices:
            self.chose(k, cycles)
        self.errors = [*self.errors, *other.errors][-KEPT:]
        self.memory = other.memory or self.memory
        self.bandwidth = other.bandwidth or self.bandwidth
        self.copy_seconds = self.copy_seconds if other.copy_seconds is None else other.copy_seconds
        self.notes.extend(note for note in other.notes if note not in self.notes)

    def chose(self, k: int, cycles: int = 1) -> None:
        """Note that so many cycles drafted k tokens."""
        if self.choices and self.choices[-1][0] == k:
            cycles += self.choices.pop()[1]
        self.choices = [*self.choices[1 - KEPT :], (k, cycles)]

    def rows(self) -> list[tuple[str, str]]:
        """Lines for a table."""
        total = self.decode_seconds
        others = sum(self.fallbacks.values())
        speed = f" ({self.tokens / total:.2f} a second, prompts apart)" if total else ""
        rows = [
            ("prompts", f"{self.generations}" + (f" (+ {others} by transformers' own loop)" if others else "")),
            ("new tokens", f"{self.tokens}{speed}"),
            (
                "tokens a cycle",
                f"{self.tokens_per_cycle:.2f}, the target's own among them; "
                f"{self.accepted} of {self.drafted} drafted ones accepted; {self.cycles} cycles",
            ),
        ]
        if self.choices:
            changes = "; ".join(f"k={k} for {n}" for k, n in self.choices[-6:])
            rows.append(("k", ("... " if len(self.choices) > 6 else "") + changes))
        if total:
            shares = ", ".join(f"{stage} {self.seconds[stage] / total:.0%}" for stage in ("draft", "verify", "host"))
            rows.append(("time", f"{shares} of {total:.1f} s; prompts {self.seconds['prefill']:.1f} s"))
        asked = self.experts["requests"]
        if asked:
            parts = ", ".join(f"{name} {self.experts[name] / asked:.1%}" for name in ("hits", "late", "misses"))
            rows.append(("experts asked for", f"{asked}: {parts}"))
        if self.experts["prefetched"]:
            wasted = ", ".join(f"{name} {self.experts[name]}" for name in ("unused", "evicted"))
            rows.append(("experts sent ahead", f"{self.experts['prefetched']}: {wasted}"))
        if self.moved.total():
            moved = ", ".join(f"{cause} {format_bytes(self.moved[cause])}" for cause in CAUSES if self.moved[cause])
            rows.append(("bytes moved", f"{moved}; {format_bytes(self.bytes_per_token)} a new token, prompts apart"))
        if self.bandwidth:
            fixed = "" if not self.copy_seconds else f" and {self.copy_seconds * 1e6:.0f} us a copy"
            rows.append(("link", f"{format_bytes(self.bandwidth)}/s{fixed}, measured while the model ran"))
        if self.memory:
            rows.append(("memory", ", ".join(f"{use} {format_bytes(size)}" for use, size in self.memory.items())))
        if self.median_error is not None:
            rows.append(("predicted cycles", f"off by {self.median_error:.0%} (median)"))
        rows.extend(("fallback", f"{reason}: {count}") for reason, count in self.fallbacks.items())
        rows.extend(("note", note) for note in self.notes)
        return rows

    def table(self) -> str:
        """The rows, aligned."""
        return "\n".join(f"  {name:<22}{text}" for name, text in self.rows())

    def to_dict(self) -> dict[str, Any]:
        """Primitives only."""
        return {
            "tokens": self.tokens, "cycles": self.cycles, "drafted": self.drafted, "accepted": self.accepted,
            "generations": self.generations, "tokens_per_cycle": self.tokens_per_cycle,
            "drafting": {str(k): count for k, count in sorted(self.drafting.items())},
            "seconds": dict(self.seconds), "moved": dict(self.moved), "experts": dict(self.experts),
            "memory": dict(self.memory), "bandwidth": self.bandwidth, "copy_seconds": self.copy_seconds,
            "choices": [list(choice) for choice in self.choices], "median_error": self.median_error,
            "fallbacks": dict(self.fallbacks), "notes": list(self.notes),
        }  # fmt: skip
