"""Which drafted nodes to verify: the best subtree of every size at once (brief A.3, verify prune).

A node is worth the probability that it is accepted: that of its whole path. A child is never worth more than its
parent, so the k best nodes always form a subtree, and sorting replaces the paper's dynamic programme. Nothing reads on
the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ygglight.engines.yggdrasil.tree import TokenTree


def values(tree: TokenTree) -> Tensor:
    """How likely each node is accepted: float32 ``[N]``, 1 for the root, 0 for dead nodes."""
    return tree.scores.exp()


def order(values: Tensor) -> Tensor:
    """Node ids, the most valuable first, equals in the order of their ids: int64 ``[N]``.

    Every prefix holds the parents of its nodes: they are worth no less and have smaller ids.
    """
    return values.sort(descending=True, stable=True).indices


def expected(values: Tensor) -> Tensor:
    """Tokens that an iteration is expected to yield if the best k nodes are verified, k = 1..N: float32 ``[N]``.

    The root's 1 stands for the bonus token, which every iteration yields; so k = 1 is plain decoding with 1.0 tokens.
    """
    return values.sort(descending=True, stable=True).values.cumsum(0)


def keep(values: Tensor, count: int) -> Tensor:
    """Ids of the best ``count`` nodes, ascending: int64 ``[count]``."""
    return order(values)[:count].sort().values


def is_closed(tree: TokenTree, ids: Tensor) -> bool:
    """Whether every node of ``ids`` has its parent among them (for tests; reads on the host)."""
    return bool(torch.isin(tree.parents[ids[ids != 0]], ids).all())
