"""Iterations of tree decoding on disk, to fit a depth predictor from."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

SHARD = 2048
"""Rows a file."""
NUMBERS = ("accepted", "drafted", "prompt")


class DecodeLog:
    """Appends rows to a folder, in files that appear whole or not at all.

    Args:
        directory: Made if it is not there. Files of earlier runs stay.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory).expanduser()
        self.directory.mkdir(parents=True, exist_ok=True)
        self._rows: list[tuple[Tensor, int, int, int]] = []
        self._run, self._written = uuid.uuid4().hex, 0

    def append(self, hidden: Tensor, accepted: int, drafted: int, prompt: int) -> None:
        """Add a row.

        Args:
            hidden: ``[H]``, the target's last hidden state before the root. accepted: length of the accepted path.
            drafted: depth of the tree. prompt: number of the prompt, so that whole prompts can be held out.
        """
        self._rows.append((hidden.detach().to("cpu", torch.float32), accepted, drafted, prompt))
        if len(self._rows) >= SHARD:
            self.flush()

    def flush(self) -> None:
        """Write what is held back."""
        if not self._rows:
            return
        hidden, *numbers = zip(*self._rows, strict=True)
        tensors = {"hidden": torch.stack(hidden)}
        tensors |= {k: torch.tensor(v) for k, v in zip(NUMBERS, numbers, strict=True)}
        # Files of one log share the beginning of their names: a prompt may go on in the next file.
        name = f"{self._run}-{self._written:06d}"
        unfinished = self.directory / f".{name}.tmp"
        try:
            save_file(tensors, unfinished)
            os.replace(unfinished, self.directory / f"{name}.safetensors")
        finally:
            unfinished.unlink(missing_ok=True)
        self._rows, self._written = [], self._written + 1


def read_log(directory: str | Path) -> dict[str, Tensor]:
    """All rows of a folder: hidden float32 ``[N, H]``; accepted, drafted, prompt int64 ``[N]``.

    Prompts of different runs are told apart.

    Raises:
        FileNotFoundError: there are none; the text says how to write some. ValueError: files do not belong together.
    """
    folder = Path(directory).expanduser()
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(
            f"{folder} holds no decode log: predict once with YggdrasilStrategy(log={str(directory)!r}, draft=...)"
        )
    shards: list[dict[str, Tensor]] = []
    run, offset, following = "", 0, 0
    for file in files:
        try:
            shard = load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} cannot be read ({error}): delete it") from error
        if set(shard) != {"hidden", *NUMBERS}:
            raise ValueError(f"{file} is no decode log: keep other files out of the folder")
        if file.stem.partition("-")[0] != run:
            run, offset = file.stem.partition("-")[0], following
        shard["prompt"] = shard["prompt"] + offset
        following = max(following, int(shard["prompt"].max()) + 1)
        shards.append(shard)
    sizes = {shard["hidden"].shape[1] for shard in shards}
    if len(sizes) > 1:
        raise ValueError(f"{folder} holds logs of different models (hidden sizes {sorted(sizes)}): keep them apart")
    return {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}
