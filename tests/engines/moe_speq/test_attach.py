"""Experts go to a runtime and come back: the same numbers, the same objects."""

from __future__ import annotations

import copy
import gc
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ygglight.engines.moe_speq import attach
from ygglight.engines.moe_speq.attach import Attachment
from ygglight.engines.moe_speq.layout import Site, find_sites

from .conftest import FAMILIES, tiny_moe, tokens


class Resident(nn.Module):
    """All experts in memory, one after another; a module, to see that it never becomes a part of the model."""

    def __init__(self, sites: list[Site]) -> None:
        super().__init__()
        self.sites, self.calls = sites, 0
        self.tensors = [{k: v.detach().clone() for k, v in site.module.named_parameters()} for site in sites]

    def forward(self, site: int, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        self.calls += 1
        of, tensors = self.sites[site], self.tensors[site]
        out = torch.zeros_like(hidden)
        for expert in index.unique().tolist():
            token, place = torch.where(index == expert)
            up, down = tensors["gate_up_proj"][expert], tensors["down_proj"][expert]
            rows = hidden[token] @ (up if of.transposed else up.T)
            rows = of.activate(rows + tensors["gate_up_proj_bias"][expert] if of.biased else rows)
            rows = rows @ (down if of.transposed else down.T)
            rows = rows + tensors["down_proj_bias"][expert] if of.biased else rows
            out.index_add_(0, token, rows * weights[token, place, None])
        return out


def attached(model: Any) -> tuple[Attachment, Resident]:
    runtime = Resident(find_sites(model))
    return Attachment().attach(model, runtime), runtime


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_text_are_those_of_eager_experts(name: str) -> None:
    model = tiny_moe(name)
    model.set_experts_implementation("eager")
    ids = tokens(11, rows=2)
    expected, text = model(ids).logits, model.generate(ids, do_sample=False, max_new_tokens=12)
    attachment, runtime = attached(model)
    logits = model(ids).logits
    assert (logits - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert torch.equal(model.generate(ids, do_sample=False, max_new_tokens=12), text)
    assert runtime.calls == 2 * (1 + 12)  # generate kept to it
    runtime.tensors[0]["down_proj"] *= 1.01
    assert (model(ids).logits - expected).abs().max() > 1e-6 * expected.abs().max()  # the tolerance can fail
    attachment.detach()
    assert torch.equal(model(ids).logits, expected)


def test_a_compiler_leaves_the_runtime_alone() -> None:
    model, seen = tiny_moe("mixtral"), []
    attachment, runtime = attached(model)
    right = runtime.forward
    runtime.forward = lambda *args: (seen.append(torch.compiler.is_compiling()), right(*args))[1]  # type: ignore[method-assign]
    with torch.no_grad():
        torch.compile(model.model.layers[0].mlp, backend="eager")(torch.randn(1, 5, 64))
    attachment.detach()
    assert seen == [False]


def test_detach_gives_the_same_objects_back() -> None:
    model = tiny_moe("mixtral")
    model.model.layers[0].mlp.experts.down_proj.requires_grad_(False)
    before = list(model.named_parameters(remove_duplicate=False))
    values = [parameter.detach().clone() for _, parameter in before]
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    implementation = model.config._experts_implementation
    attachment, runtime = attached(model)
    inside = {name for name, _ in model.named_parameters()}
    assert inside == set(model.state_dict()) == {name for name, _ in before if ".experts." not in name}
    assert runtime not in list(model.modules())
    assert model.config._experts_implementation == implementation
    model.double()
    model.float()
    attachment.detach()
    attachment.detach()
    after = list(model.named_parameters(remove_duplicate=False))
    assert [(name, id(p), p.requires_grad) for name, p in after] == [(n, id(p), p.requires_grad) for n, p in before]
    assert all(torch.equal(parameter, value) for (_, parameter), value in zip(after, values, strict=True))
    assert all(
        a is b for a, b in zip((m.config for m in model.modules() if hasattr(m, "config")), configs, strict=True)
    )
    assert not any("_moe_speq" in module.__dict__ for module in model.modules())


def test_attaching_twice() -> None:
    model = tiny_moe("olmoe")
    attachment, runtime = attached(model)
    assert attachment.attach(model, runtime) is attachment
    with pytest.raises(ValueError, match="detach it first"):
        attachment.attach(model, Resident([]))
    with pytest.raises(ValueError, match="already is; detach the model first"):
        Attachment().attach(model, runtime)
    attachment.detach()
    attachment.attach(model, runtime)
    assert attachment.attached
    attachment.detach()


def test_models_that_share_a_configuration_do_not_meet() -> None:
    from transformers import MixtralForCausalLM

    first = tiny_moe("mixtral")
    second, third = MixtralForCausalLM(first.config).eval(), MixtralForCausalLM(first.config).eval()
    ids = tokens()
    expected = [model(ids).logits for model in (first, second, third)]
    (one, a), (two, b) = attached(first), attached(second)
    assert torch.equal(third(ids).logits, expected[2]) and a.calls == b.calls == 0
    torch.testing.assert_close(first(ids).logits, expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(second(ids).logits, expected[1], rtol=1e-5, atol=1e-5)
    assert a.calls == b.calls == 2
    one.detach()
    two.detach()
    assert all(torch.equal(m(ids).logits, e) for m, e in zip((first, second, third), expected, strict=True))


def test_an_attachment_that_fails_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_moe("gpt_oss")
    before, expected = list(model.named_parameters()), model(tokens()).logits

    def fail(module: nn.Module) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(attach, "generation_models", fail)
    with pytest.raises(KeyboardInterrupt):
        attached(model)
    assert [(n, id(p)) for n, p in model.named_parameters()] == [(n, id(p)) for n, p in before]
    assert torch.equal(model(tokens()).logits, expected)


def test_a_model_without_its_experts_is_not_copied_or_saved(tmp_path: Path) -> None:
    model = tiny_moe("mixtral")
    attachment, _ = attached(model)
    with pytest.raises(TypeError, match="detach it first"):
        copy.deepcopy(model)
    with pytest.raises(TypeError, match="detach it first"):
        pickle.dumps(model)
    with pytest.raises(RuntimeError, match="missing in the file"):
        model.save_pretrained(tmp_path)
    attachment.detach()
    assert torch.equal(copy.deepcopy(model)(tokens()).logits, model(tokens()).logits)
    model.save_pretrained(tmp_path)


def test_an_attachment_keeps_no_model_alive() -> None:
    model = tiny_moe("mixtral")
    attachment, runtime = attached(model)
    runtime.sites = []
    del model, runtime
    gc.collect()
    assert not attachment.attached
    attachment.detach()


def test_the_name_alone_is_an_error() -> None:
    attachment, _ = attached(other := tiny_moe("mixtral"))
    model = tiny_moe("mixtral", seed=1)
    model.set_experts_implementation("moe_speq")
    with pytest.raises(RuntimeError, match="set by MoE-SpeQ itself"):
        model(tokens())
    attachment.detach()
    del other
