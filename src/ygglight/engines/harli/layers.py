"""Hooks that cut a training step at its repeated blocks: forward before each block, backward at each block's output."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ygglight.compat.torch import in_backward

Cut = Callable[[str, int], None]
"""Called before a quantum with its phase ("forward", "loss" or "backward") and index; may block, may raise."""


class Frames(Protocol):
    """Who keeps what a block saves; see :class:`ygglight.engines.harli.activations.Activations`."""

    def open(self, index: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A block's forward begins."""

    def close(self, block: nn.Module) -> None:
        """It is over."""


class LayerCuts:
    """See module docstring. The arithmetic is untouched: a hook looks, waits and returns nothing.

    Backward quantum i runs from the moment the gradient of block i's output is complete. A block that is computed again
    in backward (activation checkpointing) does so within its backward quantum; where the checkpoint is reentrant, its
    output had no gradient in forward, and the quantum begins with the recomputation.

    Args:
        blocks: In the order of forward. Blocks inside other blocks are cut nowhere.
        cut: See :data:`Cut`.
        frames: Told of every block that runs with gradients; None: nobody.

    Raises:
        ValueError: there are no blocks.
    """

    def __init__(self, blocks: Sequence[nn.Module], cut: Cut, frames: Frames | None = None) -> None:
        if not blocks:
            raise ValueError("no repeated blocks: a training step that cannot be cut would block decoding; name them")
        self.blocks = list(blocks)
        self._cut, self._frames = cut, frames
        self._handles: list[Any] = []
        self._thread: int | None = None
        self._open: nn.Module | None = None
        self._hooked: set[int] = set()

    @property
    def attached(self) -> bool:
        """Whether the hooks are on the blocks."""
        return bool(self._handles)

    def attach(self) -> None:
        """Put the hooks on the blocks; nothing if they are there.

        They are functions, which a deep copy of the module shares: a serving twin or an averaged model has them too,
        and they do nothing there unless it runs within the step.
        """
        if self._handles:
            return
        for index, block in enumerate(self.blocks):
            before, after = self._hooks(index)
            self._handles.append(block.register_forward_pre_hook(before, prepend=True, with_kwargs=True))
            self._handles.append(block.register_forward_hook(after, always_call=True))

    def detach(self) -> None:
        """Take them off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.end()

    def begin(self) -> None:
        """A forward begins, on this thread: cut it. Others that run the same blocks meanwhile are not cut."""
        self._thread = threading.get_ident()
        self._open = None
        self._hooked.clear()

    def end(self) -> None:
        """It is over; its backward may come."""
        self._thread = None
        self._open = None

    def _hooks(self, index: int) -> tuple[Callable[..., None], Callable[..., None]]:
        def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if in_backward():
                if index not in self._hooked:
                    self._cut("backward", index)
                return
            if self._thread != threading.get_ident() or self._open is not None:
                return
            self._cut("forward", index)
            self._open = block
            if self._frames is not None and torch.is_grad_enabled():
                self._frames.open(index, block, args, kwargs)

        def after(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if in_backward() or self._thread != threading.get_ident() or self._open is not block:
                return
            self._open = None
            if self._frames is not None:
                self._frames.close(block)
            if output is None:  # the block raised
                return
            tensor = _differentiable(output)
            if tensor is not None:
                self._hooked.add(index)
                tensor.register_hook(lambda grad: self._cut("backward", index))
            if index == len(self.blocks) - 1:
                self._cut("loss", 0)

        return before, after


def _differentiable(output: Any) -> Tensor | None:
    """The first tensor in a block's output that a gradient will come to."""
    if isinstance(output, Tensor):
        return output if output.requires_grad and output.grad_fn is not None else None
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, (tuple, list)):
        return next((found for found in map(_differentiable, output) if found is not None), None)
    return None
