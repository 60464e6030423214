"""Activation codecs: a saved tensor in 1 to 8 bits an element, with static sizes and no host synchronisation.

`pack` and `unpack` run the Triton kernels on CUDA tensors and the plain torch twin elsewhere; both write the same
bytes. Bits per element with metadata, 16-bit / 32-bit values: INT4 4.625 / 5.0, INT8 8.25 / 8.375, MASK 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ygglight.kernels import _dispatch
from ygglight.kernels.act_codec import reference, reference_mask
from ygglight.kernels.act_codec.reference_mask import is_mask
from ygglight.kernels.act_codec.spec import (
    INT4,
    INT8,
    MASK,
    PER_TENSOR_INT4,
    CodecSpec,
    Packed,
    bytes_moved,
    packed_nbytes,
    payload_shapes,
)

__all__ = [
    "INT4",
    "INT8",
    "MASK",
    "PER_TENSOR_INT4",
    "CodecSpec",
    "Packed",
    "bytes_moved",
    "is_mask",
    "pack",
    "packed_nbytes",
    "unpack",
    "workspace_nbytes",
]

_dispatch.register("act_codec", has_kernel=True)


def _uses_triton(spec: CodecSpec, device_type: str) -> bool:
    return spec.has_kernel and _dispatch.implementation("act_codec", device_type).implementation == "triton"


def pack(x: Tensor, spec: CodecSpec, seed: int) -> Packed:
    """Compresses a flat tensor; see `reference.py` for the rules of rounding, outliers and non-finite values.

    Args:
        x: [numel], 1-D and contiguous; float32, float16 or bfloat16 (mask: also bool, values in {0, c}).
        spec: the codec.
        seed: of the stochastic rounding; the same seed and values give the same bytes on every device. Use another
            seed for every tensor and step.

    Returns:
        The payload, on the device of `x`, detached from autograd.

    Raises:
        ValueError: `x` is not 1-D and contiguous.
        TypeError: the codec does not take the dtype of `x`.
    """
    if x.dim() != 1 or not x.is_contiguous():
        raise ValueError(f"pack takes a 1-D contiguous tensor, not {tuple(x.shape)} with strides {x.stride()}")
    with torch.no_grad():
        x = x.detach()
        payload_shapes(x.numel(), x.dtype, spec)
        if _uses_triton(spec, x.device.type):
            from ygglight.kernels.act_codec import triton

            return triton.pack(x, spec, seed)
        return reference_mask.pack(x) if spec.name == "mask" else reference.pack(x, spec, seed)


def unpack(p: Packed) -> Tensor:
    """Decodes a payload.

    Args:
        p: from `pack`; it is left as it is, so it can be decoded again.

    Returns:
        [numel] in the original dtype, on the payload's device.
    """
    with torch.no_grad():
        if _uses_triton(p.spec, p.code.device.type):
            from ygglight.kernels.act_codec import triton

            return triton.unpack(p)
        return reference_mask.unpack(p) if p.spec.name == "mask" else reference.unpack(p)


def workspace_nbytes(numel: int, dtype: torch.dtype, spec: CodecSpec, device_type: str) -> int:
    """Upper bound of the transient bytes of `pack` and `unpack`, beyond values and payload.

    Args:
        numel: elements of the tensor.
        dtype: its dtype.
        spec: the codec.
        device_type: "cuda", "cpu", ...; decides which implementation is counted.

    Returns:
        Bytes. Constant in `numel` beyond one chunk of 128 Ki elements.
    """
    if numel == 0:
        return 0
    if _uses_triton(spec, device_type):
        # Only a short last block is copied out and filled up: at most 256 elements, in the dtype and in fp32, twice.
        return 8192
    return (
        reference_mask.workspace_nbytes(numel, dtype)
        if spec.name == "mask"
        else reference.workspace_nbytes(numel, spec)
    )
