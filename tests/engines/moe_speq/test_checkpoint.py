"""Loading everything but the experts: equal to ``from_pretrained``, in less memory than the checkpoint has bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ygglight.engines.moe_speq.checkpoint import load_without_experts
from ygglight.engines.moe_speq.layout import find_sites

from .conftest import FAMILIES, tiny_moe, tokens

pytestmark = pytest.mark.usefixtures("own_cache")


def saved(folder: Path, name: str, **kwargs: Any) -> Path:
    tiny_moe(name).save_pretrained(folder / name, **{"max_shard_size": "100KB"} | kwargs)
    return folder / name


def whole(directory: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(directory), dtype=dtype)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("original", [True, False], ids=["hub", "fused"])
def test_equals_from_pretrained(name: str, original: bool, tmp_path: Path) -> None:
    directory = saved(tmp_path, name, save_original_format=original)
    header = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    assert original is not any("gate_up_proj" in key for key in header) or name == "gpt_oss"
    for dtype in (torch.float32, torch.bfloat16):
        expected = whole(directory, dtype)
        model, store = load_without_experts(directory, dtype, drop_cache=original)
        assert (store.path.parent == directory) is (dtype == torch.float32)  # nothing is written for the same dtype
        sites, out = find_sites(model), torch.empty(store.nbytes, dtype=torch.uint8)
        tensors, experts = expected.state_dict(), set[str]()
        for site in sites:
            for expert in range(site.experts):
                store.read_into(site.index, expert, out)
                for key, view in site.layout.views(out).items():
                    assert torch.equal(view, tensors[f"{site.name}.{key}"][expert])
                    experts.add(f"{site.name}.{key}")
        store.close()
        state = model.state_dict()
        assert list(state) == list(tensors)
        for key, tensor in tensors.items():
            assert state[key].dtype == tensor.dtype and state[key].shape == tensor.shape
            assert state[key].is_meta if key in experts else torch.equal(state[key], tensor)
        buffers = dict(model.named_buffers())
        assert all(torch.equal(buffers[key], buffer) for key, buffer in expected.named_buffers())
        assert type(model) is type(expected) and not model.training
        assert model.generation_config.to_dict() == expected.generation_config.to_dict()


def test_what_cannot_be_loaded_is_refused_with_its_mend(tmp_path: Path) -> None:
    directory = saved(tmp_path, "mixtral")
    with pytest.raises(ValueError, match="dtype is 'auto'"):
        load_without_experts(directory, torch.int8)
    shards = sorted(directory.glob("*.safetensors"))
    size = shards[1].stat().st_size
    os.truncate(shards[1], size - 1)
    with pytest.raises(ValueError, match="fetch it again"):
        load_without_experts(directory)
    shards[1].unlink()
    with pytest.raises(ValueError, match="lacks model-0000"):
        load_without_experts(directory)
    for shard in (*shards[:1], *shards[2:], directory / "model.safetensors.index.json"):
        shard.unlink()
    with pytest.raises(ValueError, match=r"no model\.safetensors"):
        load_without_experts(directory)


def test_a_checkpoint_that_does_not_fit_its_configuration_is_refused(tmp_path: Path) -> None:
    directory = saved(tmp_path, "mixtral")
    config = json.loads((directory / "config.json").read_text())
    for changes, message in (
        ({"num_local_experts": 9}, "lacks gate_up_proj of experts .8."),
        ({"intermediate_size": 48}, "the configuration says otherwise|lacks"),
        ({"quantization_config": {"quant_method": "fp8"}}, "is quantised"),
    ):
        (directory / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(ValueError, match=message):
            load_without_experts(directory)
    dense = tiny_moe("qwen3_moe", mlp_only_layers=[0, 1])
    dense.save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="no routed experts"):
        load_without_experts(tmp_path / "dense")


_LIMITED = """
import resource, sys, torch
from transformers import AutoModelForCausalLM, MixtralForCausalLM
from ygglight.engines.moe_speq.attach import Attachment
from ygglight.engines.moe_speq.checkpoint import load_without_experts
from ygglight.engines.moe_speq.layout import find_sites

class OnDemand:
    def __init__(self, sites, store):
        self.sites, self.store, self.out = sites, store, torch.empty(store.nbytes, dtype=torch.uint8)
    def forward(self, site, hidden, index, weights):
        result = torch.zeros_like(hidden)
        for expert in index.unique().tolist():
            self.store.read_into(site, expert, self.out)
            weight = self.sites[site].layout.views(self.out)
            token, place = torch.where(index == expert)
            rows = self.sites[site].activate(hidden[token] @ weight["gate_up_proj"].T) @ weight["down_proj"].T
            result.index_add_(0, token, rows * weights[token, place, None])
        return result

directory, ids = sys.argv[1], torch.arange(9)[None]
used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData")) * 1024
limit = used + int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
try:
    AutoModelForCausalLM.from_pretrained(directory)
except Exception as error:
    print("whole:", type(error).__name__)
model, store = load_without_experts(directory)
runtime = OnDemand(find_sites(model), store)
Attachment().attach(model, runtime)
with torch.no_grad():
    torch.save(model(ids).logits, sys.argv[3])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts what a process allocates on Linux only")
def test_a_model_larger_than_memory_loads_and_runs(tmp_path: Path) -> None:
    model = tiny_moe("mixtral", hidden_size=256, intermediate_size=1024, num_local_experts=48, initializer_range=0.02)
    model.save_pretrained(tmp_path / "large", max_shard_size="50MB")
    with torch.no_grad():
        expected = model(torch.arange(9)[None]).logits
    size = sum(file.stat().st_size for file in (tmp_path / "large").glob("*.safetensors"))
    limit = 160 * 2**20
    assert size > 1.75 * limit
    done = subprocess.run(
        [sys.executable, "-c", _LIMITED, str(tmp_path / "large"), str(limit), str(tmp_path / "logits.pt")],
        env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "whole:" in done.stdout  # the limit limits: all of it does not load
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=1e-4, atol=1e-5)


def test_the_loaded_model_computes_the_same(tmp_path: Path) -> None:
    directory = saved(tmp_path, "phimoe")
    expected = whole(directory, torch.float32)
    model, store = load_without_experts(directory)
    for site in find_sites(model):
        slabs = torch.empty(site.experts, store.nbytes, dtype=torch.uint8)
        for expert in range(site.experts):
            store.read_into(site.index, expert, slabs[expert])
        for name, view in site.layout.views(slabs).items():
            setattr(site.module, name, torch.nn.Parameter(view))
    store.close()
    assert torch.equal(model(tokens()).logits, expected(tokens()).logits)
