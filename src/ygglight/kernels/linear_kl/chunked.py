"""The chunked autograd Function: loss and gradients in one pass over the tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class ChunkedLinearKL(torch.autograd.Function):
    """Keeps the gradients of its inputs, which are as big as the inputs themselves."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, student_weight: Tensor, teacher: Tensor, teacher_weight: Tensor,
        temperature: float, chunk: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Loss and agreement; see the package's `linear_kl` for the arguments."""
        kind = torch.promote_types(student.dtype, torch.float32)
        count = student.shape[0]
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(student) if wants_hidden else None
        grad_weight = torch.zeros_like(student_weight, dtype=kind) if wants_weight else None
        total = torch.zeros((), dtype=kind, device=student.device)
        agree = torch.zeros((), dtype=torch.long, device=student.device)
        with torch.autocast(student.device.type, enabled=False):
            for start in range(0, count, chunk):
                rows = slice(start, start + chunk)
                hidden = student[rows]
                ours = F.linear(hidden, student_weight).to(kind).div_(temperature)
                theirs = F.linear(teacher[rows], teacher_weight).to(kind).div_(temperature)
                agree += (ours.argmax(-1) == theirs.argmax(-1)).sum()
                ours, theirs = torch.log_softmax(ours, dim=-1), torch.log_softmax(theirs, dim=-1)
                target = theirs.exp()
                total += (target * theirs.sub_(ours)).sum()
                grad = ours.exp_().sub_(target).mul_(temperature / max(count, 1)).to(student.dtype)
                if grad_hidden is not None:
                    torch.mm(grad, student_weight, out=grad_hidden[rows])
                if grad_weight is not None:
                    grad_weight += grad.t() @ hidden
        grad_weight = None if grad_weight is None else grad_weight.to(student_weight.dtype)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(agree)
        return total * (temperature**2 / max(count, 1)), agree

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, grad_agree: Tensor | None) -> tuple[Tensor | None, ...]:
        """Scales what forward found."""
        if torch.is_grad_enabled():  # the saved gradients would pass for constants, and a penalty on them be dropped
            raise RuntimeError("linear_kl cannot be differentiated twice (create_graph=True): use linear_kl_reference")
        grads = [None if grad is None else grad * grad_loss.to(grad.dtype) for grad in ctx.saved_tensors]
        return grads[0], grads[1], None, None, None, None
