"""How much does compressing a tensor perturb the gradient? Measured, on the model's own activations.

After the backward of a profiled step, when nothing saved is alive any more, a few blocks of every type run forward and
backward again by themselves: once exactly, then once per (saved tensor, codec) with just that tensor compressed. The
difference in the gradients of the block's parameters and input, weighed by the gradient of the whole model, is the
codec's error. The model's own step is not repeated, its random state and buffers are put back.

Those errors are added up to choose a plan. They need not add: two codecs may err the same way, and what is recomputed
from a decoded tensor errs too. So a chosen plan is carried out on the same blocks once more, all of it at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ygglight.engines.adacc.build import MIN_BYTES, BuiltStep, build_step, kind_keys
from ygglight.engines.adacc.codecs import SPECS
from ygglight.engines.adacc.graph import Action, Policy
from ygglight.engines.adacc.handles import RegionPlan
from ygglight.engines.adacc.plan import region_plan
from ygglight.engines.memory.meter import is_plain, tensors_in

if TYPE_CHECKING:
    from ygglight.engines.adacc.profiler import Profiler
    from ygglight.engines.adacc.runtime import Runtime

SAMPLES = 3
"""Blocks looked at per type: the first, the middle and the last."""
RESERVE = 2.0
"""Taken as joint over added error where it could not be measured; 1.06 to 1.8 was seen on blocks with outliers."""


_Gradients = tuple[list[Tensor | None], list[Tensor | None]]
"""Of a block's parameters, and of its inputs."""


@dataclass(eq=False)
class _Sample:
    """One block call, as it was in the profiled step."""

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    autocast: tuple[bool, torch.dtype]
    random_state: Tensor
    output_gradients: dict[int, Tensor] = field(default_factory=dict)


class Study:
    """Collects block calls during a profiled step and, after it, measures codec errors on them.

    Args:
        runtime: whose regions are forced during the measurement.
        blocks: the repeated blocks by name.
    """

    def __init__(self, runtime: Runtime, blocks: dict[str, nn.Module]) -> None:
        self._runtime = runtime
        names = list(blocks)
        self._wanted: set[str] = set()
        classes: dict[type, list[str]] = {}
        for name in names:
            classes.setdefault(type(blocks[name]), []).append(name)
        for members in classes.values():
            picks = {0, len(members) // 2, len(members) - 1} if SAMPLES == 3 else {0}
            self._wanted.update(members[i] for i in picks)
        self._samples: dict[int, _Sample] = {}
        self._by_name: dict[str, _Sample] = {}
        self._shares: list[tuple[float, float]] = []
        """Per trace, shares of the gradient's squared norm: its own parameters', and that of all its input reaches."""

    # -- during the profiled forward ---------------------------------------------------------------------------------
    def opened(self, trace: int, name: str, module: nn.Module, inputs: Any) -> None:
        """A block's forward starts."""
        if name not in self._wanted or _is_sharded(module):
            return
        args, kwargs = inputs
        kind = self._runtime.device.type
        args, kwargs = pytree.tree_map_only(Tensor, self._hold, (args, kwargs))
        random_state = torch.cuda.get_rng_state(self._runtime.device) if kind == "cuda" else torch.get_rng_state()
        autocast = (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        sample = _Sample(name, module, args, kwargs, autocast, random_state)
        self._samples[trace] = self._by_name[name] = sample

    def closed(self, name: str, outputs: Any) -> None:
        """Its forward is over: backward will tell the gradient of what it returned."""
        sample = self._by_name.get(name)
        if sample is None:
            return
        for index, tensor in enumerate(tensors_in(outputs)):
            if tensor.requires_grad and is_plain(tensor):
                tensor.register_hook(self._keeper(sample, index))

    def _hold(self, tensor: Tensor) -> Tensor:
        if not tensor.requires_grad or isinstance(tensor, nn.Parameter):
            return tensor.detach()
        return self._copied(tensor).requires_grad_(True)

    def _copied(self, tensor: Tensor) -> Tensor:
        # A copy, so that what the study holds can be told from what the step holds, and taken out of the profile.
        copy = tensor.detach().clone()
        if self._runtime.profiler is not None:
            self._runtime.profiler.leave_out(copy)
        return copy

    def _keeper(self, sample: _Sample, index: int) -> Any:
        def hook(gradient: Tensor) -> None:
            sample.output_gradients[index] = self._copied(gradient)

        return hook

    # -- after the profiled backward ---------------------------------------------------------------------------------
    def run(self, profiler: Profiler) -> dict[tuple[int, int, str], float] | None:
        """(type index, value id, codec) -> squared relative error of the whole gradient caused by one instance.

        None when the gradient was not finite: nothing can be said of its error.
        """
        samples = self._samples = {t: s for t, s in self._samples.items() if s.output_gradients}
        if not samples:
            return {}
        built = build_step(profiler, self._runtime.device, compress=True)
        keys = kind_keys(profiler)
        kinds = {key: position for position, key in enumerate(dict.fromkeys(keys))}
        norms = _gradient_norms(self._runtime.module, self._runtime.blocks, profiler.traces[0].name)
        total = sum(norms.values())
        if not math.isfinite(total):  # an overflowed fp16 step, say
            return None
        # A block that is called again has the same parameters, and so their share, each time.
        names = [t.name if t.module is None else t.name.partition("@")[0] for t in profiler.traces]
        shares = [norms.get(name, 0.0) / total for name in names] if total else []
        self._shares = [(share, sum(shares[:i])) for i, share in enumerate(shares)] or [(1.0, 0.0)] * len(keys)
        found: dict[tuple[int, int, str], list[float]] = {}
        for trace, sample in samples.items():
            index = kinds[keys[trace]]
            graph = built.kinds[index].graph
            exact, _ = self._gradients(sample, None)
            for value in graph.actionable:
                for codec in value.codecs:
                    if codec.error == 0 or value.nbytes < MIN_BYTES:
                        continue
                    actions = {v.id: Action.KEEP for v in graph.actionable} | {value.id: Action.COMPRESS}
                    forced = region_plan(built, index, Policy(actions, {value.id: codec.name}))
                    assert forced is not None and forced.specs[value.id] == SPECS[codec.name]
                    gradients, diverged = self._gradients(sample, forced)
                    if not diverged:
                        error = self._share_of(trace, _errors(exact, gradients))
                        found.setdefault((index, value.id, codec.name), []).append(error)
        return {key: sum(errors) / len(errors) for key, errors in found.items()}

    def joint(self, built: BuiltStep, policies: Sequence[Policy]) -> float:
        """Squared relative error of the whole gradient under a plan, all its codecs and replays at work together.

        Together within a block; blocks draw their rounding from different random numbers, and their errors are added.
        The nearest sample of its type stands for a block. Where there is none, or it leaves the plan when run by
        itself, the added errors of the codecs are taken (of a block ``RESERVE`` squared times; the constant for code
        outside the blocks holds that reserve already).

        Args:
            built: the step, with the errors that :meth:`run` measured.
            policies: per region instance, in forward order; equal ones are the same object.
        """
        sequence, total = built.step.sequence, 0.0
        members: dict[int, list[int]] = {}  # sample -> positions that it stands for
        for position, policy in enumerate(policies):
            added = _added(built, position, policy)
            near = [trace for trace in self._samples if sequence[trace] == sequence[position]]
            if added and near:
                members.setdefault(min(near, key=lambda trace: abs(trace - position)), []).append(position)
            else:
                total += added
        for trace, positions in members.items():
            sample = self._samples[trace]
            exact, _ = self._gradients(sample, None)
            found: dict[int, tuple[float, float] | None] = {}
            for position in positions:
                policy = policies[position]
                if id(policy) not in found:
                    gradients, diverged = self._gradients(sample, region_plan(built, sequence[trace], policy))
                    found[id(policy)] = None if diverged else _errors(exact, gradients)
                errors = found[id(policy)]
                if errors is None:
                    total += RESERVE**2 * _added(built, position, policy)
                else:
                    total += self._share_of(position, errors)
        return total

    def _share_of(self, trace: int, errors: tuple[float, float]) -> float:
        """What squared relative errors of a block's parameter and input gradients are of the whole gradient."""
        own, earlier = self._shares[trace]
        return errors[0] * own + errors[1] * earlier

    def _gradients(self, sample: _Sample, forced: RegionPlan | None) -> tuple[_Gradients, bool]:
        """Gradients of the block's parameters and of its inputs with ``forced`` carried out, and whether it was not."""
        runtime = self._runtime
        args, kwargs = pytree.tree_map_only(Tensor, _leafed, (sample.args, sample.kwargs))
        inputs = [t for t in tensors_in((args, kwargs)) if t.requires_grad]
        parameters = [p for p in sample.module.parameters() if p.requires_grad]
        with _undisturbed(sample, runtime.device), torch.enable_grad():
            runtime.forced = {sample.name: forced}
            try:
                enabled, dtype = sample.autocast
                autocast = torch.autocast(runtime.device.type, enabled=enabled, dtype=dtype)
                with autocast, runtime.listening() as frames:
                    output = sample.module(*args, **kwargs)
            finally:
                runtime.forced = None
            diverged = any(frame.diverged for frame in frames)  # another order in backward changes no value
            outputs = list(tensors_in(output))
            pairs = [(outputs[i], g) for i, g in sample.output_gradients.items() if i < len(outputs)]
            gradients = torch.autograd.grad(
                [o for o, _ in pairs], parameters + inputs, [g for _, g in pairs], allow_unused=True
            )
        return (list(gradients[: len(parameters)]), list(gradients[len(parameters) :])), diverged


def _leafed(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad)


def _is_sharded(module: nn.Module) -> bool:
    return any(type(p) is not nn.Parameter for p in module.parameters())


def _gradient_norms(module: nn.Module, blocks: dict[str, nn.Module], first: str) -> dict[str, float]:
    """Squared gradient norm per block, and of everything else under the name ``first``."""
    norms: dict[str, float] = {}
    seen: set[int] = set()
    for name, block in (*blocks.items(), (first, module)):
        mine = [p.grad for p in block.parameters() if p.grad is not None and id(p) not in seen]
        seen.update(id(p) for p in block.parameters())
        norms[name] = norms.get(name, 0.0) + sum(float(torch.linalg.vector_norm(g)) ** 2 for g in mine)
    return norms


def _added(built: BuiltStep, position: int, policy: Policy) -> float:
    """Summed squared errors of the codecs of one instance."""
    values = built.step.instance(position).values
    return sum(c.error for v, name in policy.codecs.items() for c in values[v].codecs if c.name == name)


def _errors(exact: _Gradients, other: _Gradients) -> tuple[float, float]:
    """Squared relative errors of parameter and of input gradients."""
    found = []
    for a, b in zip(exact, other, strict=True):
        pairs = [(x.float(), y.float()) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
        size = sum(float((x**2).sum()) for x, _ in pairs)
        found.append(sum(float(((x - y) ** 2).sum()) for x, y in pairs) / size if size else 0.0)
    return found[0], found[1]


@contextmanager
def _undisturbed(sample: _Sample, device: torch.device) -> Iterator[None]:
    """The random state of the sample inside, that of before outside; buffers as they were."""
    buffers = [(b, b.clone()) for b in sample.module.buffers()]
    cuda = device.type == "cuda"
    before = torch.cuda.get_rng_state(device) if cuda else torch.get_rng_state()
    try:
        torch.cuda.set_rng_state(sample.random_state, device) if cuda else torch.set_rng_state(sample.random_state)
        yield
    finally:
        torch.cuda.set_rng_state(before, device) if cuda else torch.set_rng_state(before)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
