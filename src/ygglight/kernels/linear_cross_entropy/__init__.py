"""Cross entropy of a linear layer, without the full [N, V] logits ever existing: the exact way to save most memory.

Saved for backward: the inputs, the target and one fp32 number a token. Backward computes the logits a second time, so
the price is one more [N, H] x [H, V] product (2 N H V FLOP on top of 6 N H V).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ygglight.kernels import _dispatch
from ygglight.kernels.linear_cross_entropy.between import between_chunks
from ygglight.kernels.linear_cross_entropy.chunked import ChunkedLinearCrossEntropy, default_chunk_tokens

__all__ = ["between_chunks", "default_chunk_tokens", "linear_cross_entropy"]

_dispatch.register("linear_cross_entropy", has_kernel=False)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    chunk_tokens: int | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Mean cross entropy of `hidden @ weight.T + bias` against `target`, over the tokens that are not ignored.

    Args:
        hidden: [N, H], float64, float32, float16 or bfloat16.
        weight: [V, H], dtype and device of `hidden` (under autocast any: both are cast as `F.linear` would).
        target: [N], int64, in [0, V) or `ignore_index`.
        ignore_index: target of tokens that count for nothing. When all are ignored the loss is NaN and every gradient
            zero, as in torch.
        chunk_tokens: tokens whose logits exist at once; None picks `default_chunk_tokens`.
        softcap: logits become softcap * tanh(logits / softcap), as in Gemma 2.
        bias: [V], or None.

    Returns:
        Scalar, float32 (float64 for float64 inputs). Differentiable once in hidden, weight and bias.

    Raises:
        ValueError: shapes, devices or dtypes do not fit together, or chunk_tokens or softcap is not positive.
        RuntimeError: on a second backward through the gradient (double backward is not supported).

    Backward sums the weight's gradient in float32 also for 16-bit inputs: 4 V H bytes while it runs.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden [N, H] and weight [V, H] do not fit: {tuple(hidden.shape)}, {tuple(weight.shape)}")
    if target.shape != hidden.shape[:1] or target.dtype is not torch.int64:
        raise ValueError(f"target must be int64 [{hidden.shape[0]}], not {target.dtype} {tuple(target.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{weight.shape[0]}], not {tuple(bias.shape)}")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens={chunk_tokens}: use at least 1, or None for the default")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap={softcap}: use a positive number, or None for no cap")
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype is not torch.float64:
        # Outside the Function, so that autograd casts the gradients back; inside, autocast is off.
        low = torch.get_autocast_dtype(kind)
        hidden, weight = hidden.to(low), weight.to(low)
        bias = None if bias is None else bias.to(low)
    if weight.dtype is not hidden.dtype or (bias is not None and bias.dtype is not hidden.dtype):
        raise ValueError(f"hidden is {hidden.dtype} and weight {weight.dtype}: cast one, or use autocast")
    chunk = chunk_tokens or default_chunk_tokens(weight.shape[0], kind)
    with torch.autocast(kind, enabled=False):
        return ChunkedLinearCrossEntropy.apply(hidden, weight, target, bias, ignore_index, chunk, softcap)
