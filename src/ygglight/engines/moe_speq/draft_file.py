"""The file of a draft: safetensors, written and read one expert at a time, with a checksum of every tensor."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ygglight.engines.moe_speq.layout import Site
from ygglight.engines.moe_speq.stores import ExpertStore
from ygglight.kernels.expert_gemm import CpuInt4Weight, Int4Weight

FORMAT = "ygglight moe draft 1"
SAMPLED = 1 << 30
"""Bytes of experts that a fingerprint may read, at most; two are always read."""
_NAMES = {torch.uint8: "U8", torch.int64: "I64", torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
_SUMS = "checksums"

Stack = Int4Weight | CpuInt4Weight | Tensor


def fingerprint(sites: Sequence[Site], store: ExpertStore | None) -> str:
    """What tells the experts of one model from those of another: names, layout, and the bytes of some.

    Args:
        sites: Of the model. store: Where its experts are; None: in its parameters.

    Raises:
        ValueError: its parameters are on the meta device and there is no store.
    """
    layout = sites[0].layout
    known = [[site.name, site.experts, site.transposed, site.interleaved] for site in sites]
    digest = hashlib.sha256(json.dumps([FORMAT, known, layout.names, layout.shapes, str(layout.dtype)]).encode())
    count = min(len(sites), max(2, SAMPLED // layout.nbytes))
    slab = torch.zeros(layout.nbytes, dtype=torch.uint8)
    for i in range(count):
        site = sites[i * (len(sites) - 1) // max(1, count - 1)]
        expert = site.index % site.experts
        if store is not None:
            store.read_into(site.index, expert, slab)
        for name, view in layout.views(slab).items():  # not the slab: what lies between tensors is anything
            if store is None:
                parameter = site.module.get_parameter(name)
                if parameter.is_meta:
                    raise ValueError("the model's experts are not in its parameters: give the store that they are in")
                view = parameter.detach()[expert].cpu()
            digest.update(_bytes(view))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(torch.uint8).numpy())  # type: ignore[arg-type]


def _parts(name: str, stack: Stack) -> dict[str, tuple[torch.dtype, list[int]]]:
    """Tensors of a stack as the file has them: name -> dtype and shape."""
    if isinstance(stack, Tensor):
        return {name: (stack.dtype, list(stack.shape))}
    experts, rows, columns = stack.shape
    scale = stack.scale.dtype
    return {
        f"{name}.packed": (torch.uint8, [experts, rows, columns // 2]),
        f"{name}.scale": (scale, [experts, rows, columns // stack.group]),
    }


def write(path: Path, stacks: Mapping[str, Stack], model: str, counts: Mapping[str, int]) -> None:
    """Write a draft; the file appears whole or not at all.

    Args:
        path: Of the file. stacks: Name -> weights. model: Fingerprint. counts: Whole numbers to keep with it.
    """
    path = path.expanduser()
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot save the draft as {path}: there is no folder {path.parent}")
    parts = {key: part for name, stack in stacks.items() for key, part in _parts(name, stack).items()}
    parts[_SUMS] = (torch.int64, [len(parts)])
    header: dict[str, Any] = {}
    starts, end = {}, 0
    for key, (dtype, shape) in parts.items():
        starts[key], size = end, dtype.itemsize * torch.Size(shape).numel()
        end += size
        header[key] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [starts[key], end]}
    meta = {"format": FORMAT, "model": model, "counts": json.dumps(dict(counts))}
    body = json.dumps({"__metadata__": meta | {"seal": _seal(header, meta)}} | header).encode()
    body += b" " * (-len(body) % 8)
    handle, scratch = tempfile.mkstemp(prefix=".writing-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(len(body).to_bytes(8, "little") + body)
            sums = dict.fromkeys(starts, 0)
            first = 8 + len(body)
            for name, stack in stacks.items():
                # An expert's codes and scales come together, and lie in two tensors: the file is written in two places.
                keys = list(_parts(name, stack))
                places = [first + starts[key] for key in keys]
                for rows in ((tensor,) for tensor in stack) if isinstance(stack, Tensor) else stack.read():
                    for i, (key, tensor) in enumerate(zip(keys, rows, strict=True)):
                        data = _bytes(tensor.detach().cpu())
                        sums[key] = zlib.crc32(data, sums[key])
                        out.seek(places[i])
                        places[i] += out.write(data)
            del sums[_SUMS]
            out.seek(first + starts[_SUMS])
            out.write(_bytes(torch.tensor(list(sums.values()), dtype=torch.int64)))
            out.flush()
            os.fsync(out.fileno())  # before the name: a power cut leaves the old file or the new one
        os.chmod(scratch, 0o644)  # mkstemp writes for the owner alone
        os.replace(scratch, path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise


def _seal(header: dict[str, Any], meta: dict[str, str]) -> str:
    """A checksum of what the header says, by which safetensors sets no store."""
    return str(zlib.crc32(json.dumps([header, meta["model"], meta["counts"]]).encode()))


class Reader:
    """A draft's file, whose header was read and found right.

    Args:
        path: Of the file. model: Fingerprint that it must have. dtype: Of that model's experts.

    Raises:
        FileNotFoundError: there is no such file. ValueError: it is damaged, no draft, or another model's.
    """

    def __init__(self, path: Path, model: str, dtype: torch.dtype) -> None:
        path = path.expanduser()
        self._path = path
        if not path.is_file():
            raise FileNotFoundError(f"there is no draft {path}: save one first, or leave it out and one is made")
        try:
            self._file = safe_open(str(path), framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{path} is no draft, or is damaged ({error}): make it again") from error
        with path.open("rb") as source:
            header = json.loads(source.read(int.from_bytes(source.read(8), "little")))
        meta = header.pop("__metadata__", {})
        if meta.get("format") != FORMAT:
            raise ValueError(f"{path} is no draft of this version of ygglight: make it again")
        if not {"model", "counts"} <= set(meta) or meta.get("seal") != _seal(header, meta):
            raise ValueError(f"the header of the draft {path} is damaged: make it again")
        if meta["model"] != model:
            raise ValueError(
                f"the draft {path} was made of other experts than this model's, or of the same in another dtype: make "
                f"it of this model (`ygglight convert moe-draft MODEL --dtype {str(dtype).removeprefix('torch.')} ...`)"
            )
        self.fingerprint = model
        self.counts: dict[str, int] = json.loads(meta["counts"])
        del header[_SUMS]
        self._sums = dict(zip(header, self._file.get_tensor(_SUMS).tolist(), strict=True))

    def __enter__(self) -> Reader:
        self._file.__enter__()
        return self

    def __exit__(self, *why: Any) -> None:
        self._file.__exit__(*why)

    def experts(self, name: str, like: Int4Weight | CpuInt4Weight) -> Iterator[tuple[Tensor, Tensor]]:
        """Codes and scales of each expert of a matrix.

        Args:
            name: Of the matrix. like: What they are for.

        Raises:
            ValueError: they were damaged; raised when all have been given.
        """
        keys = list(_parts(name, like))
        slices = [self._file.get_slice(key) for key in keys]
        sums = [0] * len(keys)
        for expert in range(like.shape[0]):
            packed, scale = (each[expert] for each in slices)
            for i, tensor in enumerate((packed, scale)):
                sums[i] = zlib.crc32(_bytes(tensor), sums[i])
            yield packed, scale
        self._check(dict(zip(keys, sums, strict=True)))

    def tensor(self, name: str, like: Tensor) -> Tensor:
        """A whole tensor.

        Args:
            name: Of it. like: What it is for.
        """
        found: Tensor = self._file.get_tensor(name)
        self._check({name: zlib.crc32(_bytes(found))})
        return found

    def check_all(self) -> None:
        """Read everything once.

        Raises:
            ValueError: some of it is damaged.
        """
        for key in self._sums:
            part, total = self._file.get_slice(key), 0
            for row in range(part.get_shape()[0]):
                total = zlib.crc32(_bytes(part[row]), total)
            self._check({key: total})

    def _check(self, sums: dict[str, int]) -> None:
        for key, value in sums.items():
            if value != self._sums[key]:
                raise ValueError(f"{key} of the draft {self._path} is damaged: make it again")
