"""A training step beside decoding: cut in quanta, its activations on loan, given up and replayed if need be.

Knows nothing of Lightning. Around every micro-batch the caller does::

    loss = session.forward(lambda: training_step(batch), tokens)
    session.backward(lambda: loss.backward(), replay)
    norm = session.clip(parameters, max_norm)
    session.optimizer_step(optimizer)

The arithmetic is that of the plain loop, bit for bit at the same number of threads.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ygglight.engines.harli import slices
from ygglight.engines.harli.activations import SMALLEST, Activations, CannotDrop
from ygglight.engines.harli.gate import Gate, Phase, Quantum, Retreat
from ygglight.engines.harli.gradients import MOST_BYTES, Gradients
from ygglight.engines.harli.layers import LayerCuts
from ygglight.engines.harli.recompute import RandomState
from ygglight.engines.memory.arena import Arena
from ygglight.kernels.linear_cross_entropy import between_chunks

log = logging.getLogger(__name__)
T = TypeVar("T")

MAX_REPLAYS = 3
"""Of one micro-batch. Then what is out of memory is an error, and who only was asked to give way no longer does."""
HOLD_SECONDS = 0.5
"""A micro-batch waits at most this long for memory pressure to go; then it starts and keeps less."""


@dataclass
class Counts:
    """What a session did so far.

    Args:
        micro_batches: Backward passes that were completed. replays: Runs that repeated one.
        retreats: Micro-batches given up for the KV side. out_of_memory: Given up for want of memory.
        held: Micro-batches that waited for pressure to go.
    """

    micro_batches: int = 0
    replays: int = 0
    retreats: int = 0
    out_of_memory: int = 0
    held: int = 0


class FinetuneSession:
    """See module docstring. All methods belong to the training thread.

    A replay computes what the given-up run would have: random state and gradients are those of before. Other effects of
    a forward (metrics, logs, buffers that it writes to) are the caller's: ``replay`` must not repeat them.

    Args:
        module: What is trained.
        blocks: Its repeated blocks, in the order of forward.
        gate: Where it waits. The session sets ``gate.relieve`` while it is attached.
        arena: Where activations go; None: they stay where they are.
        device: Where it trains.
        smallest: Bytes of a saved tensor that is worth a lease.
        host_bytes: Most that may be offloaded to the host at once; None: no limit.
        hold_seconds: Most that a micro-batch waits before it starts under pressure.
        elements: Of a slice of parameters.
        most_gradient_bytes: Gradients beyond it are not copied, and a backward that adds to them cannot be given up.

    Raises:
        ValueError: there are no blocks.
    """

    def __init__(
        self,
        module: nn.Module,
        blocks: Sequence[nn.Module],
        gate: Gate,
        arena: Arena | None,
        device: torch.device | str,
        *,
        smallest: int = SMALLEST,
        host_bytes: int | None = None,
        hold_seconds: float = HOLD_SECONDS,
        elements: int = slices.ELEMENTS,
        most_gradient_bytes: int = MOST_BYTES,
    ) -> None:
        self.module, self.gate, self.arena = module, gate, arena
        self.device = torch.device(device)
        self.counts = Counts()
        self.activations = Activations(module, arena, self.device, smallest=smallest, host_bytes=host_bytes)
        self.first_kept = 0
        self._cuts = LayerCuts(blocks, self._cut, self.activations)
        self._hold_seconds, self._elements = hold_seconds, elements
        self._most_gradient_bytes = most_gradient_bytes
        self._tokens = 0
        self._start: RandomState | None = None
        self._after_forward: RandomState | None = None
        self._replaying = False
        self._pressed = False
        self._runs = 0

    # -- life --------------------------------------------------------------------------------------------------------
    def attach(self) -> None:
        """Hook the blocks."""
        self._cuts.attach()
        self.gate.relieve = None if self.arena is None else self._relieve

    def detach(self) -> None:
        """Leave no trace on the module or the gate. A graph that autograd still holds can be run backward."""
        self._cuts.detach()
        self.gate.relieve = None
        self.gate.abortable = False

    # -- forward -----------------------------------------------------------------------------------------------------
    def forward(self, run: Callable[[], T], tokens: int, *, replayable: bool = True) -> T:
        """Run a training step's forward, again if it is given up.

        Args:
            run: The forward. tokens: Of the micro-batch that count in the loss.
            replayable: False where ``run`` also steps an optimizer (manual optimization): it is never given up.

        Raises:
            torch.OutOfMemoryError: also after ``MAX_REPLAYS`` replays.
        """
        if self._replaying:  # backward's replay brings us here, and it goes on from there
            with self.step(tokens, replayable=replayable):
                return run()
        self._runs = 0
        while True:
            with self._forgiven(replayable) as forgiven, self.step(tokens, replayable=replayable):
                return run()
            assert forgiven
            self._rewind()

    @contextmanager
    def step(self, tokens: int, *, replayable: bool = False) -> Iterator[None]:
        """Around a training step's forward; what it raises passes through. :meth:`forward` is this, with replays.

        Args:
            tokens: Of the micro-batch that count in the loss.
            replayable: Whether the caller runs it again on :class:`Retreat`.

        Raises:
            Retreat: the micro-batch was given up; only if ``replayable``.
        """
        self.attach()
        self._tokens = tokens
        outer = self.gate.abortable
        with self.gate.training():
            try:
                if not self._replaying:
                    self._start = RandomState(self.device)
                self._hold_back()
                self.gate.abortable = outer or (replayable and self._runs < MAX_REPLAYS)
                self._boundary("other", 0)
                self.activations.begin(self.first_kept)
                self._cuts.begin()
                with between_chunks(self._chunk), self.activations.saving():
                    yield
                if self._replaying and self._after_forward is not None:
                    self._after_forward.restore()
            except BaseException as error:
                self._failed(error)
                raise
            finally:
                self._cuts.end()
                self.gate.abortable = outer

    # -- backward ----------------------------------------------------------------------------------------------------
    def backward(self, run: Callable[[], None], replay: Callable[[], None] | None = None) -> None:
        """Run a backward; if it is given up, have its micro-batch replayed.

        Args:
            run: The backward of the last forward.
            replay: Runs forward, inside :meth:`step` or :meth:`forward`, and its backward, not inside this method.
                None: the backward is never given up.

        Raises:
            torch.OutOfMemoryError: also after ``MAX_REPLAYS`` replays.
        """
        before = Gradients(self.module.parameters(), self._most_gradient_bytes) if replay is not None else None
        can_replay = before is not None and before.complete
        if before is not None and not before.complete:
            log.info("the gradients are larger than %d bytes: this backward is not given up", self._most_gradient_bytes)
        self._after_forward = RandomState(self.device)
        action = run
        try:
            while True:
                with self._forgiven(can_replay), self.gate.training():
                    try:
                        self.gate.abortable = can_replay and self._runs < MAX_REPLAYS
                        if not self._replaying:
                            self._boundary("backward", len(self._cuts.blocks))
                        action()
                        self.counts.micro_batches += 1
                        return
                    except BaseException as error:
                        self._failed(error)
                        raise
                    finally:
                        self.gate.abortable = False
                assert before is not None and replay is not None
                before.restore()
                self._rewind()
                self._replaying = True
                action = replay
        finally:
            self._replaying = False
            self._after_forward = None
            self._runs = 0
            self.activations.drain()
            self._settle()

    # -- clipping and the optimizer ----------------------------------------------------------------------------------
    def clip(
        self, parameters: Tensor | Iterable[Tensor], max_norm: float, norm_type: float = 2.0, **options: Any
    ) -> Tensor:
        """``torch.nn.utils.clip_grad_norm_`` in slices; see :func:`ygglight.engines.harli.slices.clip_grad_norm`."""
        with self.gate.training():
            cut = self._slice("clip")
            return slices.clip_grad_norm(parameters, max_norm, norm_type, cut, elements=self._elements, **options)

    def clip_value(self, parameters: Tensor | Iterable[Tensor], clip_value: float, **options: Any) -> None:
        """``torch.nn.utils.clip_grad_value_`` in slices."""
        with self.gate.training():
            cut = self._slice("clip")
            slices.clip_grad_value(parameters, clip_value, cut, elements=self._elements, **options)

    @contextmanager
    def slicing(self, optimizer: Optimizer) -> Iterator[None]:
        """Inside, ``optimizer.step`` comes to the gate before every slice, whoever calls it; its closure may use the
        session as usual. See :func:`ygglight.engines.harli.slices.sliced`."""
        with self.gate.training(), slices.sliced(optimizer, self._slice("optimizer"), elements=self._elements):
            yield

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any] | None = None) -> Any:
        """``optimizer.step(closure)`` in slices."""
        with self.slicing(optimizer):
            return optimizer.step(closure) if closure is not None else optimizer.step()

    # -- quanta ------------------------------------------------------------------------------------------------------
    def _boundary(self, phase: Phase, index: int) -> None:
        self.gate.boundary(Quantum(phase, index, self._tokens))

    def _cut(self, phase: str, index: int) -> None:
        self._boundary(phase, index)  # type: ignore[arg-type]

    def _chunk(self, index: int) -> None:
        self._boundary("loss", index)

    def _slice(self, phase: Phase) -> Callable[[int], None]:
        return lambda index: self._boundary(phase, index)

    # -- memory ------------------------------------------------------------------------------------------------------
    def _relieve(self) -> None:
        """At a boundary: give back what the KV side is short of; the micro-batch itself if nothing else is left."""
        arena = self.arena
        if arena is None:
            return
        self.activations.drain()
        if not arena.pressure:
            return
        self._pressed = True
        if not self.activations.relieve() and self.gate.abortable:
            raise Retreat("the KV side needs what this micro-batch holds, and it can neither be dropped nor offloaded")

    def _hold_back(self) -> None:
        """Before a micro-batch: wait while the KV side is short, for a while; then keep less."""
        arena = self.arena
        if arena is None:
            return
        self.activations.drain()
        if not arena.pressure:
            return
        self.counts.held += 1
        if not self.gate.hold(lambda: not arena.pressure, self._hold_seconds, self._tokens):
            self._keep_less()

    def _keep_less(self) -> None:
        blocks = len(self._cuts.blocks)
        self.first_kept = blocks - (blocks - self.first_kept) // 2

    def _settle(self) -> None:
        """After a micro-batch: the next keeps half as many blocks if this one was pressed, else one more."""
        if self._pressed:
            self._keep_less()
        else:
            self.first_kept = max(0, self.first_kept - 1)
        self._pressed = False

    # -- giving up ---------------------------------------------------------------------------------------------------
    @contextmanager
    def _forgiven(self, replayable: bool) -> Iterator[list[BaseException]]:
        """Swallows what a replay mends. With the exception go the tensors that its traceback refers to."""
        forgiven: list[BaseException] = []
        try:
            yield forgiven
        except Retreat as error:
            if not replayable:
                raise
            self.counts.retreats += 1
            forgiven.append(error.with_traceback(None))
        except (RuntimeError, MemoryError) as error:
            known = isinstance(error, CannotDrop) or out_of_memory(error)
            if not replayable or not known or self._runs >= MAX_REPLAYS:
                raise
            forgiven.append(error.with_traceback(None))
            if isinstance(error, CannotDrop):
                return
            self.counts.out_of_memory += 1
            self.first_kept = len(self._cuts.blocks)
            log.warning("out of memory: the micro-batch is replayed, with all blocks recomputed (%s)", error)

    def _rewind(self) -> None:
        self._runs += 1
        self.counts.replays += 1
        self._pressed = True
        assert self._start is not None
        self._start.restore()

    def _failed(self, error: BaseException) -> None:
        """A forward or backward raised: nothing of it is kept; unless it is replayed, nothing listens any more."""
        self._cuts.end()
        self.activations.abandon()
        if not isinstance(error, Retreat) and not out_of_memory(error):
            self.detach()


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory could not be had, on a device or the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    signs = ("can't allocate memory", "not enough memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
