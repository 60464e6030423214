from pathlib import Path

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from torch.utils.data import SequentialSampler

from ygglight.compat.transformers import load_tokenizer
from ygglight.data import TextData, tokens
from ygglight.data.loading import ShuffledSampler
from ygglight.modules import CausalLM

TEMPLATE = "{question} {answer}"


def data(path, tiny, **options) -> TextData:
    module = TextData(str(path), **{"tokenizer": str(tiny), "block_size": 32, "template": TEMPLATE} | options)
    module.prepare_data()
    module.setup()
    return module


def order(module: TextData) -> list[int]:
    return [int(batch["input_ids"].sum()) for batch in module.train_dataloader()]


def test_packing_keeps_every_token_in_order(jsonl, tiny):
    module = data(jsonl, tiny, val_fraction=0)
    tokenizer = load_tokenizer(tiny)
    end = tokenizer.eos_token_id
    documents = [f"what is {i} plus {i}? it is {2 * i}." for i in range(60)]
    expected = [token for text in documents for token in [*tokenizer(text)["input_ids"], end]]
    got = torch.cat([sample["input_ids"] for sample in module._train])
    assert got.tolist() == expected[: len(expected) // 32 * 32]
    batch = next(iter(module.train_dataloader()))
    assert batch["input_ids"].shape == (4, 32) and torch.equal(batch["input_ids"], batch["labels"])
    assert module.val_dataloader() == []


def test_validation_documents_are_never_trained_on(jsonl, tiny):
    module = data(jsonl, tiny, val_fraction=0.2, block_size=8)
    train, val = (set(zip(s.spans.starts.tolist(), s.spans.lengths.tolist(), strict=True))
                  for s in (module._train, module._val))  # fmt: skip
    assert train.isdisjoint(val) and len(train | val) == 60
    held = len(module._val.spans) / len(module._tokens())
    assert 0.2 <= held < 0.25
    assert not np.array_equal(data(jsonl, tiny, val_fraction=0.2, block_size=8, seed=1)._val.spans.starts,
                              module._val.spans.starts)  # fmt: skip


def test_a_single_document_is_split_at_its_end(tmp_path, tiny):
    (tmp_path / "t.txt").write_text("to be, or not to be, that is the question\n" * 60)
    module = data(tmp_path / "t.txt", tiny, val_fraction=0.1, template=None)
    train, val = module._train.spans, module._val.spans
    assert val.starts.tolist() == [len(train)] and len(train) + len(val) == len(module._tokens())


def test_without_packing_documents_are_padded_and_masked(jsonl, tiny):
    module = data(jsonl, tiny, packing=False, block_size=16, batch_size=8)
    batch = next(iter(module.train_dataloader()))
    mask = batch["attention_mask"].bool()
    assert batch["input_ids"].shape[1] <= 16 and (~mask).any()
    assert (batch["labels"][~mask] == -100).all()
    assert torch.equal(batch["labels"][mask], batch["input_ids"][mask])
    total = sum(len(sample["input_ids"]) for part in (module._train, module._val) for sample in part)
    assert len(module._tokens()) - 60 <= total <= len(module._tokens())  # less only by lone tokens


def test_the_order_depends_on_the_seed_alone(jsonl, tiny):
    first = order(data(jsonl, tiny))
    assert first == order(data(jsonl, tiny)) != order(data(jsonl, tiny, val_fraction=0.05, seed=3))


def test_passes_differ_and_a_place_is_kept(jsonl, tiny):
    def passes(loader, count):
        return [[int(b["input_ids"].sum()) for b in loader] for _ in range(count)]

    module = data(jsonl, tiny, batch_size=2)
    loader = module.train_dataloader()
    one, two = passes(loader, 2)
    assert sorted(one) != one and one != two and len(one) == len(loader)
    again, broken = module.train_dataloader(), module.train_dataloader()
    iterator = iter(broken)
    for _ in range(5):
        next(iterator)
    again.load_state_dict(broken.state_dict())
    assert passes(again, 1)[0] == (one + two)[5 : 5 + len(one)]


def test_ranks_share_without_overlap():
    dataset = list(range(23))
    seen = [list(ShuffledSampler(dataset, batch_size=2, world_size=2, rank=rank)) for rank in (0, 1)]
    assert len(seen[0]) == len(seen[1]) == 10 and set(seen[0]).isdisjoint(seen[1])
    with pytest.raises(ValueError, match="lower batch_size"):
        ShuffledSampler(dataset, batch_size=12, world_size=2)


def test_tokens_come_from_the_cache_the_second_time(jsonl, tiny, cache, monkeypatch):
    data(jsonl, tiny)
    (entry,) = (cache / "tokens").iterdir()
    monkeypatch.setattr(tokens, "_token_lists", lambda *a: pytest.fail("tokenised twice"))
    assert isinstance(data(jsonl, tiny, block_size=16)._tokens().tokens, np.memmap)
    assert [p.name for p in entry.iterdir()] and list((cache / "tokens").iterdir()) == [entry]
    monkeypatch.undo()
    monkeypatch.setenv("YGGLIGHT_CACHE", str(cache))
    jsonl.write_text(jsonl.read_text() + '{"question": "more", "answer": "text"}\n')
    data(jsonl, tiny)
    data(jsonl, tiny, template="{answer}")
    data(jsonl, tiny, max_tokens=100, batch_size=1)
    assert len(list((cache / "tokens").iterdir())) == 4


def test_max_tokens(jsonl, tiny):
    assert len(data(jsonl, tiny, max_tokens=100, batch_size=1)._tokens()) == 100


def test_a_long_text_is_cut_without_changing_its_tokens(tmp_path, tiny, monkeypatch):
    text = "to be,\nor not\n\n to be:\n  that is\nthe question 12 34\nit's\n" * 40
    tokenizer = load_tokenizer(tiny)
    whole = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    monkeypatch.setattr(tokens, "_PIECE_CHARACTERS", 50)
    assert len(tokens._pieces(text)) > 20 and "".join(tokens._pieces(text)) == text
    assert next(tokens._encode([text, "x"], tokenizer)) == whole


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"path": None}, ValueError, "path .* or prompts"),
        ({"block_size": 1}, ValueError, "block_size=1 must be at least 2"),
        ({"batch_size": 0}, ValueError, "at least 1"),
        ({"val_fraction": 1.0}, ValueError, "below 1"),
        ({"tokenizer": "nowhere"}, FileNotFoundError, "neither a directory"),
        ({"path": "nowhere.txt"}, FileNotFoundError, "no text file"),
    ],
)
def test_bad_arguments_are_refused_at_construction(jsonl, tiny, options, error, message):
    with pytest.raises(error, match=message):
        TextData(**{"path": str(jsonl), "tokenizer": str(tiny)} | options)


def test_bad_text_is_refused_before_training(tmp_path, jsonl, tiny):
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ValueError, match="there is no text in"):
        data(tmp_path / "empty.txt", tiny)
    with pytest.raises(ValueError, match=r"tokens, too few for blocks of 4096 \(training and validation"):
        data(jsonl, tiny, block_size=4096)
    with pytest.raises(ValueError, match=r"sums\.jsonl:1: no field 'nope'"):
        data(jsonl, tiny, template="{nope}")
    with pytest.raises(ValueError, match="set `tokenizer`"):
        data(jsonl, tiny, tokenizer=None)
    with pytest.raises(ValueError, match="to train it needs a path"):
        TextData(prompts=["a"]).train_dataloader()
    with pytest.raises(ValueError, match="to predict it needs prompts"):
        data(jsonl, tiny).predict_dataloader()


def fit(tmp_path: Path, tiny, jsonl, **options) -> tuple[L.Trainer, CausalLM]:
    ckpt = options.pop("ckpt_path", None)
    workers = options.pop("num_workers", 0)
    # No tokenizer: it is taken from the module.
    text = TextData(str(jsonl), template=TEMPLATE, block_size=32, batch_size=2, num_workers=workers)
    module = CausalLM(str(tiny), learning_rate=1e-2, schedule="constant")
    trainer = L.Trainer(
        accelerator="cpu", devices=1, default_root_dir=tmp_path, logger=False, enable_progress_bar=False,
        enable_model_summary=False, **options,
    )  # fmt: skip
    trainer.fit(module, text, ckpt_path=ckpt)
    return trainer, module


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_broken_within_an_epoch_resumes_on_the_next_batch(tmp_path, tiny, jsonl, workers):
    _, whole = fit(tmp_path / "whole", tiny, jsonl, max_steps=14)
    first, _ = fit(tmp_path / "first", tiny, jsonl, max_steps=4, num_workers=workers)
    path = first.checkpoint_callback.best_model_path
    _, rest = fit(tmp_path / "rest", tiny, jsonl, max_steps=14, ckpt_path=path, num_workers=workers)
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), rest.parameters(), strict=True))


def test_overfitting_a_batch_and_validation_work(tmp_path, tiny, jsonl):
    trainer, _ = fit(tmp_path, tiny, jsonl, max_steps=4, overfit_batches=1, enable_checkpointing=False)
    assert {"train_loss", "val_loss"} <= trainer.callback_metrics.keys()
    assert trainer.global_step == 4 and isinstance(trainer.train_dataloader.sampler, SequentialSampler)


def test_prompts_are_continued(tmp_path, tiny):
    text = TextData(prompts=["to be", "the quick", "or not"], batch_size=2)
    module = CausalLM(str(tiny), max_new_tokens=3)
    trainer = L.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, default_root_dir=tmp_path
    )
    results = trainer.predict(module, text)
    assert [r["prompt"] for batch in results for r in batch] == ["to be", "the quick", "or not"]


def test_both_are_written_as_yaml(tmp_path, tiny, jsonl):
    from lightning.pytorch.cli import LightningCLI

    config = tmp_path / "fit.yaml"
    config.write_text(f"""
model:
  class_path: ygglight.modules.CausalLM
  init_args: {{model: {tiny}, lora: {{r: 2, target_modules: [q_proj]}}, generation: {{do_sample: true}}}}
data:
  class_path: ygglight.data.TextData
  init_args: {{path: [{jsonl}], template: "{TEMPLATE}", block_size: 32}}
trainer: {{accelerator: cpu, devices: 1, logger: false, max_steps: 1, enable_checkpointing: false}}
""")
    cli = LightningCLI(subclass_mode_model=True, subclass_mode_data=True, run=False, args=["--config", str(config)])
    assert type(cli.model) is CausalLM and cli.model.hparams.lora == {"r": 2, "target_modules": ["q_proj"]}
    cli.trainer.fit(cli.model, cli.datamodule)
    assert cli.trainer.global_step == 1
