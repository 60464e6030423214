"""A small model that a user could have written, and a Trainer around it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY, LENGTH = 64, 32


class Block(nn.Module):
    def __init__(self, d: int, p: float) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.o = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down, self.drop = nn.Linear(d, 4 * d), nn.Linear(4 * d, d), nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = (z.view(b, t, 4, d // 4).transpose(1, 2) for z in self.qkv(self.ln1(x)).chunk(3, -1))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.drop(self.o(a.transpose(1, 2).reshape(b, t, d)))
        return x + self.drop(self.down(F.gelu(self.up(self.ln2(x)))))


class UserGPT(L.LightningModule):
    """Knows nothing of ygglight."""

    def __init__(self, layers: int = 4, d: int = 32, p: float = 0.1, automatic: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb = nn.Embedding(VOCABULARY, d)
        self.blocks = nn.ModuleList(Block(d, p) for _ in range(layers))
        self.ln, self.head = nn.LayerNorm(d), nn.Linear(d, VOCABULARY, bias=False)
        self.automatic_optimization = automatic
        self.losses: list[float] = []
        self.validated: list[float] = []

    def loss(self, tokens: Tensor) -> Tensor:
        h = self.emb(tokens[:, :-1])
        for block in self.blocks:
            h = block(h)
        return F.cross_entropy(self.head(self.ln(h)).flatten(0, 1), tokens[:, 1:].flatten())

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        loss = self.loss(batch)
        self.losses.append(float(loss.detach()))
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return None

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.validated.append(float(self.loss(batch)))

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 3e-3)


def tokens(batches: int = 8, size: int = 4, length: int = LENGTH) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, VOCABULARY, (size, length + 1), generator=generator) for _ in range(batches)]


Fit = Callable[..., tuple[UserGPT, L.Trainer]]


@pytest.fixture
def fit() -> Fit:
    """``fit(strategy, model=None, data=None, **trainer)``: seeded alike, quiet, on the CPU."""

    def run(strategy: Any = "auto", model: Any = None, data: Any = None, **kwargs: Any) -> tuple[Any, L.Trainer]:
        model = UserGPT() if model is None else model
        settings: dict[str, Any] = {
            "accelerator": "cpu", "devices": 1, "max_steps": 6, "logger": False, "enable_checkpointing": False,
            "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0,
        }  # fmt: skip
        trainer = L.Trainer(strategy=strategy, **{**settings, **kwargs})
        torch.manual_seed(7)
        trainer.fit(model, data or torch.utils.data.DataLoader(tokens(), batch_size=None))
        return model, trainer

    return run


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random language model whose text is not boring, and a tokenizer with a chat template."""
    from ygglight.modules.testing import tiny_causal_lm

    return tiny_causal_lm(tmp_path_factory.mktemp("models") / "tiny", chat=True, initializer_range=0.2)
