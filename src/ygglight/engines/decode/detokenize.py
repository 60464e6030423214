"""Text from tokens as they come: never half a character, and never the beginning of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["Detokenizer"]

CONTEXT = 6
"""Tokens before that a decoder is shown: SentencePiece drops the space of the first word it is given."""
UNKNOWN = "\ufffd"
"""What decoders make of bytes that are no character, or not yet one."""
INCOMPLETE = 3
"""A character of UTF-8 has up to four bytes, so up to three wait for the rest; each may be shown as one UNKNOWN."""


class Detokenizer:
    """The text of one sequence, piece by piece.

    The pieces together are ``tokenizer.decode`` of all tokens (without the clean-up of spaces, which would change
    pieces that are out already), cut before the first stop string.

    Args:
        tokenizer: Of transformers.
        stop: Strings that end the text.
        skip_special_tokens: Leave them out.
        context: Tokens before the first, say of the prompt: the first word then keeps the space between.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop: Sequence[str] = (),
        skip_special_tokens: bool = True,
        context: Sequence[int] = (),
    ) -> None:
        self.text = ""
        """All that was handed out."""
        self.stopped = False
        """A stop string was met; nothing comes any more."""
        self._tokenizer, self._stop, self._skip = tokenizer, tuple(stop), skip_special_tokens
        self._special = frozenset(tokenizer.all_special_ids) if skip_special_tokens else frozenset()
        self._window = self._clean(list(context)[-CONTEXT:])
        self._settled = len(self._window)  # tokens of the window whose text is known
        self._known = self._decode(self._window)
        self._sent = 0  # characters of the text after `_known` that were taken already
        self._held = ""  # text that may be the beginning of a stop string

    def add(self, token: int) -> str:
        """Take a token.

        Args:
            token: The next one.

        Returns:
            Text that is safe to show; often empty.
        """
        if self.stopped or token in self._special:
            return ""
        self._window.append(token)
        return self._emit(self._fresh(last=False), last=False)

    def finish(self) -> str:
        """What was held back, now that nothing follows: a broken character comes out as U+FFFD."""
        if self.stopped:
            return ""
        return self._emit(self._fresh(last=True), last=True)

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=self._skip, clean_up_tokenization_spaces=False))

    def _clean(self, tokens: list[int]) -> list[int]:
        """The tokens without what is the rest of a character that began before them."""
        while tokens and UNKNOWN in self._decode(tokens):
            tokens = tokens[1:]
        return tokens

    def _fresh(self, *, last: bool) -> str:
        """Text that became certain."""
        whole = self._decode(self._window)
        if whole.startswith(self._known):
            fresh = whole[len(self._known) :]
        elif last or not whole.endswith(UNKNOWN):
            fresh = self._decode(self._window[self._settled :])
        else:  # tokenizers with byte fallback show a run of bytes whole or not at all, and this one has no end yet
            return ""
        stem = fresh.rstrip(UNKNOWN)
        certain = len(fresh) if last else max(len(stem), len(fresh) - INCOMPLETE)
        piece = fresh[self._sent : certain]
        self._sent = max(self._sent, certain)
        if fresh and certain == len(fresh):  # at the end of a character: what is settled now is the next one's context
            self._window = self._window[self._settled :]
            self._settled, self._sent = len(self._window), 0
            self._known = self._decode(self._window)
        return piece

    def _emit(self, piece: str, *, last: bool) -> str:
        text = self._held + piece
        ends = [place for string in self._stop if (place := text.find(string)) >= 0]
        if ends:
            self.stopped, self._held = True, ""
            text = text[: min(ends)]
        else:
            keep = 0 if last else self._overlap(text)
            text, self._held = text[: len(text) - keep], text[len(text) - keep :]
        self.text += text
        return text

    def _overlap(self, text: str) -> int:
        """Characters at the end of the text that a stop string begins with."""
        longest = max((len(string) - 1 for string in self._stop), default=0)
        for count in range(min(longest, len(text)), 0, -1):
            if any(string.startswith(text[len(text) - count :]) for string in self._stop):
                return count
        return 0
