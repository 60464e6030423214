"""What only a GPU can show (check A16 of the brief): no new graph, no growth, one wait an iteration. Never run yet."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from ygglight.engines.yggdrasil.generate import TreeGenerate

from .conftest import llama, noisy, plain, prompts

pytestmark = pytest.mark.gpu
TREE, NEW = {"width": 3, "depth": 4, "verify": 9}, 200


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    target = llama().to("cuda")
    return target, noisy(copy.deepcopy(target).cpu(), 0.08).to("cuda")


def generate(target: Any, method: TreeGenerate, prompt: Tensor) -> Tensor:
    return target.generate(prompt, do_sample=False, max_new_tokens=NEW, custom_generate=method)


@pytest.mark.parametrize("head", [False, True])
def test_a_thousand_iterations_record_nothing_and_take_no_memory(pair: tuple[Any, Any], head: bool) -> None:
    target, draft = pair
    method = TreeGenerate(draft, tree=TREE, plan={"tail": True, "head": head, "prune": "fixed"}, max_tokens=256)
    asked = [prompt.cuda() for prompt in prompts(3)]
    for prompt in asked:
        assert torch.equal(generate(target, method, prompt), plain(target, prompt, NEW))
    engine = method.engine(target)
    graphs = [engine.decoder._graphs, engine.draft.decoder._graphs]  # type: ignore[union-attr]
    recorded = [g.captures for g in graphs]
    torch.cuda.synchronize()
    held, before = torch.cuda.memory_reserved(), method.report.iterations
    while method.report.iterations - before < 1000:
        for prompt in asked:
            generate(target, method, prompt)
    torch.cuda.synchronize()
    assert [g.captures for g in graphs] == recorded
    assert torch.cuda.memory_reserved() == held


def test_the_host_waits_once_an_iteration(pair: tuple[Any, Any]) -> None:
    target, draft = pair
    method = TreeGenerate(draft, tree=TREE, plan={"tail": True, "head": True, "prune": "fixed"}, max_tokens=256)
    prompt = prompts(1)[0].cuda()
    generate(target, method, prompt)
    before = method.report.iterations
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            generate(target, method, prompt)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    iterations = method.report.iterations - before
    waits = [w for w in caught if "synchroniz" in str(w.message)]
    # A few more a call: generate itself looks at the prompt and its end tokens.
    assert len(waits) <= iterations + 8, f"{len(waits)} waits in {iterations} iterations"
