"""The experts in four bits: near the model's own, kept in a file that no other model takes."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.engines.moe_speq.conftest import tiny_moe, tokens
from ygglight.engines.moe_speq.draft import DraftExperts, draft_bytes
from ygglight.engines.moe_speq.layout import find_sites
from ygglight.engines.moe_speq.quantize import quantize_nearest, record
from ygglight.engines.moe_speq.stores import HostStore
from ygglight.kernels.expert_gemm import Int4Weight
from ygglight.kernels.expert_gemm.int4 import dequantize
from ygglight.kernels.testing import rms_ratio


def parts(family="mixtral", dtype=torch.float32, **changes):
    model = tiny_moe(family, dtype=dtype, **changes)
    sites = find_sites(model)
    return model, sites, HostStore(sites)


def inputs(site, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(5, 64, generator=generator).to(dtype)
    index = torch.rand(5, site.experts, generator=generator).topk(2, dim=-1).indices
    return hidden, index, torch.rand(5, 2, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["mixtral", "phimoe", "deepseek_v2", "gpt_oss"])
@torch.no_grad()
def test_near_the_experts_themselves(family, dtype):
    _, sites, store = parts(family, dtype)
    draft = DraftExperts.build(sites, store, device="cpu")
    for site in sites:
        hidden, index, weights = inputs(site, dtype)
        actual = draft.forward(site, hidden, index, weights)
        assert actual.dtype is dtype
        # Against the same weights, rounded to four bits by hand, in the model's own code: only bfloat16 is between.
        for name in ("gate_up_proj", "down_proj"):
            parameter = site.module.get_parameter(name)
            for expert in range(site.experts):
                weight = parameter[expert].mT if site.transposed else parameter[expert]
                group = 64 if weight.shape[1] == 64 else 32
                back = dequantize(*quantize_nearest(weight, group), dtype)
                parameter[expert] = back.mT if site.transposed else back
        expected = site.module(hidden, index, weights)
        assert rms_ratio(actual, expected) < 0.015
        assert rms_ratio(draft.forward(site, hidden, index.flip(-1), weights), expected) > 0.15


def test_counts_its_bytes():
    _, sites, store = parts("gpt_oss")
    draft = DraftExperts.build(sites, store, device="cpu")
    assert draft.nbytes == draft_bytes(sites) < 0.3 * store.bytes_total
    assert draft_bytes(sites, "cuda") < draft_bytes(sites)  # a CPU keeps zeros beside scales
    assert draft.bits == 4


def test_few_rows_are_rounded_to_nearest():
    model, sites, store = parts()
    steps = []
    whole = record(sites, [lambda: model(tokens(40, rows=8))])
    some = DraftExperts.build(sites, store, device="cpu", calibration=whole, progress=lambda *at: steps.append(at))
    assert (some.calibrated, some.nearest) == (16, 0) and steps == [(i, 16) for i in range(1, 17)]
    few = record(sites, [lambda: model(tokens(3))])
    none = DraftExperts.build(sites, store, device="cpu", calibration=few)
    plain = DraftExperts.build(sites, store, device="cpu")
    assert (none.calibrated, none.nearest) == (0, 16)
    case = inputs(sites[0], torch.float32)
    assert torch.equal(none.forward(sites[0], *case), plain.forward(sites[0], *case))
    assert not torch.equal(some.forward(sites[0], *case), plain.forward(sites[0], *case))


@torch.no_grad()
def test_gptq_drafts_better_than_rounding():
    """On inputs of the calibrated kind, through both matrices."""
    _, sites, store = parts()
    site = sites[0]
    mix = torch.randn(64, 64, generator=torch.Generator().manual_seed(9)) * torch.logspace(0, -1.5, 64)[:, None]

    def case(seed, count=600):
        generator = torch.Generator().manual_seed(seed)
        index = torch.rand(count, site.experts, generator=generator).topk(2, dim=-1).indices
        return torch.randn(count, 64, generator=generator) @ mix, index, torch.full((count, 2), 0.5)

    seen, unseen = case(1), case(2)
    calibration = record(sites, [lambda: [each.module(*seen) for each in sites]])
    expected = site.module(*unseen)
    plain, tuned = (DraftExperts.build(sites, store, device="cpu", calibration=c) for c in (None, calibration))
    errors = [rms_ratio(draft.forward(site, *unseen), expected) for draft in (plain, tuned)]
    assert errors[1] < 0.85 * errors[0]
    turned = record(sites, [lambda: [each.module(seen[0].flip(-1), *seen[1:]) for each in sites]])
    wrong = DraftExperts.build(sites, store, device="cpu", calibration=turned)
    assert rms_ratio(wrong.forward(site, *unseen), expected) > 0.95 * errors[0]


@pytest.mark.parametrize("plain", [False, True], ids=["fastest", "plain"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_file_gives_the_same_draft(family, plain, tmp_path, monkeypatch):
    _, sites, store = parts(family)
    draft = DraftExperts.build(sites, store, device="cpu")
    draft.save(tmp_path / "a.safetensors")
    if plain:
        monkeypatch.setenv("YGGLIGHT_KERNELS", "reference")
        assert isinstance(DraftExperts.build(sites, store, device="cpu")._layers[0].down, Int4Weight)
    again = DraftExperts.load(tmp_path / "a.safetensors", sites, store, device="cpu")
    bare = DraftExperts.load(tmp_path / "a.safetensors", sites, device="cpu")  # the store's views are the parameters
    again.save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]
    assert (again.nearest, again.calibrated) == (draft.nearest, draft.calibrated) == (16, 0)
    for site in sites:
        case = inputs(site, torch.float32)
        assert torch.equal(again.forward(site, *case), bare.forward(site, *case))
        assert rms_ratio(draft.forward(site, *case), again.forward(site, *case)) < (0.015 if plain else 1e-9)


def test_the_file_is_safetensors_in_our_order(tmp_path):
    _, sites, store = parts()
    DraftExperts.build(sites, store, device="cpu").save(tmp_path / "draft")
    tensors = load_file(tmp_path / "draft")
    weight = sites[1].module.get_parameter("down_proj")[3].detach()
    packed, scale = quantize_nearest(weight, 32)
    assert torch.equal(tensors["1.down_proj.packed"][3], packed)
    assert torch.equal(tensors["1.down_proj.scale"][3], scale)


def test_wrong_files(tmp_path):
    _, sites, store = parts()
    path = tmp_path / "draft.safetensors"
    DraftExperts.build(sites, store, device="cpu").save(path)
    good = path.read_bytes()

    def why(data=None, of=(sites, store)):
        if data is not None:
            path.write_bytes(data)
        with pytest.raises(ValueError) as caught:
            DraftExperts.load(path, *of, device="cpu")
        return str(caught.value)

    assert "other experts" in why(of=parts(seed=1)[1:])
    assert "--dtype bfloat16" in why(of=parts(dtype=torch.bfloat16)[1:])
    assert "other experts" in why(of=parts("olmoe")[1:])
    assert "is damaged" in why(good[:-100])
    assert "is damaged" in why(good[:100])
    assert "is damaged" in why(b"")
    assert "no draft" in why(b"something else entirely, of some length")
    start = 8 + int.from_bytes(good[:8], "little")
    assert good.count(b'"0.down_proj.packed"') == 1
    assert "header" in why(good.replace(b'"0.down_proj.packed"', b'"0.down_proj.paCked"'))
    assert "header" in why(good.replace(b'nearest\\": 16', b'nearest\\": 17'))
    for at in (start, len(good) // 2, len(good) - 3):  # one bit, first or middle tensor or the checksums
        data = bytearray(good)
        data[at] ^= 1
        assert "is damaged" in why(bytes(data))
    save_file({"w": torch.zeros(3)}, path)
    assert "no draft of this version" in why()
    with pytest.raises(FileNotFoundError, match="no draft"):
        DraftExperts.load(tmp_path / "nothing", sites, store, device="cpu")
    path.write_bytes(good)
    DraftExperts.load(path, sites, store, device="cpu")


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    _, sites, store = parts()
    draft = DraftExperts.build(sites, store, device="cpu")
    path = tmp_path / "draft"
    draft.save(path)
    good = path.read_bytes()
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        draft.save(path)
    assert path.read_bytes() == good and [p.name for p in tmp_path.iterdir()] == ["draft"]
    with pytest.raises(FileNotFoundError, match="no folder"):
        draft.save(tmp_path / "nowhere" / "draft")


def test_says_what_cannot_be_quantised():
    _, sites, store = parts("mixtral", intermediate_size=40)
    with pytest.raises(ValueError, match=r"experts\.down_proj has 40 inputs"):
        DraftExperts.build(sites, store, device="cpu")
    _, sites, store = parts()
    with torch.no_grad():
        sites[1].module.get_parameter("down_proj")[2, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"expert 2 of .*not finite"):
        DraftExperts.build(sites, store, device="cpu")


def test_metadata(tmp_path):
    _, sites, store = parts()
    DraftExperts.build(sites, store, device="cpu").save(tmp_path / "draft")
    with safe_open(str(tmp_path / "draft"), framework="pt") as file:
        assert json.loads(file.metadata()["counts"]) == {"nearest": 16, "calibrated": 0}
