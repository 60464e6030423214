"""Tokens are drawn from the distribution that a request asked for, whoever its neighbours are."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ygglight.engines.decode.sampling import Sampler, SamplingParams, sample_rows


def tokens(logits: torch.Tensor, samplers: list[Sampler]) -> list[int | None]:
    return [None if choice is None else choice.token for choice in sample_rows(logits, samplers)]


def greedy(**changes: Any) -> SamplingParams:
    return SamplingParams(temperature=0, **changes)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0), ("temperature", -0.1), ("temperature", float("nan")), ("top_p", 0.0), ("top_p", 1.1),
        ("top_k", -1), ("min_p", 1.5), ("frequency_penalty", 2.5), ("presence_penalty", -2.5),
        ("repetition_penalty", 0.0), ("seed", -1), ("stop", ("a", "")), ("stop", "ab"), ("logprobs", -1),
    ],
)  # fmt: skip
def test_values_out_of_range_are_named(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{field}="):
        SamplingParams(**{field: value})


def test_greedy_takes_the_first_of_the_likeliest() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [2.0, 2.0, 2.0, 2.0]])
    assert tokens(logits, [Sampler(greedy()), Sampler(greedy())]) == [1, 0]


def test_rows_are_left_as_they_are() -> None:
    logits = torch.randn(2, 8)
    before = logits.clone()
    sample_rows(logits, [Sampler(SamplingParams(repetition_penalty=3.0), [1, 2]), Sampler(SamplingParams(top_k=2))])
    assert torch.equal(logits, before)


def test_samplers_and_rows_must_match() -> None:
    with pytest.raises(ValueError, match="1 samplers for 2 rows"):
        sample_rows(torch.zeros(2, 4), [Sampler(greedy())])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_spoils_no_other(bad: float) -> None:
    logits = torch.tensor([[0.0, 1.0, 0.0], [0.0, bad, 0.0], [5.0, 1.0, 0.0]])
    samplers = [Sampler(SamplingParams(seed=1, top_k=1)), Sampler(SamplingParams(seed=1)), Sampler(greedy())]
    assert tokens(logits, samplers) == [1, None, 0]
    assert not samplers[1].counts


def test_frequency_and_presence_penalties_count_what_was_generated() -> None:
    logits = torch.tensor([[2.0, 1.5, 1.2]])
    sampler = Sampler(greedy(frequency_penalty=0.2, presence_penalty=0.25), prompt=[0, 0, 0])
    # Of token 0: 2.0, 2.0 - 0.45 = 1.55, then 1.35 < 1.5; of token 1 then 1.5 - 0.45 = 1.05 < 1.35.
    assert [tokens(logits, [sampler])[0] for _ in range(4)] == [0, 0, 1, 0]


def test_repetition_penalty_is_transformers_own_over_prompt_and_output() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    torch.manual_seed(4)
    prompt, penalty = [1, 5, 5, 9], 1.7
    sampler = Sampler(greedy(repetition_penalty=penalty), prompt)
    text = list(prompt)
    for _ in range(12):
        logits = torch.randn(1, 12)
        scores = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([text]), logits.clone())
        assert tokens(logits, [sampler]) == [int(scores.argmax())]
        text.append(int(scores.argmax()))
    assert len(set(text)) > 5


def draws(logits: torch.Tensor, params: SamplingParams, count: int) -> torch.Tensor:
    """Relative frequencies of ``count`` tokens."""
    sampler = Sampler(params)
    found = torch.zeros(logits.shape[-1])
    for _ in range(count):
        token = tokens(logits, [sampler])[0]
        assert token is not None
        found[token] += 1
    return found / count


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 3},
        {"top_p": 0.8},
        {"min_p": 0.2},
        {"temperature": 2.0, "top_k": 4, "top_p": 0.9},
    ],
)
def test_draws_follow_transformers_warped_distribution(settings: dict[str, Any]) -> None:
    from transformers import (
        GenerationConfig,
        LogitsProcessorList,
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    logits = torch.tensor([[1.5, 1.0, 0.5, 0.0, -0.5, -1.0]])
    config = GenerationConfig(**{"top_k": 0} | settings)
    warpers = LogitsProcessorList()
    for name, kind in (
        ("temperature", TemperatureLogitsWarper), ("top_k", TopKLogitsWarper),
        ("top_p", TopPLogitsWarper), ("min_p", MinPLogitsWarper),
    ):  # fmt: skip
        if name in settings:
            warpers.append(kind(getattr(config, name)))
    expected = warpers(None, logits.clone()).softmax(-1)[0]
    count = 1500
    found = draws(logits, SamplingParams(seed=7, **settings), count)
    assert bool((found[expected == 0] == 0).all())
    distance = float((found - expected).abs().sum()) / 2
    assert distance < 0.04  # a sample of 1,500 over 6 tokens is 0.02 off on average
    # The control: a distribution that another temperature makes is told apart.
    other = (warpers(None, logits.clone()) * 1.4).softmax(-1)[0]
    assert float((other - expected).abs().sum()) / 2 > 0.04


def test_a_seed_repeats_whatever_is_beside_it() -> None:
    torch.manual_seed(0)
    steps = [torch.randn(4, 50) for _ in range(10)]
    params = SamplingParams(seed=11, temperature=1.3, top_p=0.95)

    def texts(rows: list[SamplingParams]) -> list[list[int | None]]:
        samplers = [Sampler(row) for row in rows]
        return [tokens(step[: len(rows)], samplers) for step in steps]

    alone = [row[0] for row in texts([params])]
    crowd = [SamplingParams(seed=11, temperature=1.3, top_p=0.95), SamplingParams(), SamplingParams(seed=3), greedy()]
    assert [row[0] for row in texts(crowd)] == alone
    assert [row[0] for row in texts([SamplingParams(seed=12, temperature=1.3, top_p=0.95)])] != alone
    assert len(set(alone)) > 3


def test_without_a_seed_texts_differ_and_global_random_numbers_are_not_drawn() -> None:
    logits = torch.zeros(2, 1000)
    state = torch.random.get_rng_state()
    samplers = [Sampler(SamplingParams()), Sampler(SamplingParams())]
    found = [tokens(logits, samplers) for _ in range(4)]
    assert [row[0] for row in found] != [row[1] for row in found]
    assert torch.equal(torch.random.get_rng_state(), state)


def test_logprobs_are_the_models_own() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, -1.0]], dtype=torch.bfloat16)
    sampler = Sampler(greedy(logprobs=2, presence_penalty=2.0))
    first, second = (sample_rows(logits, [sampler])[0] for _ in range(2))
    assert first is not None and second is not None
    assert (first.token, second.token) == (1, 2)  # 1 pays 2.0, so 2 leads
    truth = logits.float().log_softmax(-1)[0]
    assert first.logprobs is not None and second.logprobs is not None
    assert second.logprobs.chosen == pytest.approx(float(truth[2]))
    assert [token for token, _ in second.logprobs.top] == [1, 2]
    assert second.logprobs.top[0][1] == pytest.approx(float(truth[1]))
    assert sample_rows(logits, [Sampler(greedy())])[0].logprobs is None  # type: ignore[union-attr]
