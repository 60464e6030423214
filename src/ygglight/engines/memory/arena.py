"""One block of memory for two owners: pages of keys and values, which come first, and leases of a training step.

Design A.3 of our brief on Harli (arXiv:2511.11729), reconstructed: the paper says that finetuning re-uses the memory of
the KV cache at run time, and not how. All bookkeeping is on the host: nothing here waits for a device.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

ALIGNMENT = 16
"""Bytes that a chunk is a multiple of: the widest dtype, and the widest load of a vectorised kernel."""
_FREE, _KV, _LEASED, _LEAVING = range(4)  # _LEAVING: given back, but the device may still be at it


class ArenaFull(Exception):
    """More chunks were asked for than the arena has: waiting does not help."""


class Event(Protocol):
    """What ``torch.cuda.Event`` offers."""

    def query(self) -> bool:
        """Whether all work before the event is done."""


@dataclass(frozen=True)
class ArenaCounts:
    """Where the chunks are.

    Args:
        free: Nobody's. kv: Held by the KV side. leased: Held by leases. Chunks that wait for an event count as its
            owner's. chunks: All.
        pressure: See :attr:`Arena.pressure`. peak_kv, peak_leased: The most that ``kv`` and ``leased`` have been.
    """

    free: int
    kv: int
    leased: int
    chunks: int
    pressure: int
    peak_kv: int
    peak_leased: int


class Lease:
    """Consecutive chunks lent to the finetune side; made by :meth:`Arena.lease`.

    Args:
        arena: Whose chunks. first: Index of the first. count: How many. nbytes: Bytes that were asked for.
    """

    def __init__(self, arena: Arena, first: int, count: int, nbytes: int) -> None:
        self.first, self.count, self.nbytes = first, count, nbytes
        self.released = False
        self._arena = arena

    def view(
        self, shape: Sequence[int], dtype: torch.dtype, stride: Sequence[int] | None = None, *, offset: int = 0
    ) -> Tensor:
        """A tensor over the lease's bytes; what is in it is not defined, as with ``torch.empty``.

        It counts versions on its own: writing to pages or to other leases does not make autograd think that it changed.

        Args:
            shape: Sizes. dtype: Of the elements. stride: In elements; default: contiguous.
            offset: Bytes from the start of the lease, a multiple of the element size.

        Raises:
            ValueError: it is larger than the lease, not aligned, or the lease was given back.
        """
        if self.released:
            raise ValueError("the lease was given back: take its views before")
        steps = _contiguous(shape) if stride is None else tuple(stride)
        empty = any(size == 0 for size in shape)
        extent = 0 if empty else 1 + sum((size - 1) * step for size, step in zip(shape, steps, strict=True))
        if offset < 0 or offset % dtype.itemsize:
            raise ValueError(f"offset {offset} is no multiple of the {dtype.itemsize} bytes of {dtype}: align it")
        end = offset + extent * dtype.itemsize
        if end > self.nbytes:
            raise ValueError(f"{list(shape)} of {dtype} ends at byte {end} of a lease of {self.nbytes}: lease more")
        data = self._arena.data
        start = (self.first * self._arena.chunk_bytes + offset) // dtype.itemsize
        with torch.inference_mode(False):
            return torch.empty(0, dtype=dtype, device=data.device).set_(data.untyped_storage(), start, shape, steps)


class Arena:
    """Chunks of one size in one tensor, for any number of threads.

    KV takes the lowest free chunks and leases the highest free extent, so free extents stay long. A KV allocation
    succeeds whenever enough chunks are free; a lease must leave :attr:`kv_watermark` of them, and what KV waits for.

    Streams: memory that only one stream uses needs no events. Pass one to :meth:`release` and :meth:`free_kv` where
    work on the device may still touch the chunks while the other side's stream could get them.

    Args:
        chunk_bytes: Bytes a chunk, a multiple of 16.
        chunks: How many.
        device: Where they lie. On a CPU the system gives the memory as it is first touched.

    Raises:
        ValueError: one of the numbers is not positive, or ``chunk_bytes`` not a multiple of 16.
    """

    def __init__(self, chunk_bytes: int, chunks: int, device: torch.device | str = "cpu") -> None:
        if chunks < 1 or chunk_bytes < 1:
            raise ValueError(f"{chunks} chunks of {chunk_bytes} bytes: give at least one chunk of at least 16 bytes")
        if chunk_bytes % ALIGNMENT:
            rounded = -(-chunk_bytes // ALIGNMENT) * ALIGNMENT
            raise ValueError(f"chunks of {chunk_bytes} bytes are not aligned: give a multiple of 16, say {rounded}")
        with torch.inference_mode(False):  # else nobody could write to it outside of inference mode
            self.data: Tensor = torch.zeros(chunks, chunk_bytes, dtype=torch.uint8, device=device)
        self.chunk_bytes, self.chunks = chunk_bytes, chunks
        self.kv_watermark = 0
        self._lock = threading.Lock()
        self._owners = bytearray(chunks)
        self._lowest = 0  # no chunk below it is free
        self._free, self._kv, self._leased, self._leaving = chunks, 0, 0, 0
        self._peak_kv, self._peak_leased = 0, 0
        self._wanted = 0
        self._used = bytearray(chunks)  # given to somebody before
        self._waiting: list[tuple[Event, Sequence[int], bool]] = []  # (event, chunks, was KV's)

    # -- keys and values (decode thread) -----------------------------------------------------------------------------
    def allocate_kv(self, count: int) -> list[int] | None:
        """Take chunks for pages of keys and values.

        Chunks that anybody had before are zeroed, on the current stream: a masked value is multiplied by zero, and zero
        times what activations or the overflow of another sequence may have left there, NaN, would be NaN.

        Args:
            count: How many, 0 or more.

        Returns:
            Their indices, ascending; None if fewer are free, and then :attr:`pressure` says so to the finetune side.

        Raises:
            ArenaFull: the arena is smaller than that. ValueError: ``count`` is negative.
        """
        if count < 0:
            raise ValueError(f"{count} chunks: give 0 or more")
        if count > self.chunks:
            raise ArenaFull(f"{count} chunks of an arena of {self.chunks}: give it more memory or ask for less")
        with self._lock:
            self._reap()
            if count > self._free:
                self._wanted = max(self._wanted, count)
                return None
            if count >= self._wanted:
                self._wanted = 0
            taken: list[int] = []
            position = self._lowest
            for _ in range(count):
                position = self._owners.index(_FREE, position)
                self._owners[position] = _KV
                taken.append(position)
                position += 1
            self._lowest = position
            self._free -= count
            self._kv += count
            self._peak_kv = max(self._peak_kv, self._kv)
            used = [chunk for chunk in taken if self._used[chunk]]
            for chunk in taken:
                self._used[chunk] = 1
        for first, last in _runs(used):  # theirs by now, so no lock is needed; slices, for an index would be copied
            self.data[first : last + 1].zero_()
        return taken

    def free_kv(self, chunks: Sequence[int], event: Event | None = None) -> None:
        """Give chunks back.

        Args:
            chunks: From :meth:`allocate_kv`. event: They are free once it has passed; None: at once.

        Raises:
            ValueError: one is not KV's or is there twice; then none is freed.
        """
        with self._lock:
            self._reap()
            wrong = [chunk for chunk in chunks if not 0 <= chunk < self.chunks or self._owners[chunk] != _KV]
            if wrong or len(set(chunks)) != len(chunks):
                raise ValueError(f"chunks {wrong or list(chunks)} are not KV's, or freed twice: free each once")
            self._give_back(tuple(chunks), event, kv=True)
            if not self._kv:
                self._wanted = 0  # no sequence is left that could wait; a new one asks again

    def withdraw(self) -> None:
        """Forget what KV asked for and did not get: whoever wanted it is gone, or asks again."""
        with self._lock:
            self._wanted = 0

    # -- leases (finetune thread) ------------------------------------------------------------------------------------
    def lease(self, nbytes: int) -> Lease | None:
        """Borrow a contiguous extent of chunks.

        Args:
            nbytes: Bytes, 1 or more; rounded up to chunks.

        Returns:
            None if it would leave less than the watermark and KV's unmet wishes, or no extent is long enough.

        Raises:
            ValueError: ``nbytes`` is not positive.
        """
        if nbytes < 1:
            raise ValueError(f"a lease of {nbytes} bytes: give 1 or more")
        count = -(-nbytes // self.chunk_bytes)
        with self._lock:
            self._reap()
            if self._free - count < self.kv_watermark + self._wanted:
                return None
            first = self._owners.rfind(bytes(count))
            if first < 0:
                return None
            self._owners[first : first + count] = bytes([_LEASED]) * count
            self._used[first : first + count] = b"\x01" * count
            self._free -= count
            self._leased += count
            self._peak_leased = max(self._peak_leased, self._leased)
            return Lease(self, first, count, nbytes)

    def release(self, lease: Lease, event: Event | None = None) -> None:
        """Give a lease back; its views must not be used any more.

        Args:
            lease: From this arena. event: Its chunks are free once it has passed; None: at once.

        Raises:
            ValueError: it is another arena's, or was given back before.
        """
        with self._lock:
            if lease._arena is not self or lease.released:
                raise ValueError("the lease was given back before, or is another arena's: release it once, where it is")
            lease.released = True
            self._reap()
            self._give_back(range(lease.first, lease.first + lease.count), event, kv=False)

    # -- what is where -----------------------------------------------------------------------------------------------
    @property
    def pressure(self) -> int:
        """Chunks that KV asked for and that are neither free by now nor on their way back."""
        with self._lock:
            self._reap()
            return self._pressure()

    def counts(self) -> ArenaCounts:
        """All counts of one moment."""
        with self._lock:
            self._reap()
            return ArenaCounts(
                self._free, self._kv, self._leased, self.chunks, self._pressure(), self._peak_kv, self._peak_leased
            )

    def _pressure(self) -> int:
        return max(0, self._wanted - self._free - self._leaving)

    # -- with the lock held ------------------------------------------------------------------------------------------
    def _give_back(self, chunks: Sequence[int], event: Event | None, *, kv: bool) -> None:
        if event is None or event.query():
            self._free_now(chunks, kv)
            return
        for chunk in chunks:
            self._owners[chunk] = _LEAVING
        self._leaving += len(chunks)
        self._waiting.append((event, chunks, kv))

    def _reap(self) -> None:
        """Free the chunks whose events have passed."""
        if not self._waiting:
            return
        still = []
        for event, chunks, kv in self._waiting:
            if event.query():
                self._leaving -= len(chunks)
                self._free_now(chunks, kv)
            else:
                still.append((event, chunks, kv))
        self._waiting = still

    def _free_now(self, chunks: Sequence[int], kv: bool) -> None:
        for chunk in chunks:
            self._owners[chunk] = _FREE
        self._free += len(chunks)
        if kv:
            self._kv -= len(chunks)
        else:
            self._leased -= len(chunks)
        self._lowest = min((self._lowest, *chunks))


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _runs(ascending: Iterable[int]) -> list[tuple[int, int]]:
    """First and last of each run of consecutive numbers."""
    runs: list[tuple[int, int]] = []
    for number in ascending:
        if runs and runs[-1][1] == number - 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return runs
