"""Sizes as text, and the count of live bytes on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ygglight.engines.memory import LiveBytes, format_bytes, parse_bytes

KIB = 1024


@pytest.mark.parametrize(
    ("text", "size"),
    [("600MiB", 600 * 2**20), ("8 GiB", 2**33), ("1.5kB", 1500), ("7", 7), (12, 12), ("2gb", 2 * 10**9)],
)
def test_sizes_parse(text: Any, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "8 gigs", "-1MiB", "0", 0, True, 1.5, None])
def test_what_is_no_size_is_refused(text: Any) -> None:
    with pytest.raises(ValueError, match="size"):
        parse_bytes(text)


def test_sizes_print() -> None:
    assert [format_bytes(n) for n in (12, 2048, 600 * 2**20, 3 * 2**40)] == [
        "12 B",
        "2.0 KiB",
        "600.0 MiB",
        "3072.0 GiB",
    ]


def test_live_bytes_follow_births_and_deaths() -> None:
    with LiveBytes([]) as meter:
        a = torch.ones(KIB)  # 4 KiB
        b = a + 1
        assert meter.live == 8 * KIB
        view = b.view(2, -1)
        assert meter.live == 8 * KIB, "a view has no bytes of its own"
        del b
        assert meter.live == 8 * KIB, "and keeps its base alive"
        del view
        assert meter.live == 4 * KIB
        assert meter.peak == 8 * KIB
        meter.reset_peak()
        assert meter.peak == 4 * KIB
        a.add_(1)
        assert meter.live == 4 * KIB


def test_what_was_there_before_is_state() -> None:
    old = torch.ones(KIB)
    with LiveBytes([]) as meter:
        view = old.view(32, 32)
        old.mul_(2)
        assert meter.live == 0
        del view


def test_a_gradient_counts_until_it_has_landed() -> None:
    weight = torch.nn.Parameter(torch.ones(KIB))
    with LiveBytes([weight]) as meter:
        (weight * 2).sum().backward()
        assert meter.live == 0
        assert meter.peak >= 4 * KIB
    assert weight.grad is not None


def test_every_operator_is_reported_with_its_time() -> None:
    seen: list[tuple[str, float, int]] = []
    with LiveBytes([], on_operator=lambda func, seconds, live, peak: seen.append((str(func), seconds, live))):
        kept = torch.ones(KIB)
    assert kept is not None and len(seen) == 1
    name, seconds, live = seen[0]
    assert "ones" in name and seconds > 0 and live == 4 * KIB
