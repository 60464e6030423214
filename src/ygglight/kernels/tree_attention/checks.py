"""What tree attention takes; each wrong input is one error that names the mend."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_inputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    softcap: float | None,
    sinks: Tensor | None,
    table: Tensor | None = None,
) -> None:
    """Checks shapes, dtypes and devices, and reads no data.

    Args:
        query: See :func:`ygglight.kernels.tree_attention.tree_attention`, as for all others.

    Raises:
        ValueError: something does not fit.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value), ("mask", mask)):
        if tensor.dim() != 4:
            raise ValueError(f"{name} is {_shape(tensor)}: give four dimensions, [batch, heads, tokens, size or slots]")
        if not tensor.numel():
            raise ValueError(f"{name} is {_shape(tensor)}: give at least one element in each dimension")
    batch, heads, width, size = query.shape
    groups, slots = key.shape[1:3]
    if table is not None:
        _check_table(table, batch, slots)
        slots *= table.shape[1]
    if (table is None and key.shape[0] != batch) or key.shape[3] != size:
        raise ValueError(
            f"key {_shape(key)} does not fit query {_shape(query)}: give keys of the same batch and head size"
        )
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(f"value {_shape(value)} does not fit key {_shape(key)}: only the head size may differ")
    if heads % groups:
        raise ValueError(f"{heads} query heads, {groups} key heads: query heads must be a multiple of key heads")
    if mask.dtype is not torch.bool:
        raise ValueError(f"the mask is {mask.dtype}: give torch.bool, True where a query attends (additive: mask == 0)")
    if mask.shape[0] not in (1, batch) or mask.shape[1:] != (1, width, slots):
        raise ValueError(
            f"the mask is {_shape(mask)}: give [{batch} or 1, 1, {width} queries, {slots} slots], one for all heads"
        )
    if query.dtype not in DTYPES:
        raise ValueError(f"query is {query.dtype}: cast it to float16, bfloat16 or float32")
    if key.dtype is not query.dtype or value.dtype is not query.dtype:
        raise ValueError(f"query {query.dtype}, key {key.dtype}, value {value.dtype}: cast them to one dtype")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}: give a number above 0, or None for no cap")
    if sinks is not None and (sinks.shape != (heads,) or not sinks.is_floating_point()):
        raise ValueError(f"sinks are {_shape(sinks)} {sinks.dtype}: give one floating logit a query head, [{heads}]")
    tensors = [t for t in (query, key, value, mask, sinks, table) if t is not None]
    if any(tensor.device != query.device for tensor in tensors):
        places = ", ".join(str(tensor.device) for tensor in tensors)
        raise ValueError(f"tensors are on several devices ({places}): move them to that of the query")
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise ValueError("tree attention has no backward pass: call it under torch.no_grad(), or detach its inputs")


def _check_table(table: Tensor, batch: int, page: int) -> None:
    if table.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"the block table is {table.dtype}: give page numbers as torch.int32 or torch.int64")
    if table.dim() != 2 or table.shape[0] != batch or not table.numel():
        raise ValueError(f"the block table is {_shape(table)}: give [{batch}, pages of the longest sequence]")
    if page & (page - 1):
        raise ValueError(f"pages of {page} slots: give pages [P, Hk, slots, D] of a power of two of slots")


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))
