"""What the decode block takes; each wrong input is one error that names the mend."""

from __future__ import annotations

import torch
from torch import Tensor

from ygglight.kernels.cluster_decode.mla import LatentSpec, LatentWeights
from ygglight.kernels.cluster_decode.spec import BlockSpec, BlockWeights

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INDICES = (torch.int32, torch.int64)


def check_inputs(
    x: Tensor,
    weights: BlockWeights,
    spec: BlockSpec,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    mask: Tensor | None,
    slots: Tensor | None,
) -> None:
    """Checks shapes, dtypes and devices, and reads no data.

    Args:
        x: See :func:`ygglight.kernels.cluster_decode.decode_block`, as for all others.

    Raises:
        ValueError: something does not fit.
    """
    _check_hidden(x, spec.hidden)
    batch = len(x)
    _check_weights(x, weights, _weight_shapes(weights, spec))
    if spec.qk_norm != (weights.q_norm is not None) or spec.qk_norm != (weights.k_norm is not None):
        raise ValueError(f"qk_norm={spec.qk_norm}: give q_norm and k_norm with it, and neither without it")
    for name, tensor in (("cos", cos), ("sin", sin)):
        if tuple(tensor.shape) != (batch, spec.rotary_dim):
            raise ValueError(f"{name} is {_shape(tensor)}: give [{batch}, {spec.rotary_dim}], one row a sequence")
        if spec.rotary_dim and tensor.stride(1) != 1:
            raise ValueError(f"{name} has strides {tensor.stride()}: give rows in one piece, .contiguous()")
    if keys.dim() != 4 or keys.shape[:2] != (batch, spec.kv_heads) or keys.shape[3] != spec.head_dim:
        wanted_keys = f"[{batch}, {spec.kv_heads}, slots, {spec.head_dim}]"
        raise ValueError(f"keys are {_shape(keys)}: give {wanted_keys}, the cache's view of committed tokens")
    if values.shape != keys.shape:
        raise ValueError(f"values {_shape(values)} do not fit keys {_shape(keys)}: give them the same shape")
    _check_lengths(batch, keys.shape[2], lengths, mask, slots)
    _check_append(spec, batch, new_keys, new_values, slots)
    states = {"keys": keys, "values": values, "new_keys": new_keys, "new_values": new_values}
    for name, tensor in states.items():
        if tensor.dtype is not x.dtype:
            raise ValueError(f"x is {x.dtype}, {name} are {tensor.dtype}: cast them to one dtype")
    _check_places(x, [*vars(weights).values(), cos, sin, *states.values(), lengths, mask, slots])


def check_latent_inputs(
    x: Tensor,
    weights: LatentWeights,
    spec: LatentSpec,
    cos: Tensor,
    sin: Tensor,
    latents: Tensor,
    rotated: Tensor,
    lengths: Tensor,
    new_latents: Tensor,
    new_rotated: Tensor,
    mask: Tensor | None,
    slots: Tensor | None,
) -> None:
    """Checks shapes, dtypes and devices, and reads no data.

    Args:
        x: See :func:`ygglight.kernels.cluster_decode.latent.latent_block`, as for all others.

    Raises:
        ValueError: something does not fit.
    """
    _check_hidden(x, spec.hidden)
    batch = len(x)
    _check_weights(x, weights, _latent_weight_shapes(weights, spec))
    if (weights.q_a is None) != (weights.q_a_norm is None):
        raise ValueError("q_a goes with q_a_norm: give both or neither")
    for name, tensor in (("cos", cos), ("sin", sin)):
        if tuple(tensor.shape) != (batch, spec.rope_dim // 2):
            raise ValueError(f"{name} is {_shape(tensor)}: give [{batch}, {spec.rope_dim // 2}], one number a pair")
    states = {"latents": latents, "rotated": rotated, "new_latents": new_latents, "new_rotated": new_rotated}
    cached = (batch, latents.shape[1]) if latents.dim() == 3 else (batch, 0)
    appended = (batch,) if slots is None else new_latents.shape[:2]
    sizes = (*[(*cached, size) for size in (spec.latent, spec.rope_dim)],
             *[(*appended, size) for size in (spec.latent, spec.rope_dim)])  # fmt: skip
    for (name, tensor), wanted in zip(states.items(), sizes, strict=True):
        if tuple(tensor.shape) != wanted or len(tensor) != batch:
            raise ValueError(f"{name} are {_shape(tensor)}: give {list(wanted)}")
        if tensor.dtype is not x.dtype:
            raise ValueError(f"x is {x.dtype}, {name} are {tensor.dtype}: cast them to one dtype")
        if tensor.stride(-1) != 1:
            raise ValueError(f"{name} have strides {tensor.stride()}: give vectors in one piece")
    _check_lengths(batch, latents.shape[1], lengths, mask, slots)
    _check_places(x, [*vars(weights).values(), cos, sin, *states.values(), lengths, mask, slots])


def _latent_weight_shapes(weights: LatentWeights, spec: LatentSpec) -> dict[str, tuple[int, ...]]:
    query = spec.hidden if weights.q_a is None else len(weights.q_a)
    states, output = spec.latent + spec.rope_dim, len(weights.o)
    return {
        "norm": (spec.hidden,), "q": (spec.heads * (spec.nope_dim + spec.rope_dim), query),
        "kv_a": (states, spec.hidden), "kv_a_norm": (spec.latent,),
        "kv_b": (spec.heads * (spec.nope_dim + spec.value_dim), spec.latent),
        "o": (output, spec.heads * spec.value_dim), "q_a": (query, spec.hidden), "q_a_norm": (query,),
        "q_a_bias": (query,), "kv_a_bias": (states,), "o_bias": (output,),
    }  # fmt: skip


def _check_hidden(x: Tensor, hidden: int) -> None:
    if x.dtype not in DTYPES:
        raise ValueError(f"x is {x.dtype}: cast it to float16, bfloat16 or float32")
    if x.dim() != 2 or x.shape[1] != hidden or not len(x):
        raise ValueError(f"x is {_shape(x)}: give [batch, {hidden}], one new token a sequence")


def _check_weights(x: Tensor, weights: BlockWeights | LatentWeights, shapes: dict[str, tuple[int, ...]]) -> None:
    for name, wanted in shapes.items():
        tensor = getattr(weights, name)
        if tensor is not None and tuple(tensor.shape) != wanted:
            raise ValueError(f"the weights {name} are {_shape(tensor)}: the spec makes them {list(wanted)}")
        if tensor is not None and tensor.dtype is not x.dtype:
            raise ValueError(f"x is {x.dtype}, the weights {name} are {tensor.dtype}: cast them to one dtype")
        if tensor is not None and tensor.stride(-1) != 1:
            raise ValueError(
                f"the weights {name} have strides {tensor.stride()}: give rows in one piece, .contiguous()"
            )


def _check_lengths(batch: int, count: int, lengths: Tensor, mask: Tensor | None, slots: Tensor | None) -> None:
    if tuple(lengths.shape) != (batch,) or lengths.dtype is not torch.int32:
        raise ValueError(f"lengths are {_shape(lengths)} {lengths.dtype}: give int32 [{batch}], committed tokens")
    if slots is not None and (tuple(slots.shape) != (batch,) or slots.dtype not in INDICES):
        raise ValueError(f"slots are {_shape(slots)} {slots.dtype}: give int32 or int64 [{batch}], one a sequence")
    if mask is not None:
        if mask.dim() != 2 or mask.shape[0] not in (1, batch) or mask.shape[1] != count:
            raise ValueError(f"the mask is {_shape(mask)}: give [{batch} or 1, {count}], one column a slot")
        if mask.dtype is not torch.bool and not mask.is_floating_point():
            raise ValueError(f"the mask is {mask.dtype}: give bool, True where attended, or floats to add to scores")


def _weight_shapes(weights: BlockWeights, spec: BlockSpec) -> dict[str, tuple[int, ...]]:
    queries, states, output = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim, len(weights.o)
    return {
        "norm": (spec.hidden,), "q": (queries, spec.hidden), "k": (states, spec.hidden), "v": (states, spec.hidden),
        "o": (output, queries), "q_bias": (queries,), "k_bias": (states,), "v_bias": (states,), "o_bias": (output,),
        "q_norm": (spec.head_dim,), "k_norm": (spec.head_dim,),
    }  # fmt: skip


def _check_append(spec: BlockSpec, batch: int, new_keys: Tensor, new_values: Tensor, slots: Tensor | None) -> None:
    head = (batch, spec.kv_heads)
    if slots is None:
        if tuple(new_keys.shape) != (*head, spec.head_dim) or new_values.shape != new_keys.shape:
            raise ValueError(
                f"new_keys {_shape(new_keys)}, new_values {_shape(new_values)}: give [{batch}, {spec.kv_heads}, "
                f"{spec.head_dim}], or whole caches and slots"
            )
        return
    whole = new_keys.dim() == 4 and new_keys.shape[:2] == head and new_keys.shape[3] == spec.head_dim
    if not whole or new_values.shape != new_keys.shape:
        raise ValueError(
            f"new_keys {_shape(new_keys)}, new_values {_shape(new_values)}: with slots give whole caches, "
            f"[{batch}, {spec.kv_heads}, slots, {spec.head_dim}]"
        )


def _check_places(x: Tensor, others: list[Tensor | None]) -> None:
    tensors = [x, *(tensor for tensor in others if tensor is not None)]
    if any(tensor.device != x.device for tensor in tensors):
        places = ", ".join(sorted({str(tensor.device) for tensor in tensors}))
        raise ValueError(f"tensors are on several devices ({places}): move them to that of x")
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise ValueError("the decode block has no backward pass: call it under torch.no_grad(), or detach its inputs")


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))
