"""What compression may touch, and what it does to the gradient of a block with outlier channels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ygglight.engines.adacc import build, codecs
from ygglight.engines.adacc.config import AdaccConfig
from ygglight.engines.adacc.graph import Action
from ygglight.engines.adacc.runtime import Runtime
from ygglight.kernels.act_codec import PER_TENSOR_INT4

WIDTH, LENGTH = 512, 256
OUTLIERS = [5, 130, 300]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        with torch.no_grad():
            for norm in (self.ln1, self.ln2):
                norm.weight[OUTLIERS] *= 25.0

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln1(x)
        q, k, v = (f(y).unflatten(-1, (8, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.ln2(x))))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def loss(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


@pytest.fixture
def batch() -> Tensor:
    return torch.randn(1, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1))


def gradients(model: Model, batch: Tensor, runtime: Runtime | None = None) -> Tensor:
    model.zero_grad()
    if runtime is None:
        model.loss(batch).backward()
    else:
        with runtime.forward(batch):
            loss = model.loss(batch)
        loss.backward()
        runtime.after_backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def planned(model: Model, batch: Tensor, monkeypatch: pytest.MonkeyPatch, budget: float = 0.5) -> Runtime:
    """Codecs free, running again dear: as much compression as the error bound lets through."""
    monkeypatch.setattr(build, "codec_seconds", lambda *_: 0.0)
    monkeypatch.setattr(build, "REPLAY_OVERHEAD", 1.0)
    runtime = Runtime(model, AdaccConfig(budget), torch.device("cpu"))
    runtime.attach()
    gradients(model, batch, runtime)
    return runtime


def test_the_whole_gradient_stays_within_its_bound_where_per_tensor_int4_does_not(
    batch: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model()
    exact = gradients(model, batch)
    runtime = planned(model, batch, monkeypatch)
    assert runtime.plan is not None
    assert list(runtime.plan.actions.values()).count("compress") >= 3
    ours = gradients(model, batch, runtime)
    error = float((ours - exact).norm() / exact.norm())
    assert 0 < error <= 0.03
    assert float(F.cosine_similarity(ours, exact, dim=0)) >= 0.999

    # The very same plan with one scale a tensor instead: the check must fail.
    for region in runtime.plan.regions.values():
        if region is not None:
            for value in region.specs:
                region.specs[value] = PER_TENSOR_INT4
    bad = gradients(model, batch, runtime)
    assert float((bad - exact).norm() / exact.norm()) > 0.03


def test_the_measured_codec_error_predicts_the_real_one(batch: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a budget where little is replayed from decoded tensors; where much is, what is measured is several times the
    real error (docs, "What did not reproduce")."""
    model = Model()
    exact = gradients(model, batch)
    runtime = planned(model, batch, monkeypatch, budget=0.7)
    assert runtime.plan is not None
    error = float((gradients(model, batch, runtime) - exact).norm() / exact.norm())
    assert 0.8 < error / runtime.plan.gradient_error < 1.25


def test_queries_keys_parameters_and_statistics_are_never_offered_a_lossy_codec(
    batch: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model()
    runtime = planned(model, batch, monkeypatch)
    assert runtime.plan is not None
    built, seen = runtime.plan.built, 0
    for kind, graph in zip(built.kinds, built.step.types, strict=True):
        for value in graph.values:
            if any("Attention" in reader for reader in kind.readers.get(value.id, ())):
                seen += 1
                assert all(option.error == 0 for option in value.codecs), value.name
            if value.producer is None or not value.saved:
                assert not value.codecs
    assert seen >= 4, "no attention input was found, so nothing was checked"
    sizes = {p.numel() * p.element_size() for p in model.parameters()}
    names = {name for name, action in runtime.plan.actions.items() if action == Action.COMPRESS}
    assert names and not any("aten.t:" in name or "parameter" in name for name in names)
    assert sizes


@pytest.mark.parametrize(
    ("readers", "dtype", "offered"),
    [
        (["MmBackward0", "AddmmBackward0"], torch.float32, ("int4", "int8")),
        (["GeluBackward0"], torch.bfloat16, ("int8",)),
        (["MmBackward0", "ScaledDotProductFlashAttentionForCpuBackward0"], torch.float32, ()),
        (["LogSoftmaxBackward0"], torch.float32, ()),
        (["BmmBackward0"], torch.float32, ()),
        (["NllLossBackward0"], torch.int64, ()),
        (["NativeDropoutBackward0"], torch.bool, ("mask",)),
        ([], torch.float32, ()),
    ],
)
def test_codecs_by_reader(readers: list[str], dtype: torch.dtype, offered: tuple[str, ...]) -> None:
    assert codecs.codecs_for(readers, dtype) == offered


def test_autocast_copies_of_weights_are_no_activations(batch: Tensor) -> None:
    model = Model()
    runtime = Runtime(model, AdaccConfig(0.7), torch.device("cpu"))
    runtime.attach()
    with torch.autocast("cpu", dtype=torch.bfloat16), runtime.forward(batch):
        loss = model.loss(batch)
    loss.backward()
    runtime.after_backward()
    assert runtime.plan is not None
    for kind, graph in zip(runtime.plan.built.kinds, runtime.plan.built.step.types, strict=True):
        for value in graph.actionable:
            if value.name.endswith("aten._to_copy:0") and value.nbytes == 0:
                assert value.pinned and not value.codecs
        assert kind.graph is graph
    copies = [v for g in runtime.plan.built.step.types for v in g.actionable if v.pinned and v.nbytes == 0]
    assert copies, "autocast made no copies of weights, so nothing was checked"
