"""What a run of tree decoding did."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from ygglight.engines.decode.clock import STAGES, Timed


@dataclass
class Report(Timed):
    """Totals over any number of generations.

    Args:
        tokens: new tokens. iterations: verifications. drafted: iterations that had a tree. accepted: drafted tokens
            that were accepted. verified: nodes run through the target. reads: times the host waited for the device.
        seconds: by stage. shapes: (width, depth) -> iterations. generations: prompts. fallbacks: reason -> prompts
            that went to transformers' own loop. notes: what a user should know.
    """

    tokens: int = 0
    iterations: int = 0
    drafted: int = 0
    accepted: int = 0
    verified: int = 0
    reads: int = 0
    generations: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    shapes: Counter[tuple[int, int]] = field(default_factory=Counter)
    fallbacks: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    @property
    def tokens_per_step(self) -> float:
        """New tokens an iteration, the bonus token among them: 1.0 is plain decoding."""
        return (self.tokens - self.generations) / self.iterations if self.iterations else 0.0

    def add(self, other: Report) -> None:
        """Take the counts of another report in."""
        for name in ("tokens", "iterations", "drafted", "accepted", "verified", "reads", "generations"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for stage, seconds in other.seconds.items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds
        self.shapes.update(other.shapes)
        self.fallbacks.update(other.fallbacks)
        self.notes.extend(note for note in other.notes if note not in self.notes)

    def rows(self) -> list[tuple[str, str]]:
        """Lines for a table."""
        total = self.decode_seconds
        rows = [
            (
                "prompts",
                f"{self.generations}"
                + (f" (+ {sum(self.fallbacks.values())} by transformers' own loop)" if self.fallbacks else ""),
            ),
            (
                "new tokens",
                f"{self.tokens} ({self.tokens / total:.1f} a second, prompts apart)" if total else f"{self.tokens}",
            ),
            (
                "accepted a step",
                f"{self.tokens_per_step:.2f} tokens, the bonus token among them; {self.iterations} steps",
            ),
        ]
        if total:
            shares = ", ".join(f"{stage} {self.seconds[stage] / total:.0%}" for stage in ("draft", "verify", "host"))
            rows.append(("time", f"{shares} of {total:.1f} s; prompts {self.seconds['prefill']:.1f} s"))
        plain = self.iterations - self.drafted
        trees = [f"{w}x{d} ({count})" for (w, d), count in self.shapes.most_common(4)]
        rows.append(("trees, width x depth", ", ".join(trees + ([f"none ({plain})"] if plain else [])) or "none"))
        rows.extend(("fallback", f"{reason}: {count}") for reason, count in self.fallbacks.items())
        rows.extend(("note", note) for note in self.notes)
        return rows

    def table(self) -> str:
        """The rows, aligned."""
        return "\n".join(f"  {name:<22}{text}" for name, text in self.rows())

    def to_dict(self) -> dict[str, Any]:
        """Primitives only."""
        return {
            "tokens": self.tokens, "iterations": self.iterations, "drafted": self.drafted, "accepted": self.accepted,
            "verified": self.verified, "reads": self.reads, "generations": self.generations,
            "seconds": dict(self.seconds), "tokens_per_step": self.tokens_per_step,
            "shapes": {f"{w}x{d}": count for (w, d), count in self.shapes.items()},
            "fallbacks": dict(self.fallbacks), "notes": list(self.notes),
        }  # fmt: skip
