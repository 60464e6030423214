"""Four bits: how wrong a weight may be, and whether GPTQ is worth its time on inputs that it has not seen."""

import pytest
import torch

from tests.engines.moe_speq.conftest import tiny_moe, tokens
from ygglight.engines.moe_speq.layout import find_sites
from ygglight.engines.moe_speq.quantize import choose_group, quantize_gptq, quantize_nearest, record
from ygglight.kernels.expert_gemm import unpack_codes
from ygglight.kernels.expert_gemm.int4 import dequantize


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("group", [32, 64, 128])
def test_no_weight_is_off_by_more_than_half_a_scale(group, dtype):
    torch.manual_seed(0)
    weight = torch.randn(40, 256)
    weight[3], weight[4, :128], weight[5] = 0, weight[4, :128] * 1e-4, weight[5] * 100
    weight[6, 10] = -50.0  # one that is far from all others
    weight = weight.to(dtype)
    packed, scale = quantize_nearest(weight, group)
    wide = scale.double().repeat_interleave(group, dim=1)
    error = (dequantize(packed, scale, torch.float64) - weight.double()).abs()
    assert (error <= wide / 2 * (1 + 1e-6)).all()
    assert (error[:3] > wide[:3] / 2.3).any()  # the bound is near
    assert (error[3] == 0).all()
    assert (dequantize(packed, scale * 1.1, torch.float64) - weight.double()).abs().gt(wide / 2).any()
    assert unpack_codes(packed, group).unique().numel() == 15 + (unpack_codes(packed, group) == 0).any()


def test_groups():
    assert [choose_group(n, "w") for n in (2048, 2880, 768, 576, 96)] == [128, 64, 128, 64, 32]
    with pytest.raises(ValueError, match=r"layer\.down has 40 inputs.*draft_bits"):
        choose_group(40, "layer.down")


def off(coded, weight, inputs):
    """Error of the products, of their size."""
    return float((inputs @ (dequantize(*coded, torch.float32) - weight).mT).norm() / (inputs @ weight.mT).norm())


def test_gptq_beats_rounding_on_unseen_inputs_of_the_same_kind():
    torch.manual_seed(0)
    weight = torch.randn(48, 128) / 11
    mix = torch.randn(128, 128) * torch.logspace(0, -1.5, 128)[:, None]
    seen, unseen = torch.randn(512, 128) @ mix, torch.randn(512, 128) @ mix
    nearest = off(quantize_nearest(weight, 64), weight, unseen)
    assert off(quantize_gptq(weight, seen, 64), weight, unseen) < 0.75 * nearest
    # Control: what was learnt from inputs of another kind is worth nothing.
    other = torch.randn(512, 128) @ mix[:, torch.randperm(128)]
    assert off(quantize_gptq(weight, other, 64), weight, unseen) > 0.95 * nearest


def test_gptq_takes_inputs_that_are_never_used():
    torch.manual_seed(0)
    weight, inputs = torch.randn(16, 64), torch.randn(20, 64)
    inputs[:, 5:40] = 0
    packed, scale = quantize_gptq(weight, inputs, 32)
    assert dequantize(packed, scale, torch.float32).isfinite().all()
    packed, scale = quantize_gptq(weight, torch.zeros(4, 64), 32)
    assert torch.equal(packed, quantize_nearest(weight, 32)[0])


def test_records_what_experts_see():
    model = tiny_moe("qwen3_moe")
    sites = find_sites(model)
    seen = []
    handle = sites[1].module.register_forward_pre_hook(lambda _, args: seen.append(args))
    calls = []

    def run():
        calls.append(model(tokens(10, seed=len(calls))))

    calibration = record(sites, [run] * 5, tokens=24)
    handle.remove()
    assert len(calls) == 3 and calibration.hidden[1].shape == (24, 64)
    assert torch.equal(calibration.hidden[1], torch.cat([args[0] for args in seen])[:24])
    index = torch.cat([args[1] for args in seen])[:24]
    rows = calibration.rows(1, 2)
    assert torch.equal(rows, calibration.hidden[1][(index == 2).any(-1)])
    assert sum(len(calibration.rows(1, e)) for e in range(8)) == 24 * 2
    assert not any(site.module._forward_pre_hooks for site in sites)


def test_nothing_recorded():
    with pytest.raises(ValueError, match="never reached the experts"):
        record(find_sites(tiny_moe("mixtral")), [lambda: None])
