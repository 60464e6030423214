"""What a training step saves for backward, in leases of the arena: kept, dropped and computed again, or on the host.

Order of retreat as in the brief's A.3: drop what can be computed again, farthest from its backward first; then move to
the host. Backward reads views of the arena; nothing is copied back.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ygglight.compat.autograd import is_wrapper
from ygglight.compat.torch import storage_key, version_of
from ygglight.engines.harli.recompute import Frame, Handle
from ygglight.engines.memory.arena import Arena, Lease

SMALLEST = 64 * 1024
"""Bytes below which a saved tensor stays where it is: a copy and a lease cost more than they give."""
ALIGNED = 64
"""Bytes. torch aligns CPU storages to it, and matrix products may round differently at another alignment."""


class CannotDrop(RuntimeError):
    """A block that saved nothing turned out to be one that cannot be run again."""


class Held:
    """Bytes [start, stop) of a storage as they were at one version, in a lease or on the host.

    Args:
        owner: Gets the lease back. saved: A tensor on the storage. start, stop: Multiples of no element size.
        lease: Of at least ``stop - start`` bytes, after ``offset``. offset: Bytes from the start of the lease.
    """

    def __init__(self, owner: Activations, saved: Tensor, start: int, stop: int, lease: Lease, offset: int) -> None:
        self._owner = owner
        # As long as this reference lives no other storage gets the key: see `storage_key`.
        self.origin = StorageWeakRef(saved.untyped_storage())
        self.version = version_of(saved)
        self.start, self.stop = start, stop
        self.lease: Lease | None = lease
        self.hosted = 0
        self.read = False  # views of it are about: it stays where it is until it dies
        self._bytes = lease.view((stop - start,), torch.uint8, offset=offset)
        self._bytes.copy_(_bytes_of(saved, start, stop))

    def view(
        self, shape: torch.Size, dtype: torch.dtype, stride: tuple[int, ...], offset: int, *, lent: bool
    ) -> Tensor:
        """The saved tensor, as a view.

        Args:
            shape, dtype, stride: Its own. offset: Bytes from the start of the original storage.
            lent: Whether the view is about for longer than it takes to copy it.
        """
        self.read = self.read or lent
        if self._bytes.device != self._owner.device:
            self._bytes = self._bytes.to(self._owner.device, non_blocking=True)
            self.hosted = 0
        start = (self._bytes.storage_offset() + offset - self.start) // dtype.itemsize
        with torch.inference_mode(False):
            empty = torch.empty(0, dtype=dtype, device=self._bytes.device)
            return empty.set_(self._bytes.untyped_storage(), start, shape, stride)

    def offload(self) -> bool:
        """Move to the host (pinned where the arena is on a GPU) and give the lease back; False if it cannot now."""
        size = self.stop - self.start
        if self.lease is None or self.read or not self._owner.room_on_host(size):
            return False
        pinned = self._bytes.device.type == "cuda"
        host = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        self._bytes = host.copy_(self._bytes, non_blocking=pinned)
        self.hosted = size
        self._give_back()
        return True

    def _give_back(self) -> None:
        if self.lease is not None:
            self._owner.graves.append(self.lease)
            self.lease = None

    def __del__(self) -> None:
        # The collector may run this on any thread, within the arena's lock too: it only says that it may be released.
        if hasattr(self, "lease"):
            self._give_back()


class Activations:
    """Keeps the saved tensors of a training step.

    Managed are strided tensors of at least ``smallest`` bytes, of any dtype, on the arena's device, that are no
    parameters, buffers or views of such. A storage is leased once however many tensors on it are saved. Where no lease
    is to be had, a tensor stays where it is.

    Args:
        module: Whose parameters and buffers.
        arena: Where leases come from; None: everything stays where it is, unless it is dropped.
        device: Where the module trains.
        smallest: Bytes. host_bytes: Most that is on the host at once; None: no limit.

    Attributes:
        graves: Leases that nobody refers to any more, until :meth:`drain`.
        dropped: Blocks dropped so far, for recomputation. offloaded: Bytes moved to the host
            so far. skipped: Why blocks, by index, cannot be dropped.
    """

    def __init__(
        self,
        module: nn.Module,
        arena: Arena | None,
        device: torch.device,
        *,
        smallest: int = SMALLEST,
        host_bytes: int | None = None,
    ) -> None:
        self.device = torch.device(device) if arena is None else arena.data.device
        self.graves: deque[Lease] = deque()
        self.dropped = self.offloaded = 0
        self.skipped: dict[int, str] = {}
        self._module, self._arena = module, arena
        self._smallest, self._host_bytes = smallest, host_bytes
        self._state: set[int] = set()
        self._table: dict[int, list[weakref.ref[Held]]] = {}
        self._all: list[weakref.ref[Held]] = []
        self._frames: list[weakref.ref[Frame]] = []
        self._handles: weakref.WeakSet[Handle] = weakref.WeakSet()
        self._current: Frame | None = None
        self._block: nn.Module | None = None
        self._first_kept = 0
        self._stream: Any = None

    # -- forward -----------------------------------------------------------------------------------------------------
    def begin(self, first_kept: int = 0) -> None:
        """A micro-batch begins.

        Args:
            first_kept: Blocks before this one save nothing but their inputs.
        """
        tensors = (*self._module.parameters(), *self._module.buffers())
        self._state = {storage_key(tensor) for tensor in tensors if _has_storage(tensor)}
        self._table = {}
        self._all = [ref for ref in self._all if ref() is not None]
        self._frames = [ref for ref in self._frames if ref() is not None]
        self._first_kept = first_kept
        if self.device.type == "cuda":
            self._stream = torch.cuda.current_stream(self.device)
        self.drain()

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Tensors that autograd saves inside come here.

        Raises:
            RuntimeError: from torch, where such hooks are forbidden inside; a note says what to do.
        """
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
                yield
        except RuntimeError as error:
            if "saved tensor hooks" in str(error):
                error.add_note(
                    "harli keeps saved tensors by such hooks: this model cannot be finetuned beside decoding"
                )
            raise
        finally:
            self._current = self._block = None

    def open(self, index: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """See :class:`ygglight.engines.harli.layers.Frames`."""
        self._block = block
        self._current = Frame(index, block, args, kwargs, self.device, drop=index < self._first_kept)
        if index in self.skipped:
            self._current.drop_at_once = False

    def close(self, block: nn.Module) -> None:
        """See :class:`ygglight.engines.harli.layers.Frames`."""
        frame = self._current
        if frame is None or self._block is not block:
            return
        self._current = self._block = None
        frame.close()
        if frame.reason is not None:
            self.skipped[frame.index] = frame.reason
            if frame.lacks:
                raise CannotDrop(
                    f"block {frame.index} cannot be run again in backward: {frame.reason}. That is known now: run the "
                    "micro-batch again"
                )

    def _pack(self, saved: Tensor) -> Handle:
        frame = self._current
        if frame is None:
            return self._handle(saved, None)
        frame.take_inputs(lambda tensor: self._handle(tensor, None))
        if not frame.listed:
            frame.listed = True
            self._frames.append(weakref.ref(frame))
        drop = frame.drop_at_once and frame.reason is None
        handle = self._handle(saved, frame, drop=drop)
        frame.add(handle)
        return handle

    def _handle(self, saved: Tensor, frame: Frame | None, drop: bool = False) -> Handle:
        managed = self._manages(saved)
        handle = Handle(saved, frame, managed)
        if not managed:
            handle.keep(saved)
            return handle
        self._handles.add(handle)
        if drop:
            return handle
        held = self._hold(saved)
        if held is None:
            handle.keep(saved)
        else:
            handle.hold(held, saved)
        return handle

    def _manages(self, saved: Tensor) -> bool:
        if type(saved) is not Tensor or saved.layout is not torch.strided or saved.device != self.device:
            return False
        if saved.is_conj() or saved.is_neg() or saved.numel() == 0:
            return False
        start, stop = _span(saved)
        return stop - start >= self._smallest and storage_key(saved) not in self._state

    def _hold(self, saved: Tensor) -> Held | None:
        """The bytes of a tensor in the arena, copied now unless they are there already."""
        if self._arena is None:
            return None
        key, version = storage_key(saved), version_of(saved)
        start, stop = _span(saved)
        for ref in self._table.get(key, ()):
            held = ref()
            if held is not None and held.version == version and held.start <= start and stop <= held.stop:
                return held
        whole = saved.untyped_storage().nbytes()
        if 2 * (stop - start) >= whole:  # other views of it will come, or would be kept alive by this one anyway
            start, stop = 0, whole
        start -= start % ALIGNED
        loose = self._arena.chunk_bytes % ALIGNED != 0
        self.drain()
        lease = self._arena.lease(stop - start + (ALIGNED if loose else 0))
        if lease is None:
            return None
        offset = -lease.view((1,), torch.uint8).data_ptr() % ALIGNED if loose else 0
        held = Held(self, saved, start, stop, lease, offset)
        self._table.setdefault(key, []).append(weakref.ref(held))
        self._all.append(weakref.ref(held))
        return held

    # -- retreat -----------------------------------------------------------------------------------------------------
    def drain(self) -> None:
        """Give the arena the leases that nobody refers to. On a GPU their chunks are free once the stream is there."""
        if self._arena is None or not self.graves:
            return
        event = None
        if self._stream is not None:
            event = torch.cuda.Event()
            event.record(self._stream)
        while self.graves:
            try:
                lease = self.graves.popleft()
            except IndexError:
                return
            self._arena.release(lease, event)

    def relieve(self) -> bool:
        """Give back what the KV side is short of, as far as it goes without giving the micro-batch up.

        Returns:
            Whether the pressure is gone, or what is still leased comes back by itself: the part of backward that runs
            is reading it.
        """
        arena = self._arena
        if arena is None:
            return True
        self.drain()
        if not arena.pressure:
            return True
        for frame in self._live_frames():
            if frame.index not in self.skipped and any(handle.held is not None for handle in frame.live()):
                self.drop(frame)
                if not arena.pressure:
                    return True
        for held in self._live():
            size = held.stop - held.start
            if held.offload():
                self.offloaded += size
                self.drain()
                if not arena.pressure:
                    return True
        return all(held.read for held in self._live() if held.lease is not None)

    def drop(self, frame: Frame) -> None:
        """Let go of what a block saved and can compute again."""
        if frame is self._current or frame.dropped:
            return
        if frame.drop():
            self.dropped += 1
        elif frame.reason is not None:
            self.skipped[frame.index] = frame.reason
        self.drain()

    def abandon(self) -> None:
        """The micro-batch is given up: nothing of it is leased any more, whoever still refers to its graph."""
        for frame in self._live_frames():
            frame.abandon()
        for handle in list(self._handles):
            handle.let_go()
        self._current = self._block = None
        self._table = {}
        self.drain()

    def room_on_host(self, size: int) -> bool:
        """Whether ``size`` bytes more may go there."""
        return self._host_bytes is None or sum(held.hosted for held in self._live()) + size <= self._host_bytes

    @property
    def leased(self) -> int:
        """Bytes in the arena."""
        return sum(held.stop - held.start for held in self._live() if held.lease is not None)

    def _live(self) -> list[Held]:
        return [held for ref in self._all if (held := ref()) is not None]

    def _live_frames(self) -> list[Frame]:
        return [frame for ref in self._frames if (frame := ref()) is not None]


def _unpack(handle: Handle) -> Tensor:
    return handle.read()


def _has_storage(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not is_wrapper(tensor)


def _span(tensor: Tensor) -> tuple[int, int]:
    """First byte and byte after the last that a tensor of at least one element covers in its storage."""
    extent = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    first = int(tensor.storage_offset())
    return first * tensor.element_size(), (first + extent) * tensor.element_size()


def _bytes_of(tensor: Tensor, start: int, stop: int) -> Tensor:
    with torch.inference_mode(False):
        empty = torch.empty(0, dtype=torch.uint8, device=tensor.device)
        return empty.set_(tensor.untyped_storage(), start, (stop - start,), (1,))
