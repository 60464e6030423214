"""The draft: the model itself, its routed experts in four bits. All else of it, the cache included, is the target's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ygglight.engines.moe_speq import draft_file
from ygglight.engines.moe_speq.layout import Site
from ygglight.engines.moe_speq.quantize import Calibration, choose_group, quantize_gptq, quantize_nearest
from ygglight.engines.moe_speq.stores import ExpertStore
from ygglight.kernels.expert_gemm import CpuInt4Weight, Int4Weight, allocate, expert_mlp_int4

__all__ = ["MIN_SHARE", "DraftExperts", "draft_bytes"]

MIN_SHARE = 0.25
"""Rows that an expert must have seen for GPTQ, of the inputs of its wider matrix. With an eighth of them, GPTQ was no
better than rounding to nearest on inputs that it had not seen (256 correlated inputs), with a sixteenth worse."""
_WEIGHTS = ("gate_up_proj", "down_proj")


@dataclass(frozen=True)
class _Layer:
    gate_up: Int4Weight | CpuInt4Weight
    down: Int4Weight | CpuInt4Weight
    biases: tuple[Tensor, Tensor] | None
    activation: str | Callable[[Tensor], Tensor]

    @property
    def nbytes(self) -> int:
        return self.gate_up.nbytes + self.down.nbytes + sum(bias.nbytes for bias in self.biases or ())


class DraftExperts:
    """Copies of all routed experts in four bits; made by :meth:`build` or :meth:`load`.

    Args:
        layers: One a site, in order. fingerprint: Of the experts they are copies of.
        nearest: How many experts were rounded to nearest. calibrated: How many went through GPTQ.
    """

    bits = 4

    def __init__(self, layers: list[_Layer], fingerprint: str, *, nearest: int, calibrated: int) -> None:
        self._layers, self._fingerprint = layers, fingerprint
        self.nearest, self.calibrated = nearest, calibrated

    @property
    def nbytes(self) -> int:
        """Memory of the copies."""
        return sum(layer.nbytes for layer in self._layers)

    @classmethod
    def build(
        cls,
        sites: Sequence[Site],
        store: ExpertStore,
        *,
        device: torch.device | str,
        calibration: Calibration | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> DraftExperts:
        """Quantise a model's experts, one at a time.

        Args:
            sites: Of the model. store: Where its experts are. device: Where the draft shall run, and is made.
            calibration: For GPTQ; None: weights are rounded to nearest. progress: Called with (experts done, in all).

        Raises:
            ValueError: a matrix cannot be cut into groups.
        """
        plan = [_shapes(site) for site in sites]  # what cannot be quantised is told before anything is
        slab = torch.empty(store.nbytes, dtype=torch.uint8)
        layers: list[_Layer] = []
        done = calibrated = 0
        total = sum(site.experts for site in sites)
        for site, (shapes, groups) in zip(sites, plan, strict=True):
            layer = _empty(site, shapes, groups, device)
            for expert in range(site.experts):
                store.read_into(site.index, expert, slab)
                tensors = {name: view.to(device) for name, view in site.layout.views(slab).items()}
                rows = None if calibration is None else calibration.rows(site.index, expert)
                if rows is not None and len(rows) < MIN_SHARE * max(shape[1] for shape in shapes):
                    rows = None
                calibrated += rows is not None
                _quantize(site, layer, expert, tensors, rows)
                done += 1
                if progress is not None:
                    progress(done, total)
            layers.append(layer)
        return cls(layers, draft_file.fingerprint(sites, store), nearest=total - calibrated, calibrated=calibrated)

    def save(self, path: str | Path) -> None:
        """Write a file that any machine can load; it appears whole or not at all.

        Args:
            path: Of the file (safetensors), in a folder that is there.
        """
        counts = {"nearest": self.nearest, "calibrated": self.calibrated}
        draft_file.write(Path(path), self._tensors(), self._fingerprint, counts)

    def _tensors(self) -> dict[str, draft_file.Stack]:
        stacks: dict[str, draft_file.Stack] = {}
        for number, layer in enumerate(self._layers):
            for name, weight in zip(_WEIGHTS, (layer.gate_up, layer.down), strict=True):
                stacks[f"{number}.{name}"] = weight
            for name, bias in zip(_WEIGHTS, layer.biases or (), strict=False):
                stacks[f"{number}.{name}_bias"] = bias
        return stacks

    @classmethod
    def load(
        cls, path: str | Path, sites: Sequence[Site], store: ExpertStore | None = None, *, device: torch.device | str
    ) -> DraftExperts:
        """Read what :meth:`save` wrote, an expert at a time.

        Args:
            path: Of the file. sites: Of the model that it shall draft for.
            store: Where that model's experts are; None: in the model's own parameters.
            device: Where it shall run.

        Raises:
            FileNotFoundError: there is no such file. ValueError: it is damaged, no draft, or another model's.
        """
        plan = [_shapes(site) for site in sites]
        with draft_file.Reader(Path(path), draft_file.fingerprint(sites, store), sites[0].layout.dtype) as reader:
            layers = []
            for number, (site, (shapes, groups)) in enumerate(zip(sites, plan, strict=True)):
                layer = _empty(site, shapes, groups, device)
                for name, weight in zip(_WEIGHTS, (layer.gate_up, layer.down), strict=True):
                    for expert, (packed, scale) in enumerate(reader.experts(f"{number}.{name}", weight)):
                        weight.write(expert, packed.to(device), scale.to(device))
                for name, bias in zip(_WEIGHTS, layer.biases or (), strict=False):
                    bias.copy_(reader.tensor(f"{number}.{name}_bias", bias))
                layers.append(layer)
            return cls(layers, reader.fingerprint, **reader.counts)

    @staticmethod
    def check(path: str | Path, sites: Sequence[Site], store: ExpertStore | None = None) -> None:
        """Read a whole file and keep nothing.

        Args:
            path: See :meth:`load`. sites: See :meth:`load`. store: See :meth:`load`.

        Raises:
            FileNotFoundError: see :meth:`load`. ValueError: see :meth:`load`.
        """
        for site in sites:
            _shapes(site)
        with draft_file.Reader(Path(path), draft_file.fingerprint(sites, store), sites[0].layout.dtype) as reader:
            reader.check_all()

    def forward(self, site: Site, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """What the site's experts give, roughly; nothing is read from the device.

        Args:
            site: The layer. hidden: ``[T, H]``. index: int ``[T, k]``. weights: ``[T, k]``.

        Returns:
            ``[T, H]``.
        """
        layer = self._layers[site.index]
        tokens, k = index.shape
        x = hidden if k == 1 else hidden.repeat_interleave(k, dim=0)
        out = expert_mlp_int4(
            x, index.reshape(-1), layer.gate_up, layer.down, activation=layer.activation, biases=layer.biases
        )
        return (out * weights.reshape(-1, 1)).view(tokens, k, -1).sum(dim=1).to(hidden.dtype)


def draft_bytes(sites: Sequence[Site], device: torch.device | str = "cpu") -> int:
    """What a draft would take, without making it.

    Args:
        sites: Of the model. device: Where it would run.

    Raises:
        ValueError: a matrix cannot be cut into groups.
    """
    where = "cpu" if torch.device(device).type == "cpu" else "meta"
    total = 0
    for site in sites:
        shapes, groups = _shapes(site)
        total += sum(weight.nbytes for weight in allocate(1, shapes, groups, where)) * site.experts
        if site.biased:
            total += (shapes[0][0] + shapes[1][0]) * site.layout.dtype.itemsize * site.experts
    return total


def _shapes(site: Site) -> tuple[tuple[tuple[int, int], tuple[int, int]], tuple[int, int]]:
    """Outputs and inputs of the two matrices, and their groups."""
    by_name = dict(zip(site.layout.names, site.layout.shapes, strict=True))
    turned = [by_name[name][::-1] if site.transposed else by_name[name] for name in _WEIGHTS]
    first, second = ((int(shape[0]), int(shape[1])) for shape in turned)
    groups = [
        choose_group(shape[1], f"{site.name}.{name}") for shape, name in zip((first, second), _WEIGHTS, strict=True)
    ]
    return (first, second), (groups[0], groups[1])


def _empty(
    site: Site, shapes: tuple[tuple[int, int], tuple[int, int]], groups: tuple[int, int], device: torch.device | str
) -> _Layer:
    gate_up, down = allocate(site.experts, shapes, groups, device)
    biases = None
    if site.biased:
        first, second = (torch.empty(site.experts, n, dtype=site.layout.dtype, device=device) for n, _ in shapes)
        biases = first, second
    return _Layer(gate_up, down, biases, site.fused_activation or site.activate)


def _quantize(site: Site, layer: _Layer, expert: int, tensors: dict[str, Tensor], rows: Tensor | None) -> None:
    """One expert's tensors into its place.

    Args:
        site: The layer's. layer: To write to. expert: Which. tensors: Of the expert, as in the module.
        rows: What it has seen, for GPTQ; the second matrix is given what the first then makes of it.
    """
    first, second = (tensors[name].mT if site.transposed else tensors[name] for name in _WEIGHTS)
    if not (first.isfinite().all() and second.isfinite().all()):
        raise ValueError(f"expert {expert} of {site.name} has weights that are not finite: it cannot be quantised")
    if layer.biases is not None:
        for name, bias in zip(_WEIGHTS, layer.biases, strict=True):
            bias[expert].copy_(tensors[f"{name}_bias"])
    if rows is None:
        layer.gate_up.write(expert, *quantize_nearest(first, layer.gate_up.group))
        layer.down.write(expert, *quantize_nearest(second, layer.down.group))
        return
    rows = rows.to(first)
    coded = Int4Weight.allocate(1, first.shape[0], first.shape[1], layer.gate_up.group, first.device)
    coded.write(0, *quantize_gptq(first, rows, coded.group))
    inner = rows @ coded.dequantize(0, first.dtype).mT
    inner = site.activate(inner if layer.biases is None else inner + layer.biases[0][expert])
    layer.gate_up.write(expert, coded.packed[0], coded.scale[0])
    layer.down.write(expert, *quantize_gptq(second, inner, layer.down.group))
