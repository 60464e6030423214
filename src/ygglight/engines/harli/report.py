"""What a co-located run did: requests against their target, finetune tokens, and how memory was split."""

from __future__ import annotations

import math
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ygglight.engines.memory.sizes import format_bytes

KEPT = 20_000
"""Requests and samples kept; the oldest go first, and counts go on."""


@dataclass(frozen=True)
class Outcome:
    """One request that ended. Times in seconds on the engine's clock.

    Args:
        model: ``base`` or ``adapter``. reason: Why it ended. tokens: Of the answer. ttft: Time to first token, from
            arrival; None without one. tpot: Mean time per output token after the first; None below two tokens.
        gap: Longest time between two tokens; None below two. ended: When.
    """

    model: str
    reason: str
    tokens: int
    ttft: float | None
    tpot: float | None
    gap: float | None
    ended: float

    def attains(self, tpot_slo: float, max_gap: float) -> bool:
        """Whether it was served within the targets. An answer of one token has no time per token, and attains."""
        if self.reason == "error":
            return False
        return self.tpot is None or (self.tpot <= tpot_slo and self.gap is not None and self.gap <= max_gap)


@dataclass(frozen=True)
class Sample:
    """One step of the decode loop.

    Args:
        time: When it ended. seconds: It took, quanta in turn included. kind: ``decode``, ``prefill`` or ``idle``.
        batch: Rows. reason: The scheduler's. concurrent: Whether finetuning ran beside it. kv, leased, free: Chunks of
            the arena.
    """

    time: float
    seconds: float
    kind: str
    batch: int
    reason: str
    concurrent: bool
    kv: int
    leased: int
    free: int


@dataclass
class Report:
    """Counts of a run; written by the decode and the training thread, read by any.

    Args:
        tpot_slo, max_gap: Targets in seconds. chunk_bytes: Of the arena. executor: How the device is shared.
    """

    tpot_slo: float = math.inf
    max_gap: float = math.inf
    chunk_bytes: int = 0
    executor: str = ""
    outcomes: deque[Outcome] = field(default_factory=lambda: deque(maxlen=KEPT))
    samples: deque[Sample] = field(default_factory=lambda: deque(maxlen=KEPT))
    trainings: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=KEPT))
    """When each micro-batch was done, and its loss-bearing tokens."""
    requests: int = 0
    attained: int = 0
    rejected: int = 0
    output_tokens: int = 0
    finetune_tokens: int = 0
    micro_batches: int = 0
    replays: int = 0
    versions: int = 0
    peak_kv: int = 0
    peak_leased: int = 0
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Of the decode thread by what it did: ``decode``, ``prefill``, ``waiting`` for quanta, ``idle``."""
    reasons: Counter[str] = field(default_factory=Counter)
    started: float | None = None
    ended: float | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def finished(self, outcome: Outcome) -> None:
        """A request ended. One that its client gave up counts in no share."""
        with self._lock:
            self.outcomes.append(outcome)
            self.output_tokens += outcome.tokens
            if outcome.reason != "cancelled":
                self.requests += 1
                self.attained += outcome.attains(self.tpot_slo, self.max_gap)

    def trained(self, tokens: int, now: float) -> None:
        """A micro-batch is done, backward included.

        Args:
            tokens: Loss-bearing ones. now: Seconds.
        """
        with self._lock:
            self.trainings.append((now, tokens))
            self.finetune_tokens += tokens
            self.micro_batches += 1

    def sample(self, sample: Sample) -> None:
        """The decode loop made a step."""
        with self._lock:
            self.samples.append(sample)
            if sample.kind != "idle":
                self.reasons[sample.reason] += 1
            self.peak_kv, self.peak_leased = max(self.peak_kv, sample.kv), max(self.peak_leased, sample.leased)

    @property
    def attainment(self) -> float | None:
        """Share of the requests that were served within the targets; None before the first."""
        return self.attained / self.requests if self.requests else None

    def tpot(self, q: float) -> float | None:
        """The q-quantile of the requests' time per output token in seconds; None without any."""
        return _quantile([o.tpot for o in self._ended() if o.tpot is not None], q)

    @property
    def longest_gap(self) -> float | None:
        """Longest time between two tokens of any kept request, in seconds."""
        return max((o.gap for o in self._ended() if o.gap is not None), default=None)

    def ttft(self, q: float) -> float | None:
        """The q-quantile of the time to the first token in seconds."""
        return _quantile([o.ttft for o in self._ended() if o.ttft is not None], q)

    @property
    def finetune_tokens_per_second(self) -> float | None:
        """Loss-bearing tokens a second, over the whole run."""
        if self.started is None or self.ended is None or self.ended <= self.started:
            return None
        return self.finetune_tokens / (self.ended - self.started)

    def _ended(self) -> list[Outcome]:
        with self._lock:
            return [o for o in self.outcomes if o.reason != "cancelled"]

    def table(self) -> str:
        """A short table."""
        rows = [
            ("requests", f"{self.requests} answered, {self.rejected} refused (queue full), "
             f"{self.output_tokens} tokens"),
            ("within target", f"{_percent(self.attainment)} of them: {_ms(self.tpot_slo)} a token, "
             f"no gap above {_ms(self.max_gap)}"),
            ("time per output token", f"p50 {_ms(self.tpot(0.5))}, p99 {_ms(self.tpot(0.99))}, "
             f"longest gap {_ms(self.longest_gap)}"),
            ("time to first token", f"p50 {_ms(self.ttft(0.5))}, p99 {_ms(self.ttft(0.99))}"),
            ("finetuning", f"{self.finetune_tokens} loss tokens in {self.micro_batches} micro-batches, "
             f"{_rate(self.finetune_tokens_per_second)}, {self.replays} replayed, {self.versions} versions published"),
            ("sharing", f"{self.executor}; decode thread: {self._shares()}"),
            ("memory", f"keys and values up to {format_bytes(self.peak_kv * self.chunk_bytes)}, activations up to "
             f"{format_bytes(self.peak_leased * self.chunk_bytes)}"),
        ]  # fmt: skip
        rows += [("", f"{count} steps: {reason}") for reason, count in self.reasons.most_common(3)]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"  {name:<{width}}  {text}" for name, text in rows)

    def _shares(self) -> str:
        total = sum(self.seconds.values())
        ranked = sorted(self.seconds.items(), key=lambda item: -item[1])
        return ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in ranked) if total else "not run"


def _quantile(values: Sequence[float], q: float) -> float | None:
    return float(np.quantile(np.asarray(values), q)) if values else None


def _ms(seconds: float | None) -> str:
    return "none" if seconds is None else f"{seconds * 1000:.3g} ms"


def _percent(share: float | None) -> str:
    return "none" if share is None else f"{share:.1%}"


def _rate(tokens_per_second: float | None) -> str:
    return "no rate" if tokens_per_second is None else f"{tokens_per_second:.3g} a second"
