"""Tokenises documents once, into a memory-mapped array in the cache, and cuts it into samples."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ygglight.compat.folders import publish
from ygglight.data.assets import sha256_of
from ygglight.data.documents import Source, read_documents

__all__ = ["Spans", "TokenFile", "tokenize"]

_FORMAT = 1
_BATCH_CHARACTERS = 4 << 20
_PIECE_CHARACTERS = 1 << 20
# A single line end between two visible characters: byte-level tokenizers make it a token of its own in any case, so
# cutting there changes nothing.
_CUT = re.compile(r"(?<=\S)\n(?=\S)")


class TokenFile:
    """The tokens of all documents, end to end, each closed by the end token.

    Args:
        folder: A finished cache entry.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokens: np.ndarray = np.load(folder / "tokens.npy", mmap_mode="r")
        #: Where each document ends.
        self.ends: np.ndarray = np.load(folder / "ends.npy")

    def __len__(self) -> int:
        return len(self.tokens)


class Spans:
    """Some stretches of a token file seen as one, without copying.

    Args:
        tokens: The whole array.
        starts: Where each stretch begins.
        lengths: How long each is.
    """

    def __init__(self, tokens: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> None:
        self.tokens, self.starts, self.lengths = tokens, starts, lengths
        self._before = np.concatenate([[0], np.cumsum(lengths)])

    def __len__(self) -> int:
        return int(self._before[-1])

    def read(self, begin: int, count: int) -> np.ndarray:
        """Return ``count`` tokens from ``begin`` on, across stretches.

        Args:
            begin: Position in the joined stretches.
            count: How many.
        """
        first = int(np.searchsorted(self._before, begin, side="right")) - 1
        parts = []
        while count > 0 and first < len(self.starts):
            offset = begin - int(self._before[first])
            take = min(count, int(self.lengths[first]) - offset)
            start = int(self.starts[first]) + offset
            parts.append(self.tokens[start : start + take])
            begin, count, first = begin + take, count - take, first + 1
        return np.concatenate(parts)


def _fingerprint(tokenizer: Any) -> str:
    """Hash what decides how text becomes tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    own = f"{type(tokenizer).__name__}|{tokenizer.bos_token_id}|{tokenizer.eos_token_id}|{rules}"
    return hashlib.sha256(own.encode()).hexdigest()


def _key(sources: list[Source], tokenizer: Any, max_tokens: int | None) -> str:
    parts = [[sha256_of(s.path), s.is_jsonl, s.field, s.template] for s in sources]
    return hashlib.sha256(json.dumps([_FORMAT, _fingerprint(tokenizer), max_tokens, parts]).encode()).hexdigest()[:24]


def tokenize(sources: list[Source], tokenizer: Any, max_tokens: int | None = None) -> TokenFile:
    """Return the tokens of some files, from the cache if the same bytes met the same tokenizer before.

    Args:
        sources: The files.
        tokenizer: A transformers tokenizer.
        max_tokens: Keep the first so many.
    """

    def build(folder: Path) -> None:
        # A raw file that grows, so that a corpus need not fit in memory; it is given its .npy header at the end.
        raw, ends, total = folder / "tokens.raw", [], 0
        with raw.open("wb") as out:
            for ids in _token_lists(sources, tokenizer):
                if max_tokens is not None:
                    ids = ids[: max_tokens - total]
                np.asarray(ids, dtype=np.int32).tofile(out)
                total += len(ids)
                ends.append(total)
                if max_tokens is not None and total >= max_tokens:
                    break
        if not total:
            raise ValueError(f"there is no text in {', '.join(str(s.path) for s in sources)}")
        source = np.memmap(raw, dtype=np.int32, mode="r", shape=(total,))
        target = np.lib.format.open_memmap(folder / "tokens.npy", mode="w+", dtype=np.int32, shape=(total,))
        target[:] = source
        target.flush()
        del source, target
        raw.unlink()
        np.save(folder / "ends.npy", np.asarray(ends, dtype=np.int64))

    return TokenFile(publish(f"tokens/{_key(sources, tokenizer, max_tokens)}", build))


def _token_lists(sources: list[Source], tokenizer: Any) -> Iterator[list[int]]:
    """Yield the tokens of one document at a time, closed by the end token."""
    size = sum(s.path.stat().st_size for s in sources)
    # Silent unless it takes long; on stderr, so that stdout stays clean for what a command prints.
    with tqdm(total=size, unit="B", unit_scale=True, desc="tokenising", delay=2.0, file=sys.stderr) as bar:
        for source in sources:
            batch, characters = [], 0
            for document in read_documents(source):
                batch.append(document)
                characters += len(document)
                if characters >= _BATCH_CHARACTERS:
                    yield from _encode(batch, tokenizer)
                    bar.update(characters)
                    batch, characters = [], 0
            if batch:
                yield from _encode(batch, tokenizer)
                bar.update(characters)


def _encode(documents: list[str], tokenizer: Any) -> Iterator[list[int]]:
    pieces = [_pieces(document) for document in documents]
    heads = tokenizer([p[0] for p in pieces], add_special_tokens=True, verbose=False)["input_ids"]
    for ids, (_, *rest) in zip(heads, pieces, strict=True):
        if rest:
            if ids and ids[-1] == tokenizer.eos_token_id:
                ids = ids[:-1]
            for piece in tokenizer(rest, add_special_tokens=False, verbose=False)["input_ids"]:
                ids = ids + piece
        if not ids or ids[-1] != tokenizer.eos_token_id:
            ids = [*ids, tokenizer.eos_token_id]
        yield ids


def _pieces(text: str) -> list[str]:
    """Cut a long text at line ends: a tokenizer that is given a whole book as one string needs gigabytes."""
    pieces, start = [], 0
    while len(text) - start > _PIECE_CHARACTERS and (found := _CUT.search(text, start + _PIECE_CHARACTERS)):
        pieces.append(text[start : found.end()])
        start = found.end()
    return [*pieces, text[start:]]
