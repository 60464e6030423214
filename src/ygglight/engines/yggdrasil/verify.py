"""Which nodes are accepted, given the token that the target draws at each (brief, traps 16 to 18).

One rule, exact for greedy and for sampled text: at a node draw ONE token from the target's processed distribution; if a
child holds it, descend, else stop. The drawn token is emitted either way, so the text is distributed as the target's
for any tree that does not depend on that draw. The rule ``min(1, p/q)`` of speculative sampling is NOT exact for trees
of top-k
candidates: these were not drawn from q. Nor is one block of random numbers reused from step to step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ygglight.engines.yggdrasil.tree import TokenTree


@dataclass(frozen=True)
class Accepted:
    """The accepted path, all of static shape, on the device.

    Args:
        count: int64 ``[]``, accepted drafted nodes: 0 to the depth of the tree. path: int64 ``[K]``, their ids, the
            root first, filled up with K. tokens: int64 ``[K]``, their tokens (without the root's) and the bonus token,
            filled up with -1. last: int64 ``[]``, id of the deepest accepted node. bonus: int64 ``[]``, the token drawn
            there.
    """

    count: Tensor
    path: Tensor
    tokens: Tensor
    last: Tensor
    bonus: Tensor


def accept(tree: TokenTree, drawn: Tensor) -> Accepted:
    """Walk the tree without the host.

    Args:
        tree: ``K`` nodes without siblings of the same token. drawn: int64 ``[K]``, what the target drew at each node.
    """
    size = len(drawn)
    ids = torch.arange(size, device=drawn.device)
    matches = (tree.tokens == drawn[tree.parents.clamp_min(0)]) & torch.isfinite(tree.scores)
    matches[0] = True
    # Accepted if every node on the path matches: no other node on it fails.
    accepted = ~(tree.ancestors & ~matches[None, :]).any(dim=1)
    count = accepted.sum() - 1
    path = torch.where(accepted, ids, size).sort().values
    last = torch.where(accepted, ids, -1).max()
    bonus = drawn[last]
    shifted = torch.cat([path[1:], path.new_full((1,), size)])
    tokens = torch.where(shifted < size, tree.tokens[shifted.clamp_max(size - 1)], -1)
    tokens = torch.where(ids == count, bonus, tokens)
    return Accepted(count, path, tokens, last, bonus)


@dataclass(frozen=True)
class Walked:
    """The accepted path, on the host: ids with the root first; tokens without the root's, the bonus token last."""

    path: list[int]
    tokens: list[int]


def walk(tokens: Sequence[int], parents: Sequence[int], draw: Callable[[int, list[int]], int]) -> Walked:
    """Walk the tree on the host, drawing at visited nodes only.

    Args:
        tokens: of the nodes. parents: of the nodes; -1 for the root; dead nodes must have been left out, or they could
            be taken for drafted ones. draw: (node, tokens of the path below the root) -> the token that the target
            draws.
    """
    children: dict[tuple[int, int], int] = {}
    for node in range(1, len(tokens)):
        children.setdefault((parents[node], tokens[node]), node)
    path, added = [0], list[int]()
    while True:
        token = draw(path[-1], added)
        added = [*added, token]
        child = children.get((path[-1], token))
        if child is None:
            return Walked(path, added)
        path.append(child)
