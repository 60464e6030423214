from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ygglight.engines.harli.layers import LayerCuts


class Pair(nn.Module):
    """A block that returns a tuple, the differentiable tensor second."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[None, Tensor]:
        return None, self.linear(x)


def cut_model(blocks: list[nn.Module]) -> tuple[LayerCuts, list[tuple[str, int]]]:
    seen: list[tuple[str, int]] = []
    cuts = LayerCuts(blocks, lambda phase, index: seen.append((phase, index)))
    cuts.attach()
    cuts.begin()
    return cuts, seen


FORWARD = [("forward", 0), ("forward", 1), ("loss", 0)]
BACKWARD = [("backward", 1), ("backward", 0)]


def test_every_block_is_cut_each_way() -> None:
    blocks = [nn.Linear(4, 4), nn.Linear(4, 4)]
    _, seen = cut_model(blocks)
    out = blocks[1](blocks[0](torch.ones(2, 4)))
    assert seen == FORWARD
    out.sum().backward()
    assert seen == FORWARD + BACKWARD


def test_backward_of_a_block_begins_when_its_gradient_is_complete() -> None:
    order: list[str] = []

    class Noting(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor, name: str) -> Tensor:
            ctx.name = name  # type: ignore[attr-defined]
            return x.clone()

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None]:
            order.append(ctx.name)  # type: ignore[attr-defined]
            return grad, None

    class Block(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return Noting.apply(super().forward(x), f"inside {self.out_features}")  # type: ignore[no-any-return]

    blocks = [Block(4, 4), Block(4, 5)]
    cuts = LayerCuts(blocks, lambda phase, index: order.append(f"{phase} {index}"))
    cuts.attach()
    cuts.begin()
    hidden = blocks[0](torch.ones(2, 4))
    loss = blocks[1](hidden).sum() + Noting.apply(hidden, "shortcut").sum()
    loss.backward()
    assert order[3:] == ["shortcut", "backward 1", "inside 5", "backward 0", "inside 4"]


def test_tuples_are_looked_into() -> None:
    block = Pair()
    _, seen = cut_model([block])
    block(torch.ones(2, 4))[1].sum().backward()
    assert seen == [("forward", 0), ("loss", 0), ("backward", 0)]


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_stays_within_its_backward_quantum(reentrant: bool) -> None:
    blocks = [nn.Linear(4, 4), nn.Linear(4, 4)]
    _, seen = cut_model(blocks)
    x = torch.ones(2, 4, requires_grad=True)
    for block in blocks:
        x = checkpoint(block, x, use_reentrant=reentrant)
    x.sum().backward()
    assert seen == FORWARD + BACKWARD


def test_only_the_thread_that_trains_is_cut() -> None:
    block = nn.Linear(4, 4)
    _, seen = cut_model([block])
    thread = threading.Thread(target=lambda: block(torch.ones(2, 4)))
    thread.start()
    thread.join()
    assert seen == []
    block(torch.ones(2, 4))
    assert seen


def test_outside_of_a_step_nothing_is_cut() -> None:
    block = nn.Linear(4, 4)
    cuts, seen = cut_model([block])
    cuts.end()
    block(torch.ones(2, 4)).sum().backward()
    assert seen == []


def test_blocks_in_blocks_are_part_of_them() -> None:
    inner = nn.Linear(4, 4)
    outer = nn.Sequential(inner, nn.ReLU())
    _, seen = cut_model([outer, inner])
    outer(torch.ones(2, 4))
    assert seen == [("forward", 0)]


def test_an_exception_in_a_block_ends_it() -> None:
    block = nn.Linear(4, 4)
    _, seen = cut_model([block, nn.Identity()])
    with pytest.raises(RuntimeError):
        block(torch.ones(2, 5))
    block(torch.ones(2, 4))
    assert seen == [("forward", 0), ("forward", 0)]


def test_copies_of_the_model_do_not_copy_what_is_behind_the_hooks() -> None:
    block = nn.Linear(4, 4)
    lock = threading.Lock()
    with pytest.raises(TypeError):  # so a copy that reached for it would raise
        copy.deepcopy(lock)
    cuts = LayerCuts([block], lambda phase, index: lock.acquire() and lock.release())  # type: ignore[func-returns-value]
    cuts.attach()
    twin = copy.deepcopy(block)
    assert torch.equal(twin(torch.ones(1, 4)), block(torch.ones(1, 4)))


def test_detach_leaves_no_hook() -> None:
    blocks = [nn.Linear(4, 4), nn.Linear(4, 4)]
    cuts, _ = cut_model(blocks)
    cuts.attach()  # a second time: the same hooks
    assert cuts.attached and all(len(b._forward_hooks) == len(b._forward_pre_hooks) == 1 for b in blocks)
    cuts.detach()
    assert not cuts.attached and not any(b._forward_hooks or b._forward_pre_hooks for b in blocks)


def test_no_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="no repeated blocks"):
        LayerCuts([], lambda phase, index: None)
