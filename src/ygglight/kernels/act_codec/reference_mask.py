"""The mask codec in plain torch: one bit an element, plus the one non-zero value. Lossless for values in {0, c}."""

from __future__ import annotations

import torch
from torch import Tensor

from ygglight.kernels.act_codec.spec import MASK, MASK_DTYPES, Packed, empty_packed

# Elements processed at once: 512 KiB of bool scratch.
CHUNK = 512 * 1024
# Eight 0/1 bytes b0..b7 of a little-endian int64, times this, hold b7..b0 in the top byte (no partial sums collide).
_GATHER_BITS = 0x0102040810204080


def nonzero_value(x: Tensor) -> Tensor:
    """The value c of a tensor that holds only 0 and c: its element of largest magnitude, signed.

    Args:
        x: floating, any shape, not empty.

    Returns:
        A scalar tensor; no host synchronisation.
    """
    low, high = x.amin(), x.amax()
    return torch.where(high.abs() >= low.abs(), high, low)


def is_mask(x: Tensor) -> bool:
    """Whether a tensor is boolean or holds only 0 and one finite value c; for profiling, it synchronises with the host.

    Args:
        x: any shape and dtype.

    Returns:
        True when the mask codec restores it exactly (-0 comes back as +0).
    """
    if x.dtype is torch.bool or (x.dtype in MASK_DTYPES and x.numel() == 0):
        return True
    if x.dtype not in MASK_DTYPES:
        return False
    c = nonzero_value(x)
    if not bool(torch.isfinite(c)):
        return False
    flat = x.reshape(-1)
    return all(bool(((part == 0) | (part == c)).all()) for part in flat.split(CHUNK))


def pack(x: Tensor) -> Packed:
    """Compresses a mask; the caller guarantees values in {0, c}, nothing is verified.

    Args:
        x: [numel], contiguous, bool or float32, float16, bfloat16.

    Returns:
        The payload, on the device of `x`. A wrong input decodes to {0, its element of largest magnitude}.
    """
    numel = x.numel()
    packed = empty_packed(numel, x.dtype, MASK, x.device)
    if numel == 0:
        if packed.offset is not None:
            packed.offset.zero_()
        return packed
    if packed.offset is not None:
        packed.offset.copy_(nonzero_value(x))
    scratch = torch.empty(min(CHUNK, -(-numel // 8) * 8), dtype=torch.bool, device=x.device)
    for start in range(0, numel, CHUNK):
        part = x[start : start + CHUNK]
        count = part.numel()
        padded = -(-count // 8) * 8
        scratch[count:padded] = False
        torch.ne(part, 0, out=scratch[:count])
        words = scratch[:padded].view(torch.int64)
        packed.code[start // 8 : start // 8 + padded // 8].copy_(words.mul(_GATHER_BITS).bitwise_right_shift_(56))
    return packed


def workspace_nbytes(numel: int, dtype: torch.dtype) -> int:
    """Upper bound of the transient bytes of `pack` and `unpack` here, beyond values and payload.

    Args:
        numel: elements of the tensor.
        dtype: its dtype.

    Returns:
        Bytes: bool and int64 scratch of one chunk (2 an element), a 256-row table, and the last byte's rounding.
    """
    return 2 * min(numel + 8, CHUNK) + 256 * 8 * (dtype.itemsize + 8 + 8 + 1) + 8 * dtype.itemsize


def unpack(packed: Packed) -> Tensor:
    """Restores a mask.

    Args:
        packed: from `pack`.

    Returns:
        [numel] in the original dtype.
    """
    device = packed.code.device
    bits = (torch.arange(256, device=device).view(256, 1) >> torch.arange(8, device=device)) & 1
    if packed.offset is None:
        table = bits.bool()
    else:
        table = torch.where(bits.bool(), packed.offset, torch.zeros_like(packed.offset))
    # One row of the table holds the eight elements of a byte: a copy of 8 to 32 bytes, moved as one or more int64.
    table = table.view(torch.int64)
    out = torch.empty(packed.code.numel() * 8, dtype=packed.dtype, device=device)
    rows = out.view(torch.int64).view(packed.code.numel(), table.shape[1])
    for start in range(0, packed.code.numel(), CHUNK // 8):
        part = packed.code[start : start + CHUNK // 8]
        torch.index_select(table, 0, part.int(), out=rows[start : start + CHUNK // 8])
    return out[: packed.numel]
