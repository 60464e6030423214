"""Distillation loss between two linear heads, without the full [N, V] logits of either ever existing.

Everything that backward needs is computed in forward, a chunk of tokens at a time (as Liger-Kernel does for cross
entropy): the logits of teacher and student exist once, and only for one chunk.
"""

from __future__ import annotations

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
        student: hidden states ``[N, Hs]`` before the head. student_weight: ``[V, Hs]``.
        teacher: hidden states ``[N, Ht]``; no gradient. teacher_weight: ``[V, Ht]``; no gradient.
        temperature: softens both (Hinton et al., arXiv 1503.02531); the square keeps gradients of one size.
        chunk_tokens: tokens whose logits exist at once; default: as for linear_cross_entropy, halved.

    Returns:
        The loss, float32 ``[]``; and how many tokens both heads put first, int64 ``[]``.

    Raises:
        ValueError: shapes do not fit, or temperature is not positive.
    """
    if student.shape[0] != teacher.shape[0] or student_weight.shape[0] != teacher_weight.shape[0]:
        raise ValueError(
            f"student {tuple(student.shape)} x {tuple(student_weight.shape)} and teacher {tuple(teacher.shape)} x "
            f"{tuple(teacher_weight.shape)} must agree in tokens and in vocabulary"
        )
    if temperature <= 0:
        raise ValueError(f"temperature={temperature} must be above 0")
    if chunk_tokens is None:
        chunk_tokens = max(1, default_chunk_tokens(student_weight.shape[0], student.device.type) // 2)
    loss, agree = ChunkedLinearKL.apply(student, student_weight, teacher, teacher_weight, temperature, chunk_tokens)
    return loss, agree
