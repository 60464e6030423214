"""What only a GPU can show: the allocator's peak within the budget, and gradients as in plain PyTorch. Never run yet
(no session has had a GPU); `make test-gpu` runs it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ygglight.engines.adacc.config import AdaccConfig
from ygglight.engines.adacc.runtime import Runtime

pytestmark = pytest.mark.gpu
MIB = 2**20


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def llama() -> tuple[nn.Module, Tensor]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4,
        vocab_size=2048, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to("cuda", torch.bfloat16).train()
    return model, torch.randint(0, 2048, (8, 512), device="cuda")


def step(model: Any, batch: Tensor, runtime: Runtime | None) -> list[Tensor]:
    model.zero_grad(set_to_none=False)  # gradients stay, so that they are state before and after
    if runtime is None:
        model(input_ids=batch, labels=batch).loss.backward()
    else:
        with runtime.forward(batch):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        runtime.after_backward()
    return [p.grad.clone() for p in model.parameters()]


def peak(model: Any, batch: Tensor, runtime: Runtime | None) -> int:
    step(model, batch, runtime)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    held = step(model, batch, runtime)
    return torch.cuda.max_memory_allocated() - before - sum(g.nbytes for g in held)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("share", [0.9, 0.7, 0.5])
def test_exact_plans_keep_the_budget_and_the_gradients(share: float) -> None:
    model, batch = llama()
    expected = step(model, batch, None)
    plain = peak(model, batch, None)
    runtime = Runtime(model, AdaccConfig(int(share * plain), compress=False), torch.device("cuda"))
    runtime.attach()
    step(model, batch, runtime)
    measured = peak(model, batch, runtime)
    assert runtime.plan is not None and not runtime.plan.all_keep and runtime.surprises == 0
    assert measured <= share * plain + MIB
    assert abs(runtime.plan.predicted_peak_bytes / measured - 1) < 0.05
    for name, a, b in zip(dict(model.named_parameters()), expected, step(model, batch, runtime), strict=True):
        assert torch.equal(a, b), name


def test_compressed_gradients_stay_within_the_error_bound() -> None:
    model, batch = llama()
    exact = step(model, batch, None)
    runtime = Runtime(model, AdaccConfig(0.4, max_gradient_error=0.03), torch.device("cuda"))
    runtime.attach()
    step(model, batch, runtime)
    found = step(model, batch, runtime)
    size = sum(float(a.float().square().sum()) for a in exact)
    error = sum(float((a.float() - b.float()).square().sum()) for a, b in zip(exact, found, strict=True))
    assert (error / size) ** 0.5 < 0.06  # twice the planned bound: bf16's own noise is in it
