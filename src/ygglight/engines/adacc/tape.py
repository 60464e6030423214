"""The tape: which operators a region ran, on which storages, so that any of them can be run again.

Every forward of a region that recomputes anything is traced anew, below autograd and autocast. Nothing learned in an
earlier step is trusted for *values*: Python scalars, control flow, tensors from outside are those of this very call.
Running an operator again therefore needs none of the user's Python and no second autograd graph, only its inputs.

Tensors on the tape are named by (value, size, stride, offset, dtype), where a value is one storage as one operator
wrote it: views cost nothing, and an in-place write makes a new value of the same storage.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ygglight.compat.torch import alias, in_backward, storage_key
from ygglight.engines.memory.meter import is_plain, tensors_in


class Ref(NamedTuple):
    """A tensor on the tape: ``value`` seen through one geometry (absolute storage offset, in elements of ``dtype``)."""

    value: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    def view(self, base: Tensor) -> Tensor:
        """This tensor, on the storage of ``base``."""
        if base.dtype == self.dtype:
            return torch.as_strided(base, self.size, self.stride, self.offset)
        empty = torch.empty(0, dtype=self.dtype, device=base.device)
        return empty.set_(base.untyped_storage(), self.offset, self.size, self.stride)


def clone_storage(tensor: Tensor) -> Tensor:
    """``tensor`` with the same geometry on a copy of its whole storage."""
    copy = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return copy.set_(tensor.untyped_storage().clone(), tensor.storage_offset(), tensor.size(), tensor.stride())


class Step(NamedTuple):
    """One operator on the tape; tensors in ``args`` and ``kwargs`` are :class:`Ref`."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    refs: tuple[Ref | None, ...]
    """Geometry per tensor that the operator returned (None: it returned an alias of what was known)."""
    writes: tuple[tuple[int, int], ...]
    """(old value, new value) per storage written in place."""
    replayable: bool
    grad_mode: bool = True
    """Some kernels (recurrent ones) return more when gradients are wanted."""


class TracedValue(NamedTuple):
    """What the tape knows of one value; ``producer`` is None for a leaf."""

    nbytes: int
    dtype: torch.dtype
    producer: int | None
    state: bool
    """A parameter, a buffer, or computed from nothing but those (an autocast copy): never an activation."""
    superseded: bool = False


def is_replayable(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether running ``func`` again gives the same result and changes nothing else."""
    name = func._schema.name
    namespace = name.partition("::")[0]
    if namespace in _EFFECTFUL_NAMESPACES or any(part in name for part in _EFFECTFUL):
        return False
    if torch.Tag.nondeterministic_seeded in func.tags:
        # Attention carries the tag for the sake of its dropout; without dropout it draws nothing.
        if "scaled_dot_product" not in name:
            return False
        return _argument(func, args, kwargs, "dropout_p") in (0.0, None)
    return not any(part in name for part in _UNINITIALISED)


# Batch norm updates its running statistics although its schema does not say so. Collectives must not be repeated.
# Recurrent kernels return a workspace for backward whose padding nobody fills: it never comes out twice the same.
_EFFECTFUL = ("batch_norm", "_local_scalar_dense", "record_stream", "_assert", "resize_", "set_", "_rnn")
_EFFECTFUL_NAMESPACES = ("c10d", "_c10d_functional", "fsdp", "symm_mem", "profiler")
# Memory that somebody fills behind the dispatcher's back (a Triton kernel, say) can not be made again by allocating it.
_UNINITIALISED = ("aten::empty", "aten::new_empty", "aten::_empty")
# These overwrite all of what they are given, so their result does not depend on what was there.
_OVERWRITES = ("aten::copy_", "aten::fill_", "aten::zero_")


def _argument(func: Any, args: Any, kwargs: Any, name: str) -> Any:
    for position, argument in enumerate(func._schema.arguments):
        if argument.name == name:
            return kwargs.get(name, args[position] if position < len(args) else argument.default_value)
    return None


class _Kind(NamedTuple):
    """What is the same for every call of an operator."""

    written: tuple[int | str, ...]
    """Positions or keyword names of arguments written in place."""
    overwrites: bool
    conditional: bool
    """Whether :func:`is_replayable` depends on the arguments."""
    replayable: bool


_KINDS: dict[Any, _Kind] = {}


def _kind(func: Any, args: Any, kwargs: Any) -> _Kind:
    written: list[int | str] = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written.append(argument.name if argument.kwarg_only else position)
    name = func._schema.name
    kind = _Kind(tuple(written), name in _OVERWRITES, "scaled_dot_product" in name, is_replayable(func, args, kwargs))
    _KINDS[func] = kind
    return kind


class Tape:
    """Everything one call of a region dispatched.

    Args:
        is_state: whether a tensor first seen as an input is a parameter or buffer of the model.

    Attributes:
        steps: the operators, views left out. values: one entry per value id.
        leaves: value id -> detached tensor, held strongly until :meth:`forget_leaves`.
        wanted: value ids to hold in ``early`` from birth on (a plan rebuilds others from them before they are saved).
        on_overwrite: told of the storage of a leaf before it is overwritten.
    """

    def __init__(self, is_state: Callable[[Tensor], bool]) -> None:
        self._is_state = is_state
        self._current: dict[int, int] = {}
        self._guards: list[Any] = []
        self.steps: list[Step] = []
        self.values: list[TracedValue] = []
        self.leaves: dict[int, Tensor] = {}
        self.signature: list[tuple[Any, tuple[int, ...], tuple[int, ...]]] = []
        self.read: set[int] = set()
        self.on_value: Callable[[int, Any], None] | None = None
        self.on_overwrite: Callable[[int], None] | None = None
        self.wanted: frozenset[int] = frozenset()
        self.early: dict[int, Tensor] = {}

    def value_of(self, tensor: Tensor) -> int:
        """The id of the value that ``tensor`` shows now; a storage never seen before becomes a leaf."""
        known = self._current.get(storage_key(tensor))
        return self._leaf(tensor) if known is None else known

    def known(self, tensor: Tensor) -> int | None:
        """The id of the value that ``tensor`` shows, if this region has seen its storage."""
        return self._current.get(storage_key(tensor))

    def forget_leaves(self, needed: Any) -> None:
        """Let go of every leaf that is not in ``needed``."""
        self.leaves = {value: tensor for value, tensor in self.leaves.items() if value in needed}

    # -- recording -------------------------------------------------------------------------------------------------
    def record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run ``func`` and write it down."""
        kind = _KINDS.get(func) or _kind(func, args, kwargs)
        inputs: list[int] = []
        noted_args = tuple([self._note(a, inputs) for a in args])
        noted_kwargs = {k: self._note(v, inputs) for k, v in kwargs.items()} if kwargs else {}
        opaque = -1 in inputs
        leaf_lost = bool(kind.written) and self._protect_leaves(kind, noted_args, noted_kwargs)
        out = func(*args, **kwargs)

        outputs: list[int] = []
        refs: list[Ref | None] = []
        index = len(self.steps)
        replayable = (is_replayable(func, args, kwargs) if kind.conditional else kind.replayable) and not opaque
        values = self.values
        state = bool(inputs) and not opaque and all(values[v].state for v in inputs)
        results = (out,) if isinstance(out, Tensor) else tuple(tensors_in(out))
        for tensor in results:
            if not is_plain(tensor):
                refs.append(None)
                continue
            storage = tensor.untyped_storage()
            if storage._cdata in self._current:
                refs.append(None)
                continue
            value = self._new_value(storage, tensor.dtype, index, state)
            outputs.append(value)
            refs.append(Ref(value, tensor.size(), tensor.stride(), int(tensor.storage_offset()), tensor.dtype))
        writes = self._write(kind, noted_args, noted_kwargs, index) if kind.written else ()
        if not outputs and not writes:
            return out  # a view: refs carry absolute geometry, so nothing ever needs to run it again
        outputs.extend(new for _, new in writes)
        if any(values[old].state for old, _ in writes):
            replayable = False  # it changed a parameter or a buffer
        if leaf_lost:
            replayable = False  # what it started from is gone
        if not kind.overwrites and any(not self._restorable(old) for old, _ in writes):
            replayable = False
        self.read.update(inputs)
        ins, outs = tuple([v for v in inputs if v >= 0]), tuple(outputs)
        grad_mode = torch.is_grad_enabled()
        self.steps.append(Step(func, noted_args, noted_kwargs, ins, outs, tuple(refs), writes, replayable, grad_mode))
        self.signature.append((func, ins, outs))
        if self.wanted and not self.wanted.isdisjoint(outs):
            self._hold_early(self.wanted.intersection(outs), (args, kwargs, out))
        return out

    def _hold_early(self, born: frozenset[int], tree: Any) -> None:
        for tensor in tensors_in(tree):
            value = self.known(tensor) if is_plain(tensor) else None
            if value in born:
                self.early.setdefault(value, alias(tensor))

    def _note(self, item: Any, inputs: list[int]) -> Any:
        if isinstance(item, Tensor):
            if not is_plain(item):
                inputs.append(-1)
                return item
            value = self._current.get(storage_key(item))
            if value is None:
                value = self._leaf(item)
            inputs.append(value)
            return Ref(value, item.size(), item.stride(), int(item.storage_offset()), item.dtype)
        if isinstance(item, (list, tuple)) and any(isinstance(x, (Tensor, list, tuple)) for x in item):
            return [self._note(x, inputs) for x in item]
        return item

    def _leaf(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        value = self._new_value(storage, tensor.dtype, None, self._is_state(tensor))
        self.leaves[value] = alias(tensor)
        return value

    def _new_value(self, storage: Any, dtype: torch.dtype, producer: int | None, state: bool) -> int:
        key, value, current = storage._cdata, len(self.values), self._current

        def died(_: Any) -> None:  # its address may be given to another storage: forget it
            current.pop(key, None)

        self._guards.append(weakref.ref(storage, died))
        self.values.append(TracedValue(storage.nbytes(), dtype, producer, state))
        current[key] = value
        if self.on_value is not None:
            self.on_value(value, storage)
        return value

    def _restorable(self, value: int) -> bool:
        producer = self.values[value].producer
        return producer is None or self.steps[producer].replayable

    def _written(self, kind: _Kind, args: Any, kwargs: Any) -> list[Ref]:
        found: list[Ref] = []
        for where in kind.written:
            item = kwargs.get(where) if isinstance(where, str) else args[where] if where < len(args) else None
            found.extend(x for x in (item if isinstance(item, list) else [item]) if isinstance(x, Ref))
        return found

    def _protect_leaves(self, kind: _Kind, args: Any, kwargs: Any) -> bool:
        """Copy a leaf that is about to be overwritten if a recorded operator has read it: replays need the old one.

        Returns:
            Whether one is overwritten that nobody has read, and so was not copied.
        """
        lost = False
        for ref in self._written(kind, args, kwargs):
            held = self.leaves.get(ref.value)
            if held is None:
                continue
            if self.on_overwrite is not None:
                self.on_overwrite(storage_key(held))
            if ref.value in self.read:
                self.leaves[ref.value] = clone_storage(held)
            else:
                lost = True
        return lost

    def _write(self, kind: _Kind, args: Any, kwargs: Any, index: int) -> tuple[tuple[int, int], ...]:
        writes: list[tuple[int, int]] = []
        for ref in self._written(kind, args, kwargs):
            if any(old == ref.value for old, _ in writes):
                continue
            old, new = ref.value, len(self.values)
            traced = self.values[old]
            self.values.append(TracedValue(traced.nbytes, traced.dtype, index, traced.state))
            self.values[old] = traced._replace(superseded=True)
            for key, value in self._current.items():
                if value == old:
                    self._current[key] = new
                    break
            writes.append((old, new))
        return tuple(writes)


class TapeMode(TorchDispatchMode):
    """Sends what is dispatched to the tape of the region that runs; ``paused`` while we work ourselves."""

    def __init__(self) -> None:
        super().__init__()
        self.tape: Tape | None = None
        self.paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # A backward inside the forward (manual optimization) is not part of any region.
        if self.paused or self.tape is None or in_backward():
            return func(*args, **(kwargs or {}))
        return self.tape.record(func, args, kwargs or {})
