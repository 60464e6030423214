"""The draft that copies: what it finds in a text, against a search without an index; and what can be a draft at all."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from ygglight.engines.yggdrasil.drafts import LookupDraft, ModelDraft, check_vocabulary, make_draft
from ygglight.engines.yggdrasil.tree import TokenTree

from .conftest import llama

Path = tuple[int, ...]


def started(text: Sequence[int], **options: int) -> LookupDraft:
    draft = LookupDraft(**options)
    draft.start(text, capacity=0, temperature=1.0)
    return draft


def live(tree: TokenTree) -> list[int]:
    return [node for node in range(1, len(tree.tokens)) if tree.scores[node] > float("-inf")]


def path_to(tree: TokenTree, node: int) -> Path:
    path: list[int] = []
    while node > 0:
        path.append(int(tree.tokens[node]))
        node = int(tree.parents[node])
    return tuple(reversed(path))


def nodes(tree: TokenTree) -> list[Path]:
    """Every drafted text, shortest ones too, in the order of the nodes."""
    return [path_to(tree, node) for node in live(tree)]


def beginnings(*paths: Sequence[int]) -> set[Path]:
    return {tuple(path[:end]) for path in paths for end in range(1, len(path) + 1)}


def by_search(text: Sequence[int], width: int, depth: int, longest: int = 5, shortest: int = 2) -> list[list[int]]:
    """Continuations of earlier occurrences of the last tokens: of longer matches first, then of newer ones."""
    found: list[list[int]] = []
    for n in range(longest, shortest - 1, -1):
        suffix = list(text[len(text) - n :]) if n <= len(text) else None
        for after in range(len(text) - 1, n - 1, -1):
            if list(text[after - n : after]) == suffix and len(found) < width:
                path = list(text[after : after + depth])
                if tuple(path) not in beginnings(*found):
                    found.append(path)
    return found


# -- by hand ---------------------------------------------------------------------------------------------------------
def test_what_followed_is_copied() -> None:
    tree = started([7, 8, 1, 2, 3, 4, 9, 1, 2]).grow(1, 3, None)
    assert int(tree.tokens[0]) == 2, "the root is the last token of the text"
    assert nodes(tree) == [(3,), (3, 4), (3, 4, 9)] and len(tree.tokens) == 1 + 1 * 3


def test_the_longest_match_wins_over_a_newer_one() -> None:
    text = [5, 1, 2, 3, 9, 1, 2, 4, 9, 5, 1, 2]  # 5 1 2 -> 3; the newer 1 2 -> 4
    assert nodes(started(text).grow(1, 1, None)) == [(3,)]
    assert nodes(started(text, longest=2).grow(1, 1, None)) == [(4,)]


def test_of_equal_matches_the_newest_wins() -> None:
    assert nodes(started([1, 2, 3, 9, 1, 2, 4, 8, 1, 2]).grow(1, 1, None)) == [(4,)]


def test_branches_are_merged_to_a_tree() -> None:
    text = [1, 2, 3, 4, 9, 1, 2, 3, 5, 8, 1, 2, 6, 7, 1, 2]
    tree = started(text).grow(4, 3, None)
    assert set(nodes(tree)) == beginnings([6, 7, 1], [3, 5, 8], [3, 4, 9])
    assert tree.tokens.tolist().count(3) == 1, "a common beginning is one node"
    for node, parent in enumerate(tree.parents.tolist()):
        assert parent < node and bool(tree.ancestors[node, max(0, parent)])
    assert set(nodes(started(text).grow(2, 3, None))) == beginnings([6, 7, 1], [3, 5, 8]), "the newest two"


@pytest.mark.parametrize("text", [[4], [4, 4], [1, 2, 3, 4], [1, 2, 3, 1], [2, 1, 3, 1, 4, 1]])
def test_without_a_match_there_is_the_root_alone(text: list[int]) -> None:
    tree = started(text).grow(3, 4, None)
    assert live(tree) == [] and int(tree.tokens[0]) == text[-1]
    assert len(tree.tokens) == 1 + 3 * 4, "the shape does not depend on the text"


def test_a_match_that_runs_off_the_end_drafts_what_there_is() -> None:
    assert nodes(started([1, 2, 1, 2]).grow(1, 5, None)) == [(1,), (1, 2)]
    assert nodes(started([3, 3, 3]).grow(2, 5, None)) == [(3,)]
    # Each older match is a token longer: the branches make up one chain.
    assert nodes(started([3] * 9).grow(4, 4, None)) == [(3,), (3, 3), (3, 3, 3), (3, 3, 3, 3)]


# -- against a search ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("longest", "shortest"), [(5, 2), (3, 1), (2, 2)])
def test_any_text_that_grows_in_any_way(longest: int, shortest: int) -> None:
    branched = deep = empty = 0
    for seed in range(150):
        rng = random.Random(seed)
        letters = rng.choice([2, 3, 5, 12])
        text = [rng.randrange(letters) for _ in range(rng.randrange(1, 30))]
        draft = started(text, longest=longest, shortest=shortest)
        for _ in range(6):
            width, depth = rng.randrange(1, 5), rng.randrange(1, 6)
            tree = draft.grow(width, depth, None)
            expected = by_search(text, width, depth, longest, shortest)
            assert set(nodes(tree)) == beginnings(*expected), (text, width, depth)
            assert len(nodes(tree)) == len(set(nodes(tree))) and len(tree.tokens) == 1 + width * depth
            branched += len(expected) > 1
            deep += any(len(path) > 2 for path in expected)
            empty += not expected
            new = [rng.randrange(letters) for _ in range(rng.randrange(1, 4))]
            if rng.random() < 0.5:
                draft.extend(new)
            else:
                draft.commit(torch.zeros(1, dtype=torch.long), new)
            text += new
    assert min(branched, deep) > 100 and empty > 20, "the texts must be able to show a difference"


def test_a_new_text_forgets_the_last_one() -> None:
    draft = started([1, 2, 3, 4, 1, 2])
    assert live(draft.grow(1, 2, None))
    draft.start([9, 1, 2], capacity=0, temperature=1.0)
    assert not live(draft.grow(1, 2, None))


# -- how sure it is --------------------------------------------------------------------------------------------------
def test_scores_are_chances_along_the_path() -> None:
    tree = started([5, 1, 2, 3, 4, 6, 7, 9, 1, 2, 4, 9, 5, 1, 2]).grow(2, 4, None)
    score = {path_to(tree, node): float(tree.scores[node]) for node in live(tree)}
    for path, value in score.items():
        assert value < score.get(path[:-1], 0.0), "every further token costs"
    assert score[3,] > score[4,], "the longer match is the safer one"
    edges = [float(tree.edges[node]) for node in live(tree) if path_to(tree, node)[0] == 3]
    assert edges == sorted(edges), "every token that goes well lengthens the match"


def test_it_learns_how_often_copies_are_right() -> None:
    text = [1, 2, 3, 4, 1, 2]

    def first(draft: LookupDraft) -> float:
        draft.start(text, capacity=0, temperature=1.0)
        return float(draft.grow(1, 1, None).scores[1])

    good, bad = LookupDraft(), LookupDraft()
    before = first(good)
    root = torch.zeros(1, dtype=torch.long)
    for _ in range(20):
        first(good), first(bad)
        good.commit(root, [3, 5])  # what was drafted, and a bonus token
        bad.commit(root, [4])
    assert first(bad) < before - 0.5 and before < first(good) < 0
    after = first(good)
    good.start([8, 9], capacity=0, temperature=1.0)
    good.grow(1, 1, None)
    good.commit(root, [9])  # nothing was drafted: nothing to learn
    assert first(good) == after


def test_a_periodic_text_is_foreseen_as_deep_as_asked() -> None:
    period = [4, 8, 15, 16, 23, 42]
    target = period * 12
    draft, end, rounds = started(target[:8]), 8, 0
    while end < 60:
        tree = draft.grow(2, 4, None)
        accepted = max((len(path) for path in nodes(tree) if path == tuple(target[end : end + len(path)])), default=0)
        assert accepted >= min(4, end - len(period)), "all that the period foretells"
        draft.commit(torch.arange(accepted + 1), target[end : end + accepted + 1])
        end, rounds = end + accepted + 1, rounds + 1
    assert rounds <= 13


# -- what can be a draft ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("lengths", [(2, 3), (3, 0)])
def test_match_lengths_that_cannot_be(lengths: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="do not make a range"):
        LookupDraft(*lengths)


def test_drafts_by_name_by_model_and_by_method() -> None:
    lookup = make_draft("lookup", 97)
    assert isinstance(lookup, LookupDraft) and lookup.costs_nothing and not lookup.needs_model
    assert lookup.ranks() is None
    assert isinstance(make_draft(llama(), 97), ModelDraft)
    assert make_draft(lookup, 97) is lookup
    for wrong in ("smollm2", None, 3):
        with pytest.raises(TypeError, match="neither 'lookup' nor a causal language model"):
            make_draft(wrong, 97)


@pytest.mark.parametrize(
    ("size", "vocabulary", "fits"),
    [(97, 97, True), (97, 96, False), (32000, 32000, True), (152064, 151936, True), (32000, 49152, False)],
)
def test_vocabularies_may_differ_by_padding_only(size: int, vocabulary: int, fits: bool) -> None:
    class Configured(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config: Any = llama().config
            self.config.vocab_size = size

    if fits:
        check_vocabulary(Configured(), vocabulary)
    else:
        with pytest.raises(ValueError, match=rf"{size} tokens, the target of {vocabulary}.*fit_draft\.yaml"):
            check_vocabulary(Configured(), vocabulary)
