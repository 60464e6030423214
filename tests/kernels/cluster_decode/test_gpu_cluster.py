"""On a Hopper GPU: collectives and cluster block against torch, launched many times and replayed from a graph."""

import itertools

import pytest
import torch

from ygglight.kernels.cluster_decode import decode_block_reference
from ygglight.kernels.cluster_decode.testing import count_wrong_replays, make_block, make_spec, unfused_block
from ygglight.kernels.testing import rms_ratio

pytestmark = pytest.mark.gpu

BLOCKS = (1, 2, 4, 8)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LENGTHS = (1, 63, 64, 65, 1024, 4096, 16384)
LLAMA_2, LLAMA_3 = make_spec(32, 32, 128, 4096), make_spec(32, 8, 128, 4096)
OTHERS = [
    make_spec(14, 2, 64, 896),
    make_spec(32, 32, 80, 2560, rotary_dim=32),
    make_spec(16, 16, 96, 1536, interleaved_rope=True),
    make_spec(8, 4, 256, 2304, norm_offset=1.0, softcap=50.0, window=300),
    make_spec(28, 4, 128, 3584, qk_norm=True),
]


@pytest.fixture(autouse=True)
def clusters():
    triton = pytest.importorskip("triton")
    if tuple(int(part) for part in triton.__version__.split("+")[0].split(".")[:2]) < (3, 8):
        pytest.skip("Triton before 3.8 reduces within a block only")
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the cluster block is for compute capability 9.0")


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 77, 512, 1000])
def test_collectives(blocks, dtype, size):
    from ygglight.kernels.cluster_decode import collectives

    x = torch.randn(64, blocks, size, device="cuda").to(dtype)
    summed, largest = collectives.cluster_reduce_rows(x), collectives.cluster_reduce_rows(x, maximum=True)
    assert torch.equal(largest, x.amax(1, keepdim=True).expand_as(x))
    assert torch.equal(summed, summed[:, :1].expand_as(summed))  # the same bits on every block
    tolerance = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-6}[dtype]
    assert rms_ratio(summed, x.double().sum(1, keepdim=True).expand_as(x)) <= tolerance
    gathered = collectives.cluster_gather_rows(x)
    assert torch.equal(gathered, x[:, None].expand(64, blocks, blocks, size))


@pytest.mark.parametrize("blocks", BLOCKS[1:])
def test_collectives_launched_back_to_back(blocks):
    """10,000 launches of each, on data that changes, without a wait between: any race would show as another bit."""
    from ygglight.kernels.cluster_decode import collectives

    rounds, each = 100, 100
    wrong = torch.zeros(3, dtype=torch.int64, device="cuda")
    for _ in range(rounds):
        x = torch.randn(each, 16, blocks, 385, device="cuda")
        sums = torch.stack([collectives.cluster_reduce_rows(part) for part in x])
        again = torch.stack([collectives.cluster_reduce_rows(part) for part in x])
        gathered = torch.stack([collectives.cluster_gather_rows(part) for part in x])
        exact = x.double().sum(2, keepdim=True)
        wrong[0] += ((sums - exact).abs() > 1e-4).sum()
        wrong[1] += (sums != again).sum()
        wrong[2] += (gathered != x[:, :, None]).sum()
    assert wrong.tolist() == [0, 0, 0]


def check(spec, lengths, blocks, dtype, **options):
    from ygglight.kernels.cluster_decode import cluster

    block = make_block(spec, lengths, dtype=dtype, **options)
    on_device = block.to("cuda")
    exact = on_device.to(torch.float64).run(decode_block_reference)
    unfused = unfused_block(on_device)
    actual = on_device.run(cluster.launch, blocks=blocks)
    assert rms_ratio(actual[0], exact[0]) <= 1.5 * rms_ratio(unfused, exact[0])
    for got, expected in zip(actual[1:], exact[1:], strict=True):
        assert rms_ratio(got, expected) <= {torch.float16: 5e-4, torch.bfloat16: 4e-3}[dtype]
    again = on_device.run(cluster.launch, blocks=blocks)
    assert all(map(torch.equal, actual, again)), "other bits in a second run"


@pytest.mark.parametrize("spec", [LLAMA_2, LLAMA_3], ids=["Llama-2", "Llama-3"])
@pytest.mark.parametrize("length", LENGTHS)
def test_block(spec, length):
    for blocks in BLOCKS:
        check(spec, [length], blocks, torch.bfloat16, in_place=True)


@pytest.mark.parametrize("spec", OTHERS, ids=lambda spec: f"{spec.heads}/{spec.kv_heads}x{spec.head_dim}")
def test_block_of_other_models(spec):
    for blocks, dtype in itertools.product(BLOCKS, (torch.float16, torch.bfloat16)):
        check(spec, [130, 0, 777], blocks, dtype, bias=True, mask="bool")


@pytest.mark.parametrize("blocks", BLOCKS)
def test_graph_replays(blocks):
    """1,000 replays equal eager calls while lengths, slots and input change; no wait and no second stream inside."""
    from ygglight.kernels.cluster_decode import cluster

    spec = LLAMA_3
    block = make_block(spec, [500, 20], slots=2048, dtype=torch.bfloat16, in_place=True).to("cuda")
    block.inputs["keys"].nan_to_num_()
    block.inputs["values"].nan_to_num_()
    assert count_wrong_replays(block, cluster.launch, rounds=1000, blocks=blocks) == 0
    assert block.inputs["lengths"].tolist() == [1500, 1020]


def test_resident_clusters():
    from ygglight.kernels.cluster_decode import cluster, collectives

    x = torch.randn(1, 4, 100, device="cuda")
    compiled = collectives.reduce_kernel[(1,)](
        x, torch.empty_like(x), SIZE=100, BLOCK=128, MAXIMUM=False, num_warps=4, num_ctas=4
    )
    assert cluster.resident_clusters(compiled) >= 1
