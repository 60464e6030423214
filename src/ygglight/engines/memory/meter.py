"""Live bytes of a training step above its state.

``memory_budget`` is a promise about one number: bytes alive at an instant of a training step that are neither
parameters, gradients, optimizer state, buffers nor the batch. On CUDA the caching allocator knows it. On a CPU nobody
does, so the same count is kept here by watching every dispatched operator and the death of every storage it made.
What an operator allocates inside itself is seen on CUDA only.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def tensors_in(tree: Any) -> Iterable[Tensor]:
    """Every tensor in nested tuples, lists and dicts (what operators take and return)."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from tensors_in(item)
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from tensors_in(item)


def is_plain(tensor: Tensor) -> bool:
    """True for a dense tensor of its own: no subclass (DTensor, nested...), no lazy conjugate or negation."""
    return type(tensor) in _PLAIN and tensor.layout is torch.strided and not tensor.is_conj() and not tensor.is_neg()


_PLAIN = (Tensor, torch.nn.Parameter)


class LiveBytes(TorchDispatchMode):
    """Counts live bytes above state from ``__enter__`` on; what exists then counts as state.

    Gradients stop counting once they are accumulated into ``Parameter.grad``.

    Args:
        parameters: whose gradients are state.
        device: CUDA devices are read from the allocator, all others by watching storages.
        on_operator: called after every operator with (function, seconds, bytes live right after it, peak within it);
            seconds are 0 on CUDA, where an operator is not over when its call returns.

    Attributes:
        live: bytes alive now. peak: the largest ``live`` since the last :meth:`reset_peak`.
    """

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        device: torch.device | str = "cpu",
        on_operator: Callable[[Any, float, int, int], None] | None = None,
    ) -> None:
        super().__init__()
        self._parameters = list(parameters)
        self._cuda = torch.device(device).type == "cuda"
        self._device = device
        self._on_operator = on_operator
        self._alive: dict[int, tuple[weakref.ref[Any], int]] = {}
        self._state: set[int] = set()
        self._hooks: list[Any] = []
        self._counted = self._counted_peak = 0
        self._state_offset = 0

    # -- life ------------------------------------------------------------------------------------------------------
    def __enter__(self) -> LiveBytes:
        self._hooks = [
            p.register_post_accumulate_grad_hook(self._gradient_landed) for p in self._parameters if p.requires_grad
        ]
        if self._cuda:
            self._state_offset = torch.cuda.memory_allocated(self._device) - self._gradient_bytes()
            torch.cuda.reset_peak_memory_stats(self._device)
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        # A storage may outlive the measurement; its callback must find nothing to do.
        self._alive.clear()

    # -- readings --------------------------------------------------------------------------------------------------
    @property
    def live(self) -> int:
        if self._cuda:
            return torch.cuda.memory_allocated(self._device) - self._state_offset - self._gradient_bytes()
        return self._counted

    @property
    def peak(self) -> int:
        if self._cuda:
            return torch.cuda.max_memory_allocated(self._device) - self._state_offset - self._gradient_bytes()
        return self._counted_peak

    def reset_peak(self) -> None:
        """Start a new maximum from what is live now."""
        self._counted_peak = self._counted
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(self._device)

    def count_as_state(self, tensors: Iterable[Tensor]) -> None:
        """Stop counting these (optimizer state that was made just now, say)."""
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            if key in self._alive and key not in self._state:
                self._state.add(key)
                self._counted -= self._alive[key][1]
            elif self._cuda:
                self._state_offset += tensor.untyped_storage().nbytes()

    # -- counting --------------------------------------------------------------------------------------------------
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._cuda:
            out = func(*args, **(kwargs or {}))
            seconds = 0.0
            if self._on_operator is not None:
                self._on_operator(func, seconds, self.live, self.peak)
            return out
        start = time.perf_counter()
        out = func(*args, **(kwargs or {}))
        seconds = time.perf_counter() - start
        for tensor in tensors_in(out):
            self._watch(tensor, args, kwargs)
        if self._counted > self._counted_peak:
            self._counted_peak = self._counted
        if self._on_operator is not None:
            self._on_operator(func, seconds, self._counted, self._counted)
        return out

    def _watch(self, tensor: Tensor, args: Any, kwargs: Any) -> None:
        if not is_plain(tensor):
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        for given in tensors_in((args, kwargs)):  # an alias of what was there before we looked
            if is_plain(given) and given.untyped_storage()._cdata == key:
                return
        nbytes = storage.nbytes()

        def died(_: Any, key: int = key, nbytes: int = nbytes) -> None:
            if self._alive.pop(key, None) is None:
                return
            if key in self._state:
                self._state.discard(key)
            else:
                self._counted -= nbytes

        self._alive[key] = (weakref.ref(storage, died), nbytes)
        self._counted += nbytes

    def _gradient_landed(self, parameter: torch.nn.Parameter) -> None:
        if not self._cuda and parameter.grad is not None and parameter.grad.layout is torch.strided:
            self.count_as_state([parameter.grad])

    def _gradient_bytes(self) -> int:
        return sum(p.grad.untyped_storage().nbytes() for p in self._parameters if p.grad is not None)
