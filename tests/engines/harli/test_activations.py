from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ygglight.engines.harli.activations import Activations, CannotDrop
from ygglight.engines.harli.finetune import FinetuneSession
from ygglight.engines.harli.gate import Gate
from ygglight.engines.harli.stopwatch import CudaStopwatch
from ygglight.engines.memory.arena import Arena, Lease

from .training import GPT, PoisonedArena, batches

SMALL = 64 * 1024
CPU = torch.device("cpu")


class CountingArena(PoisonedArena):
    """Counts leases."""

    made = 0

    def lease(self, nbytes: int) -> Lease | None:
        lease = super().lease(nbytes)
        self.made += lease is not None
        return lease


class Times(torch.autograd.Function):
    """Saves what it is told to, and hands it back as a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *saved: Tensor) -> Tensor:
        ctx.save_for_backward(*saved)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        return saved[0] if saved[0].is_floating_point() else grad, *[None] * len(saved)


def keeper(module: nn.Module | None = None, chunks: int = 256, **options: Any) -> tuple[Activations, CountingArena]:
    arena = CountingArena(4096, chunks)
    activations = Activations(module or nn.Identity(), arena, CPU, **options)
    activations.begin()
    return activations, arena


def large(count: int = SMALL // 4, **options: Any) -> Tensor:
    return torch.randn(count, **options)


def test_only_large_tensors_that_are_no_weights_are_leased() -> None:
    module = nn.Linear(128, 128, bias=False)
    module.register_buffer("table", large())
    activations, arena = keeper(module)
    x = torch.ones(1, 128, requires_grad=True)
    with activations.saving():
        kept = [
            module(x),  # the weight
            module(x) * 1.0 + (module.weight[:64] * x).sum(),  # a view of it
            x.expand(128, 128) * module.table.view(128, 128),  # a view of a buffer
            x * torch.randn(128),  # small
        ]
    assert arena.made == 0
    with activations.saving():
        kept.append(large(requires_grad=True).exp())
    assert arena.made == 1 and len(kept) == 5
    with activations.saving():
        kept.append(torch.randn(SMALL // 4 - 1, requires_grad=True).exp())  # 4 bytes less
    assert arena.made == 1


def test_a_storage_is_leased_once_for_aliases_and_views() -> None:
    activations, arena = keeper()
    x = large(2 * SMALL // 4, requires_grad=True)
    y = x * 1.0
    halves = y.view(2, -1)
    with activations.saving():
        out = y * y.detach() + (y.view(-1, 4).t().exp() * 0.0).t().reshape(-1)
        parts = halves[0] * halves[1]
    assert arena.made == 2  # y, and exp's result
    (out.sum() + parts.sum()).backward()
    assert x.grad is not None
    want = y.detach() + torch.cat([halves[1], halves[0]]).detach()
    assert torch.equal(x.grad, want)
    del out, parts
    activations.drain()
    assert arena.counts().leased == 0


def test_a_changed_storage_is_leased_again() -> None:
    activations, arena = keeper()
    weights = [large(requires_grad=True), large(requires_grad=True)]
    y = large()
    first = y.clone()
    with activations.saving():
        one = weights[0] * y
        y.add_(1.0)
        two = weights[1] * y
    assert arena.made == 2
    (one.sum() + two.sum()).backward()
    assert torch.equal(weights[0].grad, first) and torch.equal(weights[1].grad, first + 1.0)


def test_a_storage_that_follows_another_at_its_address_is_not_taken_for_it() -> None:
    activations, arena = keeper(chunks=4096)
    outs, wants, weights = [], [], []
    for _ in range(50):
        weight, factor = large(requires_grad=True), large()
        with activations.saving():
            outs.append(weight * factor)
        weights.append(weight)
        wants.append(factor.clone())
        del factor
    sum(out.sum() for out in outs).backward()
    assert arena.made == 50
    assert all(torch.equal(weight.grad, want) for weight, want in zip(weights, wants, strict=True))


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.arange(SMALL // 8),
        lambda: torch.ones(SMALL, dtype=torch.bool),
        lambda: large().bfloat16().repeat(2),
        lambda: torch.randn(130, 132)[1:, 1:129],
        lambda: torch.randn(64, 256).t(),
        lambda: large(SMALL)[SMALL // 2 : SMALL // 2 + SMALL // 4 + 3],
        lambda: torch.randn(SMALL // 4, 1).expand(SMALL // 4, 3),
    ],
)
def test_any_dtype_and_layout_comes_back_as_it_was(make: Callable[[], Tensor]) -> None:
    saved = make()
    want = saved.clone()
    activations, arena = keeper()
    seen: list[Tensor] = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
            ctx.save_for_backward(y)
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
            seen.append(ctx.saved_tensors[0])
            return grad, None

    with activations.saving():
        out = Look.apply(torch.ones(1, requires_grad=True), saved)
    if saved.stride(-1):
        saved.zero_()
    out.backward()
    assert arena.made == 1
    assert torch.equal(seen[0], want) and seen[0].dtype is want.dtype


@pytest.mark.parametrize("chunk", [4096, 528])
def test_backward_reads_the_arena_itself_at_the_same_alignment(chunk: int) -> None:
    arena = Arena(chunk, 1024)
    activations = Activations(nn.Identity(), arena, CPU)
    activations.begin()
    y = large()
    with activations.saving():
        handle = activations._pack(y)
    view = handle.read()
    start = arena.data.data_ptr()
    assert start <= view.data_ptr() < start + arena.data.numel()
    assert view.data_ptr() % 64 == y.data_ptr() % 64
    assert torch.equal(view, y)


def test_a_gradient_that_is_a_saved_tensor_outlives_the_lease() -> None:
    activations, arena = keeper()
    x, y = large(requires_grad=True), large()
    want = y.clone()
    with activations.saving():
        out = Times.apply(x, y)
    out.sum().backward()
    del out, y
    activations.drain()
    assert arena.counts().leased == 0  # and poisoned
    assert torch.equal(x.grad, want)


def test_without_room_tensors_stay_where_they_are() -> None:
    activations, arena = keeper(chunks=16)
    x, y, z = large(requires_grad=True), large(), large()
    with activations.saving():
        out = x * y * z
    assert arena.made == 1 and activations.leased == SMALL
    out.sum().backward()
    assert torch.allclose(x.grad, y * z)


@pytest.mark.parametrize("chunks", [1, 256])
def test_writing_to_a_saved_tensor(chunks: int) -> None:
    """In the arena it is a copy; left where it is, torch's error."""
    activations, _ = keeper(chunks=chunks)
    x, y = large(requires_grad=True), large()
    want = y.clone()
    with activations.saving():
        out = (x * y).sum()
    y.zero_()
    if chunks == 1:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.backward()
    else:
        out.backward()
        assert torch.equal(x.grad, want)


def test_graphs_that_are_retained_can_be_read_twice() -> None:
    activations, arena = keeper()
    x = large(requires_grad=True)
    with activations.saving():
        out = x.exp().sum()
    out.backward(retain_graph=True)
    once = x.grad.clone()
    assert activations.relieve() and arena.counts().leased > 0
    out.backward()
    assert torch.equal(x.grad, once + once)


def test_a_graph_that_is_dropped_gives_its_leases_back() -> None:
    activations, arena = keeper()
    with activations.saving():
        out = large(requires_grad=True).exp()
    assert arena.counts().leased == 16
    del out
    gc.collect()
    activations.drain()
    assert arena.counts().leased == 0


class Odd(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.calls = kind, 0
        self.linear = nn.Linear(32, 32)

    def forward(self, x: Tensor, state: object = None) -> Tensor:
        self.calls += 1
        if self.kind == "writes to its input":
            x.mul_(2.0)
        if self.kind == "writes to its input later":
            y = x.exp()
            x.mul_(2.0)
            return y  # type: ignore[no-any-return]
        if self.kind == "changes" and self.calls > 1:
            return self.linear(x)  # type: ignore[no-any-return]
        return self.linear(x).exp().exp()  # type: ignore[no-any-return]


def run_block(block: nn.Module, first_kept: int, *args: Any) -> tuple[Tensor, Activations, CountingArena, Tensor]:
    activations, arena = keeper(block, smallest=1024)
    activations.begin(first_kept)
    x = torch.randn(32, 32, requires_grad=True)
    hidden = x * 1.0
    with activations.saving():
        activations.open(0, block, (hidden, *args), {})
        out = block(hidden, *args)
        activations.close(block)
    return out.sum(), activations, arena, x


def test_a_block_called_with_an_unknown_object_is_kept_and_named() -> None:
    loss, activations, arena, _ = run_block(Odd(""), 1, object())
    assert "object" in activations.skipped[0] and arena.counts().leased > 0
    loss.backward()


def test_a_block_that_writes_to_its_input_is_kept_once_that_is_known() -> None:
    for kind, first_kept in (("writes to its input", 0), ("writes to its input", 1), ("writes to its input later", 0)):
        loss, activations, arena, x = run_block(Odd(kind), first_kept)
        assert "in place" in activations.skipped[0]
        assert arena.counts().leased > 0
        loss.backward()
        assert x.grad is not None
    with pytest.raises(CannotDrop, match="in place"):
        run_block(Odd("writes to its input later"), 1)


def test_a_block_that_does_something_else_the_second_time_is_an_error() -> None:
    block = Odd("changes")
    loss, activations, _, _ = run_block(block, 1)
    assert not activations.skipped
    with pytest.raises(RuntimeError, match="saved other tensors"):
        loss.backward()


@pytest.mark.parametrize("first_kept", [0, 1])
def test_recomputation_restores_autocast_and_the_random_state(first_kept: int) -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(self.linear(x), 0.5).exp() * torch.rand(1)

    def run(managed: bool) -> tuple[Tensor, Tensor]:
        torch.manual_seed(5)
        block = Noisy()
        x = torch.randn(32, 32, requires_grad=True)
        activations, _ = keeper(block, smallest=1024)
        activations.begin(first_kept)
        with torch.autocast("cpu", torch.bfloat16):
            if managed:
                with activations.saving():
                    activations.open(0, block, (x,), {})
                    out = block(x)
                    activations.close(block)
            else:
                out = block(x)
        torch.rand(3)
        state = torch.get_rng_state()
        out.float().sum().backward()
        assert torch.equal(torch.get_rng_state(), state)
        assert activations.dropped == 0 and block.linear.weight.grad is not None
        return x.grad, block.linear.weight.grad

    assert all(torch.equal(a, b) for a, b in zip(run(False), run(True), strict=True))


def test_dropping_by_and_by_and_moving_to_the_host() -> None:
    loss, activations, arena, x = run_block(Odd(""), 0)
    want = torch.autograd.grad(loss, x, retain_graph=True)[0]
    del loss
    loss, activations, arena, x = run_block(Odd(""), 0)
    torch.manual_seed(0)
    held = arena.counts().leased
    assert arena.allocate_kv(arena.counts().free + 1) is None
    assert activations.relieve()
    after = arena.counts().leased
    assert activations.dropped == 1 and activations.offloaded == 0 and 0 < after < held
    assert arena.allocate_kv(arena.chunks) is None
    assert activations.relieve()
    assert activations.offloaded == 4096 and arena.counts().leased == 0
    loss.backward()
    assert x.grad.shape == want.shape and torch.isfinite(x.grad).all()


def test_a_full_host_is_said() -> None:
    _loss, activations, arena, _ = run_block(Odd(""), 0, object())
    activations._host_bytes = 4096
    assert arena.allocate_kv(arena.chunks) is None
    assert not activations.relieve()
    assert activations.offloaded == 4096 and arena.counts().leased > 0


def test_what_was_given_up_holds_nothing_whoever_refers_to_it() -> None:
    loss, activations, arena, _ = run_block(Odd(""), 0)
    activations.abandon()
    assert arena.counts().leased == 0
    with pytest.raises(RuntimeError, match="given up"):
        loss.backward()


def test_the_collector_may_run_within_the_arenas_lock() -> None:
    activations, arena = keeper()
    with activations.saving():
        outs = [large(requires_grad=True).exp()]
    finished = threading.Event()

    def collect() -> None:
        with arena._lock:
            outs.clear()
        finished.set()

    thread = threading.Thread(target=collect, daemon=True)
    thread.start()
    assert finished.wait(20.0)
    activations.drain()
    assert arena.counts().leased == 0


def test_hooks_forbidden_is_an_error_with_a_note() -> None:
    activations, _ = keeper()
    forbidden = torch.autograd.graph.disable_saved_tensors_hooks("saved tensor hooks are disabled")
    with pytest.raises(RuntimeError) as caught, forbidden, activations.saving():
        pass
    assert any("harli" in note for note in caught.value.__notes__)


def loop_on_gpu(device: torch.device, session_of: Callable[[nn.Module], FinetuneSession | None]) -> list[Tensor]:
    """Losses and gradients of three micro-batches, with KV taking and soiling what finetuning gives back."""
    torch.manual_seed(1)
    model = GPT().to(device)
    session = session_of(model)
    stream = torch.cuda.Stream()
    found = []
    for batch in batches(3):
        batch = batch.to(device)
        if session is None or session.arena is None:
            loss = model(batch)
            loss.backward()
        else:
            loss = session.forward(lambda batch=batch: model(batch), 30)

            def replay(batch: Tensor = batch, session: FinetuneSession = session) -> None:
                with session.step(30):
                    again = model(batch)
                again.backward()

            arena = session.arena
            assert arena.allocate_kv(arena.counts().free + 8) is None
            session.backward(loss.backward, replay)
            taken = arena.allocate_kv(arena.counts().free)
            assert taken
            with torch.cuda.stream(stream):  # it waits for nobody: what finetuning still reads must not be there
                arena.data[taken] = 255
            torch.cuda.synchronize()
            arena.free_kv(taken)
        found += [loss.detach().clone(), *[p.grad.clone() for p in model.parameters()]]
    if session is not None:
        session.detach()
    return found


@pytest.mark.gpu
@pytest.mark.parametrize("host_bytes", [None, 0])
def test_on_a_gpu_leases_wait_for_the_stream(host_bytes: int | None) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    arena = Arena(4096, 4000, device)

    def session_of(model: nn.Module) -> FinetuneSession:
        gate = Gate(stopwatch=CudaStopwatch(device))
        blocks = list(model.blocks)  # type: ignore[arg-type]
        return FinetuneSession(
            model, blocks, gate, arena, device, smallest=512, host_bytes=host_bytes, hold_seconds=0.0
        )

    plain = loop_on_gpu(device, lambda model: None)
    beside = loop_on_gpu(device, session_of)
    assert all(torch.equal(a, b) for a, b in zip(plain, beside, strict=True))
    assert arena.counts().peak_leased > 0


@pytest.mark.gpu
def test_on_a_gpu_a_lease_is_free_only_when_the_stream_is_there() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    arena = Arena(4096, 256, device)
    activations = Activations(nn.Identity(), arena, device)
    activations.begin()
    with activations.saving():
        out = torch.randn(SMALL // 4, device=device, requires_grad=True).exp()
    torch.cuda._sleep(500_000_000)
    del out
    activations.drain()
    assert arena.counts().free == 256 - 16
    torch.cuda.synchronize()
    assert arena.counts().free == 256
