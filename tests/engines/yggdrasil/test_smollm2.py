"""A real model with a real draft: checks A3 and A9 of the brief, on questions of GSM8K."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import Tensor

from ygglight.compat import transformers as hf
from ygglight.data import TextData, assets
from ygglight.data.documents import read_prompts
from ygglight.engines.yggdrasil.generate import TreeGenerate
from ygglight.modules import DistilledDraft
from ygglight.strategies.draft_files import load_draft

from .conftest import close_calls, plain

pytestmark = pytest.mark.skipif(
    not (assets.is_installed(assets.SMOLLM2) and assets.is_installed("gsm8k-test")),
    reason="needs the packages of requirements-assets.txt",
)


@pytest.fixture(scope="module")
def real() -> tuple[Any, list[Tensor]]:
    directory = assets.resolve_model(assets.SMOLLM2)
    model: Any = hf.load_causal_lm(directory, dtype=torch.float32).eval()
    tokenizer = hf.load_tokenizer(directory)
    texts = []
    for question in read_prompts("gsm8k-test")[:12]:
        chat = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        texts.append(tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids)
    return model, texts


def test_greedy_text_of_a_real_model_by_lookup(real: tuple[Any, list[Tensor]]) -> None:
    model, texts = real
    method = TreeGenerate("lookup", tree={"width": 3, "depth": 4})
    expected = plain(model, texts[0], 32)
    assert close_calls(model, expected, plain(model, texts[0], 32, custom_generate=method)) == 0
    assert method.report.accepted > 0, "answers repeat what the question says"


@pytest.mark.slow
def test_greedy_text_of_a_real_model_with_a_distilled_draft(real: tuple[Any, list[Tensor]], tmp_path: Path) -> None:
    """Forty steps of distillation make a draft that is right about every fourth time: real drafts are like that."""
    trainer = L.Trainer(
        max_steps=40, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=1.0, limit_val_batches=0,
    )  # fmt: skip
    data = TextData(path="gsm8k", tokenizer=assets.SMOLLM2, block_size=128, batch_size=2)
    trainer.fit(DistilledDraft(assets.SMOLLM2, str(tmp_path / "draft"), learning_rate=1e-3), data)
    model, texts = real
    draft = load_draft(str(tmp_path / "draft"), model, None, None)
    ties, accepted = 0, 0.0
    for tree in ({"width": 1, "depth": 4}, {"width": 4, "depth": 4, "verify": 8}, {"width": 2, "depth": 6}, "auto"):
        method = TreeGenerate(draft, tree=tree)
        for ids in texts[:6]:
            expected = plain(model, ids, 64)
            ties += close_calls(model, expected, plain(model, ids, 64, custom_generate=method))
        accepted = max(accepted, method.report.tokens_per_step)
    print(f"texts that part at a tie: {ties} of 24; best tree: {accepted:.2f} tokens a step")
    assert ties <= 1, "in float32 the best two logits are hardly ever within 1e-4"
    assert accepted > 1.15


@pytest.mark.slow
def test_bfloat16_text_parts_at_ties_only(real: tuple[Any, list[Tensor]]) -> None:
    """A3: a tree's logits are rounded otherwise than a chain's, so texts may part where the best two are near."""
    exact, texts = real
    model = copy.deepcopy(exact).bfloat16()
    method = TreeGenerate("lookup", tree={"width": 3, "depth": 4})
    parted = 0
    for ids in texts:
        expected = plain(model, ids, 32)
        with torch.no_grad():
            scale = float(exact(expected).logits.abs().max())
        # Two units in the last place of the largest logit (8 bits), and the gap is that of one float32 pass.
        found = plain(model, ids, 32, custom_generate=method)
        parted += close_calls(exact, expected, found, gap=2 * scale * 2**-8)
    print(f"texts that part at a tie: {parted} of {len(texts)}")
    assert parted < len(texts) and method.report.accepted > 0 and method.report.fallbacks == {}


@pytest.mark.slow
def test_sampled_text_is_as_likely_as_plainly_sampled_text(real: tuple[Any, list[Tensor]]) -> None:
    """A9: negative log-likelihood of 120 sampled texts each, two-sided; a hotter sampler must be found out."""
    model, texts = real
    settings: dict[str, Any] = {"do_sample": True, "max_new_tokens": 24, "min_new_tokens": 24, "top_k": 0}

    def likelihoods(seed: int, temperature: float = 1.0, **more: Any) -> Tensor:
        torch.manual_seed(seed)
        found = []
        for number in range(120):
            ids = texts[number % 12]
            out = model.generate(ids, temperature=temperature, **settings, **more)
            with torch.no_grad():
                logits = model(out).logits[0, ids.shape[1] - 1 : -1].float()
            scores = torch.log_softmax(logits, -1).gather(1, out[0, ids.shape[1] :, None])
            found.append(-scores.mean())
        return torch.stack(found)

    theirs = likelihoods(1)
    method = TreeGenerate("lookup", tree={"width": 3, "depth": 4})
    assert abs(z_score(likelihoods(2, custom_generate=method), theirs)) < 3.3
    assert method.report.accepted > 0
    assert z_score(likelihoods(3, temperature=1.25), theirs) > 3.3


def z_score(mine: Tensor, theirs: Tensor) -> float:
    return float((mine.mean() - theirs.mean()) / (mine.var() / len(mine) + theirs.var() / len(theirs)).sqrt())
