"""Steps of one token: by the model's own code, or fused where that measures faster on this machine."""

from __future__ import annotations

import logging
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn

from ygglight.compat.transformers import decoder_layers
from ygglight.engines.decode.fused import FusedAttention, fusable
from ygglight.engines.decode.latent import is_latent
from ygglight.engines.profiling import fingerprint, remember
from ygglight.engines.profiling.measure import timed
from ygglight.kernels.cluster_decode import block_ways, decode_block, latent_ways

log = logging.getLogger(__name__)

PLAIN = "plain"
GAIN = 0.98
"""What fused steps may take of plain ones at most: less of a gain is within the noise of a short measurement."""
ROUNDS = 7
_PASSING = (torch.OutOfMemoryError, MemoryError, OSError)


@dataclass(frozen=True)
class Trial:
    """One step of one token, to be timed.

    Args:
        step: Runs it; may be called any number of times.
        around: Entered around each, outside the time.
    """

    step: Callable[[], object]
    around: Callable[[], AbstractContextManager[Any]] = nullcontext


Prepare = Callable[[FusedAttention | None], Trial]
"""Gives the step to be timed, with this fused attention or without one."""


@dataclass(frozen=True)
class Decision:
    """How steps of one token run.

    Args:
        way: "plain", "split_k", "cluster 4" and so on, or "torch".
        reason: One line that says why.
        fused: What to install, None for plain steps.
        seconds: Of one step in each way that was measured.
    """

    way: str
    reason: str
    fused: FusedAttention | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)


def ways_of(model: nn.Module, device: torch.device) -> tuple[dict[str, Callable[..., Any]], str]:
    """The ways in which a device can run a model's steps fused, to be measured; and a line that says why not more.

    Args:
        model: A causal language model. device: where it is.
    """
    return (latent_ways if any(map(is_latent, decoder_layers(model))) else block_ways)(device)


def decide(
    model: nn.Module,
    device: torch.device,
    prepare: Prepare,
    *,
    cluster_size: int | None = None,
    key: dict[str, Any],
) -> Decision:
    """Chooses the fastest way; measured once for a model, a machine and a key, and remembered.

    Args:
        model: A causal language model. device: where it is. prepare: gives what is timed.
        cluster_size: The only size of clusters to try. key: what else the time of a step depends on.
    """
    ways, reason = ways_of(model, device)
    only = f"cluster {cluster_size}"
    if cluster_size is not None and only in ways:
        ways = {only: ways[only]}
    if not ways:
        return Decision(PLAIN, reason)
    obstacles = [fusable(layer) for layer in decoder_layers(model)]
    if None not in obstacles:
        return Decision(PLAIN, _commonest(obstacles))
    made: dict[str, FusedAttention] = {}

    def measure() -> dict[str, Any]:
        steps, refused = {PLAIN: prepare(None)}, {}
        for name, block in ways.items():
            made[name] = FusedAttention(model, block=block)
            if not made[name].fused:
                refused[name] = _commonest(made[name].reasons)
                continue
            choices = made[name].choices
            if name.startswith("cluster") and all(choice.path != "cluster" for choice in choices):
                refused[name] = _commonest([choice.reason for choice in choices])  # it would run something else
                continue
            try:
                steps[name] = prepare(made[name])
                _seconds(steps[name], device)
            except _PASSING:
                raise  # says nothing of the way, and must not be remembered
            except Exception as error:  # clusters that the device cannot hold, tiles that do not compile
                steps.pop(name, None)
                refused[name] = _told(error)
        return {"seconds": _times(steps, device), "refused": refused}

    key = {"what": "fused step", "triton": _triton(), "ways": sorted(ways), **fingerprint(model, device), **key}
    try:
        found = remember(key, measure)
        return _choose(model, found["seconds"], found["refused"], ways, made)
    except (torch.OutOfMemoryError, MemoryError):
        return Decision(PLAIN, "there was not enough memory to measure fused steps")
    except OSError as error:
        return Decision(PLAIN, f"fused steps could not be measured ({_told(error)})")


def _choose(
    model: nn.Module,
    seconds: dict[str, float],
    refused: dict[str, str],
    ways: Mapping[str, Callable[..., Any]],
    made: dict[str, FusedAttention],
) -> Decision:
    for name, why in refused.items():
        log.info("fused steps of %s: %s is left out: %s", type(model).__name__, name, why)
    fused = [name for name in seconds if name != PLAIN]
    if not fused:
        return Decision(PLAIN, _commonest(list(refused.values())), seconds=seconds)
    best = min(fused, key=seconds.__getitem__)
    told = f"{best} {_milliseconds(seconds[best])} a step, plain {_milliseconds(seconds[PLAIN])}"
    if seconds[best] > GAIN * seconds[PLAIN]:
        return Decision(PLAIN, f"measured no faster: {told}", seconds=seconds)
    attention = made.get(best) or FusedAttention(model, block=ways[best])
    if not attention.fused:
        return Decision(PLAIN, _commonest(attention.reasons), seconds=seconds)
    return Decision(best, f"measured faster: {told}", attention, seconds)


def _times(steps: Mapping[str, Trial], device: torch.device) -> dict[str, float]:
    """Median seconds of each step; in turn, so that what slows the machine slows all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(ROUNDS + 1):
        for name, step in steps.items():
            spent = _seconds(step, device)
            if number:  # the first round warms up
                seconds[name].append(spent)
    return {name: statistics.median(each) for name, each in seconds.items()}


def _seconds(trial: Trial, device: torch.device) -> float:
    def run(_: int) -> None:
        trial.step()

    with trial.around():
        return timed(run, 0, device)


class SingleSteps:
    """A decoder's steps of one token: fused where that measures faster, or as its owner says.

    Args:
        model: A causal language model. device: where it is.
        fused: True: anyway, by what runs by default; False: never; None: where it measures faster.
        key: what else the time of a step depends on.
    """

    def __init__(self, model: nn.Module, device: torch.device, fused: bool | None, key: dict[str, Any]) -> None:
        self._model, self._device, self._key = model, device, key
        self._now: FusedAttention | None = None
        self.decision: Decision | None = None
        """How they run; None until the first one could be measured."""
        if fused is not None:
            self.decision = forced(model) if fused else Decision(PLAIN, "fused=False")
            self._now = self.decision.fused

    def decide(self, prepare: Callable[[], Callable[[], object]]) -> None:
        """Measure, unless it is decided.

        Args:
            prepare: Gives the step to be timed, as it runs with what is installed at the time of the call.
        """
        if self.decision is not None:
            return

        def under(fused: FusedAttention | None) -> Trial:
            self._now = fused
            return Trial(prepare())

        self.decision = Decision(PLAIN, "it is being measured")  # whatever runs meanwhile must not measure in turn
        try:
            self.decision = decide(self._model, self._device, under, key=self._key)
        finally:
            self._now = self.decision.fused

    def around(self, width: int) -> AbstractContextManager[Any]:
        """To be entered around a forward of so many tokens."""
        return self._now if width == 1 and self._now is not None else nullcontext()


def forced(model: nn.Module, cluster_size: int | None = None) -> Decision:
    """Fused steps without a measurement.

    Args:
        model: A causal language model. cluster_size: blocks of a cluster, where there are clusters.
    """
    fused = FusedAttention(model, block=partial(decode_block, blocks=cluster_size))
    if not fused.fused:
        return Decision(PLAIN, _commonest(fused.reasons))
    return Decision(" and ".join(sorted(set(fused.paths))), "asked for, not measured", fused)


def _commonest(reasons: Sequence[str | None]) -> str:
    told = Counter(reason for reason in reasons if reason is not None)
    return told.most_common(1)[0][0] if told else "the model has no decoder layers that are known"


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.3g} ms"


def _triton() -> str:
    try:
        return version("triton")
    except PackageNotFoundError:
        return ""
