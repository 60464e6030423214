"""Watches one fully recomputed training step and turns it into the numbers that the planner works on.

Everything that can be recomputed is, so looking costs no more memory than the smallest plan would. What is seen: the
operators of each region and their times, which values autograd saves and reads back and in which order, when each
value would die by itself, and how many bytes besides those values are alive at every operator (the *workspace*: it
does not depend on the plan, the values do).
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ygglight.compat.torch import current_node, in_backward, storage_use_count
from ygglight.engines.adacc.frame import Frame
from ygglight.engines.adacc.graph import Action
from ygglight.engines.adacc.tape import Step
from ygglight.engines.memory.meter import LiveBytes, is_plain


@dataclass(eq=False)
class Lifetime:
    """One storage between two samples; ``death`` is None while it lives."""

    nbytes: int
    birth: int
    owner: Trace | None
    value: int
    death: int | None = None
    death_tick: int | None = None
    held: bool = False
    """The frame of ``owner`` stored it beyond the region's forward."""
    users: list[tuple[Trace, int]] = field(default_factory=list)
    """Later regions that take it as a leaf, and their value id for it."""


@dataclass(eq=False)
class Trace:
    """All that was seen of one region instance."""

    name: str
    module: nn.Module | None
    frame: Frame
    steps: list[Step]
    values: list[Any]
    signature: list[Any]
    start: int
    end: int = 0
    paths: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    again_seconds: dict[int, float] = field(default_factory=dict)
    saves: list[int] = field(default_factory=list)
    digests: dict[int, Tensor] = field(default_factory=dict)
    pinned: set[int] = field(default_factory=set)
    lost: set[int] = field(default_factory=set)
    """Operators that read a tensor from outside which somebody overwrites before backward."""
    reads: list[int] = field(default_factory=list)
    nodes: list[tuple[int, str]] = field(default_factory=list)
    lifetimes: dict[int, Lifetime] = field(default_factory=dict)
    """By the first value of each storage."""

    def origins(self) -> list[int]:
        """Per value, the first value of its storage."""
        origin = list(range(len(self.values)))
        for step in self.steps:
            for old, new in step.writes:
                origin[new] = origin[old]
        return origin


class Profiler:
    """Observer of frames and of every dispatched operator, for one training step.

    Args:
        module: for the names of its submodules.
        device: where it runs.

    Attributes:
        traces: regions in forward order.
        samples: (live bytes, trace index, "F" | "B", tick) per operator.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._module = module
        self._device = device
        self.meter = LiveBytes(module.parameters(), device, on_operator=self._operator)
        self.traces: list[Trace] = []
        self.samples: list[tuple[int, int, str, int]] = []
        self.rebuilt_lifetimes: list[Lifetime] = []
        self._by_frame: dict[int, int] = {}
        self._by_key: dict[int, Lifetime] = {}
        self._guards: list[Any] = []
        self._open: Trace | None = None
        self._label = (-1, "F", 0)
        self._rebuilding: tuple[int, float] | None = None
        self._path: list[str] = []
        self._hooks: list[Any] = []
        self._compared: list[tuple[Trace, int, Tensor, Tensor]] = []

    # -- life ------------------------------------------------------------------------------------------------------
    def start(self) -> None:
        """Begin to count; submodules report when they run."""
        for name, child in self._module.named_modules():
            self._hooks.append(child.register_forward_pre_hook(self._entered(name)))
            self._hooks.append(child.register_forward_hook(self._left, always_call=True))
        self.meter.__enter__()

    def forward_over(self) -> None:
        """No more submodule names are needed."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def stop(self) -> None:
        """Count no more (also after an exception)."""
        self.forward_over()
        self.meter.__exit__(None, None, None)

    def _entered(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            self._path.append(name)

        return hook

    def _left(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._path:
            self._path.pop()

    # -- told by the runtime -----------------------------------------------------------------------------------------
    def opened(self, name: str, module: nn.Module | None, frame: Frame) -> None:
        """A region's forward starts."""
        tape = frame.tape
        assert tape is not None
        trace = Trace(name, module, frame, tape.steps, tape.values, tape.signature, len(self.samples))
        tape.on_value = self._value_born
        tape.on_overwrite = self._overwritten
        self._by_frame[id(frame)] = len(self.traces)
        self.traces.append(trace)
        self._open = trace
        self._label = (len(self.traces) - 1, "F", 0)

    def closed(self, frame: Frame) -> None:
        """A region's forward is over."""
        trace = self.traces[self._by_frame[id(frame)]]
        if self._open is trace:
            self._open = None
        trace.end = len(self.samples)
        versions: dict[int, list[int]] = {}
        for value, origin in enumerate(trace.origins()):
            versions.setdefault(origin, []).append(value)
        for origin, lifetime in trace.lifetimes.items():
            if lifetime.death is not None:
                continue
            held = [h for h in map(frame.holds, versions[origin]) if h is not None]
            lifetime.held = bool(held)
            if not held or _held_elsewhere(held[0][0], sum(count for _, count in held)):
                trace.pinned.update(versions[origin])

    # -- told by frames ----------------------------------------------------------------------------------------------
    def saved(self, frame: Frame, slot: int, value: int, action: Action, tensor: Tensor) -> None:
        """Autograd saved a tensor."""
        trace = self.traces[self._by_frame[id(frame)]]
        trace.saves.append(value)
        if action is not Action.KEEP:
            trace.digests[slot] = _digest(tensor)

    def reading(self, frame: Frame, slot: int) -> None:
        """Autograd is about to read one back."""
        index = self._by_frame[id(frame)]
        if not self.traces[index].reads:
            self.samples.append((self.meter.live, index, "B", -1))

    def read(self, frame: Frame, slot: int, tensor: Tensor) -> None:
        """It has been read."""
        index = self._by_frame[id(frame)]
        trace = self.traces[index]
        trace.nodes.append(current_node())
        trace.reads.append(slot)
        original = trace.digests.pop(slot, None)
        if original is not None:
            self._compared.append((trace, slot, original, _digest(tensor)))
        self._label = (index, "B", len(trace.reads) - 1)

    def rebuilt(self, frame: Frame, step: Step, outputs: list[tuple[int, Tensor]]) -> None:
        """An operator was run again."""
        trace = self.traces[self._by_frame[id(frame)]]
        if self._rebuilding is not None:
            trace.again_seconds[trace.values[step.outputs[0]].producer] = self._rebuilding[1]
        for value, tensor in outputs:
            lifetime = Lifetime(tensor.untyped_storage().nbytes(), max(0, len(self.samples) - 1), None, value)
            self.rebuilt_lifetimes.append(lifetime)
            self._watch_death(lifetime, tensor.untyped_storage(), None)

    def leave_out(self, tensor: Tensor) -> None:
        """Do not count ``tensor``, just made: it serves the looking, not the step."""
        lifetime = Lifetime(tensor.untyped_storage().nbytes(), max(0, len(self.samples) - 1), None, -1)
        self.rebuilt_lifetimes.append(lifetime)
        self._watch_death(lifetime, tensor.untyped_storage(), None)

    # -- told by the meter and the tape ------------------------------------------------------------------------------
    def _operator(self, func: Any, seconds: float, live: int, peak: int) -> None:
        trace, (index, phase, tick) = self._open, self._label
        if trace is not None and not in_backward():
            index, phase, tick = self._by_frame[id(trace.frame)], "F", len(trace.steps)
            while len(trace.seconds) <= tick:
                trace.seconds.append(0.0)
                trace.paths.append(self._path[-1] if self._path else "")
            trace.seconds[tick] += seconds
            trace.paths[tick] = self._path[-1] if self._path else ""
        self._rebuilding = (tick, seconds)
        self.samples.append((peak, index, phase, tick))
        if self.meter._cuda:
            self.meter.reset_peak()

    def _value_born(self, value: int, storage: Any) -> None:
        trace = self._open
        if trace is None or trace.values[value].state:
            return
        key = storage._cdata
        if trace.values[value].producer is None:
            known = self._by_key.get(key)
            if known is not None:
                known.users.append((trace, value))
            return
        # The sample of the operator that made it is taken already, and has it.
        lifetime = Lifetime(storage.nbytes(), max(0, len(self.samples) - 1), trace, value)
        trace.lifetimes[value] = lifetime
        self._by_key[key] = lifetime
        self._watch_death(lifetime, storage, trace, key)

    def _overwritten(self, key: int) -> None:
        """A region writes into a storage from outside: earlier regions must not be rebuilt from it."""
        for trace in self.traces:
            copied = trace.frame.protect(key)
            for index, step in enumerate(trace.steps if copied else ()):
                if not copied.isdisjoint(step.inputs):
                    trace.lost.add(index)

    def _watch_death(self, lifetime: Lifetime, storage: Any, trace: Trace | None, key: int | None = None) -> None:
        def died(_: Any) -> None:
            lifetime.death = len(self.samples)
            if key is not None:
                self._by_key.pop(key, None)
            if trace is not None and self._open is trace:
                lifetime.death_tick = len(trace.steps)

        self._guards.append(weakref.ref(storage, died))

    def check_rebuilt(self) -> None:
        """Raise unless every rebuilt tensor was what forward had saved.

        A kernel that writes behind the dispatcher's back (Triton called directly, say) leaves no trace on the tape;
        what it wrote could not be made again, and gradients would be wrong without a word.

        Raises:
            RuntimeError: names the first tensor that came back different.
        """
        if not self._compared:
            return
        before = torch.stack([old for _, _, old, _ in self._compared])
        after = torch.stack([new for _, _, _, new in self._compared])
        same = torch.isclose(before, after, rtol=1e-4, atol=1e-6, equal_nan=True).all(dim=1)
        for (trace, slot, *_), right in zip(self._compared, same.tolist(), strict=True):
            if not right:
                producer = trace.values[trace.saves[slot]].producer
                raise RuntimeError(
                    f"adacc: running {trace.steps[producer].func} of {trace.name} again gave another result than its "
                    "forward saved. A kernel outside of PyTorch's dispatcher may have changed it, or it is not "
                    "deterministic: wrap that kernel as a torch.library custom op, or pass enabled=False"
                )

    # -- results -----------------------------------------------------------------------------------------------------
    def managed_bytes(self) -> list[int]:
        """Per sample, the bytes that the planner accounts for by itself (everything else is workspace)."""
        count = len(self.samples)
        change = [0] * (count + 2)

        def add(start: int, end: int | None, nbytes: int) -> None:
            end = count + 1 if end is None else end
            if end > start:
                change[start] += nbytes
                change[end] -= nbytes

        for trace in self.traces:
            for lifetime in trace.lifetimes.values():
                death = count + 1 if lifetime.death is None else lifetime.death
                add(lifetime.birth, min(death, trace.end), lifetime.nbytes)
                if lifetime.held:
                    add(trace.end, death, lifetime.nbytes)
                else:
                    user = exclusive_user(lifetime)
                    if user is not None:
                        add(user.start, death, lifetime.nbytes)
        for lifetime in self.rebuilt_lifetimes:
            add(lifetime.birth, lifetime.death, lifetime.nbytes)
        total, running = [], 0
        for delta in change[:count]:
            running += delta
            total.append(running)
        return total


def exclusive_user(lifetime: Lifetime) -> Trace | None:
    """The one later region that takes the storage as a leaf; None when there is none, or several share it."""
    users = {id(trace): trace for trace, _ in lifetime.users}
    return next(iter(users.values())) if len(users) == 1 and not lifetime.held else None


def pinned_values(trace: Trace) -> frozenset[int]:
    """Saved values whose bytes stay whatever is done with them: somebody, or a later region, holds them too."""
    shared = {
        o for o, life in trace.lifetimes.items() if life.held and any(user is not trace for user, _ in life.users)
    }
    return frozenset(trace.pinned) | {value for value, origin in enumerate(trace.origins()) if origin in shared}


def _digest(tensor: Tensor) -> Tensor:
    """Two sums that tell another tensor from this one; a kernel's own non-determinism is below their tolerance."""
    if tensor.dtype.is_complex:
        tensor = torch.view_as_real(tensor)
    with torch.no_grad():
        if not tensor.dtype.is_floating_point:
            return tensor.sum(dtype=torch.float64).expand(2)
        total = tensor.sum(dtype=torch.float64)
        return torch.stack([total, torch.linalg.vector_norm(tensor, 1, dtype=torch.float64)])


def _held_elsewhere(tensor: Tensor, ours: int) -> bool:
    """Whether anybody but a frame, with its ``ours`` tensors, holds the storage of ``tensor``."""
    if not is_plain(tensor):
        return True
    return storage_use_count(tensor) > ours
