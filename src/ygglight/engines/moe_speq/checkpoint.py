"""Loading a model without its experts, which stay in the checkpoint's own files: it may be larger than the memory."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ygglight.compat.experts import Parts, checkpoint_parts, load_without, meta_causal_lm
from ygglight.compat.transformers import load_config
from ygglight.engines.moe_speq.disk import DiskStore, Piece, slabs_of
from ygglight.engines.moe_speq.layout import DTYPES, Site, SlabLayout, find_sites

__all__ = ["load_without_experts"]

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class _Stored:
    """A tensor in a safetensors file."""

    file: int
    dtype: torch.dtype | None  # None: one that only quantised checkpoints have
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def load_without_experts(
    directory: Path | str,
    dtype: torch.dtype | str = "auto",
    *,
    path: Path | str | None = None,
    drop_cache: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Any, DiskStore]:
    """Load everything but the routed experts, and open a store of them. The experts' parameters stay on meta.

    They are read where they are if their dtype is the one wanted; else a file of them in that dtype is written once.

    Args:
        directory: A Hugging Face model directory with safetensors files.
        dtype: Of the weights; "auto" takes the experts' own.
        path: Of the file that is written for another dtype; by default in ygglight's cache folder.
        drop_cache: See :class:`DiskStore`.
        progress: Called with (bytes done, bytes in all) while that file is written.

    Returns:
        The model, in evaluation mode, and the store.

    Raises:
        ValueError: no safetensors files, damaged ones, or experts that cannot be read from them as they are.
    """
    directory = Path(directory)
    config = load_config(directory)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"the checkpoint in {directory} is quantised: take one in bfloat16, or dequantise it first")
    files = _files(directory)
    stored = {key: tensor for index, file in enumerate(files) for key, tensor in _tensors(file, index).items()}
    skeleton = meta_causal_lm(config, torch.bfloat16)
    parts, rest = checkpoint_parts(skeleton, stored)
    find_sites(skeleton)  # before its experts are looked for in the files
    kept = _kept_dtype(directory, parts, stored)
    wanted = kept if dtype == "auto" else dtype
    if wanted not in DTYPES:
        raise ValueError(f"dtype is 'auto', torch.float32, torch.bfloat16 or torch.float16, not {dtype!r}")
    skeleton.to(wanted)
    sites = find_sites(skeleton)
    layout = SlabLayout.of(dict(zip(sites[0].layout.names, sites[0].layout.shapes, strict=True)), kept)
    pieces = [_pieces(site, layout, parts, stored) for site in sites]
    store = DiskStore(layout, files, pieces, drop_cache=drop_cache)
    if wanted != kept:
        source = _Cast(store, layout, sites)
        try:
            slabs = slabs_of(source, sites[0].layout, _fingerprint(files, sites), path, progress)
        finally:
            store.close()
        store = DiskStore.open(slabs.path, slabs.layout, drop_cache=drop_cache)
    try:
        tensors = {key: _read(files[stored[key].file], key, stored[key]) for key in rest}
        return load_without(directory, skeleton, wanted, tensors), store
    except BaseException:
        store.close()
        raise


def _files(directory: Path) -> list[Path]:
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if index.exists():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    elif single.exists():
        names = [single.name]
    else:
        raise ValueError(f"{directory} has no model.safetensors: experts are read from safetensors files only")
    missing = [name for name in names if not (directory / name).exists()]
    if missing:
        raise ValueError(f"{directory} lacks {', '.join(missing)}: download the rest of the checkpoint")
    return [directory / name for name in names]


def _tensors(path: Path, index: int) -> dict[str, _Stored]:
    """The header of a safetensors file: 8 bytes of its length, JSON, and the tensors' bytes after it."""
    mend = f"{path} is damaged or was not downloaded to its end: fetch it again"
    size = path.stat().st_size
    with open(path, "rb") as source:
        length = int.from_bytes(source.read(8), "little")
        if length > size - 8:
            raise ValueError(mend)
        try:
            header = json.loads(source.read(length))
        except ValueError as error:
            raise ValueError(mend) from error
    header.pop("__metadata__", None)
    if 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0) != size:
        raise ValueError(mend)
    return {
        key: _Stored(
            index, _DTYPES.get(entry["dtype"]), tuple(entry["shape"]), 8 + length + entry["data_offsets"][0],
            entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for key, entry in header.items()
    }  # fmt: skip


def _read(path: Path, key: str, tensor: _Stored) -> Tensor:
    if tensor.dtype is None:
        raise ValueError(f"{key} in {path} is quantised: take a checkpoint in bfloat16, or dequantise it first")
    out = torch.empty(tensor.nbytes, dtype=torch.uint8)
    with open(path, "rb") as source:
        source.seek(tensor.offset)
        source.readinto(out.numpy().data)  # whole: buffered files read until it is full
    return out.view(tensor.dtype).reshape(tensor.shape)


def _kept_dtype(directory: Path, parts: Parts, stored: dict[str, _Stored]) -> torch.dtype:
    dtypes = {stored[key].dtype for sources in parts.values() for key, _, _ in sources}
    kept = dtypes.pop() if len(dtypes) == 1 else None
    if kept not in DTYPES:
        raise ValueError(
            f"the experts in {directory} are not all there in one of float32, bfloat16 and float16: take an "
            "unquantised checkpoint"
        )
    return kept


def _pieces(site: Site, layout: SlabLayout, parts: Parts, stored: dict[str, _Stored]) -> list[tuple[Piece, ...]]:
    """Where the bytes of each expert of a site are.

    Raises:
        ValueError: a tensor is not there, or has another shape than the configuration says.
    """
    pieces: list[list[Piece]] = [[] for _ in range(site.experts)]
    for name, shape, offset in zip(layout.names, layout.shapes, layout.offsets, strict=True):
        size = math.prod(shape) * layout.dtype.itemsize
        filled = [0] * site.experts
        for key, expert, half in parts[f"{site.name}.{name}"]:
            tensor = stored[key]
            if expert is None:
                whole, each = (site.experts, *shape), size
            else:
                rows = tensor.shape[0]
                whole, each = (rows, *shape[1:]), rows * math.prod(shape[1:]) * layout.dtype.itemsize
            if tensor.shape != whole or (half and 2 * each != size):
                raise ValueError(f"{key} has shape {tensor.shape} in the file, and the configuration says otherwise")
            for chosen in range(site.experts) if expert is None else (expert,):
                source = tensor.offset + (chosen * each if expert is None else 0)
                pieces[chosen].append(Piece(tensor.file, source, offset + half * each, each))
                filled[chosen] += each
        if set(filled) != {size}:
            lacking = [expert for expert, count in enumerate(filled) if count != size]
            raise ValueError(f"the checkpoint lacks {name} of experts {lacking[:4]} of {site.name}: fetch it again")
    return [tuple(group) for group in pieces]


def _fingerprint(files: list[Path], sites: list[Site]) -> str:
    """Of files that are too large to be read for it: their names, sizes and times, and what is made of them."""
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    layout = asdict(sites[0].layout) | {"dtype": str(sites[0].layout.dtype)}
    return hashlib.sha256(json.dumps([stats, layout, [site.name for site in sites]]).encode()).hexdigest()


class _Cast:
    """A store in another dtype."""

    def __init__(self, store: DiskStore, layout: SlabLayout, sites: list[Site]) -> None:
        self.names, self.experts = [site.name for site in sites], [site.experts for site in sites]
        self._store, self._layout, self._target = store, layout, sites[0].layout
        self._slab = torch.empty(layout.nbytes, dtype=torch.uint8)

    def read_into(self, layer: int, expert: int, out: Tensor) -> None:
        self._store.read_into(layer, expert, self._slab)
        source = self._layout.views(self._slab)
        for name, view in self._target.views(out).items():
            view.copy_(source[name])
