"""What a codec is, what a packed tensor holds, and its exact sizes, without touching any data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

AFFINE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MASK_DTYPES = (torch.bool, *AFFINE_DTYPES)
_LEVELS = {"int4": 15, "int8": 255}
# A whole-tensor scale still stores its codes in blocks, so that one code layout serves every spec.
_BLOCK_OF_WHOLE_TENSOR = 128


@dataclass(frozen=True)
class CodecSpec:
    """How a tensor is compressed.

    Args:
        name: "int4" or "int8" (affine, lossy) or "mask" (1 bit an element, lossless for values in {0, c}).
        group: elements that share one scale and one offset: a power of two from 16 to 256, or 0 for one scale over
            the whole tensor (the deliberately bad codec of negative controls; plain torch only).
        outliers: elements of each group that are kept exact, 0 to 4 (kernel: 0 to 2). Needs a group.
        stochastic: rounds up with the probability of the fraction, so that the mean over seeds is the value itself.
    """

    name: str
    group: int = 128
    outliers: int = 0
    stochastic: bool = True

    def __post_init__(self) -> None:
        """Refuses what no implementation covers."""
        if self.name not in ("int4", "int8", "mask"):
            raise ValueError(f"unknown codec {self.name!r}: use 'int4', 'int8' or 'mask'")
        if self.name == "mask":
            return
        if self.group and (self.group & (self.group - 1) or not 16 <= self.group <= 256):
            raise ValueError(f"group={self.group}: use a power of two from 16 to 256, or 0 for the whole tensor")
        if not 0 <= self.outliers <= 4:
            raise ValueError(f"outliers={self.outliers}: use 0 to 4 per group")
        if self.outliers and not self.group:
            raise ValueError("outliers need a group: set group to 16..256 or outliers to 0")

    @property
    def levels(self) -> int:
        """The largest code: 15 or 255."""
        return _LEVELS[self.name]

    @property
    def block(self) -> int:
        """Elements in one block of codes: the group, or 128 when one scale serves the whole tensor."""
        return self.group or _BLOCK_OF_WHOLE_TENSOR

    @property
    def has_kernel(self) -> bool:
        """Whether the Triton kernel covers this spec; otherwise plain torch runs on every device."""
        return self.name == "mask" or (self.group > 0 and self.outliers <= 2)


INT4 = CodecSpec("int4", 128, 2, True)
INT8 = CodecSpec("int8", 128, 0, True)
MASK = CodecSpec("mask")
PER_TENSOR_INT4 = CodecSpec("int4", 0, 0, False)


@dataclass(frozen=True)
class Packed:
    """A compressed tensor: what stays in memory in place of the values.

    Args:
        spec: how it was compressed.
        numel: elements of the original.
        dtype: dtype of the original.
        code: uint8. int4 [blocks * block/2], int8 [blocks * block], mask [ceil(numel / 8)].
        scale: affine only, bfloat16 [groups]; 0 for a constant group, NaN for a group that decodes to NaN.
        offset: affine: the smallest kept value, [groups] in `dtype`; mask: the non-zero value c, [1] in `dtype`,
            None for bool.
        outlier_value: [groups, outliers] in `dtype`, bitwise copies; None without outliers.
        outlier_index: uint8 [groups, outliers], place inside the group; None without outliers.
    """

    spec: CodecSpec
    numel: int
    dtype: torch.dtype
    code: Tensor
    scale: Tensor | None = None
    offset: Tensor | None = None
    outlier_value: Tensor | None = None
    outlier_index: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """The payload tensors that exist, codes first."""
        fields = (self.code, self.scale, self.offset, self.outlier_value, self.outlier_index)
        return [tensor for tensor in fields if tensor is not None]

    @property
    def nbytes(self) -> int:
        """Bytes of all payload tensors, metadata included (each tensor's allocator rounding is not counted)."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())

    @property
    def bits_per_element(self) -> float:
        """Payload bits per original element, metadata included; 0 for an empty tensor."""
        return 8.0 * self.nbytes / self.numel if self.numel else 0.0


def payload_shapes(numel: int, dtype: torch.dtype, spec: CodecSpec) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """The shape and dtype of every payload tensor: static, from the element count alone.

    Args:
        numel: elements of the tensor to pack.
        dtype: its dtype.
        spec: the codec.

    Returns:
        Field of `Packed` to (shape, dtype).

    Raises:
        TypeError: the codec does not take this dtype.
    """
    allowed = MASK_DTYPES if spec.name == "mask" else AFFINE_DTYPES
    if dtype not in allowed:
        raise TypeError(f"codec {spec.name!r} takes {', '.join(str(d) for d in allowed)}, not {dtype}")
    if spec.name == "mask":
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"code": ((-(-numel // 8),), torch.uint8)}
        if dtype is not torch.bool:
            shapes["offset"] = ((1,), dtype)
        return shapes
    blocks = -(-numel // spec.block)
    groups = blocks if spec.group else min(blocks, 1)
    code = blocks * spec.block // (2 if spec.name == "int4" else 1)
    shapes = {
        "code": ((code,), torch.uint8),
        "scale": ((groups,), torch.bfloat16),
        "offset": ((groups,), dtype),
    }
    if spec.outliers:
        shapes["outlier_value"] = ((groups, spec.outliers), dtype)
        shapes["outlier_index"] = ((groups, spec.outliers), torch.uint8)
    return shapes


def packed_nbytes(numel: int, dtype: torch.dtype, spec: CodecSpec) -> int:
    """Exact payload bytes that `pack` will hold, from the element count alone.

    Args:
        numel: elements of the tensor.
        dtype: its dtype.
        spec: the codec.

    Returns:
        Bytes, equal to `pack(...).nbytes`.

    Raises:
        TypeError: the codec does not take this dtype.
    """
    total = 0
    for shape, kind in payload_shapes(numel, dtype, spec).values():
        count = 1
        for length in shape:
            count *= length
        total += count * kind.itemsize
    return total


def bytes_moved(numel: int, dtype: torch.dtype, spec: CodecSpec) -> int:
    """Bytes that an ideal `pack` reads and writes, which an ideal `unpack` moves too; for bandwidth in benchmarks.

    Args:
        numel: elements of the tensor.
        dtype: its dtype.
        spec: the codec.

    Returns:
        The values once and the payload once.
    """
    return numel * dtype.itemsize + packed_nbytes(numel, dtype, spec)


def empty_packed(numel: int, dtype: torch.dtype, spec: CodecSpec, device: torch.device) -> Packed:
    """Allocates an unwritten payload.

    Args:
        numel: elements of the tensor to pack.
        dtype: its dtype.
        spec: the codec.
        device: where the payload lies.

    Returns:
        A `Packed` whose tensors hold anything.
    """
    shapes = payload_shapes(numel, dtype, spec)
    tensors = {name: torch.empty(shape, dtype=kind, device=device) for name, (shape, kind) in shapes.items()}
    return Packed(spec, numel, dtype, **tensors)
