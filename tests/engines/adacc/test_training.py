"""Does compression hurt? Paired runs on real English text, beside a codec that is known to be bad; and plans that move
with the data."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ygglight.engines.adacc import build
from ygglight.engines.adacc.config import AdaccConfig
from ygglight.engines.adacc.runtime import Runtime
from ygglight.kernels.act_codec import PER_TENSOR_INT4, Packed, pack, unpack

STEPS, LAST, BATCH, LENGTH, WIDTH, LAYERS = 250, 50, 8, 64, 64, 2
OUTLIERS = [3, 17, 40]
BOUND = 0.1
"""Nats. Measured over three seeds: ours 0.002 to 0.019 off, per-tensor int4 0.31 and 0.47 off and once not a number."""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln1(x)
        q, k, v = (f(y).unflatten(-1, (4, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.ln2(x))))


class ByteLM(nn.Module):
    """A byte-level language model whose norms blow three channels up, as large models do by themselves."""

    def __init__(self, gain: float = 25.0) -> None:
        super().__init__()
        self.emb, self.pos = nn.Embedding(128, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.ln, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 128, bias=False)
        self.amplify(gain)

    def amplify(self, gain: float) -> None:
        with torch.no_grad():
            for block in self.blocks:
                for norm in (block.ln1, block.ln2):
                    norm.weight[OUTLIERS] *= gain

    def loss(self, x: Tensor) -> Tensor:
        h = self.emb(x[:, :-1]) + self.pos(torch.arange(LENGTH))
        for block in self.blocks:
            h = block(h)
        return F.cross_entropy(self.head(self.ln(h)).flatten(0, 1), x[:, 1:].flatten())


@pytest.fixture(scope="module")
def text() -> Tensor:
    """English that every Python brings along: the help topics of the language reference."""
    from pydoc_data.topics import topics

    raw = "".join(topics[key] for key in sorted(topics)).encode()[:400_000]
    return torch.tensor(list(raw), dtype=torch.long).clamp(max=127)


@pytest.fixture
def compression_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codecs cost nothing and running an operator again costs a second: what can be compressed is."""
    monkeypatch.setattr(build, "codec_seconds", lambda *_: 0.0)
    monkeypatch.setattr(build, "REPLAY_OVERHEAD", 1.0)


def managed(model: ByteLM, **config: Any) -> Runtime:
    runtime = Runtime(model, AdaccConfig(**{"memory_budget": 0.6, "monitor_every": 0, **config}), torch.device("cpu"))
    runtime.attach()
    return runtime


def train(
    text: Tensor, seed: int, step: Callable[[ByteLM, Tensor], Tensor], model: ByteLM, steps: int, lr: float = 2e-3
) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        starts = torch.randint(0, len(text) - LENGTH - 1, (BATCH,), generator=generator)
        optimizer.zero_grad()
        loss = step(model, torch.stack([text[i : i + LENGTH + 1] for i in starts]))
        optimizer.step()
        losses.append(loss.item())
    return losses


def plain_step(model: ByteLM, batch: Tensor) -> Tensor:
    loss = model.loss(batch)
    loss.backward()
    return loss


def adacc_step(runtime: Runtime) -> Callable[[ByteLM, Tensor], Tensor]:
    def step(model: ByteLM, batch: Tensor) -> Tensor:
        with runtime.forward(batch):
            loss = model.loss(batch)
        loss.backward()
        runtime.after_backward()
        runtime.after_optimizer_step()
        return loss

    return step


def bad_step(model: ByteLM, batch: Tensor) -> Tensor:
    """Everything that autograd saves in int4 with one scale a tensor, queries and keys included."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def squeeze(tensor: Tensor) -> Any:
        if not tensor.is_floating_point() or tensor.numel() < 256 or tensor.untyped_storage().data_ptr() in parameters:
            return tensor
        return pack(tensor.detach().reshape(-1), PER_TENSOR_INT4, 0), tensor.shape

    def restore(held: Any) -> Tensor:
        return unpack(held[0]).view(held[1]) if isinstance(held, tuple) and isinstance(held[0], Packed) else held

    with torch.autograd.graph.saved_tensors_hooks(squeeze, restore):
        loss = model.loss(batch)
    loss.backward()
    return loss


def ending(losses: list[float]) -> float:
    return sum(losses[-LAST:]) / LAST


@pytest.mark.usefixtures("compression_pays")
def test_compressed_runs_end_where_plain_ones_do_and_a_bad_codec_shows(text: Tensor) -> None:
    ours, bad = [], []
    for seed in range(3):
        ends = {}
        for name in ("plain", "adacc", "bad"):
            torch.manual_seed(seed)
            model = ByteLM()
            # At this budget codecs alone do it: a third of the saved bytes are compressed, nothing is run again.
            runtime = managed(model, memory_budget=0.8) if name == "adacc" else None
            step = {"plain": plain_step, "bad": bad_step}.get(name) or adacc_step(runtime)  # type: ignore[arg-type]
            ends[name] = ending(train(text, seed, step, model, STEPS))
            if runtime is not None:
                assert runtime.plan is not None
                shares = runtime.plan.saved_bytes
                assert shares["compress"] > 0.2 * sum(shares.values()), "hardly anything was compressed"
                assert 0 < runtime.plan.profile.error <= 0.03**2
        ours.append(ends["adacc"] - ends["plain"])
        bad.append(ends["bad"] - ends["plain"])
    assert abs(sum(ours) / 3) < BOUND and max(map(abs, ours)) < BOUND, ours
    assert all(math.isnan(d) or d > BOUND for d in bad), bad


@pytest.mark.usefixtures("compression_pays")
def test_a_shift_of_the_data_changes_the_plan_and_a_steady_run_does_not(text: Tensor) -> None:
    torch.manual_seed(0)
    model = ByteLM(gain=1.0)
    runtime = managed(model, memory_budget=0.46, monitor_every=4, max_gradient_error=0.02)
    step = adacc_step(runtime)
    train(text, 0, step, model, 13)
    assert runtime.replans == 0, runtime.history
    assert runtime.plan is not None
    before = runtime.plan.actions
    assert "compress" in before.values()
    with torch.no_grad():  # more outliers in a group than the codec has places for
        for block in model.blocks:
            block.ln2.weight[::4] *= 60.0
            block.ln1.weight[::4] *= 60.0
    train(text, 1, step, model, 9, lr=1e-7)
    assert runtime.replans >= 1, "the shift went unnoticed for two looks"
    assert runtime.plan.actions != before
    assert any("perturbs the gradient" in reason for _, reason in runtime.history), runtime.history


def test_with_free_codecs_the_planner_compresses_and_otherwise_says_what_stopped_it(
    text: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ygglight.engines.adacc.explain import explain
    from ygglight.engines.adacc.planner import plan as solve

    shares = {}
    for name, seconds in (("free", 0.0), ("dear", 10.0)):
        monkeypatch.setattr(build, "codec_seconds", lambda *_, cost=seconds: cost)
        torch.manual_seed(0)
        model = ByteLM()
        runtime = managed(model)
        train(text, 0, adacc_step(runtime), model, 2)
        assert runtime.plan is not None
        shares[name] = runtime.plan.saved_bytes["compress"]
        if name == "dear":
            built = runtime.plan.built
            solution = solve(built.step, runtime.plan.budget_bytes, error_budget=0.03**2)
            stopped = [row for row in explain(built.step, solution) if row.why_not_compressed == "cost"]
            assert stopped and all(row.detail for row in stopped)
    assert shares["free"] > 0 == shares["dear"]
