"""Choosing the next token of each request in a batch, each by its own settings and its own random numbers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Choice", "Logprobs", "Sampler", "SamplingParams", "sample_rows"]


@dataclass(frozen=True)
class SamplingParams:
    """How a request wants its tokens chosen; the names are those of OpenAI's and vLLM's APIs.

    Args:
        max_tokens: New tokens at most.
        temperature: Of the softmax; 0 takes the likeliest token.
        top_p: Keep the likeliest tokens whose probabilities sum to this.
        top_k: Keep so many of the likeliest tokens; 0: all.
        min_p: Keep tokens with at least this part of the likeliest one's probability.
        frequency_penalty: Taken off a token's logit for every time it was generated.
        presence_penalty: Taken off a token's logit once it was generated.
        repetition_penalty: Divides positive and multiplies negative logits of tokens in prompt or output
            (Keskar et al. 2019, arXiv:1909.05858); 1: none.
        seed: Of the random numbers; None: another each time.
        stop: The text ends before the first of these strings.
        ignore_eos: Go on after an end token.
        logprobs: Report log-probabilities of the chosen token and of so many of the likeliest; None: none.

    Raises:
        ValueError: a value is out of range; the text names the field.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        _require("max_tokens", self.max_tokens, self.max_tokens >= 1, "1 or more")
        _require("temperature", self.temperature, 0 <= self.temperature < math.inf, "0 (greedy) or more")
        _require("top_p", self.top_p, 0 < self.top_p <= 1, "above 0, at most 1")
        _require("top_k", self.top_k, self.top_k >= 0, "0 (all tokens) or more")
        _require("min_p", self.min_p, 0 <= self.min_p <= 1, "from 0 to 1")
        for name in ("frequency_penalty", "presence_penalty"):
            _require(name, getattr(self, name), abs(getattr(self, name)) <= 2, "from -2 to 2")
        _require("repetition_penalty", self.repetition_penalty, 0 < self.repetition_penalty < math.inf, "above 0")
        _require("seed", self.seed, self.seed is None or 0 <= self.seed < 2**63, "from 0 to 2**63 - 1")
        _require("stop", self.stop, isinstance(self.stop, tuple) and all(self.stop), "a tuple of strings, none empty")
        _require("logprobs", self.logprobs, self.logprobs is None or self.logprobs >= 0, "0 or more")

    @property
    def penalised(self) -> bool:
        """Whether the logits depend on the tokens before."""
        return bool(self.frequency_penalty or self.presence_penalty or self.repetition_penalty != 1)


def _require(name: str, value: object, holds: bool, range_: str) -> None:
    if not holds:
        raise ValueError(f"{name}={value!r}: give {range_}")


@dataclass(frozen=True)
class Logprobs:
    """Natural logarithms of probabilities under the model's own logits, before penalties and temperature.

    Args:
        chosen: Of the token. top: (token, log-probability) of the likeliest, best first.
    """

    chosen: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Choice:
    """The token of one row.

    Args:
        token: Chosen. logprobs: None if not asked for.
    """

    token: int
    logprobs: Logprobs | None = None


class Sampler:
    """What one request's sampling remembers from token to token. Global random numbers are never drawn.

    Args:
        params: Of the request. prompt: Its tokens, for the repetition penalty. device: Of the logits.
    """

    def __init__(self, params: SamplingParams, prompt: Sequence[int] = (), device: torch.device | str = "cpu") -> None:
        self.params = params
        self.counts: Counter[int] = Counter()
        """How often each token was generated."""
        self._prompt = frozenset(prompt) if params.repetition_penalty != 1 else frozenset()
        self.generator: torch.Generator | None = None
        if params.temperature > 0:
            self.generator = torch.Generator(device)
            if params.seed is None:
                self.generator.seed()
            else:
                self.generator.manual_seed(params.seed)

    def penalise(self, logits: Tensor) -> None:
        """Apply the penalties in place.

        Args:
            logits: float32 ``[V]``.
        """
        params = self.params
        if params.repetition_penalty != 1 and (seen := self._prompt | self.counts.keys()):
            index = torch.tensor(sorted(seen), device=logits.device)
            found = logits[index]
            logits[index] = torch.where(found < 0, found * params.repetition_penalty, found / params.repetition_penalty)
        if self.counts and (params.frequency_penalty or params.presence_penalty):
            index = torch.tensor(list(self.counts), device=logits.device)
            times = torch.tensor(list(self.counts.values()), dtype=logits.dtype, device=logits.device)
            logits[index] -= params.frequency_penalty * times + params.presence_penalty


def sample_rows(logits: Tensor, samplers: Sequence[Sampler]) -> list[Choice | None]:
    """Choose a token for each row and remember it; the host waits for the device once, or once more for logprobs.

    Penalties come first, then temperature, top-k, top-p and min-p by transformers' own warpers, in its order.

    Args:
        logits: ``[B, V]``, any float dtype, left as they are. samplers: One a row.

    Returns:
        One choice a row; None for a row whose logits are not finite, and then nothing is remembered.

    Raises:
        ValueError: there are more or fewer samplers than rows.
    """
    if len(samplers) != logits.shape[0]:
        raise ValueError(f"{len(samplers)} samplers for {logits.shape[0]} rows: give one a row")
    scores = logits.detach().to(torch.float32, copy=True)
    for row, sampler in enumerate(samplers):
        if sampler.params.penalised:
            sampler.penalise(scores[row])
    best, tokens = scores.max(-1)  # the first of equal ones; NaN and inf win, so `best` shows them
    alike: dict[tuple[float, int, float, float], list[int]] = {}
    for row, sampler in enumerate(samplers):
        if sampler.generator is not None:
            params = sampler.params
            alike.setdefault((params.temperature, params.top_k, params.top_p, params.min_p), []).append(row)
    for settings, rows in alike.items():
        index = torch.tensor(rows, device=scores.device)
        tokens[index] = _draw(scores[index], settings, [samplers[row] for row in rows])
    fine = torch.isfinite(best).to(tokens.dtype)
    chosen, finite = torch.stack([tokens, fine]).tolist()
    choices: list[Choice | None] = []
    for row, sampler in enumerate(samplers):
        if not finite[row]:
            choices.append(None)
            continue
        choices.append(_choice(logits[row], chosen[row], sampler.params.logprobs))
        sampler.counts[chosen[row]] += 1
    return choices


def _draw(scores: Tensor, settings: tuple[float, int, float, float], samplers: list[Sampler]) -> Tensor:
    """One token a row, ``[n]``, from warped scores ``[n, V]``."""
    for warper in _warpers(*settings):
        scores = warper(None, scores)
    probabilities = scores.softmax(-1)
    # The first arrival of independent exponential clocks with these rates: what torch.multinomial does for one sample,
    # but each row with its own generator, whoever its neighbours are, and without a host read.
    noise = torch.empty_like(probabilities)
    for row, sampler in enumerate(samplers):
        noise[row].exponential_(generator=sampler.generator)
    return (probabilities / noise).argmax(-1)


def _warpers(temperature: float, top_k: int, top_p: float, min_p: float) -> list[Any]:
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    warpers: list[Any] = []
    if temperature != 1:
        warpers.append(TemperatureLogitsWarper(float(temperature)))
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(MinPLogitsWarper(min_p))
    return warpers


def _choice(logits: Tensor, token: int, count: int | None) -> Choice:
    if count is None:
        return Choice(token)
    logprobs = logits.float().log_softmax(-1)
    values, tokens = logprobs.topk(min(count, len(logprobs)))
    return Choice(token, Logprobs(float(logprobs[token]), tuple(zip(tokens.tolist(), values.tolist(), strict=True))))
