"""Executors on a GPU (check S3 of the brief): partitions that do not overlap, a device that is whole afterwards."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
import torch

from ygglight.engines.harli.executors import Unavailable, choose_executor
from ygglight.engines.harli.executors_cuda import GreenContexts, PriorityStreams
from ygglight.engines.harli.gate import Gate
from ygglight.engines.harli.partitions import alone, slices
from ygglight.engines.harli.scheduler import Decision

pytestmark = pytest.mark.gpu
CYCLES = 100_000_000  # of a spinning kernel: tens of milliseconds


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def green(device: torch.device) -> Iterator[GreenContexts]:
    try:
        executor = GreenContexts(device)
    except Unavailable as reason:
        pytest.skip(str(reason))
    yield executor
    executor.close()


def kernel_that_meets() -> Callable[[torch.Tensor, torch.Tensor, int], None]:
    """A kernel whose programs say on which SM they are, and spin until those of another kernel are there too.

    One count in `counters[1]` for every program that saw all the others before it gave up.
    """
    import triton
    import triton.language as tl

    @triton.jit
    def meet(counters, places, everybody, patience):  # type: ignore[no-untyped-def]
        sm = tl.inline_asm_elementwise("mov.u32 $0, %smid;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
        tl.store(places + tl.program_id(0), sm)
        tl.atomic_add(counters, 1)
        tries = 0
        seen = tl.atomic_add(counters, 0)
        while (seen < everybody) & (tries < patience):
            seen = tl.atomic_add(counters, 0)
            tries += 1
        if seen >= everybody:
            tl.atomic_add(counters + 1, 1)

    def launch(counters: torch.Tensor, places: torch.Tensor, everybody: int) -> None:
        meet[(len(places),)](counters, places, everybody, 200_000, num_warps=32)

    return launch


def pair(green: GreenContexts, sms: int) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """Streams of (decoding, finetuning) where finetuning has so many SMs."""
    return green._levels[sms]


def test_kernels_sized_to_their_partitions_run_at_once(green: GreenContexts, device: torch.device) -> None:
    launch = kernel_that_meets()
    for rung in green.ladder[2:]:
        everybody = rung.decode + rung.finetune
        counters = torch.zeros(2, dtype=torch.int32, device=device)
        places = [torch.full((n,), -1, dtype=torch.int32, device=device) for n in (rung.decode, rung.finetune)]
        torch.cuda.synchronize()
        for stream, where in zip(pair(green, rung.finetune), places, strict=True):
            with torch.cuda.stream(stream):
                launch(counters, where, everybody)
        for stream in pair(green, rung.finetune):
            stream.synchronize()
        assert counters.tolist() == [everybody, everybody], rung
        decode, finetune = (set(where.tolist()) for where in places)
        assert not decode & finetune, rung
        assert len(decode) <= rung.decode and len(finetune) <= rung.finetune


def test_without_partitions_the_same_kernels_share_sms(device: torch.device) -> None:
    """Negative control: on two plain streams the places overlap, so the test above can fail."""
    launch, units = kernel_that_meets(), torch.cuda.get_device_properties(device).multi_processor_count
    counters = torch.zeros(2, dtype=torch.int32, device=device)
    places = [torch.full((units,), -1, dtype=torch.int32, device=device) for _ in range(2)]
    torch.cuda.synchronize()
    for where in places:
        with torch.cuda.stream(torch.cuda.Stream(device)):
            launch(counters, where, 2 * units)
    torch.cuda.synchronize()
    assert set(places[0].tolist()) & set(places[1].tolist())


def test_a_partition_is_no_larger_than_it_says(green: GreenContexts, device: torch.device) -> None:
    """Negative control: compute-bound work takes longer on fewer SMs, on either side."""
    x = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)

    def seconds(stream: torch.cuda.Stream) -> float:
        with torch.cuda.stream(stream):
            for _ in range(3):
                x @ x
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            first.record()
            for _ in range(10):
                x @ x
            last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1000

    torch.cuda.synchronize()
    small, large = green.ladder[2], green.ladder[-1]
    assert seconds(pair(green, small.finetune)[0]) > 2 * seconds(pair(green, large.finetune)[0])
    assert seconds(pair(green, large.finetune)[1]) > 2 * seconds(pair(green, small.finetune)[1])


def test_after_close_the_whole_device_is_usable(device: torch.device) -> None:
    x = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)

    def seconds() -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(20):
            x @ x
        torch.cuda.synchronize()
        return time.perf_counter() - start

    seconds()
    before, stream = min(seconds() for _ in range(5)), torch.cuda.current_stream()
    try:
        executor = GreenContexts(device)
    except Unavailable as reason:
        pytest.skip(str(reason))
    executor.begin(Decision(executor.ladder[2], 1, 0.0, ""), Gate())
    assert torch.cuda.current_stream() != stream
    x @ x
    executor.close()
    assert torch.cuda.current_stream() == stream
    assert min(seconds() for _ in range(5)) < 1.15 * before


def test_numbers_are_the_same_on_every_partition(green: GreenContexts, device: torch.device) -> None:
    """A partition changes where a kernel runs, not what it computes (brief A.6 tells of a backend where it did)."""
    x = torch.randn(1024, 1024, device=device)
    expected = x @ x
    torch.cuda.synchronize()
    for rung in green.ladder[2:]:
        for stream in pair(green, rung.finetune):
            with torch.cuda.stream(stream):
                found = x @ x
            stream.synchronize()
            assert torch.equal(found, expected), rung


def test_a_micro_batch_keeps_its_stream(green: GreenContexts) -> None:
    gate, first, second = Gate(), green.ladder[2], green.ladder[-1]
    green.begin(Decision(first, 1, 0.0, ""), gate)
    bound = green.bind()
    assert green.held == first.finetune
    green.begin(Decision(alone(green.units), 0, 0.0, ""), gate)
    assert green.held == first.finetune
    green.unbind()
    assert green.held is None
    green.begin(Decision(second, 1, 0.0, ""), gate)
    assert green.bind() != bound
    green.begin(Decision(slices(green.units), 1, 0.0, ""), gate)
    assert green.held == second.finetune


def test_priorities_order_streams_and_are_put_back(device: torch.device) -> None:
    executor, before = PriorityStreams(device), torch.cuda.current_stream()
    executor.begin(Decision(executor.ladder[-1], 1, 0.0, ""), Gate())
    assert torch.cuda.current_stream().priority < executor.bind().priority
    with torch.cuda.stream(executor.bind()):
        torch.cuda._sleep(CYCLES)
    y = torch.ones(8, device=device) + 1  # on the decode stream: does not wait for the one that sleeps
    executor.close()
    assert torch.cuda.current_stream() == before
    assert y.tolist() == [2.0] * 8


def test_the_choice_on_a_gpu_is_one_that_runs_beside(device: torch.device) -> None:
    executor = choose_executor(device)
    assert any(rung.concurrent for rung in executor.ladder)
    executor.close()
