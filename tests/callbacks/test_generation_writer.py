"""GenerationWriter: a line for each text, in order, whole, and nobody's file lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from ygglight.callbacks import GenerationWriter
from ygglight.callbacks.generation_writer import rows
from ygglight.modules import CausalLM
from ygglight.modules.testing import tiny_causal_lm


class Says(L.LightningModule):
    """Returns what ``answer`` makes of a batch."""

    def __init__(self, answer: Callable[[Any, int], Any], on_start: Callable[[], None] | None = None) -> None:
        super().__init__()
        self.answer, self.on_start = answer, on_start

    def configure_model(self) -> None:
        if self.on_start is not None:
            self.on_start()

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self.answer(batch, batch_idx)


def upper(batch: list[str], batch_idx: int) -> Any:
    return [{"prompt": text, "text": text.upper()} for text in batch]


PROMPTS = ["eins", "zwei", "drei", "vier", "fünf\n"]


def predict(writer: GenerationWriter, answer: Any = upper, data: Any = None, module: Any = None, **kwargs: Any) -> Any:
    run = L.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, callbacks=[writer], **kwargs
    )  # fmt: skip
    data = DataLoader(PROMPTS, batch_size=2) if data is None else data  # type: ignore[arg-type]
    return run.predict(module or Says(answer), data, return_predictions=False)


def lines(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    assert text == "" or text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def test_one_line_a_prompt_in_order(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.jsonl"
    writer = GenerationWriter(str(path))
    assert predict(writer) is None
    assert lines(path) == [{"index": i, "prompt": p, "text": p.upper()} for i, p in enumerate(PROMPTS)]
    assert writer.count == len(PROMPTS)
    assert "FÜNF" in path.read_text(encoding="utf-8"), "letters are written as they are"


def test_lines_are_there_as_soon_as_their_batch_is_done(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    seen: list[int] = []

    def answer(batch: list[str], batch_idx: int) -> Any:
        seen.append(len(lines(path)))
        return upper(batch, batch_idx)

    predict(GenerationWriter(str(path)), answer)
    assert seen == [0, 2, 4]


def test_a_run_that_breaks_off_keeps_whole_lines_and_the_next_does_not_overwrite_them(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"

    def breaks(batch: list[str], batch_idx: int) -> Any:
        if batch_idx == 2:
            raise KeyError("by the user")
        return upper(batch, batch_idx)

    with pytest.raises(KeyError, match="by the user"):
        predict(GenerationWriter(str(path)), breaks)
    kept = lines(path)
    assert [row["index"] for row in kept] == [0, 1, 2, 3]
    with pytest.raises(FileExistsError, match="move it, or set overwrite=true"):
        predict(GenerationWriter(str(path)))
    assert lines(path) == kept
    predict(GenerationWriter(str(tmp_path / "b.jsonl")), data=DataLoader(PROMPTS[len(kept) :], batch_size=2))  # type: ignore[arg-type]
    assert [row["prompt"] for row in kept + lines(tmp_path / "b.jsonl")] == PROMPTS


def test_overwrite(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("of another run\n")

    def never(batch: Any, batch_idx: int) -> Any:
        raise AssertionError("generated before the file was looked at")

    with pytest.raises(FileExistsError, match=r"a\.jsonl is there already"):
        predict(GenerationWriter(str(path)), never)
    assert path.read_text() == "of another run\n"
    writer = GenerationWriter(str(path), overwrite=True)
    for _ in range(2):  # the same object again starts anew
        predict(writer)
        assert [row["index"] for row in lines(path)] == list(range(len(PROMPTS)))


def test_a_run_that_never_begins_costs_no_file(tmp_path: Path) -> None:
    """The draft of a strategy or the weights of a module may be missing: found out after the writer's setup."""
    path = tmp_path / "a.jsonl"

    def missing() -> None:
        raise FileNotFoundError("no such model")

    for old in ("of another run\n", ""):
        path.write_text(old)
        with pytest.raises(FileNotFoundError, match="no such model"):
            predict(GenerationWriter(str(path), overwrite=True), module=Says(upper, missing))
        assert path.read_text() == old
    predict(GenerationWriter(str(path)))  # an empty file is nobody's result
    assert len(lines(path)) == len(PROMPTS)


def test_a_place_that_cannot_be_written_is_found_before_anything_is_generated(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "a.jsonl", tmp_path):
        with pytest.raises(OSError, match="GenerationWriter cannot write"):
            predict(GenerationWriter(str(path), overwrite=True), lambda *_: pytest.fail("too late"))


def test_fields(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    predict(GenerationWriter(str(path), fields=["text", "score"]))
    assert lines(path)[0] == {"index": 0, "text": "EINS"}
    with pytest.raises(ValueError, match=r"fields=\['txt'\]\): a result has only prompt, text"):
        predict(GenerationWriter(str(path), fields=["txt"], overwrite=True))


@pytest.mark.parametrize(
    ("prediction", "written"),
    [
        ("one", [{"text": "one"}]),
        (["one", "two"], [{"text": "one"}, {"text": "two"}]),
        (torch.tensor([3, 4]), [{"tokens": [3, 4]}]),
        (torch.tensor([[3, 4], [5, 6]]), [{"tokens": [3, 4]}, {"tokens": [5, 6]}]),
        ([torch.tensor([[3]]), {"text": "x"}], [{"tokens": [3]}, {"text": "x"}]),
        ({"text": "x", "scores": torch.tensor([0.5])}, [{"text": "x", "scores": [0.5]}]),
        ({"deep": {"a": [torch.tensor(1), np.float32(0.5), np.arange(2)]}}, [{"deep": {"a": [1, 0.5, [0, 1]]}}]),
        (None, []),
    ],
    ids=["text", "texts", "ids", "rows", "mixed", "tensor in a dict", "deep", "nothing"],
)
def test_kinds_of_results(tmp_path: Path, prediction: Any, written: list[Any]) -> None:
    path = tmp_path / "a.jsonl"
    predict(GenerationWriter(str(path)), lambda *_: prediction, data=DataLoader(["a", "b"], batch_size=1))  # type: ignore[arg-type]
    assert lines(path) == [{"index": i, **row} for i, row in enumerate(written * 2)]


@pytest.mark.parametrize(
    ("prediction", "message"),
    [
        (3.5, "predict_step returned float"),
        (["good", object()], "predict_step returned object"),
        (torch.zeros(1, 2, 3), r"a tensor of shape \(1, 2, 3\)"),
        ([{"text": "good"}, {"text": {1, 2}}], "a set inside a result"),
    ],
    ids=["number", "object", "tensor", "set"],
)
def test_other_kinds_are_one_clear_error_and_no_part_of_the_batch_is_written(
    tmp_path: Path, prediction: Any, message: str
) -> None:
    path = tmp_path / "a.jsonl"

    def answer(batch: Any, batch_idx: int) -> Any:
        return prediction if batch_idx else "first"

    with pytest.raises(TypeError, match=f"GenerationWriter .*{message}"):
        predict(GenerationWriter(str(path)), answer)
    assert lines(path) == [{"index": 0, "text": "first"}]


@pytest.mark.parametrize("kind", [list, dict], ids=["list", "dict"])
def test_several_dataloaders_are_told_apart(tmp_path: Path, kind: Any) -> None:
    loaders: Any = [DataLoader(["a"], batch_size=1), DataLoader(["b", "c"], batch_size=1)]  # type: ignore[arg-type]
    if kind is dict:
        loaders = dict(zip("xy", loaders, strict=True))
    path = tmp_path / "a.jsonl"
    predict(GenerationWriter(str(path)), lambda batch, _: batch[0], data=loaders)
    found = [(row["index"], row["dataloader"], row["text"]) for row in lines(path)]
    assert found == [(0, 0, "a"), (1, 1, "b"), (2, 1, "c")]


def test_only_predict_writes(tmp_path: Path) -> None:
    class Trains(Says):
        def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    path = tmp_path / "a.jsonl"
    run = L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[GenerationWriter(str(path))]
    )  # fmt: skip
    run.validate(Trains(upper), DataLoader(PROMPTS, batch_size=2), verbose=False)  # type: ignore[arg-type]
    assert not path.exists()


def test_what_causal_lm_predicts(tmp_path: Path) -> None:
    folder = tiny_causal_lm(tmp_path / "m")
    path = tmp_path / "a.jsonl"
    module = CausalLM(model=str(folder), max_new_tokens=4)
    predict(GenerationWriter(str(path)), module=module)
    found = lines(path)
    assert [row["prompt"] for row in found] == PROMPTS
    assert all(isinstance(row["text"], str) and 1 <= len(row["tokens"]) <= 4 for row in found)


def test_rows_name_what_they_cannot_write() -> None:
    with pytest.raises(TypeError, match="returned int"):
        list(rows([[1]]))
