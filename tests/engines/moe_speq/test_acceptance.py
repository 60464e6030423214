"""Which drafted tokens stay: exact in distribution, by comparison with direct draws and with arithmetic (check 5)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ygglight.engines.decode.processors import NodeProcessors
from ygglight.engines.moe_speq.acceptance import ChainDrawing, accept_best, accept_drawn

VOCABULARY, DRAFTED, DRAWS = 32, 2, 12_000

Rule = Callable[[Tensor, Tensor, Tensor, torch.Generator], Tensor]


def chances(seed: int) -> Tensor:
    """The distribution after each token ``[V, V]``, some of it cut off as top-k does."""
    logits = 1.5 * torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed))
    return logits.masked_fill(logits < logits.topk(12).values[:, -1:], -torch.inf).softmax(-1)


P = chances(0)
Q = 0.5 * P.roll(1, 0) + 0.5 * chances(1)  # related to the target at most


def match_then_draw(p: Tensor, q: Tensor, drafted: Tensor, generator: torch.Generator) -> Tensor:
    """Trap 14: a drafted token stays by min(1, p/q), and a refused one is replaced by a draw from p, not the rest."""
    chance = torch.rand(len(drafted), generator=generator)
    stays = [float(chance[i] * q[i, d]) < float(p[i, d]) for i, d in enumerate(drafted.tolist())]
    count = [*stays, False].index(False)
    bonus = torch.multinomial(p[count], 1, generator=generator)
    tokens = torch.cat([drafted, bonus])
    tokens[count] = bonus
    return torch.cat([torch.tensor([count]), tokens])


def other_filter(p: Tensor, q: Tensor, drafted: Tensor, generator: torch.Generator) -> Tensor:
    """Trap 14: q as it was before the draft's temperature."""
    return accept_drawn(p, (q**0.5) / (q**0.5).sum(-1, keepdim=True), drafted, generator)


def texts(rule: Rule, seed: int) -> Tensor:
    """Texts of two tokens after token 0, ``[DRAWS, 2]``, each by as many cycles as it takes."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.zeros(DRAWS, 2, dtype=torch.long)
    first = torch.multinomial(Q[0], DRAWS, replacement=True, generator=generator)
    second = torch.multinomial(Q[first], 1, generator=generator)[:, 0]
    for text in range(DRAWS):
        drafted = torch.stack([first[text], second[text]])
        places = torch.stack([torch.tensor(0), *drafted])
        count, *tokens = rule(P[places], Q[places[:-1]], drafted, generator).tolist()
        if count == 0:
            tokens[1] = int(torch.multinomial(P[tokens[0]], 1, generator=generator))
        found[text] = torch.tensor(tokens[:2])
    return found


def distance(counts: Tensor, exact: Tensor) -> float:
    return float((counts.double() / counts.sum() - exact).abs().sum() / 2)


def band(exact: Tensor) -> float:
    """What 99 of 100 direct draws of the same size stay below."""
    generator = torch.Generator().manual_seed(5)
    direct = [torch.multinomial(exact, DRAWS, replacement=True, generator=generator) for _ in range(300)]
    return sorted(distance(drawn.bincount(minlength=VOCABULARY), exact) for drawn in direct)[-3]


def distances(rule: Rule, seed: int) -> list[float]:
    """Of the first and the second token to the exact distribution, in bands."""
    found = texts(rule, seed)
    exact = [P[0].double(), P[0].double() @ P.double()]
    return [
        distance(found[:, i].bincount(minlength=VOCABULARY), exact[i]) / band(exact[i].float().double())
        for i in range(2)
    ]


def test_sampled_text_has_the_targets_distribution() -> None:
    assert max(distances(accept_drawn, 3)) < 1


@pytest.mark.parametrize("wrong", [match_then_draw, other_filter])
def test_and_rules_that_are_nearly_right_have_not(wrong: Rule) -> None:
    assert max(distances(wrong, 3)) > 1.5


def test_a_token_is_accepted_with_the_mass_that_p_and_q_share() -> None:
    """Exactly: with q all in one place, and with p and q apart, nothing is left to chance."""
    generator = torch.Generator().manual_seed(0)
    drafted = torch.multinomial(Q[0], DRAWS, replacement=True, generator=generator)
    kept = sum(
        int(accept_drawn(P[[0, d]], Q[:1], torch.tensor([d]), generator)[0]) for d in drafted.tolist()
    )  # fmt: skip
    expected = float(torch.minimum(P[0], Q[0]).sum())
    assert abs(kept / DRAWS - expected) < 4 * (expected * (1 - expected) / DRAWS) ** 0.5
    one, other = torch.eye(4)[1], torch.eye(4)[2]
    for _ in range(50):
        assert accept_drawn(torch.stack([one, other]), one[None], torch.tensor([1])).tolist() == [1, 1, 2]
        assert accept_drawn(torch.stack([other, one]), one[None], torch.tensor([1])).tolist()[:2] == [0, 2]


def test_nothing_drafted_is_a_plain_draw() -> None:
    generator = torch.Generator().manual_seed(0)
    empty = torch.empty(0, dtype=torch.long)
    drawn = torch.tensor([accept_drawn(P[:1], Q[:0], empty, generator)[1] for _ in range(DRAWS)])
    assert distance(drawn.bincount(minlength=VOCABULARY), P[0].double()) < band(P[0].double())
    assert accept_best(torch.tensor([7]), empty).tolist() == [0, 7]


def test_equal_distributions_refuse_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(500):
        drafted = torch.multinomial(P[0], 1, generator=generator)
        assert int(accept_drawn(P[[0, 1]], P[:1], drafted, generator)[0]) == 1


def test_greedy_text_keeps_what_the_target_says() -> None:
    best = torch.tensor([5, 6, 7, 8])
    for drafted, expected in (([5, 6, 7], [3, 5, 6, 7, 8]), ([5, 9, 7], [1, 5, 6]), ([9, 6, 7], [0, 5])):
        verdict = accept_best(best, torch.tensor(drafted)).tolist()
        assert verdict[: len(expected)] == expected


# -- both distributions are processed alike ----------------------------------------------------------------------------
def processors(**settings: Any) -> NodeProcessors:
    import transformers

    kinds = {"temperature": "TemperatureLogitsWarper", "top_k": "TopKLogitsWarper"}
    kinds |= {"top_p": "TopPLogitsWarper", "penalty": "RepetitionPenaltyLogitsProcessor"}
    return NodeProcessors(
        transformers.LogitsProcessorList([getattr(transformers, kinds[name])(v) for name, v in settings.items()])
    )


def test_every_place_sees_its_own_prefix() -> None:
    drawing = ChainDrawing(processors(penalty=5.0), do_sample=False, generator=None)
    text, drafted = torch.tensor([3, 1]), torch.tensor([4, 2])
    logits = torch.zeros(3, 6)
    logits[:, :5] = torch.tensor([5.0, 9.0, 4.0, 8.0, 6.0])  # 1 and 3 are penalised everywhere, 4 and 2 once they came
    assert drawing.verify(logits, text, drafted, None).tolist()[1:] == [4, 0, 0]
    token, q = drawing.draft(logits[0], text, [])
    assert token.tolist() == [4] and q is None
    assert drawing.draft(logits[0], text, [token])[0].tolist() == [0]


def test_drafts_are_drawn_from_what_they_are_said_to_be_drawn_from() -> None:
    generator = torch.Generator().manual_seed(0)
    drawing = ChainDrawing(processors(temperature=0.7, top_k=5, top_p=0.9), do_sample=True, generator=generator)
    logits = torch.randn(VOCABULARY, generator=generator)
    text = torch.tensor([1])
    drawn = []
    for _ in range(4000):
        token, q = drawing.draft(logits, text, [])
        drawn.append(int(token))
    assert q is not None and int((q > 0).sum()) <= 5
    exact = drawing.processors.row(logits, text).softmax(-1)
    assert torch.allclose(q, exact)
    assert distance(torch.tensor(drawn).bincount(minlength=VOCABULARY), exact.double()) < 0.03
