"""Processors over nodes give what transformers gives to each node's prefix by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import logits_process as hf
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, StoppingCriteria

from ygglight.engines.decode.processors import NodeProcessors, unknown
from ygglight.engines.decode.stopping import Stopping

VOCABULARY = 40
EOS = torch.tensor([3, 7])
EACH: dict[str, list[Any]] = {
    "temperature": [hf.TemperatureLogitsWarper(0.7)],
    "top k": [hf.TopKLogitsWarper(5)],
    "top p": [hf.TopPLogitsWarper(0.8)],
    "min p": [hf.MinPLogitsWarper(0.1)],
    "typical": [hf.TypicalLogitsWarper(0.9)],
    "repetition": [hf.RepetitionPenaltyLogitsProcessor(1.7)],
    "min length": [hf.MinLengthLogitsProcessor(10, EOS, device="cpu")],
    "min new tokens": [hf.MinNewTokensLengthLogitsProcessor(6, 4, EOS, device="cpu")],
    "forced end": [hf.ForcedEOSTokenLogitsProcessor(10, EOS, device="cpu")],
    "no repeated pair": [hf.NoRepeatNGramLogitsProcessor(2)],
    "no repeated triple": [hf.NoRepeatNGramLogitsProcessor(3)],
    "suppressed": [hf.SuppressTokensLogitsProcessor([1, 2], device="cpu")],
    "many": [
        hf.RepetitionPenaltyLogitsProcessor(1.3), hf.NoRepeatNGramLogitsProcessor(2), hf.TemperatureLogitsWarper(1.3),
        hf.TopKLogitsWarper(20), hf.TopPLogitsWarper(0.9),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", EACH)
def test_all_rows_at_once_are_each_row_by_itself(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    processors = NodeProcessors(LogitsProcessorList(EACH[name]))
    lengths = [7, 8, 9, 9, 10, 12]
    # Few tokens, so that pairs and triples do come again.
    rows = [torch.randint(0, 4, (n,), generator=generator) for n in lengths]
    longest = max(lengths)
    prefixes = torch.stack([torch.cat([row.new_full((longest - len(row),), -1), row]) for row in rows])
    scores = torch.randn(len(rows), VOCABULARY, generator=generator)
    kept = scores.clone()
    found = processors.rows(scores, prefixes, torch.tensor(lengths))
    changed = False
    for index, row in enumerate(rows):
        expected = LogitsProcessorList(EACH[name])(row[None], scores[index : index + 1].clone())[0]
        assert torch.equal(found[index], expected)
        assert torch.equal(processors.row(scores[index], row), expected)
        changed |= not torch.equal(expected, scores[index])
    assert changed, "the processor did nothing, so nothing was shown"
    assert torch.equal(scores, kept), "the model's logits were changed in place"


def test_what_is_not_known_is_named() -> None:
    class Mine(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            return scores

    class Tuned(hf.TopKLogitsWarper):
        pass

    processors = LogitsProcessorList(
        [hf.TopKLogitsWarper(3), Mine(), Tuned(3), hf.RepetitionPenaltyLogitsProcessor(1.2, prompt_ignore_length=3)]
    )
    assert unknown(processors) == ["Mine", "Tuned", "RepetitionPenaltyLogitsProcessor(prompt_ignore_length)"]
    with pytest.raises(ValueError, match="Mine"):
        NodeProcessors(processors)


class Asks(StoppingCriteria):
    """Ends after token 5, and notes what it was shown."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.seen.append(input_ids[0].tolist())
        return input_ids[:, -1] == 5


def test_where_a_text_ends() -> None:
    stopping = Stopping([MaxLengthCriteria(8), EosTokenCriteria(EOS)])
    assert (stopping.max_length, stopping.ends) == (8, {3, 7})
    assert stopping.cut([1, 1], [2, 2]) == (2, False)
    assert stopping.cut([1, 1], [2, 7, 2]) == (2, True)
    assert stopping.cut([1] * 6, [2, 2, 2]) == (2, True)
    asks = Asks()
    assert Stopping([asks]).cut([1, 2], [4, 5, 6]) == (2, True)
    assert asks.seen == [[1, 2, 4], [1, 2, 4, 5]], "every token is asked for, with the prefix that ends in it"
