"""The arena: nothing has two owners, KV comes first, leases leave the watermark (check M1 of the brief)."""

from __future__ import annotations

import random
import threading
import time

import pytest
import torch

from ygglight.engines.memory import Arena, ArenaFull, Lease


class Event:
    """A device event by hand."""

    def __init__(self, passed: bool = False) -> None:
        self.passed = passed

    def query(self) -> bool:
        return self.passed


def check(arena: Arena, kv: set[int], leases: list[Lease], leaving: set[int] = frozenset()) -> None:  # type: ignore[assignment]
    """No chunk has two owners, and the counts are those of the shadow books."""
    leased = [chunk for lease in leases for chunk in range(lease.first, lease.first + lease.count)]
    assert len(leased) == len(set(leased)) and not kv & set(leased) and not leaving & (kv | set(leased))
    assert all(0 <= chunk < arena.chunks for chunk in (*kv, *leased))
    counts = arena.counts()
    assert counts.free + counts.kv + counts.leased == counts.chunks == arena.chunks
    assert counts.kv + counts.leased == len(kv) + len(leased) + len(leaving)


@pytest.mark.parametrize("seed", range(6))
def test_random_traffic_keeps_the_books(seed: int) -> None:
    draw = random.Random(seed)
    arena = Arena(64, draw.choice([1, 7, 40, 97]))
    kv: set[int] = set()
    leases: list[Lease] = []
    leaving: list[tuple[Event, set[int]]] = []
    seen = {"refused kv": 0, "refused lease": 0, "lease": 0}
    for _ in range(1500):
        action = draw.random()
        if action < 0.3:
            count, free = draw.randint(0, arena.chunks // 3 + 1), arena.counts().free
            taken = arena.allocate_kv(count)
            assert (taken is not None) == (count <= free)  # never fails while enough is free
            if taken is None:
                seen["refused kv"] += 1
                missing = count - free - sum(len(chunks) for event, chunks in leaving if not event.passed)
                assert arena.pressure >= max(0, missing)
            else:
                assert len(taken) == count == len(set(taken)) and not kv & set(taken)
                kv |= set(taken)
        elif action < 0.55 and kv:
            some = draw.sample(sorted(kv), draw.randint(1, len(kv)))
            event = Event() if draw.random() < 0.3 else None
            arena.free_kv(some, event)
            kv -= set(some)
            if event:
                leaving.append((event, set(some)))
        elif action < 0.8:
            arena.kv_watermark = draw.randint(0, 5)
            before = arena.counts()
            lease = arena.lease(draw.randint(1, 64 * 9))
            if lease is None:
                seen["refused lease"] += 1
            else:
                seen["lease"] += 1
                assert lease.count == -(-lease.nbytes // 64)
                assert arena.counts().free == before.free - lease.count >= arena.kv_watermark
                leases.append(lease)
        elif action < 0.95 and leases:
            lease = leases.pop(draw.randrange(len(leases)))
            event = Event() if draw.random() < 0.3 else None
            arena.release(lease, event)
            if event:
                leaving.append((event, set(range(lease.first, lease.first + lease.count))))
        else:
            for event, _ in leaving[: len(leaving) // 2 + 1]:
                event.passed = True
            leaving = [(event, chunks) for event, chunks in leaving if not event.passed]
        check(arena, kv, leases, {chunk for _, chunks in leaving for chunk in chunks})
    assert all(seen.values()) or arena.chunks == 1
    arena.free_kv(sorted(kv))
    for lease in leases:
        arena.release(lease)
    for event, _ in leaving:
        event.passed = True
    counts = arena.counts()
    assert (counts.free, counts.kv, counts.leased, counts.pressure) == (arena.chunks, 0, 0, 0)


def test_threads_never_get_the_same_chunk() -> None:
    arena = Arena(64, 60)
    arena.kv_watermark = 4
    owner: list[str | None] = [None] * arena.chunks
    wrong: list[str] = []
    together = threading.Barrier(4)

    def take(chunks: range | list[int], name: str) -> None:
        for chunk in chunks:
            if owner[chunk] is not None:
                wrong.append(f"{chunk}: {owner[chunk]} and {name}")
            owner[chunk] = name

    def drop(chunks: range | list[int]) -> None:
        for chunk in chunks:
            owner[chunk] = None

    def decode(name: str) -> None:
        draw, held = random.Random(name), []
        together.wait()
        for _ in range(600):
            taken = arena.allocate_kv(draw.randint(1, 6))
            if taken is not None:
                take(taken, name)
                held.append(taken)
            if held and (taken is None or draw.random() < 0.4):
                gone = held.pop(0)
                drop(gone)
                arena.free_kv(gone)
        for gone in held:
            drop(gone)
            arena.free_kv(gone)

    def finetune(name: str) -> None:
        draw, held, granted = random.Random(name), [], 0
        together.wait()
        while granted < 100:  # KV comes first: the last ones are granted when it is done
            lease = arena.lease(draw.randint(1, 64 * 8))
            if lease is not None:
                granted += 1
                take(range(lease.first, lease.first + lease.count), name)
                held.append(lease)
            else:
                time.sleep(0)
            if held and (lease is None or arena.pressure):
                gone = held.pop()
                drop(range(gone.first, gone.first + gone.count))
                arena.release(gone)
        for gone in held:
            drop(range(gone.first, gone.first + gone.count))
            arena.release(gone)

    threads = [threading.Thread(target=decode, args=(f"kv {i}",)) for i in range(2)]
    threads += [threading.Thread(target=finetune, args=(f"finetune {i}",)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert arena.counts().free == arena.chunks and arena.counts().peak_kv > 0 and arena.counts().peak_leased > 0


def test_kv_grows_from_the_low_end_and_leases_from_the_high_one() -> None:
    arena = Arena(64, 10)
    assert arena.allocate_kv(3) == [0, 1, 2]
    first, second = arena.lease(100), arena.lease(64)
    assert first and second and (first.first, first.count, second.first) == (8, 2, 7)
    arena.free_kv([1])
    assert arena.allocate_kv(2) == [1, 3]
    arena.release(first)
    again = arena.lease(128)
    assert again and again.first == 8


def test_a_lease_needs_an_extent_and_leaves_what_kv_may_need() -> None:
    arena = Arena(64, 8)
    taken = arena.allocate_kv(8)
    assert taken is not None
    arena.free_kv(taken[::2])
    assert arena.counts().free == 4
    assert arena.lease(65) is None and arena.lease(64) is not None  # four free, no two of them neighbours
    arena.free_kv(taken[1::2])
    arena.kv_watermark = 5
    assert arena.lease(64 * 3) is None
    assert arena.lease(64 * 2) is not None


def test_pressure_is_what_is_missing_until_it_is_given_back() -> None:
    arena = Arena(64, 10)
    kept, other = arena.lease(64 * 5), arena.lease(64 * 3)
    assert kept and other and arena.pressure == 0
    assert arena.allocate_kv(4) is None and arena.pressure == 2
    assert arena.allocate_kv(3) is None and arena.pressure == 2  # the largest wish counts: a repeated one is no new one
    assert arena.lease(1) is None  # what KV waits for is not for rent
    event = Event()
    arena.release(other, event)
    assert arena.pressure == 0 and arena.allocate_kv(4) is None  # on its way
    event.passed = True
    assert arena.lease(64 * 2) is None and arena.allocate_kv(4) == [0, 1, 2, 3]
    assert arena.pressure == 0 and arena.lease(64) is not None


def test_wishes_end_with_those_who_had_them() -> None:
    arena = Arena(64, 6)
    lease = arena.lease(64 * 4)
    first = arena.allocate_kv(1)
    assert lease and first and arena.allocate_kv(3) is None and arena.pressure == 2
    arena.withdraw()
    assert arena.pressure == 0
    assert arena.allocate_kv(6) is None and arena.pressure == 5
    arena.free_kv(first)
    assert arena.pressure == 0


def test_chunks_come_back_when_their_event_has_passed() -> None:
    arena = Arena(64, 4)
    lease, event = arena.lease(64 * 4), Event()
    assert lease
    arena.release(lease, event)
    assert arena.counts().leased == 4 and arena.allocate_kv(1) is None
    event.passed = True
    assert arena.allocate_kv(1) == [0] and arena.counts().leased == 0
    later = Event()
    arena.free_kv([0], later)
    assert arena.counts().kv == 1
    with pytest.raises(ValueError, match="freed twice"):
        arena.free_kv([0])
    later.passed = True
    assert arena.counts().free == 4


def test_giving_back_twice_is_an_error_and_changes_nothing() -> None:
    arena = Arena(64, 6)
    taken, lease = arena.allocate_kv(3), arena.lease(64)
    assert taken and lease
    for chunks in ([3], [0, 5], [0, 0], [-1], [6]):  # free, leased, twice, outside
        with pytest.raises(ValueError, match="free each once"):
            arena.free_kv(chunks)
    assert arena.counts().kv == 3
    arena.free_kv(taken)
    with pytest.raises(ValueError, match="free each once"):
        arena.free_kv(taken)
    arena.release(lease)
    with pytest.raises(ValueError, match="given back before"):
        arena.release(lease)
    with pytest.raises(ValueError, match="given back"):
        lease.view((4,), torch.uint8)
    mine = arena.lease(64)
    assert mine
    with pytest.raises(ValueError, match="another arena"):
        Arena(64, 6).release(mine)


def test_what_can_never_be() -> None:
    with pytest.raises(ArenaFull, match="5 chunks of an arena of 4"):
        Arena(64, 4).allocate_kv(5)
    with pytest.raises(ValueError, match="say 112"):
        Arena(100, 4)
    with pytest.raises(ValueError, match="at least one chunk"):
        Arena(64, 0)
    with pytest.raises(ValueError, match="give 1 or more"):
        Arena(64, 4).lease(0)
    with pytest.raises(ValueError, match="give 0 or more"):
        Arena(64, 4).allocate_kv(-1)


def test_views_share_the_bytes_of_their_lease_alone() -> None:
    arena = Arena(64, 8)
    low, high = arena.lease(200), arena.lease(64)
    assert low and high and high.first == low.first - 1
    matrix = low.view((5, 8), torch.float32)
    matrix.copy_(torch.arange(40.0).view(5, 8))
    turned = low.view((8, 5), torch.float32, (1, 8))
    assert torch.equal(turned, matrix.t()) and turned.data_ptr() == matrix.data_ptr()
    assert torch.equal(low.view((2, 4), torch.float32, offset=128), matrix[4:].view(2, 4))
    assert low.view((3, 0), torch.float32).numel() == 0 and low.view((), torch.int64).dim() == 0
    high.view((64,), torch.uint8).fill_(255)
    assert torch.equal(matrix, torch.arange(40.0).view(5, 8))
    assert bool((arena.data[high.first] == 255).all())
    with pytest.raises(ValueError, match="byte 204 of a lease of 200"):
        low.view((51,), torch.float32)
    with pytest.raises(ValueError, match="align it"):
        low.view((1,), torch.float32, offset=2)


def test_writing_beside_a_saved_view_is_no_change_of_it() -> None:
    arena = Arena(64, 4)
    lease, other = arena.lease(64), arena.lease(64)
    assert lease and other
    saved = lease.view((4,), torch.float32)
    saved.fill_(2.0)
    weight = torch.ones(4, requires_grad=True)
    loss = (weight * saved).sum()
    with torch.inference_mode():
        other.view((4,), torch.float32).fill_(7.0)
        taken = arena.allocate_kv(2)
        assert taken is not None
        arena.data[taken[0]].fill_(1)
    loss.backward()
    assert weight.grad is not None and weight.grad.tolist() == [2.0] * 4
    loss = (weight * saved).sum()
    saved.fill_(3.0)  # the control: a write to the view itself is found
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_used_chunks_come_to_kv_as_zeros_and_untouched_ones_are_not_touched() -> None:
    arena = Arena(64, 6)
    lease = arena.lease(64 * 3)
    assert lease
    lease.view((192,), torch.uint8).fill_(255)
    arena.release(lease)
    arena.data[0].fill_(1)  # nobody's yet, so allocation must not spend time on it
    taken = arena.allocate_kv(6)
    assert taken is not None
    assert arena.data[0].tolist() == [1] * 64 and not arena.data[3:].any()
    arena.data.fill_(9)
    arena.free_kv([1, 2, 4])
    assert arena.allocate_kv(3) == [1, 2, 4]
    assert arena.data.any(dim=1).tolist() == [True, False, False, True, False, True]


def test_an_arena_made_in_inference_mode_is_writable_outside() -> None:
    with torch.inference_mode():
        arena = Arena(64, 2)
        lease = arena.lease(64)
        assert lease
        view = lease.view((16,), torch.float32)
    assert not arena.data.is_inference() and not view.is_inference()
    (view.fill_(1.0) * torch.ones(16, requires_grad=True)).sum().backward()
