"""Where regions begin and end in a model's forward.

A region is one call of a repeated block, or the stretch of ``training_step`` before, between or after such calls, so a
model without blocks is one region and nothing is left out. At any time exactly one region listens: its frame packs
what autograd saves, and, if it recomputes, its tape hears what is dispatched. A region whose plan keeps everything
installs nothing at all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ygglight.compat.torch import current_dispatch_mode, saved_tensor_hooks_allowed, top_saved_tensor_hooks
from ygglight.engines.adacc.frame import Frame
from ygglight.engines.adacc.handles import Handle, Opaque
from ygglight.engines.adacc.tape import TapeMode

ROOT = "training_step"


def find_blocks(module: nn.Module) -> dict[str, nn.Module]:
    """The repeated blocks of a model: siblings of one class that have children of their own, outermost first.

    Returns:
        name -> module, in the order of ``named_modules``; empty when nothing repeats.
    """
    blocks: dict[str, nn.Module] = {}
    known: set[int] = set()  # a block may be reachable by several names

    def search(parent: nn.Module, prefix: str) -> None:
        children = [(n, c) for n, c in parent.named_children() if _is_callable_block(c)]
        counts = Counter(type(c) for _, c in children)
        for name, child in parent.named_children():
            path = f"{prefix}{name}"
            if id(child) in known:
                continue
            known.add(id(child))
            if _is_callable_block(child) and counts[type(child)] > 1:
                blocks[path] = child
            else:
                search(child, f"{path}.")

    search(module, "")
    return blocks


def _is_callable_block(module: nn.Module) -> bool:
    # A leaf repeats too (Linear, Linear in a Sequential), but is too small to be planned by itself.
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return False
    return any(True for _ in module.children()) and any(True for _ in module.parameters())


class Director(Protocol):
    """Decides what a region does; told of its life."""

    def open_frame(self, name: str, module: nn.Module | None, inputs: Any) -> Frame | None:
        """The frame for this call; None leaves it to plain autograd."""

    def frame_closed(self, name: str, frame: Frame | None, outputs: Any) -> None:
        """The region's forward is over."""


class RegionSwitch:
    """Moves the listening frame along with the forward pass.

    Args:
        director: decides and is told.

    Attributes:
        skipped: blocks that ran inside somebody else's saved-tensor hooks or dispatch mode, and why.
    """

    def __init__(self, director: Director) -> None:
        self._director = director
        self._mode = TapeMode()
        self._mode_on = False
        self._hooks: Any = None
        self._frame: Frame | None = None
        self._name: str | None = None
        self._inside: list[tuple[str, bool]] = []
        self._calls: Counter[str] = Counter()
        self._root_number = 0
        self._root_on = False
        self._outer_mode: Any = None
        self._outer_hooks: Any = None
        self._handles: list[Any] = []
        self.running = False
        self.skipped: dict[str, str] = {}

    # -- installing ------------------------------------------------------------------------------------------------
    def attach(self, blocks: dict[str, nn.Module]) -> None:
        """Put the hooks on ``blocks``; they do nothing outside :meth:`begin` .. :meth:`end`."""
        for name, module in blocks.items():
            self._handles.append(module.register_forward_pre_hook(self._entering(name), with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._leaving(name), always_call=True))

    def detach(self) -> None:
        """Take the hooks off again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _entering(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if self.running and torch.is_grad_enabled():
                self.enter(name, module, (args, kwargs))
            elif self.running:  # without gradients it is no region; leaving it must not close one
                self._inside.append((name, False))

        return hook

    def _leaving(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if self.running and self._inside and self._inside[-1][0] == name:
                self.leave(output)

        return hook

    # -- the forward pass ------------------------------------------------------------------------------------------
    def begin(self, *, root: bool) -> None:
        """A training step's forward starts; ``root`` manages the code around the blocks too."""
        self.running, self._root_on = True, root
        self._outer_mode, self._outer_hooks = current_dispatch_mode(), top_saved_tensor_hooks()
        self._calls.clear()
        self._root_number = 0
        self._inside.clear()
        self._open_root()

    def end(self, outputs: Any = None) -> None:
        """It is over, by a result or by an exception."""
        if not self.running:
            return
        while self._inside:
            self.leave(None)
        self._close(outputs)
        self.running = False
        self._outer_mode = self._outer_hooks = None

    def enter(self, name: str, module: nn.Module, inputs: Any) -> None:
        """A block is called."""
        if self._inside:  # a block inside a block: the outer one is the region
            self._inside.append((name, False))
            return
        foreign = self._foreign_listener()
        if foreign:
            self.skipped[name] = foreign
            return
        self._close(inputs)
        call = self._calls[name]
        self._calls[name] += 1
        self._inside.append((name, True))
        self._open(name if call == 0 else f"{name}@{call}", module, inputs)

    def leave(self, output: Any) -> None:
        """The block returned ``output``."""
        _, outermost = self._inside.pop()
        if outermost:
            self._close(output)
            self._open_root()

    def _open_root(self) -> None:
        if self._root_on:
            name = ROOT if self._root_number == 0 else f"{ROOT}@{self._root_number}"
            self._root_number += 1
            self._open(name, None, None)

    def _open(self, name: str, module: nn.Module | None, inputs: Any) -> None:
        frame = self._director.open_frame(name, module, inputs)
        self._frame, self._name = frame, name
        if frame is None:
            return
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)
        self._hooks.__enter__()
        if frame.tape is not None:
            self._mode.tape = frame.tape
            self._mode.__enter__()
            self._mode_on = True

    def _close(self, outputs: Any) -> None:
        name, frame = self._name, self._frame
        if name is None:
            return
        if self._mode_on:
            self._mode.__exit__(None, None, None)
            self._mode_on, self._mode.tape = False, None
        if self._hooks is not None:
            self._hooks.__exit__(None, None, None)
            self._hooks = None
        self._frame = self._name = None
        if frame is not None:
            frame.close(outputs)
        self._director.frame_closed(name, frame, outputs)

    def _pack(self, tensor: Tensor) -> Handle | Opaque:
        frame = self._frame
        if frame is None:  # saved after the region ended, by a hook that outlived it: leave it alone
            return Opaque(tensor.detach())
        self._mode.paused = True
        try:
            return frame.save(tensor)
        finally:
            self._mode.paused = False

    def _foreign_listener(self) -> str:
        # The same answer whether or not the code around the block is managed, or plans could not be kept to.
        top, outer = top_saved_tensor_hooks(), self._outer_hooks
        expected = self._pack if self._hooks is not None else None if outer is None else outer[0]
        if (None if top is None else top[0]) != expected:
            return "runs under other saved-tensor hooks (a checkpoint or save_on_cpu of the model's own)"
        if current_dispatch_mode() is not (self._mode if self._mode_on else self._outer_mode):
            return "runs under another dispatch mode"
        if not saved_tensor_hooks_allowed():
            return "runs where saved-tensor hooks are disabled"
        return ""


def _unpack(packed: Handle | Opaque) -> Tensor:
    if isinstance(packed, Handle):
        return packed.frame.read(packed)
    if packed.tensor._version != packed.version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            f"{tuple(packed.tensor.shape)} {packed.tensor.dtype}"
        )
    return packed.tensor
