"""How a decision is carried out: in turn, on two thread pools, and (``executors_cuda``) on streams and SM partitions.

All of it runs on the decode thread, around each decode step::

    executor.begin(decision, gate)
    with gate.decoding():
        batcher.run(work)
    executor.end(decision, gate)

An executor that a machine cannot have is replaced by the next one, with a logged reason.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch

from ygglight.compat.openmp import release_workers
from ygglight.engines.harli.partitions import Partition, alone, slices

if TYPE_CHECKING:
    from ygglight.engines.harli.gate import Gate
    from ygglight.engines.harli.scheduler import Decision

log = logging.getLogger(__name__)

RUNGS = 8
"""Most concurrent rungs of a ladder: each is one more to measure, and neighbours differ by little."""


SETTLE_SECONDS = 0.2
"""A decode step waits at most so long for a quantum that has more cores than are left to it."""


class Unavailable(RuntimeError):
    """This machine cannot have an executor; the message says why."""


class Executor(Protocol):
    """What carries decisions out.

    Attributes:
        name: for logs and the report. ladder: the partitions that it can realise. afterwards: units on which quanta
            can go on after a step beside finetuning; 0: they keep what their micro-batch began with.
    """

    name: str
    ladder: list[Partition]
    afterwards: int

    def begin(self, decision: Decision, gate: Gate) -> None:
        """Before a decode step: sets its partition, and lets finetuning run beside it or stops it."""

    def end(self, decision: Decision, gate: Gate) -> None:
        """After it: quanta in turn run now, and are waited for as long as was decided."""

    def close(self) -> None:
        """Put the machine back as it was; the decode thread is done. The gate is the caller's to close."""


class TimeSlices:
    """Decoding and finetuning in turn, on the whole machine each.

    A quantum that takes longer than was predicted does not hold decoding back: it goes on beside the next step.

    Args:
        units: threads or SMs of the machine.
    """

    name = "time_slices"
    afterwards = 0

    def __init__(self, units: int) -> None:
        self.units = units
        self.ladder = [alone(units), slices(units)]
        self.overruns = 0
        """How often decoding went on before its quanta were done."""

    def begin(self, decision: Decision, gate: Gate) -> None:
        """See :class:`Executor`."""
        gate.grant(decision.quanta if _runs_beside(decision) else 0, self._finetune_threads(decision))

    def end(self, decision: Decision, gate: Gate) -> None:
        """See :class:`Executor`."""
        quanta = _in_turn(decision)
        if not quanta:
            return
        gate.grant(quanta, self._threads_in_turn(decision))
        if not gate.wait_spent(decision.wait_seconds):
            self.overruns += 1
            gate.grant(0)  # the quantum in flight cannot be called back, those after it can

    def close(self) -> None:
        """See :class:`Executor`."""

    def _finetune_threads(self, decision: Decision) -> int | None:
        return None

    def _threads_in_turn(self, decision: Decision) -> int | None:
        return None


class ThreadPools(TimeSlices):
    """Two pools of CPU threads that share the cores: torch keeps a thread count for every Python thread.

    Args:
        cores: to share, two at least.

    Raises:
        Unavailable: one core cannot be shared.
    """

    name = "thread_pools"

    def __init__(self, cores: int) -> None:
        if cores < 2:
            raise Unavailable(f"{cores} core cannot be split in two pools")
        super().__init__(cores)
        self.ladder += _pairs(cores)
        self.afterwards = cores
        self._threads_before: int | None = None

    def begin(self, decision: Decision, gate: Gate) -> None:
        """See :class:`Executor`."""
        if self._threads_before is None:
            self._threads_before = torch.get_num_threads()
        wanted = decision.partition.decode
        # OpenMP makes its pool anew when the number changes, so it is only set when it does.
        if wanted and wanted != torch.get_num_threads():
            torch.set_num_threads(wanted)
        if not wanted:  # nothing to decode
            release_workers()
        elif gate.running and (gate.threads or 0) > decision.partition.beside:
            # With more threads than cores those of a pool wait for each other: on two cores a quantum of 9 ms that
            # overlapped a decode step took 75. It is waited for.
            gate.grant(0)
            gate.wait_spent(SETTLE_SECONDS)
        super().begin(decision, gate)

    def end(self, decision: Decision, gate: Gate) -> None:
        """See :class:`Executor`."""
        if _in_turn(decision):
            release_workers()
        super().end(decision, gate)

    def close(self) -> None:
        """Give the decode thread, which calls this, its threads back."""
        if self._threads_before is not None:
            torch.set_num_threads(self._threads_before)

    def _finetune_threads(self, decision: Decision) -> int | None:
        return decision.partition.finetune or None

    def _threads_in_turn(self, decision: Decision) -> int | None:
        return self.afterwards if decision.after else self._finetune_threads(decision)


def choose_executor(device: torch.device | str, cores: int | None = None, kind: str = "auto") -> Executor:
    """The best executor that the machine can have.

    On CUDA green contexts, then priority streams, then time slices; elsewhere thread pools, then time slices. Every
    step down is logged with its reason.

    Args:
        device: where both work. cores: of a CPU; default: those that this process may use.
        kind: ``auto``, or where to begin: ``green_contexts``, ``streams``, ``threads``, ``slices``.

    Raises:
        ValueError: no cores, or a kind that the device does not have.
    """
    device = torch.device(device)
    if cores is not None and cores < 1:
        raise ValueError(f"cores={cores}: give at least 1, or None for those that this process may use")
    options: dict[str, Callable[[], Executor]]
    if device.type == "cuda":
        from ygglight.engines.harli.executors_cuda import GreenContexts, PriorityStreams

        units = torch.cuda.get_device_properties(device).multi_processor_count
        options = {"green_contexts": lambda: GreenContexts(device), "streams": lambda: PriorityStreams(device)}
    else:
        units = cores or usable_cores()
        options = {"threads": lambda: ThreadPools(units)}
    kinds = [*options, "slices"]
    if kind not in ("auto", *kinds):
        raise ValueError(f"executor {kind!r} is not for {device.type}: there are auto, {', '.join(kinds)}")
    for name in kinds[0 if kind == "auto" else kinds.index(kind) : -1]:
        try:
            return options[name]()
        except Unavailable as reason:
            log.info("Harli goes one executor down: %s", reason)
    return TimeSlices(units)


def usable_cores() -> int:
    """Cores that this process may run on, no more than torch would use."""
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(mine, torch.get_num_threads()))


def _runs_beside(decision: Decision) -> bool:
    """Whether what is granted runs during the decode step: concurrent, or there is no step to speak of."""
    return decision.quanta is None or decision.partition.concurrent


def _in_turn(decision: Decision) -> int:
    """Quanta that run after the decode step."""
    return decision.after if _runs_beside(decision) else decision.quanta or 0


def _pairs(cores: int) -> list[Partition]:
    """(decode, finetune) threads: all pairs of a few cores, else the splits of all of them, evenly spread."""
    splits = [Partition(d, cores - d, True) for d in range(1, cores)]
    if len(splits) > RUNGS:
        splits = [splits[round(i * (len(splits) - 1) / (RUNGS - 1))] for i in range(RUNGS)]
    # One core left free can help: both pools, and whoever else works here, fight less for the memory.
    spare = [Partition(d, cores - 1 - d, True) for d in range(1, cores - 1)] if 3 <= cores <= 5 else []
    return splits + spare
