"""The same loss with whole logits, in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_kl_reference(
    student: Tensor, student_weight: Tensor, teacher: Tensor, teacher_weight: Tensor, temperature: float = 1.0
) -> Tensor:
    """See :func:`ygglight.kernels.linear_kl.linear_kl`; differentiable as often as one likes."""
    ours = torch.log_softmax(F.linear(student, student_weight) / temperature, dim=-1)
    theirs = torch.log_softmax(F.linear(teacher, teacher_weight) / temperature, dim=-1)
    return temperature**2 * (theirs.exp() * (theirs - ours)).sum(-1).mean()
