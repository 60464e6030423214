"""A static cache cut into pages of an arena: what tests and benchmarks give to tree attention with a block table."""

from __future__ import annotations

import torch
from torch import Tensor, nn

SPARE_PAGES = 3
"""Pages of the arena that no sequence owns."""


def into_pages(
    key: Tensor, value: Tensor, mask: Tensor, page: int, seed: int = 0, dtype: torch.dtype = torch.int32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Copies keys and values into pages in random order; whatever tree attention must not read is NaN.

    Args:
        key: ``[B, Hk, C, D]``. value: ``[B, Hk, C, Dv]``. mask: bool ``[B or 1, 1, W, C]``.
        page: slots of a page. seed: of the order. dtype: of the table.

    Returns:
        Pages of keys ``[P, Hk, page, D]`` and of values ``[P, Hk, page, Dv]``, both views of one arena of which a page
        is one row, the mask filled up to whole pages, and the block table ``[B, N]``. NaN are the slots before the
        first and behind the last that any query attends to; pages of such slots alone are pages of nobody's.
    """
    batch, groups, slots, _ = key.shape
    fill = -slots % page
    number = (slots + fill) // page
    mask = nn.functional.pad(mask, (0, fill))
    seen = mask.any(dim=2).expand(batch, 1, -1).to(torch.int32)
    reach = (seen.cumsum(-1) > 0) & (seen.flip(-1).cumsum(-1) > 0).flip(-1)  # [B, 1, C]

    order = torch.randperm(batch * number + SPARE_PAGES, generator=torch.Generator().manual_seed(seed))
    owned, spare = order[:-SPARE_PAGES].view(batch, number).to(key.device), int(order[-1])
    sizes = [groups * page * each.shape[-1] for each in (key, value)]
    stride = -(-sum(sizes) // 256) * 256
    arena = torch.full((len(order), stride), torch.nan, dtype=key.dtype, device=key.device)
    pages = []
    for each, start, count in zip((key, value), (0, sizes[0]), sizes, strict=True):
        whole = nn.functional.pad(each, (0, 0, 0, fill)).masked_fill(~reach[..., None], torch.nan)
        view = arena[:, start : start + count].unflatten(1, (groups, page, each.shape[-1]))
        view[owned.flatten()] = whole.unflatten(2, (number, page)).transpose(1, 2).flatten(0, 1)
        pages.append(view)
    unread = ~reach.view(batch, number, page).any(dim=-1)
    return pages[0], pages[1], mask, owned.masked_fill(unread, spare).to(dtype)
