"""The chunked distillation loss against plain log_softmax in float64: values, gradients, memory, and the corners."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ygglight.kernels.linear_kl import linear_kl
from ygglight.kernels.linear_kl.reference import linear_kl_reference
from ygglight.kernels.testing import assert_close, poisoned_empty, rms_ratio

TOKENS, OURS, THEIRS, VOCABULARY = 37, 24, 16, 53
# Of the rms of the float64 gradient; bfloat16 rounds the logits (8 bits, of size ~5) before anything else is done.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-2}


def inputs(dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student and teacher of different widths: neither can stand in for the other unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((TOKENS, OURS), (VOCABULARY, OURS), (TOKENS, THEIRS), (VOCABULARY, THEIRS))
    student, student_weight, teacher, teacher_weight = (
        torch.randn(shape, generator=generator).mul_(0.6).to(dtype) for shape in shapes
    )
    return student, student_weight, teacher, teacher_weight


def oracle(student: Tensor, student_weight: Tensor, teacher: Tensor, teacher_weight: Tensor, t: float = 1.0) -> Tensor:
    """The definition, token by token and in float64; shares no line with the package."""
    total = torch.zeros((), dtype=torch.float64)
    for row in range(len(student)):
        q = F.log_softmax(student_weight.double() @ student[row].double() / t, dim=0)
        p = F.log_softmax(teacher_weight.double() @ teacher[row].double() / t, dim=0)
        total = total + F.kl_div(q, p, log_target=True, reduction="sum")
    return total * t**2 / len(student)


def run(loss: Any, tensors: tuple[Tensor, ...], **options: Any) -> list[Tensor]:
    """Loss and gradients of the student's hidden states and weight; 3 stands for whatever comes after the loss."""
    student, weight = (tensor.clone().requires_grad_() for tensor in tensors[:2])
    value = loss(student, weight, *tensors[2:], **options)
    value = value[0] if isinstance(value, tuple) else value
    (value * 3.0).backward()
    return [value.detach(), student.grad, weight.grad]  # type: ignore[list-item]


@pytest.mark.parametrize("chunk", [1, 8, 37, 1000, None])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_value_and_gradients(dtype: torch.dtype, temperature: float, chunk: int | None) -> None:
    tensors = inputs(dtype)
    with poisoned_empty():
        ours = run(linear_kl, tensors, temperature=temperature, chunk_tokens=chunk)
    theirs = run(oracle, tuple(t.double() for t in tensors), t=temperature)
    assert ours[0].dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
    for name, one, other in zip(("loss", "hidden", "weight"), ours, theirs, strict=True):
        assert name == "loss" or one.dtype is dtype
        assert_close(one.double(), other, TOLERANCE[dtype], name)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_reference_is_the_definition(temperature: float) -> None:
    tensors = inputs(torch.float64)
    for one, other in zip(
        run(linear_kl_reference, tensors, temperature=temperature), run(oracle, tensors, t=temperature), strict=True
    ):
        assert_close(one, other, 1e-13)


def test_teacher_and_student_swapped_is_another_loss() -> None:
    """The negative control: KL is not symmetric, and the comparison above sees it in value and gradient."""
    student, student_weight, teacher, teacher_weight = inputs(torch.float64)
    right = run(oracle, (student, student_weight, teacher, teacher_weight))

    def swapped(student: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> Tensor:
        return linear_kl_reference(teacher, teacher_weight, student, weight)

    wrong = run(swapped, (student, student_weight, teacher, teacher_weight))
    assert all(rms_ratio(one, other) > 0.05 for one, other in zip(wrong, right, strict=True))


def test_chunks_do_not_change_the_result() -> None:
    tensors = inputs(torch.float64)
    whole = run(linear_kl, tensors, chunk_tokens=TOKENS)
    for chunk in (1, 2, 5, 36):
        for one, other in zip(run(linear_kl, tensors, chunk_tokens=chunk), whole, strict=True):
            assert_close(one, other, 1e-14)


def test_sums_of_16_bit_chunks_keep_their_precision() -> None:
    tensors = inputs(torch.bfloat16)
    tensors = tuple(t.repeat(16, 1) if len(t) == TOKENS else t for t in tensors)  # type: ignore[assignment]
    exact = run(oracle, tuple(t.double() for t in tensors))
    one_by_one = run(linear_kl, tensors, chunk_tokens=1)
    assert_close(one_by_one[2].double(), exact[2], 2e-2)


def test_gradcheck() -> None:
    student, student_weight, teacher, teacher_weight = inputs(torch.float64)
    leaves = (student[:6, :5].clone().requires_grad_(), student_weight[:7, :5].clone().requires_grad_())

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_kl(hidden, weight, teacher[:6], teacher_weight[:7], temperature=2.0, chunk_tokens=4)[0]

    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("trained", [0, 1])
def test_only_asked_gradients_are_computed(trained: int) -> None:
    tensors = inputs()
    tensors[trained].requires_grad_()
    linear_kl(*tensors, chunk_tokens=8)[0].backward()
    expected = run(oracle, tuple(t.detach() for t in tensors))
    assert_close(tensors[trained].grad * 3, expected[1 + trained], 2e-6)  # type: ignore[operator]
    assert sum(t.grad is not None for t in tensors) == 1


def test_the_teacher_gets_no_gradient() -> None:
    tensors = [t.requires_grad_() for t in inputs()]
    linear_kl(*tensors)[0].backward()  # type: ignore[arg-type]
    assert tensors[0].grad is not None and tensors[1].grad is not None
    assert tensors[2].grad is None and tensors[3].grad is None


def test_a_model_compared_with_itself_has_no_loss_and_agrees_everywhere() -> None:
    student, weight, _, _ = inputs(torch.float64)
    loss, hidden, head = run(lambda *t: linear_kl(*t)[0], (student, weight, student, weight))
    assert abs(float(loss)) < 1e-14 and hidden.abs().max() < 1e-14 and head.abs().max() < 1e-14
    assert int(linear_kl(student, weight, student, weight)[1]) == TOKENS


@pytest.mark.parametrize("chunk", [1, 8, None])
def test_agreement_counts_equal_best_tokens(chunk: int | None) -> None:
    student, student_weight, _, _ = inputs()
    teacher = student + 0.7 * torch.randn(student.shape, generator=torch.Generator().manual_seed(9))
    expected = ((student @ student_weight.t()).argmax(1) == (teacher @ student_weight.t()).argmax(1)).sum()
    assert 0 < int(expected) < TOKENS, "the count must be able to be wrong"
    for temperature in (1.0, 5.0):
        agree = linear_kl(
            student, student_weight, teacher, student_weight, temperature=temperature, chunk_tokens=chunk
        )[1]
        assert agree.dtype == torch.int64 and int(agree) == int(expected)


def test_no_tokens_are_no_loss() -> None:
    student, student_weight, teacher, teacher_weight = inputs()
    loss, hidden, weight = run(linear_kl, (student[:0], student_weight, teacher[:0], teacher_weight))
    assert float(loss) == 0 and hidden.shape == (0, OURS) and not weight.any()


def test_logits_of_thousands_stay_finite() -> None:
    tensors = inputs()
    tensors = (tensors[0] * 3000, tensors[1], tensors[2] * 3000, tensors[3])
    ours = run(linear_kl, tensors, chunk_tokens=8)
    for one, other in zip(ours, run(oracle, tensors), strict=True):
        assert_close(one.double(), other.double(), 1e-3)


def test_autocast_matches_plain_bfloat16() -> None:
    tensors = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        ours = run(linear_kl, tensors, chunk_tokens=8)
    low = run(linear_kl, tuple(t.bfloat16() for t in tensors), chunk_tokens=8)
    assert all(t.dtype is torch.float32 for t in ours)
    for one, other in zip(ours, low, strict=True):
        assert_close(one, other.float(), 1e-6)
    # What a model gives under autocast: hidden states of 16 bits, a head of 32.
    with torch.autocast("cpu", torch.bfloat16):
        mixed = run(linear_kl, (tensors[0].bfloat16(), tensors[1], tensors[2].bfloat16(), tensors[3]), chunk_tokens=8)
    assert mixed[1].dtype is torch.bfloat16 and mixed[2].dtype is torch.float32
    assert_close(mixed[2], ours[2], 1e-6)


def test_double_backward_is_refused() -> None:
    tensors = inputs()
    tensors[0].requires_grad_()
    with pytest.raises(RuntimeError, match="differentiated twice"):
        torch.autograd.grad(linear_kl(*tensors)[0], tensors[0], create_graph=True)


class Watched(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned, and counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.products += "mm" in func.name()
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.nbytes = max(self.nbytes, tensor.untyped_storage().nbytes())
        return out


def large() -> tuple[Tensor, ...]:
    return torch.randn(512, 16), torch.randn(1000, 16), torch.randn(512, 8), torch.randn(1000, 8)


def test_full_logits_never_exist() -> None:
    full = 512 * 1000 * 4
    with Watched() as ours:
        run(linear_kl, large(), chunk_tokens=32)
    with Watched() as theirs:
        run(linear_kl_reference, large())
    assert ours.nbytes == full // 16
    assert theirs.nbytes >= full


def test_what_is_saved_is_as_big_as_the_inputs() -> None:
    student, weight, *teacher = large()
    student.requires_grad_(), weight.requires_grad_()
    seen: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(tuple(t.shape)) or t, lambda t: t):
        loss = linear_kl(student, weight, *teacher, chunk_tokens=32)[0]
    loss.backward()
    assert sorted(shape for shape in seen if shape) == [(512, 16), (1000, 16)]


def test_without_gradients_none_are_computed() -> None:
    """Validation: the head requires a gradient, but nobody will ask for one."""
    student, weight, *teacher = large()
    weight.requires_grad_()
    with Watched() as seen, torch.no_grad():
        loss, _ = linear_kl(student, weight, *teacher, chunk_tokens=128)
    assert seen.products == 2 * 4 and not loss.requires_grad


def test_errors_name_the_mend() -> None:
    student, student_weight, teacher, teacher_weight = inputs()
    for bad, message in (
        ((student[:, :3], student_weight, teacher, teacher_weight), "student .* do not fit"),
        ((student, student_weight, teacher, teacher_weight[:, :3]), "teacher .* do not fit"),
        ((student[None], student_weight, teacher[None], teacher_weight), "student .* do not fit"),
        ((student[:5], student_weight, teacher, teacher_weight), "agree in tokens"),
        ((student, student_weight[:9], teacher, teacher_weight), "in vocabulary"),
        ((student, student_weight.bfloat16(), teacher, teacher_weight), "one dtype, or use autocast"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_kl(*bad)
    for options, message in (({"temperature": 0.0}, "temperature=0.0"), ({"chunk_tokens": 0}, "chunk_tokens=0")):
        with pytest.raises(ValueError, match=message):
            linear_kl(student, student_weight, teacher, teacher_weight, **options)
