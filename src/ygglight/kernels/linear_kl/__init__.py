"""Distillation loss between two linear heads, without the full [N, V] logits of either ever existing.

Everything that backward needs is computed in forward, a chunk of tokens at a time (as Liger-Kernel does for cross
entropy): the logits of teacher and student exist once, and only for one chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ygglight.kernels import _dispatch
from ygglight.kernels.linear_cross_entropy import default_chunk_tokens
from ygglight.kernels.linear_kl.chunked import ChunkedLinearKL

__all__ = ["linear_kl"]

_dispatch.register("linear_kl", has_kernel=False)


def linear_kl(
    student: Tensor,
    student_weight: Tensor,
    teacher: Tensor,
    teacher_weight: Tensor,
    *,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean KL(teacher || student) a token over temperature-softened distributions, times temperature squared.

    Args:
        student: hidden states ``[N, Hs]`` before the head. student_weight: ``[V, Hs]``, of the same dtype (under
            autocast any, as for ``F.linear``; so for the teacher).
        teacher: hidden states ``[N, Ht]``; no gradient. teacher_weight: ``[V, Ht]``; no gradient.
        temperature: softens both (Hinton et al., arXiv 1503.02531); the square keeps gradients of one size.
        chunk_tokens: tokens whose logits exist at once; default: as for linear_cross_entropy, halved.

    Returns:
        The loss, float32 ``[]`` (float64 for float64 inputs), 0 of no tokens and differentiable once; and for how many
        tokens both heads have the same best one, int64 ``[]``.

    Raises:
        ValueError: shapes or dtypes do not fit, or temperature or chunk_tokens is not positive.
        RuntimeError: on double backward.
    """
    for name, hidden, weight in (("student", student, student_weight), ("teacher", teacher, teacher_weight)):
        if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
            raise ValueError(
                f"{name} [N, H] and {name}_weight [V, H] do not fit: {tuple(hidden.shape)}, {tuple(weight.shape)}"
            )
    if student.shape[0] != teacher.shape[0] or student_weight.shape[0] != teacher_weight.shape[0]:
        raise ValueError(
            f"student {tuple(student.shape)} x {tuple(student_weight.shape)} and teacher {tuple(teacher.shape)} x "
            f"{tuple(teacher_weight.shape)} must agree in tokens and in vocabulary"
        )
    if temperature <= 0:
        raise ValueError(f"temperature={temperature} must be above 0")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens={chunk_tokens}: use at least 1, or None for the default")
    kind = student.device.type
    if torch.is_autocast_enabled(kind) and student.dtype is not torch.float64:
        # Outside the Function, so that autograd casts the gradients back; inside, autocast is off.
        low = torch.get_autocast_dtype(kind)
        student, student_weight = student.to(low), student_weight.to(low)
        teacher, teacher_weight = teacher.to(low), teacher_weight.to(low)
    if student.dtype is not student_weight.dtype or teacher.dtype is not teacher_weight.dtype:
        raise ValueError(
            f"student is {student.dtype} and its weight {student_weight.dtype}, teacher {teacher.dtype} and its weight "
            f"{teacher_weight.dtype}: each pair must be of one dtype, or use autocast"
        )
    if not torch.is_grad_enabled():  # the Function would compute gradients of all that could have one
        student, student_weight = student.detach(), student_weight.detach()
    if chunk_tokens is None:
        chunk_tokens = max(1, default_chunk_tokens(student_weight.shape[0], kind) // 2)
    loss, agree = ChunkedLinearKL.apply(student, student_weight, teacher, teacher_weight, temperature, chunk_tokens)
    return loss, agree
