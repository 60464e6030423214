"""Where a model keeps its routed experts, and how one expert lies in one run of bytes.

One expert is a gate-up matrix, a down matrix and perhaps two biases. As one contiguous slab it is one copy rather than
two to four, and the fixed cost of a copy is what counts for experts of a few megabytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ygglight.compat.experts import act_name, has_default_gate, is_experts_module, why_odd_experts

__all__ = ["Site", "SlabLayout", "find_sites"]

ALIGN = 256  # bytes; what CUDA's allocator gives, and a multiple of every element size
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_WEIGHTS, _BIASES = ("gate_up_proj", "down_proj"), ("gate_up_proj_bias", "down_proj_bias")


def _aligned(size: int) -> int:
    return -(-size // ALIGN) * ALIGN


@dataclass(frozen=True)
class SlabLayout:
    """How the tensors of one expert lie in one contiguous run of bytes.

    Args:
        names: "gate_up_proj", "down_proj" and where there are biases "gate_up_proj_bias", "down_proj_bias".
        shapes: Of one expert, as in the module.
        dtype: Of all of them.
        offsets: First byte of each, multiples of 256.
        nbytes: Of the slab, a multiple of 256.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    offsets: tuple[int, ...]
    nbytes: int

    @classmethod
    def of(cls, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> SlabLayout:
        """Lay tensors out one after another.

        Args:
            shapes: Name -> shape of one expert. dtype: Of all of them.
        """
        offsets, end = [], 0
        for shape in shapes.values():
            offsets.append(end)
            end = _aligned(end + math.prod(shape) * dtype.itemsize)
        return cls(tuple(shapes), tuple(shapes.values()), dtype, tuple(offsets), end)

    def views(self, slabs: Tensor) -> dict[str, Tensor]:
        """See the tensors in slabs, without a copy.

        Args:
            slabs: uint8 ``[..., nbytes]``, contiguous in the last dimension.

        Returns:
            Name -> ``[..., *shape]``, strided over the slabs.
        """
        return {
            name: slabs.narrow(-1, offset, math.prod(shape) * self.dtype.itemsize).view(self.dtype).unflatten(-1, shape)
            for name, shape, offset in zip(self.names, self.shapes, self.offsets, strict=True)
        }


@dataclass(frozen=True, eq=False)
class Site:
    """The routed experts of one layer.

    Args:
        index: Among the sparse layers. name: Of the experts module in the model. module: That module.
        experts: How many. top_k: Experts a token.
        layout: Of one expert.
        gated: The first product gives gate and up. interleaved: They alternate, rather than being halves.
        transposed: Weights are ``[in, out]``. biased: Both products add a bias.
    """

    index: int
    name: str
    module: nn.Module = field(repr=False)
    experts: int
    top_k: int
    layout: SlabLayout
    gated: bool
    interleaved: bool
    transposed: bool
    biased: bool

    def activate(self, gate_up: Tensor) -> Tensor:
        """Apply what lies between the two products.

        Args:
            gate_up: ``[S, 2I]``.

        Returns:
            ``[S, I]``.
        """
        return self.module._apply_gate(gate_up)  # type: ignore[no-any-return, operator]

    @property
    def fused_activation(self) -> str | None:
        """ "silu" or "gelu" where :meth:`activate` is that of the first half, times the second half; else None."""
        return None if self.interleaved or not has_default_gate(self.module) else act_name(self.module)


def find_sites(model: nn.Module) -> list[Site]:
    """Find the layers of routed experts in a transformers model.

    Args:
        model: Any transformers model of a mixture of experts; weights may be on the meta device.

    Raises:
        ValueError: it has none, or some that cannot be run from slots; the message names the mend.
    """
    found = [(name, module) for name, module in model.named_modules() if is_experts_module(module)]
    if not found:
        raise ValueError(_why_none(model))
    sites = [_site(model, index, name, module) for index, (name, module) in enumerate(found)]
    if len({site.layout for site in sites}) > 1:
        raise ValueError(
            f"the experts of {type(model).__name__} differ in shape or dtype from layer to layer, and share no slots; "
            "cast the model to one dtype if it is that"
        )
    return sites


def _why_none(model: nn.Module) -> str:
    name = type(model).__name__
    for path, module in model.named_modules():
        kind = type(module).__name__
        if kind.startswith("Mxfp4"):
            return (
                f"the experts of {name} are quantised to MXFP4: load it with "
                "quantization_config=Mxfp4Config(dequantize=True)"
            )
        if path.endswith("experts") or kind.endswith(("Experts", "SparseMoeBlock")):
            return (
                f"{path} of {name} ({kind}) is not made by transformers' use_experts_implementation, so its experts "
                "cannot be taken over: load the model without trust_remote_code, as transformers' own class"
            )
    return f"{name} has no routed experts: MoE-SpeQ needs a mixture of experts such as Mixtral, Qwen3-MoE or OLMoE"


def _site(model: nn.Module, index: int, name: str, module: nn.Module) -> Site:
    where = f"{name} of {type(model).__name__} cannot be run from slots: "
    if "_moe_speq" in module.__dict__:
        raise ValueError(f"{where}it already is; detach the model first")
    odd = why_odd_experts(module)
    if odd:
        raise ValueError(where + odd)
    biased = bool(module.has_bias)
    names = _WEIGHTS + _BIASES if biased else _WEIGHTS
    tensors = dict(module.named_parameters(recurse=False))
    dtypes = {tensor.dtype for tensor in module.parameters()}
    if not dtypes <= set(DTYPES):
        raise ValueError(f"{where}its experts are quantised ({_listed(dtypes)}): load or dequantise them to bfloat16")
    if set(tensors) != set(names) or len(list(module.named_parameters())) != len(names):
        has = ", ".join(key for key, _ in module.named_parameters()) or "none"
        raise ValueError(
            f"{where}its parameters are {has} and not {', '.join(names)}; merge adapters and dequantise first"
        )
    if len(dtypes) > 1:
        raise ValueError(f"{where}its parameters have several dtypes ({_listed(dtypes)}): cast the model to one")
    counts = {tensor.shape[0] for tensor in tensors.values()}
    experts, top_k = tensors["down_proj"].shape[0], _top_k(model, name)
    if counts != {experts} or experts != _routed(model, name, experts):
        raise ValueError(
            f"{where}it holds {experts} experts and its router chooses among {_routed(model, name, experts)}: the "
            "model is split among processes (expert parallel); load it whole"
        )
    layout = SlabLayout.of({key: tuple(tensors[key].shape[1:]) for key in names}, dtypes.pop())
    return Site(
        index, name, module, experts, top_k, layout, gated=True, interleaved=not module.is_concatenated,
        transposed=bool(module.is_transposed), biased=biased,
    )  # fmt: skip


def _listed(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))


def _block(model: nn.Module, name: str) -> list[nn.Module]:
    """The module around the experts and those beside them, where the router is."""
    parent = model.get_submodule(name.rpartition(".")[0])
    return [parent, *(child for key, child in parent.named_children() if key != name.rpartition(".")[2])]


def _top_k(model: nn.Module, name: str) -> int:
    config: Any = model.get_submodule(name).config
    own = [getattr(module, "top_k", None) for module in _block(model, name)]
    return next((value for value in own if isinstance(value, int)), None) or int(config.num_experts_per_tok)


def _routed(model: nn.Module, name: str, default: int) -> int:
    """Experts that the router chooses among: the rows of the weight of a router beside the experts."""
    for module in _block(model, name)[1:]:
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and hasattr(module, "top_k") and weight.dim() == 2:
            return int(weight.shape[0])
    return default
