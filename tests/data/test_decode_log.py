"""Decode logs: shards that are whole or not there, prompts told apart, and a split that keeps prompts whole."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ygglight.data import DecodeLogData
from ygglight.engines.yggdrasil import decode_log
from ygglight.engines.yggdrasil.decode_log import DecodeLog, read_log

Row = tuple[Tensor, int, int, int]


def rows(count: int, hidden: int = 5, each: int = 4, seed: int = 0) -> list[Row]:
    """``each`` rows a prompt; no two hidden states alike."""
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(hidden, generator=generator), i % 3, 3 + i % 2, i // each) for i in range(count)]


def write(folder: Path, written: list[Row]) -> None:
    log = DecodeLog(folder)
    for row in written:
        log.append(*row)
    log.flush()


def sorted_rows(log: dict[str, Tensor]) -> list[tuple[float, ...]]:
    return sorted(
        (*hidden.tolist(), float(accepted), float(drafted))
        for hidden, accepted, drafted in zip(log["hidden"], log["accepted"], log["drafted"], strict=True)
    )


# -- reading and writing ---------------------------------------------------------------------------------------------
def test_what_is_written_is_read(tmp_path: Path) -> None:
    written = rows(10)
    write(tmp_path / "deep" / "log", written)
    log = read_log(tmp_path / "deep" / "log")
    assert log["hidden"].dtype == torch.float32
    assert torch.equal(log["hidden"], torch.stack([row[0] for row in written]))
    for place, name in enumerate(("accepted", "drafted", "prompt"), start=1):
        assert log[name].dtype == torch.int64 and log[name].tolist() == [row[place] for row in written]


def test_hidden_states_of_any_dtype_are_kept_as_float32_and_copied(tmp_path: Path) -> None:
    log = DecodeLog(tmp_path)
    state = torch.arange(4.0)
    log.append(state.bfloat16().requires_grad_(), 1, 2, 0)
    log.flush()
    assert torch.equal(read_log(tmp_path)["hidden"], state[None])


def test_a_log_is_written_by_shards_and_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_log, "SHARD", 4)
    log = DecodeLog(tmp_path)
    written = rows(10)
    for count, row in enumerate(written, start=1):
        log.append(*row)
        assert len(list(tmp_path.glob("*.safetensors"))) == count // 4
    log.flush()
    log.flush()  # nothing is held back any more
    assert len(list(tmp_path.iterdir())) == 3
    assert torch.equal(read_log(tmp_path)["hidden"], torch.stack([row[0] for row in written])), "in order"


def test_a_prompt_that_goes_on_in_the_next_shard_stays_one_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else half of it would be held out, and the other half trained on."""
    monkeypatch.setattr(decode_log, "SHARD", 3)
    write(tmp_path, rows(12, each=4))
    assert len(list(tmp_path.glob("*.safetensors"))) == 4
    assert read_log(tmp_path)["prompt"].tolist() == [i // 4 for i in range(12)]


def test_runs_are_added_and_their_prompts_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_log, "SHARD", 5)
    write(tmp_path, rows(12, seed=0))
    write(tmp_path, rows(8, seed=1))
    log = read_log(tmp_path)
    assert sorted(log["prompt"].unique(return_counts=True)[1].tolist()) == [4] * 5
    assert log["prompt"].unique().tolist() == list(range(5))


def test_a_shard_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = rows(6)
    log = DecodeLog(tmp_path)
    for row in written:
        log.append(*row)

    def full(tensors: Any, path: Path) -> None:
        Path(path).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(decode_log, "save_file", full)
        with pytest.raises(OSError, match="No space left"):
            log.flush()
    assert list(tmp_path.iterdir()) == []
    log.flush()  # there is room again: nothing was lost
    assert len(read_log(tmp_path)["hidden"]) == 6


def test_a_killed_writer_leaves_nothing_that_is_read(tmp_path: Path) -> None:
    write(tmp_path, rows(4))
    (tmp_path / ".0123.tmp").write_bytes(b"half of it")
    assert len(read_log(tmp_path)["hidden"]) == 4


def test_a_method_that_is_dropped_writes_its_log(tmp_path: Path) -> None:
    """No `release`: a script that only calls generate loses no rows."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from ygglight.engines.yggdrasil.generate import TreeGenerate

    shape: dict[str, Any] = {
        "vocab_size": 31, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    }  # fmt: skip
    model: Any = LlamaForCausalLM(LlamaConfig(**shape)).eval()
    made = TreeGenerate(model, tree={"width": 1, "depth": 2}, log=str(tmp_path / "log"))
    model.generate(torch.arange(5)[None], max_new_tokens=9, do_sample=False, custom_generate=made)
    assert not list((tmp_path / "log").glob("*.safetensors"))
    del made
    gc.collect()
    assert len(read_log(tmp_path / "log")["hidden"]) >= 3


# -- what cannot be read ---------------------------------------------------------------------------------------------
def test_no_log_says_how_to_write_one(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=r"predict once with YggdrasilStrategy\(log="):
            DecodeLogData(str(folder))


def test_logs_of_different_models_are_one_error(tmp_path: Path) -> None:
    write(tmp_path, rows(4, hidden=5))
    write(tmp_path, rows(4, hidden=7))
    with pytest.raises(ValueError, match=r"different models \(hidden sizes \[5, 7\]\): keep them apart"):
        DecodeLogData(str(tmp_path))


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    write(tmp_path, rows(4))
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match=f"{file.name} cannot be read .* delete it"):
        read_log(tmp_path)


def test_another_file_is_named(tmp_path: Path) -> None:
    write(tmp_path, rows(4))
    save_file({"weight": torch.zeros(3)}, tmp_path / "predictor.safetensors")
    with pytest.raises(ValueError, match=r"predictor\.safetensors is no decode log"):
        read_log(tmp_path)


# -- the split -------------------------------------------------------------------------------------------------------
def parts(data: DecodeLogData) -> tuple[list[tuple[float, ...]], list[tuple[float, ...]]]:
    found = []
    for loader in (data.train_dataloader(), data.val_dataloader()):
        batches = list(loader)
        columns = [torch.cat(column) for column in zip(*batches, strict=True)]
        found.append(sorted_rows(dict(zip(("hidden", "accepted", "drafted"), columns, strict=True))))
    return found[0], found[1]


@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.95])
@pytest.mark.parametrize("seed", [0, 1])
def test_prompts_are_held_out_whole(tmp_path: Path, fraction: float, seed: int) -> None:
    write(tmp_path, rows(80, each=4))
    data = DecodeLogData(str(tmp_path), batch_size=7, val_fraction=fraction, seed=seed)
    train, val = parts(data)
    assert sorted(train + val) == sorted_rows(read_log(tmp_path))
    prompt_of = {
        row: int(prompt)
        for row, prompt in zip([tuple(h.tolist()) for h in data.rows["hidden"]], data.rows["prompt"], strict=True)
    }
    trained, held = ({prompt_of[row[:5]] for row in part} for part in (train, val))
    assert not trained & held and len(held) == max(1, min(19, round(fraction * 20)))
    assert data.hidden_size == 5 and data.max_depth == 4


def test_the_choice_follows_the_seed(tmp_path: Path) -> None:
    write(tmp_path, rows(80))
    first, same, other = (parts(DecodeLogData(str(tmp_path), seed=seed))[1] for seed in (0, 0, 1))
    assert first == same != other


@pytest.mark.parametrize("fraction", [0.01, 0.99])
def test_two_prompts_are_one_and_one(tmp_path: Path, fraction: float) -> None:
    write(tmp_path, rows(8))
    train, val = parts(DecodeLogData(str(tmp_path), val_fraction=fraction))
    assert len(train) == len(val) == 4


def test_one_prompt_is_too_few(tmp_path: Path) -> None:
    write(tmp_path, rows(4))
    with pytest.raises(ValueError, match="holds one prompt"):
        DecodeLogData(str(tmp_path))


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_bad_fractions(tmp_path: Path, fraction: float) -> None:
    with pytest.raises(ValueError, match="val_fraction"):
        DecodeLogData(str(tmp_path), val_fraction=fraction)
