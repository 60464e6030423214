"""Finding experts, the slab of one of them, and the models that are refused: check 20 of the brief."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ygglight.engines.moe_speq.layout import SlabLayout, find_sites

from .conftest import EXPERTS, FAMILIES, TOP_K, tiny_moe


@pytest.mark.parametrize("name", FAMILIES)
def test_sites_of_every_family(name: str) -> None:
    model = tiny_moe(name)
    sites = find_sites(model)
    odd = name == "gpt_oss"
    assert [site.index for site in sites] == [0, 1]
    assert [site.name for site in sites] == [
        f"model.layers.{layer + name.startswith('deepseek')}.mlp.experts" for layer in range(2)
    ]
    for site in sites:
        assert site.module is model.get_submodule(site.name)
        assert (site.experts, site.top_k, site.gated) == (EXPERTS, TOP_K, True)
        assert (site.interleaved, site.transposed, site.biased) == (odd, odd, odd)
        assert site.fused_activation == (None if odd else "silu")
        assert len(site.layout.names) == (4 if odd else 2)
        gate_up = torch.randn(3, 64)
        expected = site.module._apply_gate(gate_up)
        assert torch.equal(site.activate(gate_up), expected)
        halves = nn.functional.silu(gate_up[:, :32]) * gate_up[:, 32:]
        assert torch.equal(expected, halves) is not odd


@pytest.mark.parametrize(("act", "fused"), [("gelu", "gelu"), ("gelu_pytorch_tanh", None), ("relu", None)])
def test_an_activation_is_fused_only_if_it_is_that_one(act: str, fused: str | None) -> None:
    assert find_sites(tiny_moe("mixtral", hidden_act=act))[0].fused_activation == fused


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views_are_the_tensors_and_no_copies(dtype: torch.dtype) -> None:
    shapes = {"gate_up_proj": (6, 5), "down_proj": (5, 3), "gate_up_proj_bias": (6,)}
    layout = SlabLayout.of(shapes, dtype)
    assert layout.nbytes % 256 == 0
    assert all(offset % 256 == 0 for offset in layout.offsets)
    slabs = torch.zeros(2, 3, layout.nbytes, dtype=torch.uint8)
    values = {name: torch.randn(2, 3, *shape).to(dtype) for name, shape in shapes.items()}
    for name, view in layout.views(slabs).items():
        assert view.shape == values[name].shape and view.untyped_storage().data_ptr() == slabs.data_ptr()
        view.copy_(values[name])
    for name, value in values.items():  # none ran over another
        assert torch.equal(layout.views(slabs)[name], value)
        assert torch.equal(layout.views(slabs[1, 2])[name], value[1, 2])


def _dense() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    )


def _undecorated() -> Any:
    model = _dense()
    model.model.layers[0].mlp = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(16, 16)])})
    return model


def _mxfp4() -> Any:
    model = tiny_moe("gpt_oss")
    for layer in model.model.layers:
        layer.mlp.experts = type("Mxfp4GptOssExperts", (nn.Module,), {})()
    return model


def _changed(change: Callable[[nn.Module], None], **fields: Any) -> Callable[[], Any]:
    def build() -> Any:
        model = tiny_moe("mixtral", **fields)
        change(model.model.layers[1].mlp.experts)
        return model

    return build


def _fp8(module: Any) -> None:
    for name in ("gate_up_proj", "down_proj"):
        setattr(module, name, nn.Parameter(getattr(module, name).data.to(torch.float8_e4m3fn), requires_grad=False))


def _local(module: Any) -> None:
    for name in ("gate_up_proj", "down_proj"):
        setattr(module, name, nn.Parameter(getattr(module, name).data[:4]))


def _adapter(module: Any) -> None:
    module.lora_A = nn.Parameter(torch.zeros(2, 2))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (_dense, "no routed experts"),
        (_undecorated, "trust_remote_code"),
        (_mxfp4, "MXFP4.*dequantize=True"),
        (_changed(_fp8), "quantised .float8_e4m3fn"),
        (_changed(_local), "expert parallel"),
        (_changed(lambda m: setattr(m, "_is_expert_parallel", True)), "shared out among processes"),
        (_changed(lambda m: setattr(m, "has_gate", False)), "no gate"),
        (_changed(lambda m: setattr(m, "has_post_expert_norm", True)), "norm of their own"),
        (_changed(lambda m: setattr(m, "_hf_hook", object())), "device_map"),
        (_changed(_adapter), "lora_A.*merge adapters"),
        (_changed(lambda m: m.to(torch.bfloat16)), "from layer to layer"),
    ],
)
def test_what_cannot_be_run_is_refused_with_its_mend(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_sites(build())
