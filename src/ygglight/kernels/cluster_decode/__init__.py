"""The attention half of a decoder layer for one new token: norm, projections, rotary, KV append, attention, output.

One fused block in the manner of ClusterFusion (arXiv:2508.18850), for the steps of plain decoding that move weights and
cache once and compute next to nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ygglight.kernels import _dispatch
from ygglight.kernels.cluster_decode.checks import check_inputs
from ygglight.kernels.cluster_decode.choose import (
    CLUSTER_SIZES,
    Choice,
    Path,
    choose_path,
    cluster_support,
    describe,
    describe_latent,
    possible_paths,
)
from ygglight.kernels.cluster_decode.latent import latent_block
from ygglight.kernels.cluster_decode.mla import LatentSpec, LatentWeights
from ygglight.kernels.cluster_decode.operation import Operation
from ygglight.kernels.cluster_decode.reference import decode_block_reference
from ygglight.kernels.cluster_decode.spec import BlockSpec, BlockWeights

__all__ = [
    "CLUSTER_SIZES", "BlockSpec", "BlockWeights", "Choice", "LatentSpec", "LatentWeights", "Path", "block_ways",
    "choose_path", "cluster_support", "decode_block", "decode_block_reference", "latent_block", "latent_ways",
]  # fmt: skip

_dispatch.register("cluster_decode", has_kernel=True, describe=describe)
_dispatch.register("latent_decode", has_kernel=True, describe=describe_latent)


def decode_block(
    x: Tensor,
    weights: BlockWeights | LatentWeights,
    spec: BlockSpec | LatentSpec,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    *,
    mask: Tensor | None = None,
    slots: Tensor | None = None,
    blocks: int | None = None,
) -> Tensor:
    """Runs one new token of each sequence through the block; forward only.

    A token attends to itself and to every committed slot that is below its length, inside the window, allowed by the
    mask and not the slot that ``slots`` writes. Slots at or beyond the length and that of ``slots`` may hold anything;
    those that only the mask hides must be finite, for they are multiplied by zero. Nothing is read from the device and
    all sizes follow from shapes, so calls can be recorded in a CUDA graph; the same input gives the same bits. In a
    graph of `torch.compile` it is one operation, which declares what it writes.

    Args:
        x: ``[B, hidden]``, the residual stream before the norm; float16, bfloat16, float32 or float64.
        weights: In the dtype of ``x``.
        spec: Sizes and switches. With a :class:`LatentSpec` this is `latent_block`, which says what the rest is then.
        cos: ``[B, rotary_dim]``, of the new token's position. The angle of pair i is element i: the second half of
            what rotary modules of transformers give repeats the first, and is not read. sin: the same.
        keys: ``[B, kv_heads, C, head_dim]``, a view of any cache in any strides; C may be 0. values: the same.
        lengths: int32 ``[B]`` on the device, committed tokens; no slot at or beyond it is read.
        new_keys: ``[B, kv_heads, head_dim]`` in any strides, where the new token's key goes: fresh memory, or a slot
            of the cache. new_values: the same.
        mask: ``[B or 1, C]``: bool, True where the new token attends; or floating, added to the scores.
        slots: int32 or int64 ``[B]`` on the device. Then ``new_keys`` and ``new_values`` are whole caches
            ``[B, kv_heads, C', head_dim]``, and the token goes to this slot: what a CUDA graph needs, where a view of
            a slot would be the same slot at each replay.
        blocks: Of a cluster, where the cluster block runs; 0 leaves it to the split-K kernels; by default the size that
            fills the device.

    Returns:
        ``[B, output size]`` in the dtype of ``x``, before the residual is added.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or a gradient would be needed.
        RuntimeError: YGGLIGHT_KERNELS=triton where no kernel can run.
    """
    if isinstance(spec, LatentSpec) and isinstance(weights, LatentWeights):
        return latent_block(
            x, weights, spec, cos, sin, keys, values, lengths, new_keys, new_values, mask=mask, slots=slots,
            blocks=blocks,
        )  # fmt: skip
    if isinstance(spec, LatentSpec) or isinstance(weights, LatentWeights):
        raise ValueError(f"a {type(spec).__name__} does not go with {type(weights).__name__}: give both of one kind")
    if torch.compiler.is_compiling():
        return _operation(
            x, weights, spec, cos, sin, keys, values, lengths, new_keys, new_values, mask, slots, blocks
        )  # fmt: skip
    check_inputs(x, weights, spec, cos, sin, keys, values, lengths, new_keys, new_values, mask, slots)
    inputs = (x, weights, spec, cos, sin, keys, values, lengths, new_keys, new_values, mask, slots)
    path = choose_path(spec, x.dtype, x.device, batch=len(x), mask=None if mask is None else mask.dtype).path
    if path == "torch":
        return decode_block_reference(*inputs)
    if path == "split_k" or blocks == 0:
        from ygglight.kernels.cluster_decode import split_k

        return split_k.launch(*inputs)
    from ygglight.kernels.cluster_decode import cluster

    return cluster.launch(*inputs, blocks=blocks)


_operation = Operation(decode_block)


def block_ways(device: torch.device) -> tuple[dict[str, Callable[..., Tensor]], str]:
    """The ways in which a device can run `decode_block`, by name, to be measured; and a line that says why not more.

    Args:
        device: Where the model is.

    Returns:
        Functions in the form of `decode_block`, which take another way for calls that theirs has nothing for; none
        where plain torch alone can run.
    """
    paths, reason = possible_paths(device)
    sizes = ([0] if "split_k" in paths else []) + (list(CLUSTER_SIZES) if "cluster" in paths else [])
    return {f"cluster {size}" if size else "split_k": partial(decode_block, blocks=size) for size in sizes}, reason


def latent_ways(device: torch.device) -> tuple[dict[str, Callable[..., Tensor]], str]:
    """The ways in which a device can run `latent_block`, by name, to be measured; and a line that says why not more.

    Plain torch is one of them on any device: a model's own code expands all of the text at each step.

    Args:
        device: Where the model is.

    Returns:
        Functions in the form of `decode_block`, which take another way for calls that theirs has nothing for.
    """
    paths, reason = possible_paths(device, latent=True)
    sizes = ([0] if "torch" in paths else []) + (list(CLUSTER_SIZES) if "cluster" in paths else [])
    return {f"cluster {size}" if size else "torch": partial(decode_block, blocks=size) for size in sizes}, reason
