"""The exchange schedules end with the right data on every block, move what the formulas say, and in fixed orders."""

import pytest
import torch

from ygglight.kernels.cluster_decode import schedule

CLUSTERS = (1, 2, 4, 8, 16)
SIZES = (1, 7, 128, 385)


def parts_of(blocks, size, dtype=torch.float32):
    return torch.randn(blocks, size, generator=torch.Generator().manual_seed(blocks + size)).to(dtype)


@pytest.mark.parametrize("blocks", CLUSTERS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("reduce", [schedule.ring_reduce, schedule.pulled_reduce])
def test_every_block_gets_the_reduction(reduce, blocks, size):
    parts = parts_of(blocks, size, torch.float64)
    summed, largest = reduce(parts), reduce(parts, torch.maximum)
    torch.testing.assert_close(summed.copies, parts.sum(0).expand(blocks, size), rtol=0, atol=1e-12)
    assert torch.equal(largest.copies, parts.amax(0).expand(blocks, size))
    traffic = {
        schedule.ring_reduce: schedule.ring_reduce_traffic,
        schedule.pulled_reduce: schedule.pulled_reduce_traffic,
    }[reduce]
    assert summed.moved == traffic(size, blocks)


@pytest.mark.parametrize("blocks", CLUSTERS)
@pytest.mark.parametrize("size", SIZES)
def test_every_block_gathers_in_order(blocks, size):
    parts = parts_of(blocks, size)
    gathered = schedule.ring_gather(parts)
    assert torch.equal(gathered.copies, parts.expand(blocks, blocks, size))
    assert gathered.moved == schedule.gather_traffic(size, blocks)


def test_the_ring_leaves_rows_rotated():
    """Control: as they arrive, block b's rows are those of b, b-1, b-2, ..."""
    held = parts_of(4, 3)[:, None]
    for stride in schedule.doubling(4):
        held = torch.cat((held, held.roll(stride, dims=0)), dim=1)
    assert torch.equal(held[2], parts_of(4, 3)[[2, 1, 0, 3]])


@pytest.mark.parametrize("blocks", CLUSTERS)
def test_the_public_codes_strides_are_right_for_four_blocks_alone(blocks):
    """xinhao-luo/ClusterFusion at 8755446 loops over strides 1 .. blocks - 2."""
    parts = torch.ones(blocks, 5)
    got = schedule.ring_reduce(parts, strides=range(1, blocks - 1)).copies
    assert bool((got == blocks).all()) == (blocks in (1, 4))
    if blocks in (2, 8, 16):
        assert got.unique().tolist() == [{2: 1.0, 8: 64.0, 16: 16384.0}[blocks]]


@pytest.mark.parametrize("blocks", CLUSTERS)
def test_same_bits_each_run_and_on_each_block(blocks):
    parts = parts_of(blocks, 4096) * torch.logspace(-3, 3, 4096)
    for reduce in (schedule.ring_reduce, schedule.pulled_reduce):
        assert torch.equal(reduce(parts).copies, reduce(parts.clone()).copies)
    copies = schedule.pulled_reduce(parts).copies
    assert torch.equal(copies, copies[:1].expand_as(copies))
    # Control: on the ring each block adds in its own order, so from four blocks on their bits differ.
    ring = schedule.ring_reduce(parts).copies
    assert torch.equal(ring, ring[:1].expand_as(ring)) == (blocks < 4)


def test_traffic():
    # A head of 128 in float16 on 4 blocks: the paper's order of exchanges and the public code's, 3 * 128 rows each.
    paper = schedule.gather_traffic(3 * 32, 4) + schedule.ring_reduce_traffic(128, 4)
    public = schedule.ring_reduce_traffic(3 * 128, 4) + schedule.ring_reduce_traffic(128, 4)
    assert (2 * paper, 2 * public) == (4352, 8192)
    for blocks in (2, 4, 8, 16):
        moved = schedule.projection_traffic(3 * 128, blocks)
        assert moved["rows"] * 2 == moved["hidden"]
        assert moved["rows"] * (blocks.bit_length() - 1) <= schedule.ring_reduce_traffic(3 * 128, blocks)
        assert schedule.pulled_reduce_traffic(384, blocks) <= schedule.ring_reduce_traffic(384, blocks)
    with pytest.raises(ValueError, match="power of two"):
        list(schedule.doubling(6))
