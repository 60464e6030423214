"""Decode attention under any mask in plain torch: the truth, and what runs on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn

CHUNK_BYTES = 1 << 20
"""Keys (or values) that are converted to float32 at once: they stay in the cache until the product has read them."""

SDPA_ROWS = 32
"""Rows (queries x heads of a group) from which torch's sdpa is taken on a CPU. Its time over that of the plain version
in float32 and bfloat16, with 512 and 4096 slots, 9 heads over 3 of size 64 and 32 over 8 of size 128, on one core of a
shared machine: 0.2 to 1.0 from 32 rows on, 0.6 to 0.9 at 12 to 24, 0.5 to 6 at 3 and 4. In float16 from 24 rows on 0.85
to 1.7: never taken."""


def tree_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """See :func:`ygglight.kernels.tree_attention.tree_attention`.

    The query heads of a group are folded into the rows of one product with their key head, so keys and values are read
    once and never repeated. Everything is in float32 (float64 for float64): scores rounded to bfloat16 are not enough
    for models with large ones (Qwen2.5: logits 38 % off). Keys and values of 16 bits are converted in chunks.
    """
    batch, heads, width, size = query.shape
    groups, slots = key.shape[1], key.shape[2]
    rows = heads // groups * width
    work = torch.promote_types(query.dtype, torch.float32)
    step = slots
    if key.dtype is not work:
        step = max(1, CHUNK_BYTES // (batch * groups * max(size, value.shape[-1]) * work.itemsize))
    folded = query.reshape(batch, groups, rows, size).to(work) * scale
    parts = [torch.matmul(folded, part.to(work).transpose(-1, -2)) for part in key.split(step, dim=2)]
    scores = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    del parts
    if softcap is not None:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    scores = scores.view(batch, groups, heads // groups, width, slots)
    hidden = ~mask[:, :, None]  # [B or 1, 1, 1, W, C]
    scores = scores.masked_fill_(hidden, -torch.inf)
    if sinks is None:
        weights = torch.softmax(scores, dim=-1)
    else:
        extra = sinks.to(scores.dtype).view(1, groups, heads // groups, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.softmax(torch.cat([scores, extra], dim=-1), dim=-1)[..., :-1]
    # A row that sees nothing is softmax(-inf, ...) = NaN, which would spread through the layers.
    weights = weights.masked_fill(hidden, 0.0).view(batch, groups, rows, slots)
    output = torch.zeros(batch, groups, rows, value.shape[-1], dtype=work, device=query.device)
    for part, share in zip(value.split(step, dim=2), weights.split(step, dim=3), strict=True):
        output += torch.matmul(share, part.to(work))
    return output.view(batch, heads, width, value.shape[-1]).to(query.dtype)


def gather_pages(key: Tensor, value: Tensor, mask: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of each sequence in one piece; slots that no query attends to are zero, whatever the pages hold.

    Args:
        key: pages ``[P, Hk, PAGE, D]``. value: pages ``[P, Hk, PAGE, Dv]``. mask: bool ``[B or 1, 1, W, N * PAGE]``.
        table: integers ``[B, N]``.

    Returns:
        Contiguous ``[B, Hk, N * PAGE, D]`` and ``[B, Hk, N * PAGE, Dv]`` in the dtype of the pages.
    """
    hidden = ~mask.any(dim=2).expand(table.shape[0], 1, -1)
    keys, values = (_in_one_piece(pages, table) for pages in (key, value))
    if keys.is_cpu and not torch.compiler.is_compiling():  # masked_fill_ on all takes thrice as long as the gathering
        for number, slots in enumerate(hidden):
            unread = slots[0].nonzero()[:, 0]
            keys[number].index_fill_(1, unread, 0)
            values[number].index_fill_(1, unread, 0)
        return keys, values
    return keys.masked_fill_(hidden[..., None], 0), values.masked_fill_(hidden[..., None], 0)


def _in_one_piece(pages: Tensor, table: Tensor) -> Tensor:
    # One index_select a sequence, and not one for all: its result, which must be turned, is then small (1.3 and 2.7 ms
    # for 17 and 34 MB on one core; one for all takes 1.6 and 29, one along the heads 17 and 46).
    _, groups, page, size = pages.shape
    dense = pages.new_empty(table.shape[0], groups, table.shape[1], page, size)
    for sequence, own in zip(dense, table, strict=True):
        sequence.copy_(pages.index_select(0, own).transpose(0, 1))
    return dense.flatten(2, 3)


def prefers_sdpa(query: Tensor, key: Tensor, value: Tensor, softcap: float | None, sinks: Tensor | None) -> bool:
    """Whether :func:`tree_attention_sdpa` can do the work and is measured to be the faster one.

    Args:
        query: See :func:`tree_attention_reference`, as for all others.
    """
    if softcap is not None or sinks is not None or query.shape[-1] != value.shape[-1]:
        return False
    if query.dtype not in (torch.float32, torch.bfloat16):
        return False
    return query.shape[1] // key.shape[1] * query.shape[2] >= SDPA_ROWS


def tree_attention_sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """The same by torch's scaled_dot_product_attention, for many queries; it keeps scores in float32 too.

    The query heads of a group are folded into rows here too: with ``enable_gqa`` torch repeats keys and values. Rows
    without any slot are zeroed here, for backends differ in what they give.
    """
    batch, heads, width, size = query.shape
    groups = key.shape[1]
    output = nn.functional.scaled_dot_product_attention(
        query.reshape(batch, groups, heads // groups * width, size),
        key,
        value,
        attn_mask=mask.repeat(1, 1, heads // groups, 1),
        scale=scale,
    )
    output = output.view(batch, heads, width, value.shape[-1])
    return output.masked_fill(~mask.any(dim=-1, keepdim=True), 0.0)
