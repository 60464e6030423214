"""Sparse layers with experts on demand: the same to the bit whatever is where, books that add up, errors that pass."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from ygglight.engines.moe_speq.attach import Attachment
from ygglight.engines.moe_speq.compute import GroupedCompute, group
from ygglight.engines.moe_speq.layout import find_sites
from ygglight.engines.moe_speq.link import Cause, ThreadLink
from ygglight.engines.moe_speq.reuse import ReuseDistances
from ygglight.engines.moe_speq.runtime import Runtime
from ygglight.engines.moe_speq.stores import HostStore

from .conftest import tiny_moe, tokens
from .fakes import FakeSite, InstantLink, Store, dense, routes, sites, until

Make = Callable[..., Runtime]


class FakeDraft:
    """Returns its input: what it computes is of no interest here."""

    def forward(self, site: FakeSite, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return hidden


@pytest.fixture
def make() -> Iterator[Make]:
    runtimes: list[Runtime] = []

    def build(store: Store, these: list[FakeSite], slots: int, **more: Any) -> Runtime:
        runtimes.append(Runtime(these, store, slots=slots, **more))  # type: ignore[arg-type]
        return runtimes[-1]

    yield build
    for runtime in runtimes:
        runtime.close()


def draw_ahead(runtime: Runtime, layer: int, experts: list[int], cap: int = 1 << 30, stream: int = 0) -> int:
    """Draft tokens that choose these experts, and send them ahead."""
    with runtime.drafting():
        index = torch.tensor([experts]).T
        runtime.forward(layer, torch.zeros(len(experts), 16), index, torch.ones(len(experts), 1))
    return runtime.prefetch(cap, stream=stream)[0]


def run(
    runtime: Runtime, layer: int, batch: tuple[Tensor, Tensor, Tensor], *, prefill: bool = False, stream: int = 0
) -> Tensor:
    with runtime.window(prefill=prefill, stream=stream):
        return runtime.forward(layer, *batch)


def choose(experts: list[int], tokens: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """A batch of which every token wants these experts."""
    k = len(experts)
    return torch.randn(tokens, 16), torch.tensor([experts] * tokens), torch.rand(tokens, k)


def arrived(runtime: Runtime) -> None:
    """Wait for all copies that were queued."""
    until(lambda: all(ticket.state.value == "done" for layer in runtime._layers for ticket in layer._loading.values()))


# -- check 2 ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slots", [1, 2, 3, 4, 5, 6, 7, 8])
def test_output_is_the_same_to_the_bit_whatever_the_slots_hold(slots: int, dtype: torch.dtype, make: Make) -> None:
    these = sites(dtype=dtype)
    store = Store(these)
    whole = make(store, these, 8)
    part = make(store, these, slots, staging=1 + slots % 4, draft=FakeDraft())
    draw, generator = random.Random(slots), torch.Generator().manual_seed(slots)
    store.seconds = 2e-4  # slabs are NaN for so long
    for step in range(30):
        layer = step % 2
        batch = routes(these[layer], draw.choice([1, 1, 2, 5, 9, 17]), generator)
        stream = draw.choice([0, 3 * store.nbytes, 1 << 30])
        if draw.random() < 0.7:
            draw_ahead(part, layer, draw.choices(range(8), k=draw.randint(1, 9)), stream=stream)
        prefill = draw.random() < 0.2
        out = run(part, layer, batch, prefill=prefill, stream=stream)
        assert torch.equal(out, run(whole, layer, batch))
        assert out.dtype == dtype
        near = dense(store, these[layer], *batch) if step % 5 == 0 else out.double()
        assert torch.allclose(out.double(), near, rtol=0, atol=1e-5 if dtype is torch.float32 else 0.05)
    assert part.stats.experts["hits"] > 0
    assert part.stats.experts["prefetched"] > 0 or slots > 6, "a prompt may have filled more slots with all there is"


def test_what_transformers_computes(make: Make) -> None:
    """The same sum in the same order as transformers' own experts, on the CPU to the bit."""
    from transformers.integrations.moe import grouped_mm_experts_forward

    these = sites()
    store = Store(these)
    runtime = make(store, these, 3)

    class Module(torch.nn.Module):
        num_experts, has_gate, has_bias, is_transposed, is_concatenated = 8, True, False, False, True

        def __init__(self) -> None:
            super().__init__()
            views = these[0].layout.views(store.data[0])
            self.gate_up_proj, self.down_proj = views["gate_up_proj"], views["down_proj"]
            self._apply_gate = these[0].activate

    batch = routes(these[0], 9, torch.Generator().manual_seed(1))
    assert torch.allclose(run(runtime, 0, batch), grouped_mm_experts_forward(Module(), *batch), rtol=0, atol=1e-6)


def test_no_rows_and_one_expert_twice(make: Make) -> None:
    these = sites()
    store = Store(these)
    runtime = make(store, these, 1)
    hidden, weights = torch.randn(2, 16), torch.rand(2, 2)
    twice = (hidden, torch.tensor([[3, 3], [1, 3]]), weights)
    assert torch.allclose(run(runtime, 0, twice).double(), dense(store, these[0], *twice), atol=1e-5)
    empty = (hidden[:0], torch.zeros(0, 2, dtype=torch.long), weights[:0])
    assert run(runtime, 0, empty).shape == (0, 16)


def test_works_in_inference_mode_and_out_of_it(make: Make) -> None:
    these = sites()
    store = Store(these)
    with torch.inference_mode():
        runtime = make(store, these, 2)
        first = run(runtime, 0, choose([1, 2]))
    batch = choose([3, 4, 5])
    batch[0].requires_grad_()
    second = run(runtime, 0, batch)
    assert first.isfinite().all() and not second.requires_grad


# -- checks 8 to 12 --------------------------------------------------------------------------------------------------
def foreseen(corrupt: float, make: Make, slots: int = 6) -> tuple[Runtime, list[Tensor]]:
    """Windows whose routes the draft foresaw, but for a share that was replaced by others."""
    these = sites(layers=2, experts=16)
    store = Store(these)
    runtime = make(store, these, slots, link=InstantLink(store), draft=FakeDraft())
    draw, generator, outputs = random.Random(5), torch.Generator().manual_seed(5), []
    for _ in range(40):
        batches = [routes(site, 3, generator) for site in these]
        for layer, batch in enumerate(batches):
            experts = batch[1].flatten().tolist()
            draw_ahead(runtime, layer, [draw.randrange(16) if draw.random() < corrupt else e for e in experts])
        with runtime.window(prefill=False):
            outputs += [runtime.forward(layer, *batch) for layer, batch in enumerate(batches)]
    return runtime, outputs


def test_an_oracle_hits_always_and_errors_cost_hits_alone(make: Make) -> None:
    runs = [foreseen(corrupt, make) for corrupt in (0.0, 0.25, 0.5, 0.75)]
    oracle = runs[0][0].stats
    assert oracle.experts["hits"] == oracle.experts["requests"] > 0 and oracle.experts["late"] == 0
    assert oracle.experts["unused"] == 0 and oracle.recall == oracle.precision == [1.0, 1.0]
    rates = [runtime.stats.experts["hits"] / runtime.stats.experts["requests"] for runtime, _ in runs]
    assert rates == sorted(rates, reverse=True) and len(set(rates)) == 4
    for _, outputs in runs[1:]:
        assert all(map(torch.equal, outputs, runs[0][1]))


@pytest.mark.parametrize("slots", [1, 3, 6, 16])
def test_books_add_up(slots: int, make: Make) -> None:
    runtime, _ = foreseen(0.4, make, slots)
    run(runtime, 0, routes(runtime.sites[0], 30, torch.Generator()), prefill=True)  # type: ignore[arg-type]
    counts = runtime.stats.to_dict()
    assert counts["hits"] + counts["late"] + counts["misses"] == counts["requests"]
    nbytes = runtime.sites[0].layout.nbytes
    until(lambda: sum(runtime.stats.traffic.copies.values()) == sum(runtime._link._copier._source.reads.values()))  # type: ignore
    counts = runtime.stats.to_dict()
    assert counts["bytes"] == {cause: copies * nbytes for cause, copies in counts["copies"].items()}
    assert counts["copies"]["demand"] == counts["misses"] and counts["copies"]["prefetch"] == counts["prefetched"]
    assert counts["evicted"] <= counts["unused"] <= counts["prefetched"]
    assert (counts["copies"]["prefill"] > 0) == (slots < 16)


@pytest.mark.parametrize("slots", [1, 2, 4, 7, 8])
def test_no_more_bytes_than_what_is_missing_and_as_lru_predicts(slots: int, make: Make) -> None:
    these = sites()
    store = Store(these)
    runtime = make(store, these, slots)
    generator, missing, reuse = torch.Generator().manual_seed(2), 0, ReuseDistances(1, 8)
    prompt = routes(these[0], 1, generator)
    run(runtime, 0, prompt, prefill=True)
    reuse.warm(0, group(prompt[1]).ranked)
    for step in range(60):
        batch = routes(these[0], 1 + step % 4, generator)
        reuse.observe(0, group(batch[1]).ranked)
        missing += len(set(batch[1].flatten().tolist()) - set(runtime._layers[0].cache.residents))
        run(runtime, 0, batch)
    stats = runtime.stats
    assert stats.experts["misses"] == missing == reuse.misses(slots, 0)
    assert stats.moved["demand"] == missing * store.nbytes


def test_a_prompt_is_no_request_and_evicts_nothing(make: Make) -> None:
    these = sites()
    store = Store(these)
    runtime = make(store, these, 3)
    run(runtime, 0, choose([1, 2, 3]))
    before = runtime._layers[0].cache.residents
    run(runtime, 0, routes(these[0], 50, torch.Generator()), prefill=True)
    assert runtime._layers[0].cache.residents == before
    assert runtime.stats.experts["requests"] == 3 and runtime.stats.moved["prefill"] == 5 * store.nbytes
    run(runtime, 1, choose([4, 5, 6, 7], tokens=9), prefill=True)  # an empty cache takes what it can
    assert set(runtime._layers[1].cache.residents) == {4, 5, 6}


# -- prefetches ------------------------------------------------------------------------------------------------------
def test_a_prefetch_under_way_is_late_and_one_in_the_queue_a_miss(make: Make) -> None:
    these = sites()
    store = Store(these)
    runtime = make(store, these, 4, draft=FakeDraft())
    store.gate = threading.Semaphore(0)
    assert draw_ahead(runtime, 0, [1, 2, 3]) == 3 * store.nbytes
    assert store.entered.wait(10)
    threading.Timer(0.05, lambda: store.gate.release(9)).start()  # type: ignore[union-attr]
    batch = choose([1, 2])
    out = run(runtime, 0, batch)
    assert torch.allclose(out.double(), dense(store, these[0], *batch), atol=1e-5)
    counts = runtime.stats.to_dict()
    assert (counts["hits"], counts["late"], counts["misses"]) == (0, 1, 1)
    assert counts["withdrawn"]["prefetch"] == 2 and store.reads[0, 3] == 0  # 3 is not wanted: it never travels
    assert counts["copies"] == {"demand": 1, "prefetch": 1, "prefill": 0}


def test_no_prefetch_outlives_its_window(make: Make) -> None:
    these = sites(layers=3)
    store = Store(these)
    runtime = make(store, these, 4, draft=FakeDraft())
    store.gate = threading.Semaphore(0)
    draw_ahead(runtime, 0, [1])
    assert store.entered.wait(10)
    draw_ahead(runtime, 2, [5, 6])
    with pytest.raises(KeyError), runtime.window(prefill=False):
        raise KeyError("the pass failed before the layer")
    store.gate.release(9)
    arrived(runtime)
    assert runtime.stats.traffic.cancelled[Cause.PREFETCH] == 2 and not runtime._layers[2].cache.residents
    assert runtime.prefetch(1 << 30) == (0, 0)  # what was drafted is forgotten


def test_cap_and_room_hold(make: Make) -> None:
    these = sites()
    store = Store(these)
    runtime = make(store, these, 2, link=InstantLink(store), draft=FakeDraft())
    assert draw_ahead(runtime, 0, [1, 2, 3, 4], cap=store.nbytes) == store.nbytes
    assert draw_ahead(runtime, 0, [1, 2, 3, 4]) == store.nbytes  # one slot is left: no wanted one is evicted for others
    assert runtime.prefetch(1 << 30) == (0, 0)
    assert runtime.stats.experts["evicted"] == 0


def test_prefetches_that_are_wanted_do_not_evict_each_other(make: Make) -> None:
    runtime, _ = foreseen(0.0, make, slots=3)  # unions of up to six in three slots
    assert runtime.stats.experts["unused"] == runtime.stats.experts["evicted"] == 0


# -- what finds no slot comes through staging ------------------------------------------------------------------------
def test_what_the_draft_names_comes_while_it_drafts_and_while_earlier_layers_run(make: Make) -> None:
    these = sites(layers=3)
    store = Store(these)
    runtime = make(store, these, 1, staging=3, link=InstantLink(store), draft=FakeDraft())
    batches = [choose([1, 2, 3]) for _ in these]
    for layer in range(3):
        draw_ahead(runtime, layer, [1, 2, 3], stream=1 << 30)
    assert sum(store.reads.values()) == 3 + 2, "a slot a layer, and all staging but the slab that a pass must have"
    outputs = []
    with runtime.window(prefill=False, stream=1 << 30):
        for layer, batch in enumerate(batches):
            outputs.append(runtime.forward(layer, *batch))
    stats = runtime.stats
    assert stats.experts["hits"] == stats.experts["requests"] == 9 and stats.moved["demand"] == 0
    assert sum(stats.ahead) == 9 and sum(stats.streamed) == 6 and sum(stats.in_vain) == 0
    for layer, out in enumerate(outputs):
        assert torch.allclose(out.double(), dense(store, these[layer], *batches[layer]), atol=1e-5)


def test_what_streams_is_no_more_than_it_may_be_and_no_less_right(make: Make) -> None:
    these = sites(layers=2)
    store = Store(these)
    runtime = make(store, these, 1, staging=4, link=InstantLink(store), draft=FakeDraft())
    draw_ahead(runtime, 0, [1])
    draw_ahead(runtime, 1, [4, 5, 6])  # 4 takes the slot
    with runtime.window(prefill=False, stream=store.nbytes):
        first = runtime.forward(0, *choose([7]))
        assert store.reads[1, 5] == 1 and store.reads[1, 6] == 0, "one expert is what it may be"
        second = runtime.forward(1, *(batch := choose([4, 2])))
    assert first.isfinite().all() and torch.allclose(second.double(), dense(store, these[1], *batch), atol=1e-5)
    assert runtime.stats.in_vain == [0, 1] and runtime.stats.experts["unused"] == 2
    assert all(torch.equal(run(runtime, 1, batch), second) for _ in range(3)), "all staging is free again"


def test_a_stream_that_fails_or_is_left_costs_nothing_but_time(make: Make) -> None:
    these = sites(layers=2)
    store = Store(these)
    runtime = make(store, these, 1, staging=2, draft=FakeDraft())
    batch = choose([1, 2, 3])
    store.broken = {(1, 2)}
    for broken in (True, False):
        draw_ahead(runtime, 1, [1, 2, 3])
        with runtime.window(prefill=False, stream=1 << 30):
            until(lambda: runtime.stats.traffic.failed[Cause.PREFETCH] == 1)
            if broken:
                with pytest.raises(OSError, match="disk is gone"):
                    runtime.forward(1, *batch)
            else:
                out = runtime.forward(1, *batch)
        store.broken.clear()
    assert torch.allclose(out.double(), dense(store, these[1], *batch), atol=1e-5)
    draw_ahead(runtime, 1, [5, 6, 7])
    with pytest.raises(KeyError), runtime.window(prefill=False, stream=1 << 30):
        raise KeyError("the pass failed before the layer")
    assert torch.equal(run(runtime, 1, batch), out)
    assert torch.equal(run(runtime, 1, choose([4, 5, 6]), prefill=True).isfinite().all(), torch.tensor(True))


def test_what_comes_through_staging_is_not_brought_to_a_slot_as_well(make: Make) -> None:
    these = sites(layers=1)
    store = Store(these)
    runtime = make(store, these, 4, staging=4, link=InstantLink(store), draft=FakeDraft())
    with runtime.drafting():
        runtime.forward(0, torch.zeros(3, 16), torch.tensor([[1, 2], [1, 3], [1, 4]]), torch.ones(3, 2))
    slab = store.nbytes
    assert runtime.prefetch(1 << 30, most=1, stream=1 << 30) == (slab, 3 * slab)  # 1 to a slot, the others to staging
    assert runtime.prefetch(1 << 30, stream=1 << 30) == (0, 0)
    run(runtime, 0, choose([1, 2, 3, 4]), stream=1 << 30)
    assert max(store.reads.values()) == 1 and sum(runtime.stats.ahead) == 4 == runtime.stats.experts["hits"]


def test_staging_comes_back_when_computing_fails(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    these = sites()
    store = Store(these)
    runtime = make(store, these, 1, staging=1)
    batch = choose([1, 2, 3])
    expected = run(runtime, 0, batch)
    compute = runtime._layers[0]._compute
    for _ in range(3):
        runtime.clear()
        with monkeypatch.context() as patched:
            patched.setattr(compute, "run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                run(runtime, 0, batch)
    assert torch.equal(run(runtime, 0, batch), expected)


def test_a_resize_without_memory_for_it_leaves_right_answers(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    these = sites()
    store = Store(these)
    runtime = make(store, these, 2)
    batches = [choose([1, 2]), choose([5, 6])]
    expected = [run(runtime, 0, batch) for batch in batches]

    def full(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patched:
        patched.setattr(runtime._bank, "_empty", full)
        with pytest.raises(torch.OutOfMemoryError):
            runtime.resize(1)
    assert all(torch.equal(run(runtime, 0, batch), out) for batch, out in zip(batches, expected, strict=True))


# -- errors ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("slots", [1, 2, 8])
@pytest.mark.parametrize("prefill", [False, True])
def test_a_read_error_surfaces_and_passes(slots: int, prefill: bool, make: Make) -> None:
    these = sites()
    store = Store(these)
    runtime = make(store, these, slots, staging=1)
    batch = routes(these[0], 6, torch.Generator().manual_seed(slots))
    wanted = batch[1].flatten().unique().tolist()
    for broken in wanted:
        runtime.clear()
        store.broken = {(0, broken)}
        with pytest.raises(OSError, match="disk is gone"):
            run(runtime, 0, batch, prefill=prefill)
        assert broken not in runtime._layers[0].cache
        store.broken.clear()
        out = run(runtime, 0, batch, prefill=prefill)
        assert torch.allclose(out.double(), dense(store, these[0], *batch), atol=1e-5)


def test_a_failed_prefetch_is_counted_and_tried_again_on_demand(make: Make) -> None:
    these = sites()
    store = Store(these)
    runtime = make(store, these, 3, draft=FakeDraft())
    store.broken = {(0, 1)}
    store.gate = threading.Semaphore(0)
    draw_ahead(runtime, 0, [1])
    assert store.entered.wait(10)
    batch = choose([1, 2])
    threading.Timer(0.05, lambda: store.gate.release(9)).start()  # type: ignore[union-attr]
    with pytest.raises(OSError):  # it was under way when the pass came, failed, and failed again
        run(runtime, 0, batch)
    assert runtime.stats.traffic.failed == {Cause.PREFETCH: 1, Cause.DEMAND: 1}
    draw_ahead(runtime, 0, [1])
    until(lambda: runtime.stats.traffic.failed[Cause.PREFETCH] == 2)
    store.broken.clear()
    out = run(runtime, 0, batch)
    assert torch.allclose(out.double(), dense(store, these[0], *batch), atol=1e-5)
    assert 1 in runtime._layers[0].cache


# -- the rest --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("slots", [1, 3, 8])
def test_resize_keeps_what_it_can(slots: int, make: Make) -> None:
    these = sites()
    store = Store(these)
    runtime = make(store, these, 4, draft=FakeDraft())
    run(runtime, 0, choose([1, 2, 3, 4]))
    draw_ahead(runtime, 1, [5, 6])
    before, held = runtime._layers[0].cache.residents, runtime.nbytes
    runtime.resize(slots)
    assert runtime.slots == slots and runtime.draft is None
    assert runtime.nbytes - held == 2 * (slots - 4) * store.nbytes
    assert runtime._layers[0].cache.residents == before[-slots:]
    copies = sum(runtime.stats.traffic.copies.values())
    batch = choose(before[-slots:])
    assert torch.allclose(run(runtime, 0, batch).double(), dense(store, these[0], *batch), atol=1e-5)
    assert sum(runtime.stats.traffic.copies.values()) == copies  # what stayed is right, and was not copied again
    batch = routes(these[1], 9, torch.Generator())
    assert torch.allclose(run(runtime, 1, batch).double(), dense(store, these[1], *batch), atol=1e-5)
    with pytest.raises(RuntimeError, match="no draft"), runtime.drafting():
        pass


@pytest.mark.parametrize("broken", [False, True])
def test_resize_and_clear_with_copies_under_way(broken: bool, make: Make) -> None:
    these = sites()
    store = Store(these)
    runtime = make(store, these, 4, draft=FakeDraft())
    for change in (partial(runtime.resize, 1), runtime.clear, partial(runtime.resize, 3)):
        runtime.draft = FakeDraft()  # type: ignore[assignment]
        store.gate = threading.Semaphore(0)
        store.entered.clear()
        store.broken = {(0, 1)} if broken else set()
        draw_ahead(runtime, 0, [1, 2])
        assert store.entered.wait(10)
        threading.Timer(0.02, lambda: store.gate.release(99)).start()  # type: ignore[union-attr]
        change()
        store.broken.clear()
        for batch in (choose([1, 2]), choose([3])):
            out = run(runtime, 0, batch)
            assert torch.allclose(out.double(), dense(store, these[0], *batch), atol=1e-5)
        runtime.clear()


def test_wrong_use_is_refused(make: Make) -> None:
    these = sites()
    store = Store(these)
    for wrong in ({"slots": 0}, {"slots": 2, "staging": 0}):
        with pytest.raises(ValueError, match="at least one"):
            Runtime(these, store, **wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no sparse layers"):
        Runtime([], store, slots=1)
    runtime = make(store, these, 2)
    with pytest.raises(ValueError, match="at least one"):
        runtime.resize(0)
    runtime.close()
    runtime.close()
    with pytest.raises(RuntimeError, match="closed"):
        run(runtime, 0, choose([1, 2]))


def test_a_slot_is_not_overwritten_while_its_expert_is_computed(make: Make) -> None:
    """Two slots and one staging slab, unions of up to eight: every place is used again and again within a pass."""
    these = sites()
    store = Store(these)
    runtime = make(store, these, 2, staging=1)
    inner, fetching = runtime._layers[0]._compute.run, runtime._layers[0]._link.submit
    computing: set[int] = set()

    def watched(x: Tensor, batches: Any, out: Tensor) -> None:
        computing.update(id(batch.slab) for batch in batches)
        before = [batch.slab.data.clone() for batch in batches]
        inner(x, batches, out)
        assert all(torch.equal(old, batch.slab.data) for old, batch in zip(before, batches, strict=True))
        computing.clear()

    def checked(layer: int, expert: int, out: Tensor, *more: Any) -> Any:
        assert not computing
        return fetching(layer, expert, out, *more)

    runtime._layers[0]._compute.run, runtime._layers[0]._link.submit = watched, checked  # type: ignore[method-assign]
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        batch = routes(these[0], 12, generator)
        assert torch.allclose(run(runtime, 0, batch).double(), dense(store, these[0], *batch), atol=1e-5)


def test_a_link_can_be_given(make: Make) -> None:
    these = sites()
    store = Store(these)
    runtime = make(store, these, 2, link=ThreadLink(store, latency=0.01))
    run(runtime, 0, choose([1, 2]))
    assert runtime.link.speed.seconds(store.nbytes) >= 0.009


def test_grouped_kernel_gets_the_right_rows_and_slots(make: Make) -> None:
    """What a GPU runs, here over the kernel's reference: slots and staging in one pass."""
    these = sites()
    store = Store(these)
    runtime = make(store, these, 3)
    for index, layer in enumerate(runtime._layers):
        layer._compute = GroupedCompute(index, these[index], runtime._bank)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(3)
    for step in range(12):
        batch = routes(these[step % 2], 1 + step, generator)
        out = run(runtime, step % 2, batch)
        assert torch.allclose(out.double(), dense(store, these[step % 2], *batch), atol=1e-5)


# -- with real models ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v2"])
@pytest.mark.parametrize("slots", [1, 3])
def test_a_model_says_what_it_said_before(family: str, slots: int) -> None:
    model = tiny_moe(family)
    text = tokens(9)
    with torch.inference_mode():
        expected = model(text).logits
        found = find_sites(model)
        store = HostStore(found)
        runtime = Runtime(found, store, slots=slots)
        attachment = Attachment().attach(model, runtime)
        try:
            assert torch.allclose(model(text).logits, expected, rtol=0, atol=2e-5)
            with runtime.window(prefill=True):
                assert torch.allclose(model(text).logits, expected, rtol=0, atol=2e-5)
            assert not torch.allclose(model(tokens(9, seed=4)).logits, expected, rtol=0, atol=1e-2)
        finally:
            attachment.detach()
            runtime.close()
            store.close()
