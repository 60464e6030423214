"""Request traces: when requests arrive and how long they are; read from a file or drawn from a seed."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

# One length for all requests, or several of which each request draws one.
Lengths = int | Sequence[int]


@dataclass(frozen=True)
class TracedRequest:
    """One request of a trace.

    Args:
        arrival: Seconds after the start of the trace.
        max_tokens: Tokens of the answer.
        prompt: Text of the prompt; or
        prompt_tokens: how many (random) tokens the prompt has.
        model: Which model answers: ``base`` or ``adapter``.

    Raises:
        ValueError: A value that cannot be, named.
    """

    arrival: float
    max_tokens: int
    prompt: str | None = None
    prompt_tokens: int | None = None
    model: str = "base"

    def __post_init__(self) -> None:
        if not _is_number(self.arrival) or not 0 <= self.arrival < math.inf:
            raise ValueError(f"arrival is {self.arrival!r}: give seconds from 0")
        if not _is_count(self.max_tokens):
            raise ValueError(f"max_tokens is {self.max_tokens!r}: give a whole number from 1")
        if (self.prompt is None) == (self.prompt_tokens is None):
            raise ValueError("give either prompt (text) or prompt_tokens (how many)")
        if self.prompt is not None and not (isinstance(self.prompt, str) and self.prompt):
            raise ValueError(f"prompt is {self.prompt!r}: give text")
        if self.prompt_tokens is not None and not _is_count(self.prompt_tokens):
            raise ValueError(f"prompt_tokens is {self.prompt_tokens!r}: give a whole number from 1")
        if self.model not in ("base", "adapter"):
            raise ValueError(f"model is {self.model!r}: give base or adapter")


@dataclass(frozen=True)
class Trace:
    """Requests in the order of their arrival.

    Args:
        requests: The requests.
        seconds: How long the trace lasts; a load that falls to 0 lasts longer than its last arrival.
    """

    requests: tuple[TracedRequest, ...]
    seconds: float

    @classmethod
    def of(cls, requests: Sequence[TracedRequest], seconds: float | None = None) -> Trace:
        """A trace of requests in any order.

        Args:
            requests: At least one.
            seconds: How long it lasts. Default: until the last arrival.

        Raises:
            ValueError: There is no request: the rate or the time is too small.
        """
        if not requests:
            raise ValueError("the trace has no request: raise the rate or the time")
        ordered = tuple(sorted(requests, key=lambda request: request.arrival))
        return cls(ordered, max(ordered[-1].arrival, seconds or 0.0))

    @classmethod
    def load(cls, path: Path | str) -> Trace:
        """Reads a jsonl file, a request a line: ``{"arrival": 0.5, "prompt": "Once", "max_tokens": 9}``.

        ``prompt_tokens`` (a number) may stand for ``prompt``, and ``"model": "adapter"`` may be added. Empty lines are
        skipped.

        Raises:
            ValueError: There is no such file, or a line is wrong; it names the line.
        """
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"the trace {path} cannot be read: {error}") from error
        requests = []
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                requests.append(_parsed(json.loads(line)))
            except ValueError as error:  # of json too
                raise ValueError(f"{path}, line {number}: {error}") from error
        return cls.of(requests)

    def save(self, path: Path | str) -> None:
        """Writes the file that `load` reads; the time after the last arrival is not in it."""
        rows = ({name: value for name, value in asdict(row).items() if value is not None} for row in self.requests)
        Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def poisson(
    rate: float, seconds: float, prompt_tokens: Lengths, max_tokens: Lengths, *, model: str = "base", seed: int = 0
) -> Trace:
    """Arrivals that know nothing of each other.

    Args:
        rate: Requests a second, on average. seconds: how long. prompt_tokens, max_tokens: lengths. model: who
            answers. seed: of arrivals and lengths.
    """
    return phases([(seconds, rate)], prompt_tokens, max_tokens, model=model, seed=seed)


def load_step(
    peak: float,
    before: float,
    during: float,
    after: float,
    prompt_tokens: Lengths,
    max_tokens: Lengths,
    *,
    model: str = "base",
    seed: int = 0,
) -> Trace:
    """Nothing, then Poisson arrivals, then nothing (brief E, S4).

    Args:
        peak: Requests a second in the middle. before, during, after: seconds of the three parts. The rest as in
            `poisson`.
    """
    parts = [(before, 0.0), (during, peak), (after, 0.0)]
    return phases(parts, prompt_tokens, max_tokens, model=model, seed=seed)


def phases(
    parts: Sequence[tuple[float, float]],
    prompt_tokens: Lengths,
    max_tokens: Lengths,
    *,
    model: str = "base",
    seed: int = 0,
) -> Trace:
    """Poisson arrivals whose rate changes from part to part.

    Args:
        parts: (seconds, requests a second) of each part. The rest as in `poisson`.

    Raises:
        ValueError: A negative time or rate, or no request comes of it.
    """
    generator = np.random.default_rng(seed)
    arrivals: list[float] = []
    start = 0.0
    for seconds, rate in parts:
        if not (0 <= seconds < math.inf and 0 <= rate < math.inf):
            raise ValueError(f"a part of {seconds} s at {rate} requests/s: neither may be negative or infinite")
        # Given how many there are, the arrivals of a Poisson process are uniform.
        count = int(generator.poisson(rate * seconds))
        arrivals += sorted(start + float(x) for x in generator.uniform(0, seconds, count))
        start += seconds
    return _drawn(arrivals, start, prompt_tokens, max_tokens, model, generator)


def bursts(
    rate: float,
    seconds: float,
    prompt_tokens: Lengths,
    max_tokens: Lengths,
    *,
    variation: float = 2.0,
    model: str = "base",
    seed: int = 0,
) -> Trace:
    """Arrivals in clusters: times between them follow a Gamma distribution, as BurstGPT (arXiv:2401.17644) fits them.

    Args:
        rate: Requests a second in the long run.
        variation: Standard deviation of the time between arrivals over its mean: 1 is Poisson, more is burstier.
        seconds, prompt_tokens, max_tokens, model, seed: As in `poisson`.

    Raises:
        ValueError: A rate, time or variation that is not above 0, or no request comes of it.
    """
    if not all(0 < value < math.inf for value in (rate, seconds, variation)):
        raise ValueError(f"rate={rate}, seconds={seconds}, variation={variation}: each must be above 0")
    generator = np.random.default_rng(seed)
    shape = 1 / variation**2
    arrivals: list[float] = []
    now = float(generator.gamma(shape, 1 / (rate * shape)))
    while now < seconds:
        arrivals.append(now)
        now += float(generator.gamma(shape, 1 / (rate * shape)))
    return _drawn(arrivals, seconds, prompt_tokens, max_tokens, model, generator)


def heavy_tailed(median: int, sigma: float, longest: int, *, count: int = 1000, seed: int = 0) -> list[int]:
    """Lengths as conversations have them: log-normal, cut at both ends.

    Args:
        median: Tokens. sigma: of the logarithm; 0 makes all alike. longest: the cut above, in tokens. count: how many.
    """
    drawn = np.random.default_rng(seed).lognormal(math.log(median), sigma, count)
    return [int(x) for x in np.clip(np.rint(drawn), 1, longest)]


def _drawn(
    arrivals: Sequence[float],
    seconds: float,
    prompt_tokens: Lengths,
    max_tokens: Lengths,
    model: str,
    generator: np.random.Generator,
) -> Trace:
    prompts = _lengths(prompt_tokens, len(arrivals), generator)
    answers = _lengths(max_tokens, len(arrivals), generator)
    rows = [
        TracedRequest(arrival, answer, prompt_tokens=prompt, model=model)
        for arrival, prompt, answer in zip(arrivals, prompts, answers, strict=True)
    ]
    return Trace.of(rows, seconds)


def _lengths(lengths: Lengths, count: int, generator: np.random.Generator) -> list[int]:
    if isinstance(lengths, int):
        return [lengths] * count
    if not lengths:
        raise ValueError("no lengths to draw from: give a number or a list of them")
    return [lengths[int(index)] for index in generator.integers(0, len(lengths), count)]


def _parsed(row: Any) -> TracedRequest:
    if not isinstance(row, dict):
        raise ValueError("not an object")
    known = set(TracedRequest.__dataclass_fields__)
    unknown = sorted(set(row) - known)
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: no such field (there are: {', '.join(sorted(known))})")
    missing = [name for name in ("arrival", "max_tokens") if name not in row]
    if missing:
        raise ValueError(f"{' and '.join(missing)} is missing")
    return TracedRequest(**row)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
