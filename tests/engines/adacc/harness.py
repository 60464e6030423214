"""A model under a :class:`Runtime` with plans forced upon it, beside the same step in plain torch."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ygglight.engines.adacc.build import BuiltStep, build_step
from ygglight.engines.adacc.config import AdaccConfig
from ygglight.engines.adacc.frame import Frame, Handle
from ygglight.engines.adacc.graph import Action, Policy, RegionGraph
from ygglight.engines.adacc.plan import Plan, keep_all, recompute_all
from ygglight.engines.adacc.profiler import Profiler
from ygglight.engines.adacc.runtime import Runtime
from ygglight.engines.adacc.schedule import mask_of, masks_of, validate_policy
from ygglight.engines.adacc.shapes import bucket_of, shapes_of
from ygglight.engines.adacc.simulate import simulate_step
from ygglight.engines.memory.meter import LiveBytes

CPU = torch.device("cpu")
KEEP, COMPRESS, RECOMPUTE = Action.KEEP, Action.COMPRESS, Action.RECOMPUTE
Outcome = tuple[float, list[Tensor | None]]


class Session:
    """One model, one batch.

    Args:
        module: the model. batch: what its step takes.
        step: (module, batch) -> loss; default ``module.loss(batch)``.
        compress: offer codecs. context: entered around forward (autocast, say).
        inputs: further tensors whose gradients are compared.
    """

    def __init__(
        self,
        module: nn.Module,
        batch: Any,
        step: Callable[[Any, Any], Tensor] | None = None,
        *,
        compress: bool = False,
        root: bool = True,
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
        inputs: Sequence[Tensor] = (),
        budget: int | float | str = 1.0,
        **config: Any,
    ) -> None:
        self.module, self.batch, self.context, self.inputs = module, batch, context, list(inputs)
        self.loss_of = step or (lambda m, b: m.loss(b))
        self.runtime = Runtime(module, AdaccConfig(budget, compress=compress, **config), CPU, root=root)
        self.runtime.attach()
        self.compress = compress
        self.peak = 0
        self.built: BuiltStep | None = None
        self.profiler: Profiler | None = None

    # -- steps -----------------------------------------------------------------------------------------------------
    def leaves(self) -> list[Tensor]:
        return [p for p in self.module.parameters() if p.requires_grad] + self.inputs

    def plain(self, seed: int = 1, backward: Callable[[Tensor], Any] = Tensor.backward) -> Outcome:
        """The step in plain torch: the hooks are there, but no step is under way."""
        return self._run(nullcontext(), seed, backward)

    def managed(self, seed: int = 1, backward: Callable[[Tensor], Any] = Tensor.backward) -> Outcome:
        """The step inside the runtime."""
        return self._run(self.runtime.forward(self.batch), seed, backward)

    def _run(self, inside: AbstractContextManager[Any], seed: int, backward: Callable[[Tensor], Any]) -> Outcome:
        torch.manual_seed(seed)
        for leaf in self.leaves():
            leaf.grad = None
        buffers = {name: b.clone() for name, b in self.module.named_buffers()}
        with inside, self.context():
            loss = self.loss_of(self.module, self.batch)
        value = loss.item()
        backward(loss)
        del loss
        with torch.no_grad():
            for name, buffer in self.module.named_buffers():
                buffer.copy_(buffers[name])
        return value, [None if leaf.grad is None else leaf.grad.clone() for leaf in self.leaves()]

    def measured(self, run: Callable[[], Outcome]) -> Outcome:
        """``run()`` with its peak of live bytes in :attr:`peak`."""
        with LiveBytes(self.module.parameters()) as meter:
            outcome = run()
            self.peak = meter.peak
        return outcome

    # -- plans -----------------------------------------------------------------------------------------------------
    def profile(self, seed: int = 1, errors: Any = None) -> Outcome:
        """The first step, watched and fully recomputed; no plan is solved, :attr:`built` is set."""
        outcome = self.managed(seed)
        self.build(errors)
        return outcome

    def build(self, errors: Any = None) -> BuiltStep:
        """From a step that was just watched."""
        profiler, self.runtime._profiler = self.runtime._profiler, None
        self.runtime._study = None
        assert profiler is not None
        profiler.stop()
        profiler.check_rebuilt()
        self.profiler = profiler
        self.built = build_step(profiler, CPU, compress=self.compress, errors=errors)
        return self.built

    def plan(self, policies: Sequence[Policy], budget: int | None = None) -> Plan:
        assert self.built is not None
        plain = simulate_step(self.built.step, keep_all(self.built)).peak_bytes
        policies = tuple(policies)
        return Plan(self.built, policies, simulate_step(self.built.step, policies), budget, plain, 0.0)

    def use(self, policies: Sequence[Policy] | str) -> Plan:
        """Force policies, one per region instance ("keep" and "recompute": all)."""
        assert self.built is not None
        if isinstance(policies, str):
            policies = {"keep": keep_all, "recompute": recompute_all}[policies](self.built)
        for position, policy in enumerate(policies):
            validate_policy(self.built.step.instance(position), policy)
        plan = self.plan(policies)
        runtime = self.runtime
        runtime._plans = {bucket_of(shapes_of(self.batch)): (shapes_of(self.batch), plan)}
        runtime._due, runtime.plan = None, plan
        runtime._frames.clear()  # nor is anything left of an earlier plan to be surprised by
        return plan

    def diverged(self) -> list[str]:
        """Regions that left the plan in the last managed step."""
        return [frame.name for frame in self.runtime._frames if frame.diverged]

    def close(self) -> None:
        self.runtime.detach()


def prepared(module: nn.Module, batch: Any, *args: Any, **kwargs: Any) -> Session:
    """A session that has had its watched step."""
    session = Session(module, batch, *args, **kwargs)
    session.profile()
    return session


def random_policies(
    built: BuiltStep, rng: random.Random, actions: Sequence[Action] = (KEEP, RECOMPUTE), per_instance: bool = False
) -> list[Policy]:
    """Valid random policies, one per type or one per instance."""
    positions = range(len(built.step.sequence))
    if per_instance:
        return [random_policy(built.step.instance(p), rng, actions) for p in positions]
    kinds = [random_policy(graph, rng, actions) for graph in built.step.types]
    return [kinds[built.step.sequence[p]] for p in positions]


def random_policy(graph: RegionGraph, rng: random.Random, actions: Sequence[Action]) -> Policy:
    weights = [rng.random() + 0.05 for _ in actions]
    chosen = {v.id: KEEP for v in graph.actionable}
    codecs: dict[int, str] = {}
    for value in graph.actionable:
        action = rng.choices(actions, weights)[0]
        if value.pinned or (action is COMPRESS and not value.codecs):
            continue
        chosen[value.id] = action
        if action is COMPRESS:
            codecs[value.id] = rng.choice(value.codecs).name
    masks = masks_of(graph)
    while True:  # a recomputed value may hang on one that must not run twice: keep it then
        held = masks.leaf | mask_of(v for v, a in chosen.items() if a is not RECOMPUTE)
        again = [v for v, a in chosen.items() if a is RECOMPUTE]
        bad = [v for v in again if not all(graph.operators[op].replayable for op in masks.cut(1 << v, held)[0])]
        if not bad:
            break
        chosen.update(dict.fromkeys(bad, KEEP))
    policy = Policy(chosen, codecs)
    validate_policy(graph, policy)
    return policy


def single(built: BuiltStep, kind: int, value: int, action: Action, codec: str | None = None) -> list[Policy]:
    """Everything kept but one value of one type."""
    kinds = [Policy({v.id: KEEP for v in graph.actionable}) for graph in built.step.types]
    codecs = {} if codec is None else {value: codec}
    kinds[kind] = Policy({**kinds[kind].actions, value: action}, codecs)
    return [kinds[i] for i in built.step.sequence]


# -- comparing ---------------------------------------------------------------------------------------------------------
def same(a: Outcome, b: Outcome) -> bool:
    """Bitwise, None only where None."""
    return a[0] == b[0] and _same_all(a[1], b[1])


def _same_all(a: list[Tensor | None], b: list[Tensor | None]) -> bool:
    return len(a) == len(b) and all(
        (x is None and y is None) or (x is not None and y is not None and torch.equal(x, y))
        for x, y in zip(a, b, strict=True)
    )


def assert_exact(session: Session, policies: int = 6, actions: Sequence[Action] = (KEEP, RECOMPUTE)) -> None:
    """Watched, kept, recomputed and under random plans, the step is bitwise that of plain torch, without surprises."""
    truth = session.plain()
    assert same(session.plain(), truth), "plain torch is not deterministic itself"
    assert same(session.profile(), truth), "the watched step"
    rng = random.Random(0)
    plans: list[Any] = ["keep", "recompute"]
    plans += [random_policies(session.built, rng, actions, per_instance=i % 2 == 1) for i in range(policies)]
    for index, policies_ in enumerate(plans):
        session.use(policies_)
        with nothing_left() if index == 1 else nullcontext():
            outcome = session.managed()
        assert same(outcome, truth), f"plan {index}: off by {error(outcome, truth):.2g}"
        assert not session.diverged(), f"plan {index}: the same forward was taken for another"
    session.close()


def recomputed(session: Session) -> list[str]:
    """Slots that the plan in force recomputes."""
    return [name for name, action in session.runtime.plan.actions.items() if action == "recompute"]


def error(outcome: Outcome, truth: Outcome) -> float:
    """Relative error of the whole gradient."""
    pairs = [(x, y) for x, y in zip(outcome[1], truth[1], strict=True) if x is not None and y is not None]
    size = sum(float(y.double().square().sum()) for _, y in pairs)
    return (sum(float((x - y).double().square().sum()) for x, y in pairs) / size) ** 0.5


def cosine(outcome: Outcome, truth: Outcome) -> float:
    x, y = (torch.cat([g.flatten().double() for g in o[1] if g is not None]) for o in (outcome, truth))
    return float(x @ y / (x.norm() * y.norm()))


# -- what is left behind -----------------------------------------------------------------------------------------------
def handles() -> int:
    """Packed tensors that are alive, of those made since the last ``gc.freeze()``."""
    gc.collect()
    return sum(type(item) is Handle for item in gc.get_objects())


@contextmanager
def nothing_left() -> Iterator[None]:
    """Inside, no handle may come to stay, and no frame may hold on to tensors."""
    gc.freeze()  # what is there already need not be looked at
    try:
        yield
        assert handles() == 0, "packed tensors are still alive"
        for item in gc.get_objects():
            if type(item) is Frame:
                assert not item._store and not item._codes and not item._memo, f"{item.name} still holds tensors"
        assert torch._C._len_torch_dispatch_stack() == 0, "a dispatch mode is still on"
        assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None, "hooks are still on"
    finally:
        gc.unfreeze()
