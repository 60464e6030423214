"""Experts in files, read on demand past Python's lock, and past the page cache where that is asked for."""

from __future__ import annotations

import errno
import functools
import logging
import mmap
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ygglight.compat.folders import cache_root
from ygglight.engines.moe_speq.layout import Site, SlabLayout
from ygglight.engines.moe_speq.parameters import ParameterStore
from ygglight.engines.moe_speq.slab_file import SlabFile, open_slabs, write_slabs

__all__ = ["DiskStore", "Piece"]

log = logging.getLogger(__name__)

_PAGE = 4096  # bytes; what O_DIRECT wants offsets, lengths and addresses to be multiples of, on every common disk
_BOUNCE = 8 * 2**20  # bytes of the buffer that a thread reads into past the page cache


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of bytes in a file that is a run of bytes in a slab.

    Args:
        file: Index of the file. source: First byte in it. target: First byte in the slab. nbytes: How many.
    """

    file: int
    source: int
    target: int
    nbytes: int


class _File:
    """One file, open for reads at offsets from any thread."""

    def __init__(self, path: Path, drop_cache: bool) -> None:
        self.path = path
        self.io = "cached"
        self._local = threading.local()
        if drop_cache and hasattr(os, "O_DIRECT"):
            try:
                self.handle = os.open(path, os.O_RDONLY | os.O_DIRECT)
                self._local.bounce = mmap.mmap(-1, _BOUNCE)
                os.preadv(self.handle, [memoryview(self._local.bounce)[:_PAGE]], 0)
                self.io = "direct"
                return
            except OSError:  # the file system has no direct reads
                if hasattr(self, "handle"):
                    os.close(self.handle)
        self.handle = os.open(path, os.O_RDONLY)
        if drop_cache and hasattr(os, "posix_fadvise"):
            self.io = "dropped"

    def read(self, out: Tensor, offset: int) -> None:
        """Fill a uint8 tensor from an offset."""
        if self.io == "direct":
            self._read_direct(out, offset)
            return
        view, done = out.numpy().data, 0
        while done < len(view):
            count = os.preadv(self.handle, [view[done:]], offset + done)
            if count == 0:
                raise OSError(errno.EIO, "the file ends before it")
            done += count
        if self.io == "dropped":
            os.posix_fadvise(self.handle, offset, len(view), os.POSIX_FADV_DONTNEED)

    def _read_direct(self, out: Tensor, offset: int) -> None:
        """By whole pages into an aligned buffer, and what was asked for out of it."""
        bounce: mmap.mmap | None = getattr(self._local, "bounce", None)
        if bounce is None:
            bounce = self._local.bounce = mmap.mmap(-1, _BOUNCE)  # page-aligned, unlike tensors
        pages, done = torch.frombuffer(bounce, dtype=torch.uint8), 0
        while done < len(out):
            skip = (offset + done) % _PAGE
            want = min(_BOUNCE, -(-(skip + len(out) - done) // _PAGE) * _PAGE)
            count = os.preadv(self.handle, [memoryview(bounce)[:want]], offset + done - skip) - skip
            if count <= 0:
                raise OSError(errno.EIO, "the file ends before it")
            count = min(count, len(out) - done)
            out[done : done + count].copy_(pages[skip : skip + count])
            done += count

    def close(self) -> None:
        """Close it; again: nothing."""
        if self.handle >= 0:
            os.close(self.handle)
            self.handle = -1


class DiskStore:
    """Experts in files: a slab file, or the checkpoint itself where its bytes are already in the right order.

    Args:
        layout: Of one expert. files: Read from.
        pieces: Of each expert of each layer.
        drop_cache: Leave no copy in the page cache, so that a read costs what it costs when memory is short. ``io``
            says how: "direct" (O_DIRECT), "dropped" (pages are given back after the read) where the file system has no
            direct reads, else "cached".
    """

    kind = "disk"

    def __init__(
        self, layout: SlabLayout, files: list[Path], pieces: list[list[tuple[Piece, ...]]], *, drop_cache: bool = False
    ) -> None:
        if not hasattr(os, "preadv"):
            raise ValueError("this system has no preadv, by which experts are read from disk: use where='host'")
        self.layout, self.layers, self.nbytes = layout, len(pieces), layout.nbytes
        self.bytes_total = sum(map(len, pieces)) * layout.nbytes
        self.path = files[0]
        self._pieces, self._files = pieces, list[_File]()
        self._source: ParameterStore | None = None
        try:
            self._files += [_File(path, drop_cache) for path in files]
        except OSError:
            self.close()
            raise
        self.io = self._files[0].io

    @classmethod
    def open(cls, path: Path | str, layout: SlabLayout, *, drop_cache: bool = False) -> DiskStore:
        """Open a slab file.

        Args:
            path: Written by :meth:`from_sites` or ``load_without_experts``. layout: Of the model that it is for.
            drop_cache: As in the class.

        Raises:
            ValueError: it is no slab file, is damaged, or is another model's.
        """
        return cls._over(open_slabs(Path(path), layout), drop_cache)

    @classmethod
    def _over(cls, slabs: SlabFile, drop_cache: bool) -> DiskStore:
        pieces: list[list[tuple[Piece, ...]]] = [
            [(Piece(0, slabs.offset(layer, expert), 0, slabs.layout.nbytes),) for expert in range(experts)]
            for layer, experts in enumerate(slabs.experts)
        ]
        return cls(slabs.layout, [slabs.path], pieces, drop_cache=drop_cache)

    @classmethod
    def from_sites(
        cls,
        sites: list[Site],
        *,
        path: Path | str | None = None,
        drop_cache: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> DiskStore:
        """Write a model's experts to a slab file, unless it is there, and free their memory.

        The parameters become views of the file, mapped: the model goes on giving the same numbers, slowly.

        Args:
            sites: Of the model.
            path: Of the file; by default in ygglight's cache folder, under a hash of the weights.
            drop_cache: As in the class. progress: Called with (bytes done, bytes in all) while the file is written.

        Raises:
            ValueError: there is a file at the path, but not of these weights.
            OSError: the disk is full, or cannot be written to.
        """
        source = ParameterStore(sites)
        layout, fingerprint = sites[0].layout, source.fingerprint()
        file = slabs_of(source, layout, fingerprint, path, progress)
        store = cls._over(file, drop_cache)
        for layer in range(source.layers):
            source.point_at(layer, file.mapped(layer))
        store._source = source
        return store

    def slab(self, layer: int, expert: int) -> None:
        """None: it must be read."""

    def read_into(self, layer: int, expert: int, out: Tensor) -> None:
        """Read a slab.

        Args:
            layer: Index of the site. expert: Index in the layer. out: uint8 ``[nbytes]`` in host memory.

        Raises:
            OSError: the file cannot be read there; it names file, layer and expert.
        """
        if out.dtype != torch.uint8 or out.shape != (self.nbytes,) or out.device.type != "cpu":
            raise ValueError(f"read into uint8 [{self.nbytes}] in host memory, not {out.dtype} {list(out.shape)}")
        for piece in self._pieces[layer][expert]:
            file = self._files[piece.file]
            try:
                file.read(out[piece.target : piece.target + piece.nbytes], piece.source)
            except OSError as error:
                where = f"{piece.nbytes} bytes of expert {expert} of sparse layer {layer} at byte {piece.source}"
                raise OSError(error.errno, f"cannot read {where}: {error.strerror}", str(file.path)) from error

    def close(self) -> None:
        """Read parameters that were views of the files back into memory, and close the files. Again: nothing.

        Raises:
            OSError: some cannot be read back, and hold no values from now on (meta device).
        """
        source, self._source = self._source, None
        fault: OSError | None = None
        for layer in range(self.layers if source is not None else 0):
            try:
                source.own_memory(layer, functools.partial(self.read_into, layer))  # type: ignore[union-attr]
            except OSError as error:
                fault = error
        for file in self._files:
            file.close()
        if fault is not None:
            what = f"the model's experts are lost, load it again: {fault.strerror}"
            raise OSError(fault.errno, what, fault.filename) from fault


def slabs_of(
    source: Any,
    layout: SlabLayout,
    fingerprint: str,
    path: Path | str | None,
    progress: Callable[[int, int], None] | None,
) -> SlabFile:
    """The slab file of a store, written if it is not there.

    Args:
        source: A store with ``names`` and ``experts`` of its layers.
        layout: Of one expert. fingerprint: Of the weights.
        path: Of the file, or None for one in the cache folder. progress: Called with (bytes done, bytes in all).
    """
    path = cache_root() / "experts" / fingerprint[:32] / "experts.slabs" if path is None else Path(path).expanduser()
    if not path.exists():
        write_slabs(path, source, layout, fingerprint, progress)
        log.info("experts are in %s, which stays for the next run; delete it when there is none", path)
    return open_slabs(path, layout, fingerprint)
