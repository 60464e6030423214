"""Matrices to four bits: rounding to the nearest, or GPTQ (arXiv:2210.17323) with inputs that an expert has seen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ygglight.engines.moe_speq.layout import Site
from ygglight.kernels.expert_gemm import GROUPS, pack_codes
from ygglight.kernels.expert_gemm.int4 import SCALE_DTYPE, ZERO

__all__ = ["Calibration", "choose_group", "passes", "quantize_gptq", "quantize_nearest", "record"]

DAMPING = 0.01
"""Added to the diagonal of GPTQ's Hessian, of its mean; as in the paper."""
LEVELS = 7.5
"""A group's largest weight in scales: the finest scale whose codes -8 to 7 leave no error above half a scale."""
BLOCK = 512
"""Tokens of a calibration pass."""
MAX_TOKENS = 16384
"""Tokens of a layer that calibration keeps: with 8 of 128 experts a token some thousand rows an expert."""


def choose_group(columns: int, name: str) -> int:
    """The largest group that divides the input size of a matrix.

    Args:
        columns: inputs. name: of the matrix, for the message.

    Raises:
        ValueError: no group does.
    """
    for group in GROUPS:
        if columns % group == 0:
            return group
    raise ValueError(
        f"{name} has {columns} inputs, which no group of {', '.join(map(str, GROUPS))} weights divides: it cannot be a "
        "draft of four bits; set draft_bits to null, and experts are cached without a draft"
    )


def quantize_nearest(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Round each weight to the nearest code: no error is above half the scale of its group.

    Args:
        weight: ``[N, K]``, finite. group: divides K.

    Returns:
        Packed codes and scales, as ``Int4Weight.write`` takes them.
    """
    groups = weight.float().unflatten(-1, (-1, group))
    scale = _scale(groups)
    return pack_codes(_codes(groups, scale[..., None]).flatten(-2), group), scale


def quantize_gptq(weight: Tensor, inputs: Tensor, group: int, damping: float = DAMPING) -> tuple[Tensor, Tensor]:
    """Round column by column, and let the columns that are still to come make up for the error on given inputs.

    The order of the columns is kept, so a group is one run of inputs. Errors are those of the products: a single weight
    may be off by more than half a scale.

    Args:
        weight: ``[N, K]``, finite. inputs: ``[S, K]``, rows that the matrix has seen. group: divides K.
        damping: of the Hessian's diagonal, in its mean.

    Returns:
        Packed codes and scales, as ``Int4Weight.write`` takes them.
    """
    left = weight.float().clone()
    inverse = _inverse_root(inputs.float(), damping)
    codes = torch.empty_like(left, dtype=torch.uint8)
    scales = []
    for start in range(0, left.shape[1], group):
        stop = start + group
        block, errors = left[:, start:stop], torch.empty_like(left[:, start:stop])
        scale = _scale(block)
        scales.append(scale)
        for i in range(group):
            row = inverse[start + i, start + i : stop]
            code = _codes(block[:, i], scale)
            codes[:, start + i] = code
            error = (block[:, i] - (code.float() - ZERO) * scale.float()) / row[0]
            block[:, i:] -= error[:, None] * row
            errors[:, i] = error
        left[:, stop:] -= errors @ inverse[start:stop, stop:]
    return pack_codes(codes, group), torch.stack(scales, dim=1)


def _scale(groups: Tensor) -> Tensor:
    """Scales of groups ``[..., group]``, rounded so that no code has to be cut off by more than half a scale."""
    largest = groups.abs().amax(dim=-1)
    scale = (largest / LEVELS).to(SCALE_DTYPE)
    small = scale.float() * LEVELS < largest
    scale = torch.where(small, torch.nextafter(scale, torch.full_like(scale, torch.inf)), scale)
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def _codes(weight: Tensor, scale: Tensor) -> Tensor:
    return ((weight / scale.float()).round().clamp(-ZERO, ZERO - 1) + ZERO).to(torch.uint8)


def _inverse_root(inputs: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the inverse of the damped Hessian, ``[K, K]``."""
    hessian = inputs.mT @ inputs / len(inputs)
    diagonal = hessian.diagonal()
    diagonal += damping * diagonal.mean().clamp_min(torch.finfo(torch.float32).tiny)
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)


@dataclass
class Calibration:
    """What routed experts saw of a text, layer by layer, on the host.

    Args:
        hidden: Index of a site -> ``[T, H]``. index: Of a site -> int64 ``[T, k]``, the experts of each token.
    """

    hidden: dict[int, Tensor] = field(default_factory=dict)
    index: dict[int, Tensor] = field(default_factory=dict)

    def rows(self, site: int, expert: int) -> Tensor:
        """The inputs of one expert.

        Args:
            site: Index of the layer. expert: Index in the layer.

        Returns:
            ``[S, H]``.
        """
        return self.hidden[site][(self.index[site] == expert).any(dim=-1)]


def passes(model: Any, text: Tensor, progress: Callable[[int, int], None] | None = None) -> Iterator[Callable[[], Any]]:
    """Forwards over a text, for :func:`record`.

    Args:
        model: A causal language model. text: int64 ``[n]``, on its device. progress: Called with (tokens done, in all).
    """
    run = torch.inference_mode()(partial(model, use_cache=False))  # no mode is held over a yield
    for at in range(0, len(text), BLOCK):
        yield partial(run, input_ids=text[None, at : at + BLOCK])
        if progress is not None:
            progress(min(at + BLOCK, len(text)), len(text))


def record(sites: Sequence[Site], runs: Iterable[Callable[[], Any]], tokens: int = MAX_TOKENS) -> Calibration:
    """Watch what experts are given while a model runs over text.

    Args:
        sites: Of the model, whose forward must be what ``runs`` call. runs: Called one after the other, each a forward
            over some text, until every layer has seen enough.
        tokens: To keep of a layer, in host memory. GPTQ needs some hundreds an expert: more experts, more tokens.

    Raises:
        ValueError: nothing ran through the experts.
    """
    kept: dict[int, list[tuple[Tensor, Tensor]]] = {site.index: [] for site in sites}
    room = dict.fromkeys(kept, tokens)

    def watch(site: Site) -> Callable[..., None]:
        def hook(_: Any, args: tuple[Any, ...]) -> None:
            hidden, index = args[0].detach().flatten(0, -2), args[1].detach()
            count = min(len(hidden), room[site.index])
            if count:
                kept[site.index].append((hidden[:count].to("cpu", copy=True), index[:count].to("cpu", copy=True)))
                room[site.index] -= count

        return hook

    handles = [site.module.register_forward_pre_hook(watch(site)) for site in sites]
    try:
        with torch.no_grad():
            for run in runs:
                run()
                if not any(room.values()):
                    break
    finally:
        for handle in handles:
            handle.remove()
    if not all(kept.values()):
        raise ValueError("the calibration text never reached the experts: run the model that the sites were found in")
    hidden, index = ({site: torch.cat([p[i] for p in parts]) for site, parts in kept.items()} for i in (0, 1))
    return Calibration(hidden, index)
