"""Other shapes of trees on our runtime: Sequoia's static tree and EAGLE-2's level beam with reranking.

Only the policy differs from Yggdrasil's: target, draft, KV caches, attention, verification and loop are the same. Their
trees are built on the host, as in the authors' own code: a host read a level, which a CPU does not feel and a GPU does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ygglight.engines.yggdrasil.drafts import ModelDraft
from ygglight.engines.yggdrasil.tree import TokenTree


@dataclass(frozen=True)
class Topology:
    """A tree known before the text: for each node its parent and its rank among the parent's children.

    Args:
        parents: -1 for the root, which is node 0; parents come first, level by level. ranks: 0 is the draft's best.
    """

    parents: tuple[int, ...]
    ranks: tuple[int, ...]

    @property
    def depths(self) -> list[int]:
        """Of the nodes."""
        found = [0]
        for parent in self.parents[1:]:
            found.append(found[parent] + 1)
        return found


def sequoia(rates: Sequence[float], nodes: int, depth: int) -> Topology:
    """The tree with the most expected tokens under positional acceptance (Sequoia, arXiv 2402.12374, section 3).

    Under positional acceptance a node is reached with the product of the rates along its path, which never grows
    downwards, so the best tree of n nodes holds the n most probable ones: taken one by one from a frontier.

    Args:
        rates: chance that the draft's candidate of each rank is the one, P(rank), highest first.
        nodes: in all, root included. depth: deepest.
    """
    ranked = sorted(rates, reverse=True)
    chosen: list[tuple[float, int, int, int]] = [(1.0, -1, 0, 0)]  # value, parent, rank, depth
    frontier = [(ranked[0], 0, 0, 1)]
    while frontier and len(chosen) < nodes:
        best = max(frontier, key=lambda node: node[0])
        frontier.remove(best)
        value, parent, rank, level = best
        own = len(chosen)
        chosen.append(best)
        if rank + 1 < len(ranked):
            frontier.append((chosen[parent][0] * ranked[rank + 1], parent, rank + 1, level))
        if level < depth:
            frontier.append((value * ranked[0], own, 0, level + 1))
    order = sorted(range(len(chosen)), key=lambda i: (chosen[i][3], i))
    place = {old: new for new, old in enumerate(order)}
    parents = tuple(-1 if i == 0 else place[chosen[i][1]] for i in order)
    return Topology(parents, tuple(chosen[i][2] for i in order))


class LevelDraft(ModelDraft):
    """A draft that runs some nodes of each level; the others have no keys and values of theirs.

    Args:
        model: the draft. vocabulary: of the target.
    """

    def __init__(self, model: nn.Module, vocabulary: int) -> None:
        super().__init__(model, vocabulary)
        self._tree: TokenTree | None = None
        self._slots: dict[int, int] = {}

    def _head_pass(self) -> Tensor:  # after the root, [V]
        assert self.decoder is not None
        self._slots = {0: -1}
        pending = torch.tensor(self._pending, device=self.decoder.device)
        return self._log_probabilities(self.decoder.append(pending).logits[0])[0]

    def _run_nodes(self, nodes: _Nodes, ids: list[int]) -> Tensor:
        """Log-probabilities after these nodes, ``[n, V]``."""
        assert self.decoder is not None
        first = len(self._slots) - 1
        for offset, node in enumerate(ids):
            self._slots[node] = first + offset
        mask = torch.zeros(len(ids), first + len(ids), dtype=torch.bool)
        for row, node in enumerate(ids):
            at = node
            while at > 0:
                mask[row, self._slots[at]] = True
                at = nodes.parents[at]
        tokens, depths = [nodes.tokens[i] for i in ids], [nodes.depths[i] - 1 for i in ids]
        numbers = torch.tensor([tokens, depths, range(first, first + len(ids))], device=self.decoder.device)
        step = self.decoder.nodes(numbers[0], numbers[1], numbers[2], mask.to(self.decoder.device))
        return self._log_probabilities(step.logits[0])

    def commit(self, path: Tensor, tokens: Sequence[int]) -> None:
        """Keep what was run of the accepted path."""
        assert self.decoder is not None
        slots = [self._slots[i] for i in path.tolist()[1:] if i in self._slots]
        self.decoder.keep(torch.tensor(slots, dtype=torch.long, device=self.decoder.device), len(slots))
        self._pending = list(tokens[len(slots) :])

    def ranks(self) -> Tensor | None:
        """Nothing is learnt from these trees."""
        return None


@dataclass
class _Nodes:
    tokens: list[int]
    parents: list[int]
    depths: list[int]
    scores: list[float]

    def add(self, token: int, parent: int, score: float) -> int:
        self.tokens.append(token)
        self.parents.append(parent)
        self.depths.append(self.depths[parent] + 1)
        self.scores.append(score)
        return len(self.tokens) - 1

    def tree(self) -> TokenTree:
        size = len(self.tokens)
        ancestors = torch.eye(size, dtype=torch.bool)
        for node in range(1, size):
            ancestors[node] |= ancestors[self.parents[node]]
        scores = torch.tensor(self.scores)
        parents = torch.tensor(self.parents)
        edges = scores - scores[parents.clamp_min(0)]
        return TokenTree(
            torch.tensor(self.tokens), parents, torch.tensor(self.depths), scores, edges,
            torch.zeros(size, dtype=torch.bool), ancestors,
        )  # fmt: skip


class StaticTreeDraft(LevelDraft):
    """Fills a fixed tree with the draft's best candidates.

    Args:
        model: the draft. vocabulary: of the target. topology: of the tree.
    """

    name = "static tree"

    def __init__(self, model: nn.Module, vocabulary: int, topology: Topology) -> None:
        super().__init__(model, vocabulary)
        self.topology = topology

    def grow(self, width: int, depth: int, calibrate: Any) -> TokenTree:
        """A pass a level, each over the nodes that have children."""
        shape, depths = self.topology, self.topology.depths
        nodes = _Nodes([self._pending[-1]], [-1], [0], [0.0])
        rows = {0: self._head_pass()}
        for level in range(1, max(depths) + 1):
            here = [i for i, d in enumerate(depths) if d == level]
            if level > depth or not here:
                break
            for i in here:
                # Equal for all: the whole tree is verified, so nothing is pruned by score.
                token = rows[shape.parents[i]].topk(shape.ranks[i] + 1).indices[-1]
                nodes.add(int(token), shape.parents[i], -float(level))
            inner = [i for i in here if i in shape.parents]
            if inner and level < depth:
                rows.update(zip(inner, self._run_nodes(nodes, inner), strict=True))
        return nodes.tree()


class LevelBeamDraft(LevelDraft):
    """EAGLE-2's tree (arXiv 2406.16858): each level expands its ``width`` best nodes; all candidates are reranked.

    The loop keeps the best ``verify`` of them: a parent is worth no less than its children, so that is a tree.
    """

    name = "level beam"

    def grow(self, width: int, depth: int, calibrate: Any) -> TokenTree:
        """A pass a level, each over the best candidates of the last level."""
        nodes = _Nodes([self._pending[-1]], [-1], [0], [0.0])
        frontier, scores = [0], self._head_pass()[None]
        for level in range(1, depth + 1):
            values, tokens = scores.topk(width, dim=1)
            new = []
            for row, parent in enumerate(frontier):
                for value, token in zip(values[row].tolist(), tokens[row].tolist(), strict=True):
                    new.append(nodes.add(token, parent, nodes.scores[parent] + value))
            frontier = sorted(sorted(new, key=lambda i: -nodes.scores[i])[:width])
            if level < depth:
                scores = self._run_nodes(nodes, frontier)
        return nodes.tree()
