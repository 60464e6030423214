from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from ygglight.engines.harli.slices import PER_PARAMETER, can_slice, clip_grad_norm, clip_grad_value, sliced, slices

SHAPES = [(8, 8), (3,), (8, 4), (1,), (40, 5), (7, 7)]


def parameters(dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for index, shape in enumerate(SHAPES):
        dtype = dtypes[index % len(dtypes)]
        made.append(nn.Parameter(torch.randn(shape, generator=generator).to(dtype)))
        made[-1].grad = torch.randn(shape, generator=generator).to(dtype)
    made[3].grad = None
    return made


def test_slices_are_consecutive_and_bounded() -> None:
    tensors = parameters()
    parts = slices(tensors, 70)
    assert [id(t) for part in parts for t in part] == [id(t) for t in tensors]
    assert all(len(part) == 1 or sum(t.numel() for t in part) <= 70 for part in parts)
    assert [len(part) for part in parts] == [2, 2, 1, 1]
    assert slices([], 70) == []


@pytest.mark.parametrize("norm_type", [2.0, 1.0, 3.5, float("inf")])
@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.float32, torch.float64, torch.bfloat16)])
@pytest.mark.parametrize("max_norm", [0.7, 1e6])
def test_clipping_by_norm_is_torchs(
    norm_type: float, foreach: bool | None, dtypes: tuple[torch.dtype, ...], max_norm: float
) -> None:
    expected, found, seen = parameters(dtypes), parameters(dtypes), []
    want = torch.nn.utils.clip_grad_norm_(expected, max_norm, norm_type, foreach=foreach)
    got = clip_grad_norm(iter(found), max_norm, norm_type, seen.append, foreach=foreach, elements=50)
    assert torch.equal(want, got)
    for one, other in zip(expected, found, strict=True):
        assert one.grad is other.grad is None or torch.equal(one.grad, other.grad)
    assert seen == list(range(len(seen))) and len(seen) > 4


def test_clipping_by_norm_looks_for_what_is_not_finite() -> None:
    found = parameters()
    found[0].grad[0] = torch.nan
    with pytest.raises(RuntimeError, match="non-finite"):
        clip_grad_norm(found, 1.0, 2.0, lambda index: None, error_if_nonfinite=True)
    assert torch.isfinite(found[1].grad).all()
    assert clip_grad_norm(found, 1.0, 2.0, lambda index: None).isnan()
    assert clip_grad_norm([nn.Parameter(torch.ones(2))], 1.0, 2.0, lambda index: None) == 0


def test_clipping_by_value_is_torchs() -> None:
    expected, found, seen = parameters(), parameters(), []
    torch.nn.utils.clip_grad_value_(expected, 0.3)
    clip_grad_value(found, 0.3, seen.append, elements=50)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(expected, found, strict=True) if a.grad is not None)
    assert seen == [0, 1, 2, 3]


OPTIONS: dict[type, list[dict[str, Any]]] = {
    torch.optim.Adam: [{}, {"amsgrad": True}, {"foreach": True}, {"fused": True}],
    torch.optim.AdamW: [{}, {"foreach": True}, {"fused": True}, {"lr": torch.tensor(1e-2)}],
    torch.optim.SGD: [{"lr": 0.1, "momentum": 0.9, "nesterov": True}, {"lr": 0.1, "fused": True}, {"lr": 0.1}],
    torch.optim.RMSprop: [{"momentum": 0.5, "centered": True}],
    torch.optim.Adagrad: [{}, {"foreach": True}],
    torch.optim.Adamax: [{}],
    torch.optim.NAdam: [{"decoupled_weight_decay": True}],
    torch.optim.RAdam: [{}],
}


@pytest.mark.parametrize(
    ("kind", "options"), [(kind, options) for kind, several in OPTIONS.items() for options in several]
)
def test_steps_are_the_optimizers_own(kind: type[torch.optim.Optimizer], options: dict[str, Any]) -> None:
    assert kind in PER_PARAMETER
    outcomes = []
    for cut in (False, True):
        weights = parameters()
        optimizer = kind(  # type: ignore[call-arg]
            [{"params": weights[:2]}, {"params": weights[2:], "weight_decay": 0.1}], **copy.deepcopy(options)
        )
        seen: list[int] = []
        for _ in range(3):
            if cut:
                with sliced(optimizer, seen.append, elements=70):
                    optimizer.step()
            else:
                optimizer.step()
        assert seen == [0, 1, 2, 3] * 3 if cut else seen == []
        assert [len(group["params"]) for group in optimizer.param_groups] == [2, 4]
        outcomes.append((weights, optimizer.state_dict()))
    (one, state), (other, found) = outcomes
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert state["param_groups"] == found["param_groups"] and list(state["state"]) == list(found["state"])
    for index, entry in state["state"].items():
        for name, value in entry.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(found["state"][index][name]))


def test_hooks_closures_and_schedulers_see_one_step() -> None:
    weights = parameters()
    optimizer = torch.optim.AdamW(weights)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    events: list[str] = []
    optimizer.register_step_pre_hook(lambda *args: events.append("before"))
    optimizer.register_step_post_hook(lambda *args: events.append("after"))

    def closure() -> float:
        assert torch.is_grad_enabled() and len(optimizer.param_groups[0]["params"]) == len(weights)
        events.append("closure")
        return 1.5

    own = optimizer.step
    with sliced(optimizer, lambda index: events.append(f"slice {index}"), elements=70):
        assert optimizer.step(closure) == 1.5
    assert events == ["before", "closure", *[f"slice {i}" for i in range(4)], "after"]
    assert optimizer.step is own
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the scheduler warns when it saw no step
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(5e-4)


def test_without_a_scheduler_no_attribute_is_left() -> None:
    optimizer = torch.optim.AdamW(parameters())
    with sliced(optimizer, lambda index: None):
        pass
    assert "step" not in vars(optimizer)


def test_an_exception_between_slices_puts_the_groups_back() -> None:
    weights = parameters()
    optimizer = torch.optim.SGD(weights, lr=0.1)
    groups = optimizer.param_groups

    def stop(index: int) -> None:
        if index == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), sliced(optimizer, stop, elements=70):
        optimizer.step()
    assert optimizer.param_groups is groups and len(groups[0]["params"]) == len(weights)
    assert "step" not in vars(optimizer)


class Own(torch.optim.SGD):
    pass


@pytest.mark.parametrize("kind", [Own, torch.optim.Adafactor])
def test_other_optimizers_are_one_slice(kind: type[torch.optim.Optimizer]) -> None:
    one, other, seen = parameters(), parameters(), []
    kind(one, lr=0.1).step()  # type: ignore[call-arg]
    optimizer = kind(other, lr=0.1)  # type: ignore[call-arg]
    assert not can_slice(optimizer)
    with sliced(optimizer, seen.append, elements=10):
        optimizer.step()
    assert seen == [0]
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    with sliced(optimizer, seen.append, elements=10):
        assert optimizer.step(lambda: 2.0) == 2.0
    assert seen == [0, 0]


def test_a_gradient_scaler_steps_in_slices() -> None:
    one, other, seen = parameters(), parameters(), []
    for weights, boundary in ((one, None), (other, seen.append)):
        optimizer = torch.optim.AdamW(weights)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        scaler.scale(torch.tensor(1.0))
        if boundary is None:
            scaler.step(optimizer)
        else:
            with sliced(optimizer, boundary, elements=70):
                scaler.step(optimizer)
    assert seen == [0, 1, 2, 3]
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
