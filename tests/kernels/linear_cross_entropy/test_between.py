from __future__ import annotations

import threading

import pytest
import torch

from ygglight.kernels.linear_cross_entropy import between_chunks, linear_cross_entropy


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(10, 4, generator=generator).requires_grad_()
    weight = torch.randn(7, 4, generator=generator).requires_grad_()
    return hidden, weight, torch.randint(0, 7, (10,), generator=generator)


def test_called_between_chunks_forward_and_backward() -> None:
    hidden, weight, target = inputs()
    seen: list[int] = []
    with between_chunks(seen.append):
        loss = linear_cross_entropy(hidden, weight, target, chunk_tokens=3)
    assert seen == [1, 2, 3]
    thread = threading.Thread(target=loss.backward)  # as on a GPU, where backward is another thread's
    thread.start()
    thread.join()
    assert seen == [1, 2, 3, 1, 2, 3]
    other_hidden, other_weight, _ = inputs()
    plain = linear_cross_entropy(other_hidden, other_weight, target, chunk_tokens=3)
    plain.backward()
    assert len(seen) == 6
    assert torch.equal(loss, plain)
    assert torch.equal(hidden.grad, other_hidden.grad) and torch.equal(weight.grad, other_weight.grad)


def test_one_chunk_has_nothing_between() -> None:
    hidden, weight, target = inputs()
    seen: list[int] = []
    with between_chunks(seen.append):
        linear_cross_entropy(hidden, weight, target, chunk_tokens=10).backward()
    assert seen == []


def test_other_threads_are_not_meant() -> None:
    hidden, weight, target = inputs()
    seen: list[int] = []
    with between_chunks(seen.append):
        thread = threading.Thread(target=lambda: linear_cross_entropy(hidden, weight, target, chunk_tokens=3))
        thread.start()
        thread.join()
    assert seen == []


def test_contexts_nest_and_end_with_what_is_raised() -> None:
    hidden, weight, target = inputs()
    outer: list[int] = []

    def stop(index: int) -> None:
        raise KeyError(index)

    with between_chunks(outer.append):
        with pytest.raises(KeyError), between_chunks(stop):
            linear_cross_entropy(hidden, weight, target, chunk_tokens=3)
        linear_cross_entropy(hidden, weight, target, chunk_tokens=5)
    assert outer == [1]
