"""Finds text files and reads the documents in them. Knows nothing of tokens."""

from __future__ import annotations

import glob
import gzip
import json
import string
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ygglight.data.assets import ASSETS, resolve

__all__ = ["Source", "find_sources", "read_documents", "read_prompts"]

_SUFFIXES = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz")


@dataclass(frozen=True)
class Source:
    """One text file.

    Args:
        path: The file.
        field: Of a .jsonl row, the text; None for plain text or if there is a template.
        template: How a .jsonl row becomes text, with fields in braces.
    """

    path: Path
    field: str | None = None
    template: str | None = None

    @property
    def is_jsonl(self) -> bool:
        """Whether the file holds a JSON object a line."""
        return self.path.name.removesuffix(".gz").endswith(".jsonl")


def find_sources(path: str | list[str], field: str | None = None, template: str | None = None) -> list[Source]:
    """Turn what a user calls a path into files, in a fixed order.

    Args:
        path: A file, a directory (searched for .txt and .jsonl, perhaps .gz), a glob, the name of a packaged text, or
            a list of these.
        field: Which field of a .jsonl row is the text (``text`` if neither this nor a template is given).
        template: How a .jsonl row becomes text. Packaged texts bring their own.
    """
    found: list[Source] = []
    for item in [path] if isinstance(path, str) else path:
        if item in ASSETS and ASSETS[item].kind != "model":
            own = None if field else ASSETS[item].template
            found.append(Source(resolve(item), field, template or own))
        else:
            found += [Source(file, field, template) for file in _files(item)]
    return found


def _files(item: str) -> list[Path]:
    path = Path(item).expanduser()
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.name.endswith(_SUFFIXES) and p.is_file())
        if not files:
            raise FileNotFoundError(f"no {', '.join(_SUFFIXES[:2])} file (or .gz of them) in the directory {path}")
        return files
    if path.is_file():
        if not path.name.endswith(_SUFFIXES):
            raise ValueError(f"cannot read {path}: text is read from {', '.join(_SUFFIXES)} files")
        return [path]
    files = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if p.endswith(_SUFFIXES))
    if not files:
        names = ", ".join(a.name for a in ASSETS.values() if a.kind != "model")
        raise FileNotFoundError(f"no text file at {item!r}, and no packaged text of that name ({names})")
    return files


def _open(path: Path) -> IO[str]:
    if path.name.endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")


def read_documents(source: Source) -> Iterator[str]:
    """Yield the documents of a file that are not blank: a .txt file is one, a .jsonl file has one a row.

    Args:
        source: The file.
    """
    try:
        if source.is_jsonl:
            yield from _read_rows(source)
        else:
            with _open(source.path) as stream:
                text = stream.read()
            if text.strip():
                yield text
    except UnicodeDecodeError as error:
        raise ValueError(f"{source.path} is not UTF-8 text ({error.reason} at byte {error.start})") from error


def _read_rows(source: Source) -> Iterator[str]:
    with _open(source.path) as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                text = _row_text(source, line, f"{source.path}:{number}")
                if text.strip():
                    yield text


def _row_text(source: Source, line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not a line of JSON ({error.msg})") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: not a JSON object but {type(row).__name__}")
    if source.template is None:
        names = [source.field or "text"]
    else:
        names = [name for _, name, _, _ in string.Formatter().parse(source.template) if name]
    for name in names:
        if name not in row:
            mend = "template" if source.template else "field"
            raise ValueError(f"{where}: no field {name!r}; the row has {', '.join(row)}: set `{mend}` to fit")
    # Not str.format, which would let a template reach attributes of the values.
    text = source.template if source.template is not None else "{" + names[0] + "}"
    parts = string.Formatter().parse(text)
    return "".join(literal + (str(row[name]) if name else "") for literal, name, _, _ in parts)


def read_prompts(prompts: str | list[str], field: str | None = None) -> list[str]:
    """Return prompts: those given, or one a line or row of a file or packaged text.

    Args:
        prompts: The prompts themselves, or a path or name as for :func:`find_sources`.
        field: Which field of a .jsonl row is the prompt; packaged texts know theirs, else ``prompt``.
    """
    if not isinstance(prompts, str):
        found = list(prompts)
    else:
        found = []
        own = ASSETS[prompts].field if prompts in ASSETS else None
        for source in find_sources(prompts, field or own or "prompt"):
            texts = read_documents(source)
            lines = texts if source.is_jsonl else (line for text in texts for line in text.splitlines())
            found += [line for line in lines if line.strip()]
    if not found:
        raise ValueError(f"there is not one prompt in {prompts!r}")
    bad = next((p for p in found if not isinstance(p, str) or not p.strip()), None)
    if bad is not None:
        raise ValueError(f"a prompt must be text that is not blank, not {bad!r}")
    return found
