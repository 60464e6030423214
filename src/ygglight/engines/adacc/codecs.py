"""Which saved values may be compressed, by which codec, and what a codec costs on this machine.

The choice by consumer is ours (the paper's is not public). A Linear's weight gradient is linear in the saved input,
so unbiased rounding leaves it unbiased and int4 is offered; where backward is not linear in what was saved, int8;
attention's queries and keys, log-softmax, statistics and indices never. What a choice really does to the gradient is
measured (``study.py``), so this table only has to keep the hopeless and the dangerous out.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from functools import lru_cache

import torch

from ygglight.kernels.act_codec import INT4, INT8, MASK, CodecSpec, pack, packed_nbytes, unpack, workspace_nbytes

SPECS: dict[str, CodecSpec] = {"int4": INT4, "int8": INT8, "mask": MASK}

# Autograd node name prefixes -> codecs offered when every reader of the value is of these kinds.
_LINEAR = ("MmBackward", "AddmmBackward", "LinearBackward", "ConvolutionBackward")
_SMOOTH = (
    "MulBackward", "SiluBackward", "GeluBackward", "NativeLayerNormBackward", "NativeRmsNormBackward",
    "FusedRmsNormBackward", "PowBackward", "DivBackward", "TanhBackward", "ReluBackward", "SigmoidBackward",
    "NativeGroupNormBackward",
)  # fmt: skip

# Squared relative gradient error of one compressed value where it could not be measured (code outside repeated blocks):
# twice the worst of the brief's table 2.4 for values fed to Linear layers, and for the others. Twice, because nobody
# measures what they do together with others either.
UNMEASURED_ERROR = {"int4": 0.016**2, "int8": 0.013**2, "mask": 0.0}

MIN_BYTES = 16 * 1024
"""Smaller values are not worth a kernel launch."""


def codecs_for(readers: Iterable[str], dtype: torch.dtype, *, two_valued: bool = False) -> tuple[str, ...]:
    """Names of the codecs offered for a value of ``dtype`` that the autograd nodes ``readers`` will read.

    ``two_valued``: it is known to hold zero and one other value (dropout's scaled noise), so one bit is lossless.
    """
    names = list(readers)
    if dtype is torch.bool or two_valued:
        return ("mask",)
    if not dtype.is_floating_point or dtype.itemsize > 4 or not names:
        return ()
    if all(name.startswith(_LINEAR) for name in names):
        return ("int4", "int8")
    if all(name.startswith(_LINEAR + _SMOOTH) for name in names):
        return ("int8",)
    return ()


@lru_cache(maxsize=256)
def codec_seconds(name: str, numel: int, dtype: torch.dtype, device: str) -> float:
    """Seconds of one pack and one unpack of ``numel`` elements on ``device``, measured here."""
    spec = SPECS[name]
    data = torch.ones(numel, dtype=dtype, device=device)
    if spec.name != "mask":
        data = torch.linspace(-1, 1, numel, dtype=torch.float32, device=device).to(dtype)
    seconds = []
    for _ in range(4):
        _finish(device)
        start = time.perf_counter()
        unpack(pack(data, spec, 1))
        _finish(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])  # what else runs on the machine only ever adds


def codec_bytes(name: str, numel: int, dtype: torch.dtype, device: str) -> tuple[int, int]:
    """Bytes stored, and transient bytes while packing or unpacking."""
    spec = SPECS[name]
    return packed_nbytes(numel, dtype, spec), workspace_nbytes(numel, dtype, spec, torch.device(device).type)


def _finish(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
