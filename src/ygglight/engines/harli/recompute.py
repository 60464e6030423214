"""Running one block again in backward, in the state it was in, like ``torch.utils.checkpoint`` but decided later."""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from ygglight.compat.autograd import in_python_function
from ygglight.compat.torch import version_of

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, Enum)


class RandomState:
    """The state of torch's generators at one moment: the CPU's and that of one GPU.

    Args:
        device: The GPU, or a CPU. Reading its state does not wait for it.
    """

    def __init__(self, device: torch.device) -> None:
        self._cpu = torch.get_rng_state()
        self._device = device if device.type == "cuda" else None
        self._cuda = None if self._device is None else torch.cuda.get_rng_state(self._device)

    def restore(self) -> None:
        """Make it the state of now."""
        torch.set_rng_state(self._cpu)
        if self._device is not None and self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)


class Handle:
    """What autograd keeps in place of a saved tensor. It is in one of these states:

    ``tensor`` set: as it is. ``held`` set: in the arena or on the host. Neither, with a ``frame``: computed again when
    it is asked for. Neither and no frame: given up.

    Args:
        saved: The tensor. frame: Of the block that saved it; None outside of blocks.
        managed: Whether it may be moved or dropped at all.
    """

    __slots__ = (
        "__weakref__", "dtype", "frame", "held", "managed", "offset", "requires_grad", "shape", "stride", "tensor",
        "version",
    )  # fmt: skip

    def __init__(self, saved: Tensor, frame: Frame | None, managed: bool) -> None:
        self.frame, self.managed = frame, managed
        self.held: Any = None
        self.tensor: Tensor | None = None
        self.version = 0
        self.requires_grad = saved.requires_grad
        self.shape, self.dtype = saved.shape, saved.dtype
        self.stride: tuple[int, ...] = ()
        self.offset = 0

    def keep(self, tensor: Tensor) -> None:
        """Hold a tensor as it is; that it is not written to is checked."""
        self.tensor = tensor.detach()  # shares the version counter, holds no graph
        self.version = version_of(self.tensor)

    def hold(self, held: Any, saved: Tensor) -> None:
        """Refer to bytes in the arena that hold ``saved``."""
        self.held = held
        self.stride, self.offset = saved.stride(), int(saved.storage_offset()) * saved.element_size()

    def let_go(self) -> None:
        """Refer to nothing."""
        self.held = self.tensor = None

    @property
    def changed(self) -> bool:
        """Whether the tensor was written to in place since it was saved; copies in the arena never are."""
        return self.tensor is not None and version_of(self.tensor) != self.version

    def read(self) -> Tensor:
        """The saved tensor: itself, a view of the arena, or its like computed again.

        Raises:
            RuntimeError: it was modified in place, or its micro-batch was given up.
        """
        if self.frame is not None:
            self.frame.touched = True
            if self.tensor is None and self.held is None:
                self.frame.recompute()
        if self.tensor is not None:
            if self.changed:
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an inplace operation: "
                    f"{self.dtype} {list(self.shape)} is at version {version_of(self.tensor)}, expected {self.version}"
                )
            return self.tensor
        if self.held is None:
            raise RuntimeError("this micro-batch was given up: its backward cannot run, only its replay")
        # A backward in Python may return what it saved as a gradient, which then outlives the lease: it gets a copy.
        lent = not in_python_function()
        view: Tensor = self.held.view(self.shape, self.dtype, self.stride, self.offset, lent=lent)
        return view if lent else view.clone()


class _Done(Exception):
    """All that was saved is there again; the rest of the block need not run."""


class Frame:
    """One run of one block: its inputs, its state, and what it saved, in order.

    Args:
        index: Of the block. block: The module. args, kwargs: What it was called with, as its hooks saw them.
        device: Whose random state and autocast it runs under.
        drop: Save nothing of it from the start.
    """

    def __init__(
        self,
        index: int,
        block: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        device: torch.device,
        drop: bool,
    ) -> None:
        self.index, self.block, self.drop_at_once = index, block, drop
        self.reason: str | None = None
        self.dropped = self.listed = False
        self.touched = False  # its backward has begun, and may use views of its leases until it is over
        self._call: tuple[Any, Any] | None = (args, kwargs)
        self._tensors: list[tuple[Tensor, int]] = []
        self._ready = False
        self._handles: list[weakref.ref[Handle]] = []
        self._kinds: list[tuple[torch.Size, torch.dtype]] = []
        self._inputs: list[Handle] = []
        self._random = RandomState(device)
        kinds = {"cpu", device.type}
        self._autocast = [(k, torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in sorted(kinds)]
        self._autocast_cache = torch.is_autocast_cache_enabled()
        _each(self._call, self._look)

    def _look(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            self._tensors.append((value, version_of(value)))
        elif not isinstance(value, _PLAIN) and not isinstance(value, types.FunctionType):
            self.reason = f"it is called with a {type(value).__name__}, which running it again might change"
        return value

    # -- forward -----------------------------------------------------------------------------------------------------
    def take_inputs(self, hold: Callable[[Tensor], Handle]) -> None:
        """Keep the inputs for a run in backward, once, when the block saves something: it may save nothing at all."""
        if self._ready:
            return
        self._ready = True
        self._check_inputs()
        if self.reason is not None:
            self._call = None
            return

        def replace(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            handle = hold(value)
            self._inputs.append(handle)
            return handle

        self._call = _each(self._call, replace)

    def close(self) -> None:
        """The block's forward is over."""
        if self._ready:
            self._check_inputs()
        else:
            self._call = None
        self._tensors.clear()
        if self.reason is not None:
            self._call = None
            self._inputs.clear()

    def _check_inputs(self) -> None:
        if self.reason is None and any(version_of(tensor) != version for tensor, version in self._tensors):
            self.reason = "it writes to its inputs in place"

    def add(self, handle: Handle) -> None:
        """The next saved tensor."""
        self._handles.append(weakref.ref(handle))
        self._kinds.append((handle.shape, handle.dtype))

    @property
    def lacks(self) -> bool:
        """Whether something that the block saved is not there."""
        return any(handle.tensor is None and handle.held is None for handle in self.live())

    # -- afterwards --------------------------------------------------------------------------------------------------
    def live(self) -> list[Handle]:
        """Handles that autograd still holds."""
        return [handle for ref in self._handles if (handle := ref()) is not None]

    def drop(self) -> bool:
        """Let go of what can be computed again.

        Returns:
            False when it cannot be.
        """
        if self.reason is not None or self._call is None or not self._ready or self.touched:
            return False
        if any(handle.changed for handle in self._inputs):
            self.reason = "its inputs were written to in place"
            return False
        for handle in self.live():
            if handle.managed:
                handle.let_go()
        self.dropped = True
        return True

    def abandon(self) -> None:
        """The micro-batch is given up."""
        self._call = None
        self._inputs.clear()

    def recompute(self) -> None:
        """Run the block again and hand its saved tensors to the handles that lack theirs.

        Raises:
            RuntimeError: the block saved other tensors than in forward, or the micro-batch was given up.
        """
        if self._call is None:
            raise RuntimeError("this micro-batch was given up: its backward cannot run, only its replay")
        args, kwargs = _each(self._call, _input)
        count = 0

        def collect(saved: Tensor) -> Tensor:
            nonlocal count
            if count == len(self._handles) or self._kinds[count] != (saved.shape, saved.dtype):
                raise RuntimeError(self._differs())
            handle = self._handles[count]()
            count += 1
            if handle is not None and handle.tensor is None and handle.held is None:
                handle.keep(saved)
            if count == len(self._handles):
                raise _Done
            return saved.detach()

        try:
            with self._as_in_forward(), torch.autograd.graph.saved_tensors_hooks(collect, lambda saved: saved):
                self.block(*args, **kwargs)
        except _Done:
            pass
        if count != len(self._handles):
            raise RuntimeError(self._differs())
        # Every live handle has its tensor by now. The inputs stay: some of these tensors are views of their leases.
        self._call = None

    def _differs(self) -> str:
        return (
            f"block {self.index} ({type(self.block).__name__}) saved other tensors when it was run again in backward: "
            "its forward depends on something besides its inputs and torch's random state"
        )

    @contextmanager
    def _as_in_forward(self) -> Iterator[None]:
        now = RandomState(self._random._device or torch.device("cpu"))
        self._random.restore()
        try:
            with ExitStack() as stack:
                for kind, enabled, dtype in self._autocast:
                    stack.enter_context(torch.autocast(kind, dtype, enabled, self._autocast_cache))
                stack.enter_context(torch.enable_grad())
                yield
        finally:
            now.restore()


def _input(value: Any) -> Any:
    if not isinstance(value, Handle):
        return value
    tensor = value.read().detach()
    return tensor.requires_grad_(value.requires_grad) if value.requires_grad else tensor


def _each(value: Any, function: Callable[[Any], Any]) -> Any:
    """``function`` of all that is in tuples, lists and dicts, in their shape."""
    if type(value) in (tuple, list):
        return type(value)([_each(item, function) for item in value])
    if type(value) is dict:
        return {key: _each(item, function) for key, item in value.items()}
    return function(value)
