"""Token trees of static size, and the equal-growth tree (Yggdrasil, arXiv 2512.23858): always so many new nodes a step.

Shapes depend on numbers that the host chose, never on data: who is whose parent is data. Nothing here reads a tensor on
the host, so growth runs on a GPU without waiting.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DEAD = float("-inf")


@dataclass(frozen=True)
class TokenTree:
    """A tree of ``N`` tokens; parents come before their children.

    Node 0 is the root: the last token of the text, known but not yet in the KV cache. Dead nodes fill up a tree that
    has fewer tokens than its shape: their score is -inf, they hang on the root and are never accepted.

    Args:
        tokens: int64 ``[N]``. parents: int64 ``[N]``, -1 for the root. depths: int64 ``[N]``, 0 for the root.
        scores: float32 ``[N]``, sum of log-values along the path, 0 for the root.
        edges: float32 ``[N]``, the draft's own log-probability of the node given its parent, before any calibration.
        firsts: bool ``[N]``, whether the node is the draft's best child of its parent.
        ancestors: bool ``[N, N]``, row u marks u and its ancestors: the tree's attention mask.
    """

    tokens: Tensor
    parents: Tensor
    depths: Tensor
    scores: Tensor
    edges: Tensor
    firsts: Tensor
    ancestors: Tensor

    @staticmethod
    def from_paths(
        root: int,
        paths: Sequence[Sequence[int]],
        size: int,
        *,
        scores: Sequence[Sequence[float]] | None = None,
        device: torch.device | str = "cpu",
    ) -> TokenTree:
        """Merge paths that start below the root; made on the host.

        Args:
            root: its token. paths: tokens from depth 1 on; common beginnings become one. size: nodes in all; what does
                not fit is left out, what is missing is dead. scores: log-value of each step of each path (default 0);
                where paths share a node the first one's counts. device: of the tensors.
        """
        tokens, parents, depths, edges, total = [root], [-1], [0], [0.0], [0.0]
        children: dict[tuple[int, int], int] = {}
        for index, path in enumerate(paths):
            node = 0
            for step, token in enumerate(path):
                child = children.get((node, token))
                if child is None:
                    if len(tokens) == size:
                        break
                    edge = 0.0 if scores is None else scores[index][step]
                    child = children[node, token] = len(tokens)
                    tokens.append(token)
                    parents.append(node)
                    depths.append(depths[node] + 1)
                    edges.append(edge)
                    total.append(total[node] + edge)
                node = child
        missing = size - len(tokens)
        tokens += [0] * missing
        parents += [0] * missing
        depths += [1] * missing
        edges += [DEAD] * missing
        total += [DEAD] * missing
        ancestors = torch.eye(size, dtype=torch.bool)
        for node in range(1, size):
            ancestors[node] |= ancestors[parents[node]]
        ints = torch.tensor([tokens, parents, depths], device=device)
        floats = torch.tensor([total, edges], device=device)
        firsts = torch.zeros(size, dtype=torch.bool, device=device)
        return TokenTree(ints[0], ints[1], ints[2], floats[0], floats[1], firsts, ancestors.to(device))

    def to(self, device: torch.device) -> TokenTree:
        """The same tree on another device."""
        return TokenTree(*(t.to(device) for t in vars(self).values()))

    def select(self, ids: Tensor) -> TokenTree:
        """The subtree of these nodes.

        Args:
            ids: int64 ``[K]``, ascending, 0 first, with every node's parent among them.
        """
        count = len(ids)
        # Where each node of the old tree lies in the new one; a parent comes before its child, so its place is known.
        places = torch.zeros_like(self.parents).index_copy_(0, ids, torch.arange(count, device=ids.device))
        parents = places[self.parents[ids].clamp_min(0)]
        parents[0] = -1
        return TokenTree(
            self.tokens[ids], parents, self.depths[ids], self.scores[ids], self.edges[ids],
            self.firsts[ids], self.ancestors[ids][:, ids],
        )  # fmt: skip


class Growth:
    """Grows an equal-growth tree of ``1 + width * depth`` nodes: ``width`` new ones a step, the best of a global pool.

    The pool holds every candidate of every expanded node that was not taken yet, so a step may widen a shallow node as
    well as deepen the tree (brief A.3; EAGLE-2's pool is the last level only). Candidates are ranked by the sum of
    log-values along their path, ties go to the one that came first.

    Args:
        width: nodes a step, and rows of the draft's forward. depth: steps. device: of the tensors.
    """

    def __init__(self, width: int, depth: int, device: torch.device | str | None = None) -> None:
        if width < 1 or depth < 1:
            raise ValueError(f"a tree of width {width} and depth {depth} has no nodes: both must be at least 1")
        self.width, self.depth = width, depth
        size, pool = 1 + width * depth, width * (1 + width * (depth - 1))
        integers: dict[str, Any] = {"dtype": torch.long, "device": device}
        self._tokens = torch.zeros(size, **integers)
        self._parents = torch.zeros(size, **integers)
        self._depths = torch.zeros(size, **integers)
        self._scores = torch.zeros(size, device=device)
        self._edges = torch.zeros(size, device=device)
        self._firsts = torch.zeros(size, dtype=torch.bool, device=device)
        self._ancestors = torch.eye(size, dtype=torch.bool, device=device)
        self._eye = torch.eye(size, dtype=torch.bool, device=device)
        self._candidates = torch.full((size, width), -1, **integers)
        self._pool_scores = torch.full((pool,), DEAD, device=device)
        self._pool_edges = torch.full((pool,), DEAD, device=device)
        self._pool_tokens = torch.zeros(pool, **integers)
        self._pool_parents = torch.zeros(pool, **integers)
        self._ids = torch.arange(size, device=device)
        self.steps = 0

    def start(self, root: int | Tensor) -> None:
        """Begin anew.

        Args:
            root: the token, on the host or as int64 ``[]``.
        """
        self.steps = 0
        self._tokens[0] = root
        self._parents[0] = -1
        self._pool_scores.fill_(DEAD)
        self._candidates.fill_(-1)

    @property
    def frontier(self) -> Tensor:
        """Ids of the newest nodes, int64: those to run through the draft next."""
        if self.steps == 0:
            return self._ids[:1]
        last = 1 + self.width * self.steps
        return self._ids[last - self.width : last]

    @property
    def tree(self) -> TokenTree:
        """What has grown so far, as views that the next step writes behind."""
        size = 1 + self.width * self.steps
        return TokenTree(
            self._tokens[:size], self._parents[:size], self._depths[:size], self._scores[:size], self._edges[:size],
            self._firsts[:size], self._ancestors[:size, :size],
        )  # fmt: skip

    @property
    def candidates(self) -> Tensor:
        """The best children of each node in the order of the draft's ranks, int64 ``[N, width]``; -1: not expanded."""
        return self._candidates[: 1 + self.width * self.steps]

    def step(self, log_probabilities: Tensor, calibrate: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Add ``width`` nodes.

        Args:
            log_probabilities: float ``[n, V]``, of the draft after each node of the frontier. calibrate: from the
                draft's
                log-probabilities of candidates ``[n, k]`` in order of rank to the logs of how likely each is accepted,
                none above 0.

        Returns:
            Ids of the new nodes, int64 ``[width]``: the new frontier.

        Raises:
            RuntimeError: the tree is full.
        """
        if self.steps == self.depth:
            raise RuntimeError(f"the tree has its {self.depth} steps already: call start first")
        rows, width = self.frontier, self.width
        # A vocabulary smaller than the width leaves the rest of the row dead.
        count = min(width, log_probabilities.shape[1])
        edges, tokens = log_probabilities.float().topk(count, dim=1)
        values = edges if calibrate is None else calibrate(edges)
        base = 0 if self.steps == 0 else width * (1 + width * (self.steps - 1))
        place = slice(base, base + len(rows) * width)
        start = 0 if self.steps == 0 else 1 + width * (self.steps - 1)
        self._candidates[start : start + len(rows), :count] = tokens
        self._fill(place, rows, self._scores[rows][:, None] + values, edges, tokens, count)
        # Stable, so that equals go to the one that came first; topk promises nothing.
        best = self._pool_scores.sort(descending=True, stable=True).indices[:width]
        first = 1 + width * self.steps
        new = slice(first, first + width)
        parents = self._pool_parents[best]
        self._tokens[new], self._parents[new] = self._pool_tokens[best], parents
        self._scores[new], self._edges[new] = self._pool_scores[best], self._pool_edges[best]
        self._firsts[new] = best % width == 0
        dead = torch.isinf(self._scores[new])
        self._parents[new] = torch.where(dead, 0, parents)
        self._depths[new] = torch.where(dead, 1, self._depths[parents] + 1)
        self._ancestors[new] = self._ancestors[self._parents[new]] | self._eye[new]
        self._pool_scores[best] = DEAD
        self.steps += 1
        return self._ids[new]

    def _fill(self, place: slice, rows: Tensor, scores: Tensor, edges: Tensor, tokens: Tensor, count: int) -> None:
        shape = (len(rows), self.width)
        for pool, values in (
            (self._pool_scores, scores), (self._pool_edges, edges), (self._pool_tokens, tokens),
        ):  # fmt: skip
            pool[place].view(shape)[:, :count] = values.to(pool.dtype)
        self._pool_scores[place].view(shape)[:, count:] = DEAD
        self._pool_parents[place].view(shape).copy_(rows[:, None].expand(shape))
