"""GenerationWriter: what predict generates, written as it is made."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter


class GenerationWriter(BasePredictionWriter):
    """Writes one line of JSON for each generated text, in order, and as soon as its batch is done.

    Works with ``Trainer.predict(..., return_predictions=False)``, which keeps no results in memory. A run that breaks
    off has lost nothing that was generated: every line that is there is whole. It does not go on where it broke off: to
    resume, predict the prompts that are missing into another file.

    Args:
        path: The .jsonl file. Folders above it are made.
        fields: Which fields of a result to write; default: all. ``text`` stands for the whole of a plain string.
        overwrite: Replace a file that is there, once the first prompt is about to be generated; otherwise that is an
            error, raised before anything is loaded. An empty file counts as none.
    """

    def __init__(self, path: str, fields: list[str] | None = None, overwrite: bool = False) -> None:
        super().__init__(write_interval="batch")
        self.path, self.fields, self.overwrite = Path(path).expanduser(), fields, overwrite
        self.count = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """See that the file can be written, on rank 0, before anything is generated.

        Raises:
            FileExistsError: it is there and may not be overwritten. OSError: it cannot be written.
        """
        super().setup(trainer, pl_module, stage)
        if stage != "predict" or not trainer.is_global_zero:
            return
        if trainer.world_size > 1:
            raise ValueError("GenerationWriter writes one file from one process: use devices=1")
        if self.path.is_file() and self.path.stat().st_size and not self.overwrite:
            raise FileExistsError(f"{self.path} is there already: move it, or set overwrite=true")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.open("a").close()
        except OSError as error:
            raise OSError(f"GenerationWriter cannot write {self.path}: {error.strerror}") from error

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Empty the file; not before, for a run whose model or draft cannot be loaded should not cost the old one."""
        if trainer.is_global_zero:
            self.path.write_text("")
            self.count = 0

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Append a batch and flush.

        Args:
            trainer: The Trainer. pl_module: The module. prediction: What ``predict_step`` returned: a dict, a string, a
                tensor of token ids, or a list or tensor of these. batch_indices: Unused. batch: Unused.
            batch_idx: Of the batch. dataloader_idx: Of the dataloader, written when there are several.

        Raises:
            TypeError: the results are of another kind. ValueError: a result has none of ``fields``.
        """
        loaders = trainer.predict_dataloaders
        several = isinstance(loaders, Sequence | Mapping) and len(loaders) > 1
        extra = {"dataloader": dataloader_idx} if several else {}
        lines: list[str] = []
        for row in rows(prediction):
            line = {"index": self.count + len(lines), **extra, **self._chosen(row)}
            lines.append(json.dumps(line, ensure_ascii=False, default=_primitive) + "\n")
        with self.path.open("a", encoding="utf-8") as file:  # the whole batch or none of it
            file.write("".join(lines))
        self.count += len(lines)

    def _chosen(self, row: dict[str, Any]) -> dict[str, Any]:
        if self.fields is None:
            return row
        chosen = {name: row[name] for name in self.fields if name in row}
        if not chosen:
            raise ValueError(f"GenerationWriter(fields={self.fields}): a result has only {', '.join(map(str, row))}")
        return chosen

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Nothing is open between batches."""


def _primitive(value: Any) -> Any:
    """What json cannot write by itself: tensors and numpy's numbers and arrays, however deep inside a result."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"GenerationWriter cannot write a {type(value).__name__} inside a result of predict_step")


def rows(prediction: Any, kind: Literal["text"] = "text") -> Iterator[dict[str, Any]]:
    """One dict a generated text.

    Args:
        prediction: See :meth:`GenerationWriter.write_on_batch_end`. kind: Name of the field for plain strings.

    Raises:
        TypeError: names what came.
    """
    from torch import Tensor

    if isinstance(prediction, dict):
        yield {name: value.tolist() if isinstance(value, Tensor) else value for name, value in prediction.items()}
    elif isinstance(prediction, str):
        yield {kind: prediction}
    elif isinstance(prediction, Tensor):
        values = prediction.tolist()
        if prediction.dim() == 1:
            yield {"tokens": values}
        elif prediction.dim() == 2:
            yield from ({"tokens": row} for row in values)
        else:
            raise TypeError(f"GenerationWriter cannot write a tensor of shape {tuple(prediction.shape)}")
    elif isinstance(prediction, list | tuple):
        for item in prediction:
            yield from rows(item)
    elif prediction is not None:
        raise TypeError(
            f"GenerationWriter writes dicts, strings and token ids; predict_step returned {type(prediction).__name__}"
        )
