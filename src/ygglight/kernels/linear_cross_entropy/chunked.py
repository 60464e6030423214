"""The chunked autograd Function: logits of one chunk of tokens at a time, computed again in backward."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ygglight.kernels.linear_cross_entropy import between

# fp32 logits of one chunk.
CHUNK_BYTES = 32 * 1024 * 1024
# On a GPU a chunk of M tokens does M FLOP for each byte of a 16-bit weight that it reads, so below ~295 tokens an H100
# (989 TFLOP/s, 3.35 TB/s) waits for the weight. 256 wins over the 32 MiB for vocabularies above 32 Ki entries.
SMALLEST_GPU_CHUNK = 256


def default_chunk_tokens(vocabulary: int, device_type: str = "cpu") -> int:
    """Tokens whose logits exist at once when the caller does not say.

    Args:
        vocabulary: V.
        device_type: "cuda" keeps at least 256 tokens (131 MB of fp32 logits at V = 128 Ki).

    Returns:
        At least 1; elsewhere than on CUDA the fp32 logits stay within 32 MiB.
    """
    fitting = max(1, CHUNK_BYTES // (4 * max(vocabulary, 1)))
    return max(fitting, SMALLEST_GPU_CHUNK) if device_type == "cuda" else fitting


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    """Logits of one chunk [tokens, V] in a buffer of its own, float32 (float64 for float64 inputs)."""
    logits = F.linear(hidden, weight, bias)
    logits = logits if logits.dtype is torch.float64 else logits.float()
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def _accumulate_(total: Tensor, grad_logits: Tensor, hidden: Tensor) -> None:
    """Adds grad_logits.T @ hidden to total [V, H], in the accumulator's precision."""
    if total.dtype is hidden.dtype:
        total.addmm_(grad_logits.t(), hidden)
        return
    # 16-bit inputs: the product is 16-bit on every backend, so it goes by slices of the vocabulary that stay in 32 MiB.
    step = max(1, CHUNK_BYTES // (hidden.element_size() * max(hidden.shape[1], 1)))
    for start in range(0, total.shape[0], step):
        total[start : start + step].add_(grad_logits[:, start : start + step].t() @ hidden)


class _DifferentiatedOnce(torch.autograd.Function):
    """Passes a gradient on; differentiating it raises.

    torch's `once_differentiable` looks only at the incoming gradient, which is a plain 1 for a loss: with
    `create_graph=True` it lets the gradient out as a constant, and a gradient penalty would silently be dropped.
    """

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *sources: Tensor | None) -> Tensor:
        """Returns `grad`, tied to the tensors that it depends on."""
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Always raises."""
        raise RuntimeError(
            "linear_cross_entropy cannot be differentiated twice: compute the logits and call "
            "torch.nn.functional.cross_entropy where a second derivative is needed"
        )


class ChunkedLinearCrossEntropy(torch.autograd.Function):
    """Mean cross entropy that keeps its inputs and a log-sum-exp per token."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None,
        ignore_index: int,
        chunk: int,
        softcap: float | None,
    ) -> Tensor:
        """Loss of all chunks; see the package's `linear_cross_entropy` for the arguments."""
        kind = torch.float64 if hidden.dtype is torch.float64 else torch.float32
        lse = torch.empty(hidden.shape[0], dtype=kind, device=hidden.device)
        valid = target != ignore_index
        total = torch.zeros((), dtype=kind, device=hidden.device)
        on_chunk = between.current()
        for start in range(0, hidden.shape[0], chunk):
            if start and on_chunk is not None:
                on_chunk(start // chunk)
            rows = slice(start, start + chunk)
            logits = _logits(hidden[rows], weight, bias, softcap)
            picked = logits.gather(1, target[rows].where(valid[rows], 0)[:, None]).squeeze(1)
            # In place instead of torch.logsumexp, which takes a second [chunk, V] buffer.
            largest = logits.amax(1, keepdim=True)
            lse[rows] = logits.sub_(largest).exp_().sum(1).log_().add_(largest.squeeze(1))
            total += (lse[rows] - picked).where(valid[rows], 0.0).sum()
            del logits
        count = valid.sum()
        ctx.save_for_backward(hidden, weight, target, bias, lse, count)
        ctx.ignore_index, ctx.chunk, ctx.softcap = ignore_index, chunk, softcap
        ctx.on_chunk = on_chunk  # backward may run on a thread of autograd's
        return total / count

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of hidden, weight and bias, each only when it is asked for."""
        hidden, weight, target, bias, lse, count = ctx.saved_tensors
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            grads = _gradients(ctx, grad_loss, hidden, weight, target, bias, lse, count)
        if torch.is_grad_enabled():
            sources = (hidden, weight, bias, grad_loss)
            grads = [None if grad is None else _DifferentiatedOnce.apply(grad, *sources) for grad in grads]
        return grads[0], grads[1], None, grads[2], None, None, None


def _gradients(
    ctx: Any,
    grad_loss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    count: Tensor,
) -> list[Tensor | None]:
    """Gradients of hidden, weight and bias, chunk by chunk."""
    wants_hidden, wants_weight, _, wants_bias, *_ = ctx.needs_input_grad
    grad_hidden = torch.empty_like(hidden) if wants_hidden else None
    grad_weight = torch.zeros_like(weight, dtype=lse.dtype) if wants_weight else None
    grad_bias = lse.new_zeros(weight.shape[0]) if wants_bias else None
    factor = grad_loss / count
    for start in range(0, hidden.shape[0], ctx.chunk):
        if start and ctx.on_chunk is not None:
            ctx.on_chunk(start // ctx.chunk)
        rows = slice(start, start + ctx.chunk)
        valid = (target[rows] != ctx.ignore_index)[:, None]
        logits = _logits(hidden[rows], weight, bias, ctx.softcap)
        slope = None if ctx.softcap is None else (logits / ctx.softcap).square_().neg_().add_(1.0)
        grad = logits.sub_(lse[rows, None]).exp_()
        place = target[rows, None].where(valid, 0)
        grad.scatter_add_(1, place, grad.new_full((), -1.0).expand(place.shape))
        if slope is not None:
            grad.mul_(slope)
        # Filled, not multiplied by 0: with every token ignored the factor is infinite, and 0 * inf is NaN.
        grad.mul_(factor).masked_fill_(~valid, 0.0)
        if grad_bias is not None:
            grad_bias += grad.sum(0)
        grad = grad.to(hidden.dtype)
        if grad_hidden is not None:
            torch.mm(grad, weight, out=grad_hidden[rows])
        if grad_weight is not None:
            _accumulate_(grad_weight, grad, hidden[rows])
        del logits, slope, grad
    return [
        grad_hidden,
        None if grad_weight is None else grad_weight.to(weight.dtype),
        None if grad_bias is None else grad_bias.to(weight.dtype),
    ]
