"""The file format of experts on disk: a checked header, then one slab after another at offsets that follow from it."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ygglight.engines.memory.sizes import format_bytes
from ygglight.engines.moe_speq.layout import SlabLayout

__all__ = ["SlabFile", "open_slabs", "write_slabs"]

_MAGIC = b"ygglight slabs 1"
_PAGE = 4096  # slabs start at multiples of it, as reads past the page cache want them


def _paged(size: int) -> int:
    return -(-size // _PAGE) * _PAGE


@dataclass(frozen=True)
class SlabFile:
    """A slab file whose header was read and found right.

    Args:
        path: Of the file. layout: Of one expert. experts: Of each layer. start: First byte of the first slab.
    """

    path: Path
    layout: SlabLayout
    experts: tuple[int, ...]
    start: int

    @property
    def stride(self) -> int:
        """Bytes from one slab to the next."""
        return _paged(self.layout.nbytes)

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.start + sum(self.experts) * self.stride

    def offset(self, layer: int, expert: int) -> int:
        """First byte of a slab."""
        return self.start + (sum(self.experts[:layer]) + expert) * self.stride

    def mapped(self, layer: int) -> Tensor:
        """The slabs of a layer, uint8 ``[experts, nbytes]``, mapped; what is written into them stays in memory."""
        whole = torch.from_file(str(self.path), shared=False, size=self.size, dtype=torch.uint8)
        first, count = self.offset(layer, 0), self.experts[layer]
        return whole[first : first + count * self.stride].view(count, self.stride)[:, : self.layout.nbytes]


def _header(names: list[str], experts: list[int], layout: SlabLayout, fingerprint: str) -> bytes:
    fields = asdict(layout) | {"dtype": str(layout.dtype).removeprefix("torch.")}
    body = json.dumps({"fingerprint": fingerprint, "layout": fields, "names": names, "experts": experts}).encode()
    return _MAGIC + len(body).to_bytes(8, "little") + hashlib.sha256(body).digest() + body


def write_slabs(
    path: Path,
    source: Any,
    layout: SlabLayout,
    fingerprint: str,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a slab file; it appears whole or not at all.

    Args:
        path: Of the file. source: A store with ``names`` and ``experts`` of its layers.
        layout: Of one expert. fingerprint: Of the weights.
        progress: Called with (bytes done, bytes in all).
    """
    header = _header(source.names, source.experts, layout, fingerprint)
    file = SlabFile(path, layout, tuple(source.experts), _paged(len(header)))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
        if free < file.size:
            sizes = f"the experts take {format_bytes(file.size)} and {format_bytes(free)} are free"
            raise OSError(errno.ENOSPC, sizes)
        handle, scratch = tempfile.mkstemp(prefix=".writing-", dir=path.parent)
    except OSError as error:
        raise _unwritable(path, error) from error
    try:
        with os.fdopen(handle, "wb", buffering=0) as out:
            slab = torch.zeros(file.stride, dtype=torch.uint8)
            _write_all(out, header.ljust(file.start, b"\0"))
            for layer, count in enumerate(source.experts):
                for expert in range(count):
                    source.read_into(layer, expert, slab[: layout.nbytes])
                    _write_all(out, slab.numpy())
                    if progress is not None:
                        progress(out.tell() - file.start, file.size - file.start)
            os.fsync(out.fileno())  # before the name: a power cut leaves the old file or the new one
        os.chmod(scratch, 0o644)  # mkstemp writes for the owner alone
        os.replace(scratch, path)
    except BaseException as error:
        Path(scratch).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # of the writing, not of the source
            raise _unwritable(path, error) from error
        raise


def _unwritable(path: Path, error: OSError) -> OSError:
    mend = "give a path on another disk, or set YGGLIGHT_CACHE to a folder there"
    return OSError(error.errno, f"the experts cannot be written here ({error.strerror}): {mend}", str(path))


def _write_all(out: Any, data: Any) -> None:
    view = memoryview(data)
    while len(view):
        view = view[out.write(view) :]


def open_slabs(path: Path, layout: SlabLayout, fingerprint: str | None = None) -> SlabFile:
    """Read and check the header of a slab file.

    Args:
        path: Of the file. layout: That it must have. fingerprint: That it must have, if given.

    Raises:
        ValueError: it is no slab file, is damaged or cut off, or is another model's.
    """
    mend = "delete it, and it is written anew"
    with open(path, "rb") as source:
        start = source.read(len(_MAGIC) + 8 + 32)
        magic, length, digest = start[:16], int.from_bytes(start[16:24], "little"), start[24:]
        if magic != _MAGIC:
            raise ValueError(f"{path} is no file of experts of this version of ygglight: give another path")
        body = source.read(min(length, path.stat().st_size))
    if len(body) != length or hashlib.sha256(body).digest() != digest:
        raise ValueError(f"the header of {path} is damaged: {mend}")
    fields = json.loads(body)
    found = fields["layout"]
    kept = SlabLayout(
        tuple(found["names"]), tuple(map(tuple, found["shapes"])), getattr(torch, found["dtype"]),
        tuple(found["offsets"]), found["nbytes"],
    )  # fmt: skip
    if kept != layout or fingerprint not in (None, fields["fingerprint"]):
        raise ValueError(f"{path} holds the experts of another model or dtype: {mend}, or give another path")
    file = SlabFile(path, kept, tuple(fields["experts"]), _paged(len(start) + length))
    if path.stat().st_size != file.size:
        raise ValueError(f"{path} has {path.stat().st_size} bytes and should have {file.size}: {mend}")
    return file
