"""Running traced operators again, and finding which ones it takes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ygglight.compat.torch import below_autograd
from ygglight.engines.adacc.tape import Ref, Step, Tape, clone_storage
from ygglight.engines.memory.meter import tensors_in


@contextmanager
def replaying() -> Iterator[None]:
    """Operators run as they were traced: below autograd and autocast."""
    with ExitStack() as stack:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(torch.enable_grad())  # as in forward; below autograd it records nothing
        stack.enter_context(below_autograd())
        yield


def run_again(
    step: Step,
    bind: Collection[int],
    base_of: Callable[[int], Tensor],
    memo: dict[int, Tensor],
    stealable: Collection[int] = (),
) -> None:
    """Run one operator again.

    Args:
        step: the operator. bind: those of its outputs to put into ``memo``.
        base_of: a tensor on the storage of a value that is at hand.
        stealable: values in ``memo`` that nobody needs afterwards: an in-place operator may write into them.

    Raises:
        RuntimeError: when a result is laid out differently than it was in forward.
    """
    rebased: dict[int, int] = {}
    for old, new in step.writes:
        base = base_of(old)
        memo[new] = base if old in stealable and old in memo else clone_storage(base)
        rebased[old] = new

    def resolve(item: Any) -> Any:
        if isinstance(item, Ref):
            return item.view(base_of(rebased.get(item.value, item.value)))
        return [resolve(x) for x in item] if isinstance(item, list) else item

    with nullcontext() if step.grad_mode else torch.no_grad():
        out = step.func(*[resolve(a) for a in step.args], **{k: resolve(v) for k, v in step.kwargs.items()})
    results = (out,) if isinstance(out, Tensor) else tensors_in(out)
    for tensor, ref in zip(results, step.refs, strict=True):
        if ref is None or ref.value not in bind:
            continue
        if tensor.stride() != ref.stride or tensor.storage_offset() != ref.offset:
            raise RuntimeError(f"{step.func} laid out its result differently when it was run again")
        memo[ref.value] = tensor


def ancestors(tape: Tape | None, value: int, *at_hand: Container[int]) -> set[int]:
    """``value`` and all that it is rebuilt from, down to and including what is at hand."""
    seen, todo = {value}, [value]
    while todo and tape is not None:
        current = todo.pop()
        if current < 0 or any(current in held for held in at_hand):
            continue
        producer = tape.values[current].producer
        if producer is not None:
            fresh = [p for p in tape.steps[producer].inputs if p not in seen]
            seen.update(fresh)
            todo.extend(fresh)
    return seen


def is_rebuildable(tape: Tape, value: int, *at_hand: Container[int]) -> bool:
    """Whether operators that may run again lead from leaves and what is at hand to ``value``."""
    for current in ancestors(tape, value, *at_hand):
        producer = tape.values[current].producer
        if producer is None or any(current in held for held in at_hand):
            continue
        if producer >= len(tape.steps) or not tape.steps[producer].replayable:
            return False
    return True
