"""What the tests of MoESpeQStrategy share: small models, modules that know nothing of it, budgets by slots."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ygglight.engines.moe_speq.config import STAGING
from ygglight.engines.moe_speq.layout import find_sites

VOCABULARY, NEW, PROMPTS, EXPERTS = 97, 24, 2, 8


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Files of experts and measured latencies are nobody else's; and a second thread would only wait."""
    monkeypatch.setenv("YGGLIGHT_CACHE", str(tmp_path / "cache"))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def mixtral(seed: int = 0, **changes: Any) -> Any:
    """Random, with text that is not boring."""
    from transformers import MixtralConfig, MixtralForCausalLM

    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "num_local_experts": EXPERTS, "num_experts_per_tok": 2, "tie_word_embeddings": False,
        "initializer_range": 0.2, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    }  # fmt: skip
    torch.manual_seed(seed)
    return MixtralForCausalLM(MixtralConfig(**shape | changes)).eval()


class Writes(L.LightningModule):
    """Knows nothing of ygglight."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.model.generate(batch, do_sample=False, max_new_tokens=NEW)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Scores(Writes):
    """Does not generate: one forward."""

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.model(input_ids=batch).logits


def prompts() -> DataLoader[Any]:
    rows = torch.randint(0, VOCABULARY, (PROMPTS, 7), generator=torch.Generator().manual_seed(3))
    return DataLoader(rows, batch_size=1)


def trainer(strategy: Any, **changes: Any) -> L.Trainer:
    options: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False,
    }  # fmt: skip
    return L.Trainer(strategy=strategy, **options | changes)


def slabs(model: Any, slots: int, staging: int = STAGING) -> int:
    sites = find_sites(model)
    return (slots * len(sites) + staging) * sites[0].layout.nbytes


def plain(model: Any) -> list[Tensor]:
    """What the whole model writes."""
    return [model.generate(row, do_sample=False, max_new_tokens=NEW) for row in prompts()]


def same(found: Any, expected: list[Tensor]) -> bool:
    return found is not None and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
