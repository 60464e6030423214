"""Pieces of text are whole characters, hold no stop string, and are together what the tokenizer says."""

from __future__ import annotations

import random
from typing import Any

import pytest

from ygglight.engines.decode.detokenize import UNKNOWN, Detokenizer
from ygglight.modules.testing import tiny_causal_lm

TEXT = "the quick brown fox: naïve café, 日本語 and 🦊🌲! déjà vu \n\t end"


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_causal_lm(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def byte_fallback() -> Any:
    """As Llama 2's: SentencePiece's spaces, and characters it does not know as runs of byte tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz:,!"]
    rules = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], byte_fallback=True, unk_token="<unk>"))
    rules.pre_tokenizer = pre_tokenizers.Metaspace()
    rules.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=rules, eos_token="</s>", unk_token="<unk>")


def pieces_of(tokenizer: Any, ids: list[int], **kwargs: Any) -> tuple[list[str], Detokenizer]:
    detokenizer = Detokenizer(tokenizer, **kwargs)
    return [*(detokenizer.add(token) for token in ids), detokenizer.finish()], detokenizer


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_pieces_are_whole_characters_and_together_the_text(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(kind)
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    assert len(ids) > len(TEXT.split())
    pieces, detokenizer = pieces_of(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids, clean_up_tokenization_spaces=False) == detokenizer.text
    assert not any(UNKNOWN in piece for piece in pieces)
    assert sum(map(bool, pieces)) > 20  # it comes as it goes, and not all at the end
    # The control: token by token it would be broken.
    assert UNKNOWN in "".join(tokenizer.decode([token]) for token in ids)


def test_any_bytes_are_decoded_as_the_tokenizer_does(byte_level: Any) -> None:
    choose = random.Random(5)
    for _ in range(60):
        ids = [choose.randrange(1, len(byte_level)) for _ in range(choose.randrange(1, 40))]
        pieces, _ = pieces_of(byte_level, ids)
        assert "".join(pieces) == byte_level.decode(ids, clean_up_tokenization_spaces=False)


def test_a_run_of_broken_bytes_is_shown_before_the_end(byte_level: Any) -> None:
    broken = byte_level.convert_tokens_to_ids("Ģ")  # the byte 0x80: no character begins with it
    detokenizer = Detokenizer(byte_level)
    shown = "".join(detokenizer.add(broken) for _ in range(20))
    assert shown == UNKNOWN * 17
    assert detokenizer.finish() == UNKNOWN * 3


def test_after_a_broken_run_byte_fallback_goes_on(byte_fallback: Any) -> None:
    euro, half, a = ([byte_fallback.convert_tokens_to_ids(t) for t in ts] for ts in (
        ("<0xE2>", "<0x82>", "<0xAC>"), ("<0xF0>",), ("a", "b", "c"),
    ))  # fmt: skip
    detokenizer = Detokenizer(byte_fallback)
    shown = [detokenizer.add(token) for token in [*euro, *half, *a]]
    assert shown == ["", "", "€", "", UNKNOWN + "a", "b", "c"]


def test_the_first_word_keeps_its_space_after_the_prompt(byte_fallback: Any) -> None:
    prompt, ids = (byte_fallback.encode(text, add_special_tokens=False) for text in ("hello", "you there"))
    assert "".join(pieces_of(byte_fallback, ids, context=prompt)[0]) == " you there"
    assert "".join(pieces_of(byte_fallback, ids)[0]) == "you there"


def test_a_prompt_that_ends_within_a_character_is_no_context(byte_fallback: Any) -> None:
    bytes_ = [byte_fallback.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in "日本語".encode()]
    ids = byte_fallback.encode("ab", add_special_tokens=False)
    text = "".join(pieces_of(byte_fallback, ids, context=bytes_[:-1])[0])
    assert text.strip() == "ab"


def test_special_tokens_are_left_out_on_request(byte_level: Any) -> None:
    ids = [*byte_level.encode("ab"), byte_level.eos_token_id, *byte_level.encode("c")]
    assert "".join(pieces_of(byte_level, ids)[0]) == "abc"
    assert "".join(pieces_of(byte_level, ids, skip_special_tokens=False)[0]) == "ab<eos>c"


@pytest.mark.parametrize("stop", [("END",), ("XX", "ND"), ("日本",), ("fox jumps",)])
def test_text_is_cut_before_the_first_stop_string(byte_level: Any, stop: tuple[str, ...]) -> None:
    text = "a fox jumps 日本 over XX the END fox"
    expected = text[: min(place for string in stop if (place := text.find(string)) >= 0)]
    ids = byte_level.encode(text)
    detokenizer = Detokenizer(byte_level, stop)
    shown = ""
    for count, token in enumerate(ids, start=1):
        shown += detokenizer.add(token)
        assert expected.startswith(shown)  # never a part of what is cut
        assert detokenizer.stopped == any(string in byte_level.decode(ids[:count]) for string in stop)
    assert shown + detokenizer.finish() == expected == detokenizer.text


def test_a_beginning_that_is_no_stop_string_after_all_is_shown(byte_level: Any) -> None:
    pieces, detokenizer = pieces_of(byte_level, byte_level.encode("aaab aab"), stop=("aac", "b!"))
    assert "".join(pieces) == "aaab aab" and not detokenizer.stopped
    assert pieces[-1] == "b"  # held back until the end: "b!" might have come


def test_the_earliest_of_several_stop_strings_counts(byte_level: Any) -> None:
    pieces, detokenizer = pieces_of(byte_level, byte_level.encode("one two"), stop=("two", "ne tw"))
    assert "".join(pieces) == "o" and detokenizer.stopped
    assert detokenizer.add(5) == "" == detokenizer.finish()
