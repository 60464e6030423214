"""The equal-growth tree and its pruning: checks A11 and A12 of the brief, against a heap and against brute force."""

from __future__ import annotations

import heapq
import itertools

import pytest
import torch
from torch import Tensor

from ygglight.engines.yggdrasil import prune
from ygglight.engines.yggdrasil.tree import Growth, TokenTree


def table(seed: int, vocabulary: int, coarse: bool = False) -> Tensor:
    """Log-probabilities after each token; coarse ones are full of ties."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(vocabulary, vocabulary, generator=generator) * 2
    return torch.log_softmax(logits.round() if coarse else logits, dim=-1)


def grown(q: Tensor, width: int, depth: int, root: int = 0) -> Growth:
    growth = Growth(width, depth)
    growth.start(root)
    for _ in range(depth):
        growth.step(q[growth.tree.tokens[growth.frontier]])
    return growth


def by_heap(q: Tensor, width: int, depth: int, root: int = 0) -> list[tuple[int, int, float]]:
    """(token, parent, score) of each node, by the rule in words: the best of all candidates that nobody took."""
    nodes, pool, count = [(root, -1, 0.0)], [], 0
    frontier = [0]
    for _ in range(depth):
        for node in frontier:
            values, tokens = q[nodes[node][0]].topk(min(width, q.shape[1]))
            for value, token in zip(values.tolist(), tokens.tolist(), strict=True):
                score = float(torch.tensor(nodes[node][2]) + torch.tensor(value))
                heapq.heappush(pool, (-score, count, token, node))
                count += 1
            count += width - min(width, q.shape[1])
        frontier = []
        for _ in range(width):
            if pool:
                score, _, token, parent = heapq.heappop(pool)
                frontier.append(len(nodes))
                nodes.append((token, parent, -score))
    return nodes


@pytest.mark.parametrize(("width", "depth"), [(1, 1), (1, 6), (2, 3), (4, 4), (8, 3)])
@pytest.mark.parametrize("coarse", [False, True])
def test_growth_is_that_of_a_heap(width: int, depth: int, coarse: bool) -> None:
    for seed in range(8):
        q = table(seed, 23, coarse)
        tree = grown(q, width, depth).tree
        expected = by_heap(q, width, depth)
        assert tree.tokens.tolist() == [node[0] for node in expected]
        assert tree.parents.tolist() == [node[1] for node in expected]
        assert torch.allclose(tree.scores, torch.tensor([node[2] for node in expected]), atol=1e-5)


@pytest.mark.parametrize(("width", "depth"), [(1, 6), (3, 4), (8, 3)])
def test_invariants(width: int, depth: int) -> None:
    growth = Growth(width, depth)
    q = table(0, 50)
    growth.start(7)
    for step in range(1, depth + 1):
        new = growth.step(q[growth.tree.tokens[growth.frontier]])
        tree = growth.tree
        assert len(new) == width and len(tree.tokens) == 1 + width * step
        assert torch.equal(new, growth.frontier)
        assert (tree.parents[1:] < torch.arange(1, len(tree.tokens))).all()
        assert (tree.depths[1:] == tree.depths[tree.parents[1:]] + 1).all()
        assert (tree.scores[1:] <= tree.scores[tree.parents[1:]]).all()
        siblings = list(zip(tree.parents[1:].tolist(), tree.tokens[1:].tolist(), strict=True))
        assert len(set(siblings)) == len(siblings), "two siblings hold one token"
        for node, parent in enumerate(tree.parents.tolist()):
            expected = set() if parent < 0 else set(tree.ancestors[parent].nonzero().flatten().tolist())
            assert set(tree.ancestors[node].nonzero().flatten().tolist()) == expected | {node}
    with pytest.raises(RuntimeError, match="start"):
        growth.step(q[:width])


def test_a_growth_can_be_used_again() -> None:
    q, other = table(0, 30), table(1, 30)
    growth = grown(other, 3, 4, root=5)
    growth.start(0)
    for _ in range(4):
        growth.step(q[growth.tree.tokens[growth.frontier]])
    fresh = grown(q, 3, 4)
    for a, b in zip(vars(growth.tree).values(), vars(fresh.tree).values(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(growth.candidates, fresh.candidates)


def test_candidates_are_the_best_children_in_order_and_firsts_the_best() -> None:
    q = table(2, 30)
    growth = grown(q, 4, 3)
    tree = growth.tree
    for node, row in enumerate(growth.candidates.tolist()):
        if node < 1 + 4 * 2:
            assert row == q[tree.tokens[node]].topk(4).indices.tolist()
        else:
            assert row == [-1] * 4
    for node in range(1, len(tree.tokens)):
        best = int(q[tree.tokens[tree.parents[node]]].argmax())
        assert bool(tree.firsts[node]) == (int(tree.tokens[node]) == best)


def test_a_vocabulary_smaller_than_the_width_leaves_dead_nodes() -> None:
    tree = grown(table(0, 3), 5, 2).tree
    dead = torch.isinf(tree.scores)
    assert int(dead.sum()) == 2, "the root has three children only"
    assert (tree.parents[dead] == 0).all()
    assert prune.values(tree)[dead].eq(0).all()


def test_calibration_is_applied_to_edges_and_kept_apart() -> None:
    q = table(0, 30)
    growth = Growth(3, 2)
    growth.start(0)
    for _ in range(2):
        growth.step(q[growth.tree.tokens[growth.frontier]], lambda edges: edges * 2)
    tree = growth.tree
    edges = q[tree.tokens[tree.parents[1:]], tree.tokens[1:]]
    assert torch.allclose(tree.edges[1:], edges)
    assert torch.allclose(tree.scores[1:], tree.scores[tree.parents[1:]] + 2 * edges, atol=1e-5)


def test_paths_are_merged() -> None:
    tree = TokenTree.from_paths(9, [[1, 2, 3], [1, 2, 4], [5]], 8, scores=[[-0.1, -0.2, -0.3], [-9, -9, -0.4], [-1.0]])
    assert tree.tokens.tolist() == [9, 1, 2, 3, 4, 5, 0, 0]
    assert tree.parents.tolist() == [-1, 0, 1, 2, 2, 0, 0, 0]
    assert tree.depths.tolist()[:6] == [0, 1, 2, 3, 3, 1]
    assert torch.allclose(tree.scores[:6], torch.tensor([0, -0.1, -0.3, -0.6, -0.7, -1.0]))
    assert torch.isinf(tree.scores[6:]).all()
    assert len(TokenTree.from_paths(9, [[1, 2, 3]], 3).tokens) == 3, "what does not fit is left out"


def test_select_keeps_the_shape_of_the_subtree() -> None:
    tree = grown(table(3, 40), 4, 4).tree
    ids = prune.keep(prune.values(tree), 7)
    part = tree.select(ids)
    assert part.parents[0] == -1
    for new, old in enumerate(ids.tolist()):
        assert part.tokens[new] == tree.tokens[old]
        if new:
            assert ids[part.parents[new]] == tree.parents[old]
    assert torch.equal(part.ancestors, tree.ancestors[ids][:, ids])


def random_tree(seed: int, size: int) -> TokenTree:
    """Any shape, ties and zeros among the values."""
    generator = torch.Generator().manual_seed(seed)
    parents = [-1] + [int(torch.randint(0, node, (1,), generator=generator)) for node in range(1, size)]
    scores = [0.0]
    for node in range(1, size):
        edge = float(torch.randint(0, 4, (1,), generator=generator)) * -0.5
        scores.append(scores[parents[node]] + edge)
    ancestors = torch.eye(size, dtype=torch.bool)
    depths = [0] * size
    for node in range(1, size):
        ancestors[node] |= ancestors[parents[node]]
        depths[node] = depths[parents[node]] + 1
    numbers = torch.tensor(scores)
    firsts = torch.zeros(size, dtype=torch.bool)
    return TokenTree(
        torch.arange(size), torch.tensor(parents), torch.tensor(depths), numbers, numbers, firsts, ancestors
    )


def test_pruning_finds_the_best_subtree_of_every_size() -> None:
    for seed in range(30):
        size = 4 + seed % 7
        tree = random_tree(seed, size)
        values = prune.values(tree)
        sums = prune.expected(values)
        for count in range(1, size + 1):
            ids = prune.keep(values, count)
            assert prune.is_closed(tree, ids) and len(ids) == count and ids[0] == 0
            best = max(
                float(values[list(chosen)].sum())
                for chosen in itertools.combinations(range(size), count)
                if prune.is_closed(tree, torch.tensor(chosen)) and 0 in chosen
            )
            assert float(values[ids].sum()) == pytest.approx(best)
            assert float(sums[count - 1]) == pytest.approx(best)


def test_the_root_alone_is_one_token() -> None:
    assert prune.expected(prune.values(random_tree(0, 5)))[0] == 1.0


@pytest.mark.parametrize(("width", "depth"), [(0, 3), (3, 0)])
def test_impossible_sizes(width: int, depth: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Growth(width, depth)
