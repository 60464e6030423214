"""Serving from the weights that are being trained: a twin of the model, and versions of its LoRA matrices.

The twin has its own modules over the very same base weights. The adapter being trained is not read in place: it is
copied at optimizer boundaries, and each copy is a version. A request keeps the version it was admitted with, so no
output mixes two of them (trap 8 and check T3 of our brief on Harli, arXiv:2511.11729).
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ygglight.compat.copying import share_tensors
from ygglight.compat.extras import require
from ygglight.compat.transformers import unwrap

__all__ = ["Adapters", "VersionedLoRA", "serving_twin"]

Matrices = tuple[Tensor, Tensor]
"""``A [r, in]`` and ``B [out, r]`` of one layer."""


@dataclass
class _Route:
    """Which matrices the rows of the next forward use; one object for all layers of a twin.

    Args:
        rows: Of the batch. groups: (row numbers int64 ``[n]``, None: all rows; matrices of all layers), one a version.
    """

    rows: int = 0
    groups: list[tuple[Tensor | None, list[Matrices]]] = field(default_factory=list)


class VersionedLoRA(nn.Module):
    """A linear layer with an adapter of its own for each row of the batch, or none.

    As peft's layers compute it in eval mode: ``base(x) + (x A^T B^T) * scaling``, in the dtype of the matrices.

    Args:
        base_layer: The frozen linear layer, quantised or not.
        name: Of peft's layer in the model. adapter: Of peft's adapter. index: Of the layer among the versioned ones.
        scaling: ``alpha / r``, or ``alpha / sqrt(r)`` (rslora).
        rounds_delta: Round the adapter's part to the dtype of the base's before they are added, as peft does over
            bitsandbytes layers; else the sum is rounded.
        route: Shared by all layers of the twin.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        name: str,
        adapter: str,
        index: int,
        scaling: float,
        rounds_delta: bool,
        route: _Route,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name, self.adapter, self.index = name, adapter, index
        self.scaling, self.rounds_delta, self.route = scaling, rounds_delta, route

    @property
    def weight(self) -> Any:
        """Of the base layer: models ask for its dtype and device."""
        return self.base_layer.weight

    @property
    def bias(self) -> Any:
        """Of the base layer."""
        return self.base_layer.bias

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``[B, ..., in]`` to ``[B, ..., out]``; rows that a padded batch has beyond the route's are the base's."""
        result: Tensor = self.base_layer(x, *args, **kwargs)
        for rows, matrices in self.route.groups:
            if rows is None:
                return self._add(result, x, matrices[self.index])
            if x.shape[0] < self.route.rows:
                raise RuntimeError(
                    f"{self.name} got {x.shape[0]} rows of a batch of {self.route.rows}: it cannot tell which adapter"
                )
            added = self._add(result.index_select(0, rows), x.index_select(0, rows), matrices[self.index])
            result.index_copy_(0, rows, added)
        return result

    def _add(self, result: Tensor, x: Tensor, matrices: Matrices) -> Tensor:
        a, b = matrices
        delta = nn.functional.linear(nn.functional.linear(x.to(a.dtype), a), b) * self.scaling
        if self.rounds_delta:
            return result + delta.to(result.dtype)
        return (result + delta).to(result.dtype)


def serving_twin(model: nn.Module) -> Any:
    """A model of its own over the same base weights, with versioned adapters in place of peft's.

    It stays in eval mode and without hooks, gradient checkpointing or dropout, whatever is set on the original, so the
    one can be run in a thread while the other trains in another. It has no weight of its own; rows have no adapter
    until :meth:`Adapters.activate` says so.

    Args:
        model: A transformers model with LoRA layers of peft, or the peft model around it.

    Returns:
        The transformers model's twin.

    Raises:
        ValueError: there is no LoRA layer, or something besides the matrices of plain LoRA on linear layers is trained
            or active (DoRA and other variants, biases, embeddings, ``modules_to_save``).
    """
    inner = unwrap(model)
    layers = _lora_layers(inner)
    twin = share_tensors(inner)
    twin.eval()
    if getattr(twin, "is_gradient_checkpointing", False):
        twin.gradient_checkpointing_disable()
    plain = require("peft.tuners.lora", "lora").Linear
    route = _Route()
    for index, (name, layer) in enumerate(layers.items()):
        adapter = layer.active_adapters[0]
        linear = twin.get_submodule(name).base_layer
        versioned = VersionedLoRA(
            linear, name, adapter, index, layer.scaling[adapter], not isinstance(layer, plain), route
        )
        twin.set_submodule(name, versioned.eval())
    return twin


def _lora_layers(model: nn.Module) -> dict[str, Any]:
    """Name -> LoRA layer of peft's, all of them checked."""
    tuners = require("peft.tuners.tuners_utils", "lora")
    lora = require("peft.tuners.lora", "lora")
    found: dict[str, Any] = {}
    matrices: set[int] = set()
    for name, module in model.named_modules():
        if not isinstance(module, tuners.BaseTunerLayer):
            if type(module).__name__ in ("ModulesToSaveWrapper", "TrainableTokensWrapper"):
                raise ValueError(
                    f"{name} is a {type(module).__name__}: only LoRA matrices can be served while they train"
                )
            continue
        problem = _problem(name, module, lora)
        if problem is not None:
            raise ValueError(f"{name} cannot be served while it trains: {problem}")
        if module.active_adapters:
            found[name] = module
            adapter = module.active_adapters[0]
            matrices |= {id(module.lora_A[adapter].weight), id(module.lora_B[adapter].weight)}
    if not found:
        raise ValueError("the model has no active LoRA layer: wrap it by peft.get_peft_model(model, LoraConfig(...))")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in matrices:
            raise ValueError(
                f"{name} is trained too, and serving would see it change: train LoRA matrices alone (bias='none', no "
                "modules_to_save), one adapter at a time"
            )
    return found


def _problem(name: str, layer: Any, lora: Any) -> str | None:
    if not isinstance(layer, lora.LoraLayer):
        return f"it is a {type(layer).__name__}, not LoRA"
    active = list(layer.active_adapters)
    if layer.merged:
        return "its adapter is merged into the base weights: unmerge it"
    if len(active) > 1:
        return f"the adapters {active} are active at once: set_adapter one of them"
    base = layer.base_layer
    linear = isinstance(base, nn.Linear) or type(base).__name__ == "Conv1D"
    if not linear or isinstance(layer, lora.ParamWrapper) or layer.lora_embedding_A:
        return f"LoRA on {type(base).__name__} ({type(layer).__name__}): target linear layers only"
    if any(part in ("experts", "expert") for part in name.split(".")):
        return "an expert sees tokens of many requests without their row: leave experts out of target_modules"
    if active and active[0] in layer.lora_variant:
        return f"{type(layer.lora_variant[active[0]]).__name__} is no plain LoRA (use_dora and the like): switch it off"
    if active and layer.lora_bias.get(active[0]):
        return "it has a bias (lora_bias=True): switch it off"
    return None


class _Slot:
    """Memory of one version; used again when the version is dropped."""

    def __init__(self, number: int, matrices: list[Matrices]) -> None:
        self.number, self.matrices = number, matrices
        self.written: torch.cuda.Event | None = None  # by the publishing stream
        self.read: torch.cuda.Event | None = None  # for the last time, by the decoding stream


class Adapters:
    """The versions of an adapter that requests may be served by.

    The main thread publishes, the decode thread pins and activates. The current version and all pinned ones are kept.
    On a GPU the copies are ordered by events; no thread waits for the device.

    Args:
        twin: From :func:`serving_twin`. model: The model it was made of; its adapter becomes version 0.
        slots: Versions that are kept at most; default: as many as are pinned. Graphs are recorded for a slot, not for a
            version, so a bound on slots is a bound on recordings.

    Raises:
        ValueError: the twin has no versioned layers, or ``slots`` is less than 2.
    """

    def __init__(self, twin: nn.Module, model: nn.Module, *, slots: int | None = None) -> None:
        self._layers = [module for module in twin.modules() if isinstance(module, VersionedLoRA)]
        if not self._layers:
            raise ValueError("the twin has no versioned layers: make it by serving_twin(model)")
        if slots is not None and slots < 2:
            raise ValueError(f"slots={slots}: a version is written while another is read, so give 2 or more")
        self._route = self._layers[0].route
        self._lock = threading.Lock()
        self._slots, self._made = slots, 0
        self._spare: list[_Slot] = []
        self._versions: dict[int, _Slot] = {}
        self._pins: Counter[int] = Counter()
        self._current = -1
        self.skipped = 0
        """How often :meth:`publish` found no free slot."""
        self.publish(model)

    @property
    def current_version(self) -> int:
        """The newest."""
        return self._current

    @property
    def versions(self) -> list[int]:
        """Those that are kept, ascending."""
        with self._lock:
            return sorted(self._versions)

    # -- main thread -------------------------------------------------------------------------------------------------
    def publish(self, model: nn.Module) -> int:
        """Copy the adapter as it is now; requests admitted from now on get it.

        Args:
            model: The live model, between two optimizer steps.

        Returns:
            The current version: a new one, or the one before if all slots are pinned.
        """
        inner = unwrap(model)
        live: list[Matrices] = []
        for layer in self._layers:
            source: Any = inner.get_submodule(layer.name)
            live.append((source.lora_A[layer.adapter].weight, source.lora_B[layer.adapter].weight))
        slot = self._take_slot(live)
        if slot is None:
            self.skipped += 1
            return self._current
        cuda = live[0][0].is_cuda
        if cuda and slot.read is not None:
            torch.cuda.current_stream(live[0][0].device).wait_event(slot.read)
        with torch.inference_mode(False), torch.no_grad():
            for targets, sources in zip(slot.matrices, live, strict=True):
                for target, tensor in zip(targets, sources, strict=True):
                    target.copy_(tensor)
        if cuda:
            slot.written = torch.cuda.Event()
            slot.written.record(torch.cuda.current_stream(live[0][0].device))
        with self._lock:
            before, self._current = self._current, self._current + 1
            self._versions[self._current] = slot
            self._drop(before)
            return self._current

    def _take_slot(self, live: list[Matrices]) -> _Slot | None:
        with self._lock:
            if self._spare:
                return self._spare.pop()
            if self._made == self._slots:
                return None
            self._made += 1
            number = self._made
        with torch.inference_mode(False):
            return _Slot(number, [(torch.empty_like(a.detach()), torch.empty_like(b.detach())) for a, b in live])

    # -- decode thread -----------------------------------------------------------------------------------------------
    def pin(self, version: int | None = None) -> int:
        """Keep a version for a request.

        Args:
            version: Default: the current one, whatever is being published meanwhile.

        Returns:
            The version.

        Raises:
            ValueError: it is not kept any more.
        """
        with self._lock:
            version = self._current if version is None else version
            self._slot(version)
            self._pins[version] += 1
            return version

    def unpin(self, version: int) -> None:
        """Give a pin back; a version that is neither pinned nor current is dropped.

        Raises:
            ValueError: nobody pinned it.
        """
        with self._lock:
            if self._pins[version] < 1:
                raise ValueError(f"version {version} is not pinned: unpin once what was pinned")
            self._pins[version] -= 1
            slot = self._slot(version)
            device = slot.matrices[0][0].device
            if device.type == "cuda":
                slot.read = torch.cuda.Event()
                slot.read.record(torch.cuda.current_stream(device))
            self._drop(version)

    def signature(self, rows: Sequence[int | None]) -> tuple[int, ...] | None:
        """What a recording of a forward depends on besides shapes: the memory of the matrices.

        Args:
            rows: As in :meth:`activate`.

        Returns:
            Equal for equal memory; None for a mixed batch, whose row numbers a recording would freeze.
        """
        distinct = set(rows)
        if len(distinct) != 1:
            return None
        version = distinct.pop()
        with self._lock:
            return (0 if version is None else self._slot(version).number,)

    @contextmanager
    def activate(self, rows: Sequence[int | None]) -> Iterator[None]:
        """Let the forwards within use these versions.

        Args:
            rows: For each row of the batch a version that is pinned, or None for the base.

        Raises:
            ValueError: a version is not kept any more.
        """
        groups: list[tuple[Tensor | None, list[Matrices]]] = []
        distinct = dict.fromkeys(rows)
        device = self._layers[0].weight.device
        for version in distinct:
            if version is None:
                continue
            with self._lock:
                slot = self._slot(version)
            if slot.written is not None:
                torch.cuda.current_stream(device).wait_event(slot.written)
            numbers = None
            if len(distinct) > 1:
                numbers = torch.tensor([row for row, chosen in enumerate(rows) if chosen == version], device=device)
            groups.append((numbers, slot.matrices))
        self._route.rows, self._route.groups = len(rows), groups
        try:
            yield
        finally:
            self._route.groups = []

    # -- with the lock held ------------------------------------------------------------------------------------------
    def _slot(self, version: int) -> _Slot:
        if version not in self._versions:
            raise ValueError(f"version {version} of the adapter is not kept any more: pin it while it is current")
        return self._versions[version]

    def _drop(self, version: int) -> None:
        if version == self._current or self._pins[version] or version not in self._versions:
            return
        del self._pins[version]
        self._spare.append(self._versions.pop(version))
