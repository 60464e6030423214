"""Adacc at work: profile a step, plan, carry the plan out, and look again now and then.

Knows nothing of Lightning. Around every training step the caller does::

    with runtime.forward(batch):
        loss = ...
    loss.backward()
    runtime.after_backward()
    optimizer.step()
    runtime.after_optimizer_step()
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ygglight.compat.torch import storage_key
from ygglight.engines.adacc.build import build_step
from ygglight.engines.adacc.config import AdaccConfig
from ygglight.engines.adacc.evolution import Snapshot, reasons_to_replan, worth_adopting
from ygglight.engines.adacc.frame import Frame
from ygglight.engines.adacc.handles import RegionPlan
from ygglight.engines.adacc.plan import Plan
from ygglight.engines.adacc.planning import JointError, Planning
from ygglight.engines.adacc.profiler import Profiler
from ygglight.engines.adacc.regions import RegionSwitch, find_blocks
from ygglight.engines.adacc.shapes import Shapes, bucket_of, covers, shapes_of
from ygglight.engines.adacc.study import Study
from ygglight.engines.adacc.tape import Tape

log = logging.getLogger(__name__)

MAX_SURPRISES = 3
"""Times a forward may leave its plan before its shape is given up and recomputed without a plan."""


class Runtime:
    """See module docstring.

    Args:
        module: the model; its own code is not touched, its repeated blocks get forward hooks.
        config: what the user said.
        device: where it trains.
        root: whether code outside the blocks is managed too (not under manual optimization).
        agree: given this rank's plan, returns rank 0's (collective); None on a single device.

    Attributes:
        plan: the plan in force; None before the first backward.
        replans: how many plans were adopted after the first one.
        history: (optimizer step, reason) of every plan.
        surprises: forwards or backwards that left their plan.
        just_profiled: the last step was watched, and so fully recomputed.
        measured_peak: live bytes above state of a step under the plan in force, where somebody measured it.
    """

    def __init__(
        self,
        module: nn.Module,
        config: AdaccConfig,
        device: torch.device,
        *,
        root: bool = True,
        agree: Callable[[Any], Any] | None = None,
    ) -> None:
        self.module, self.config, self.device = module, config, device
        self.blocks = find_blocks(module)
        self.plan: Plan | None = None
        self.replans = 0
        self.history: list[tuple[int, str]] = []
        self.surprises = 0
        self.optimizer_steps = 0
        self.measured_peak: int | None = None
        self.just_profiled = False
        self.forced: dict[str, RegionPlan | None] | None = None
        self._root = root
        self._planning = Planning(module, config, device, agree)
        self._plans: dict[Shapes, tuple[Shapes, Plan]] = {}
        self._given_up: set[Shapes] = set()
        self._surprised: dict[Shapes, int] = {}
        self._due: str | None = "first micro-batch"
        self._snapshot: Snapshot | None = None
        self._switch = RegionSwitch(self)
        self._profiler: Profiler | None = None
        self._study: Study | None = None
        self._shapes: Shapes = ()
        self._state: set[int] = set()
        self._forwards = 0
        self._opened = 0
        self._fresh_step = True
        self._steps_before = 0
        self._frames: list[Frame] = []
        self._restored: dict[str, Any] | None = None
        self._plan_reason = ""

    # -- life ------------------------------------------------------------------------------------------------------
    def attach(self) -> None:
        """Hook the blocks."""
        self._switch.attach(self.blocks)

    def detach(self) -> None:
        """Leave no trace on the module; what autograd still holds stays readable."""
        self.abort()
        self._switch.detach()

    def abort(self) -> None:
        """Something was raised mid-step: stop listening."""
        self._switch.end()
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None
        self._study = None
        self._frames.clear()

    @property
    def skipped(self) -> dict[str, str]:
        """Blocks that could not be managed, and why."""
        return self._switch.skipped

    @property
    def profiler(self) -> Profiler | None:
        """What watches the step under way, if anything does."""
        return self._profiler

    @property
    def profiling(self) -> bool:
        """Whether the step under way is watched."""
        return self._profiler is not None

    # -- one step --------------------------------------------------------------------------------------------------
    @contextmanager
    def forward(self, batch: Any) -> Iterator[None]:
        """Around the forward pass of one micro-batch."""
        self._count_surprises()
        self.just_profiled = False
        self._shapes = shapes_of(batch)
        bucket = bucket_of(self._shapes)
        if bucket in self._given_up:
            self.plan = None
        else:
            self._choose_plan(bucket)
        self._state = {storage_key(t) for t in (*self.module.parameters(), *self.module.buffers()) if _plain_storage(t)}
        self._forwards += 1
        self._steps_before = self.optimizer_steps
        self._opened = 0
        self._switch.begin(root=self._root)
        outputs: list[Any] = []
        try:
            yield
        except BaseException as error:
            self.abort()
            if "saved tensor hooks" in str(error):
                error.add_note("adacc manages saved tensors by such hooks: pass enabled=False to train this model")
            raise
        self._switch.end(outputs)
        if self._profiler is not None:
            self._profiler.forward_over()

    def _choose_plan(self, bucket: Shapes) -> None:
        known = self._plans.get(bucket)
        if known is not None and not covers(known[0], self._shapes):
            known = None
        reason = "new batch shape" if known is None and self._plans else self._due if self._fresh_step else None
        if known is None or reason is not None:
            self._plan_reason = reason or "first micro-batch"
            self._start_profiling()
        if known is not None:
            self.plan = known[1]

    def _start_profiling(self) -> None:
        if self._profiler is not None:  # the last one never saw a backward
            self._profiler.stop()
        self._profiler = Profiler(self.module, self.device)
        self._study = Study(self, self.blocks) if self.config.compress else None
        self._profiler.start()

    def after_backward(self) -> None:
        """The backward of the last forward is over; the first time, this makes the plan.

        Raises:
            InfeasibleBudget: no plan fits the budget.
        """
        if self.optimizer_steps == self._steps_before:  # else it stepped inside the forward: manual optimization
            self._fresh_step = False
        profiler, study = self._profiler, self._study
        if profiler is None:
            return
        self._profiler = self._study = None
        self.just_profiled = True
        profiler.stop()
        if not any(trace.reads for trace in profiler.traces):
            return  # no backward happened: look again next time
        profiler.check_rebuilt()
        errors = study.run(profiler) if study is not None else {}
        self._make_plan(profiler, errors, None if study is None else study.joint)

    def after_optimizer_step(self) -> None:
        """The optimizer stepped: nothing saved is alive, plans may change."""
        self.optimizer_steps += 1
        self._fresh_step = True
        every = self.config.monitor_every
        if every and self.optimizer_steps % every == 0:
            self._due = f"look at step {self.optimizer_steps}"

    @contextmanager
    def listening(self) -> Iterator[list[Frame]]:
        """Blocks that run inside are regions (with ``forced`` plans), outside of any step; yields their frames."""
        outer, self._frames = self._frames, []
        self._switch.begin(root=False)
        try:
            yield self._frames
        finally:
            self._switch.end()
            self._frames = outer

    # -- planning --------------------------------------------------------------------------------------------------
    def _make_plan(
        self, profiler: Profiler, errors: dict[tuple[int, int, str], float] | None, joint: JointError | None
    ) -> None:
        bucket = bucket_of(self._shapes)
        known = self._plans.get(bucket)
        if errors is None and known is not None and covers(known[0], self._shapes):
            return  # a gradient that is not finite tells nothing: the plan stands, and the look is still due
        compress = self.config.compress and errors is not None
        built = build_step(profiler, self.device, compress=compress, errors=errors)
        snapshot = Snapshot.of(built)
        reason, self._due = self._plan_reason, None
        if known is not None and covers(known[0], self._shapes) and self._snapshot is not None:
            budget = known[1].budget_bytes
            causes = reasons_to_replan(self._snapshot, snapshot, self.measured_peak, budget, all_keep=known[1].all_keep)
            if self._surprised.get(bucket):
                causes.append("the forward left its plan")
            if not causes:
                return
            reason = "; ".join(causes)
        state, self._restored = self._restored, None
        resumed = None if state is None else self._planning.resume(built, state)
        if resumed is not None:
            self._plans[bucket], self.plan = (self._shapes, resumed), resumed
            self._snapshot = Snapshot.from_dict(state["snapshot"]) if state and state["snapshot"] else snapshot
            return
        plan = self._planning.make(built, len(self.history) + 1, reason, joint)
        if known is not None and not worth_adopting(known[1], plan, self.config.error_budget):
            return
        self._snapshot = snapshot
        self._plans[bucket] = (self._shapes, plan)
        self.replans += bool(self.history)
        self.history.append((self.optimizer_steps, reason))
        self.plan = plan
        log.info("adacc plan v%d (%s)\n%s", plan.version, reason, plan.table())

    def _count_surprises(self) -> None:
        left = [frame.name for frame in self._frames if frame.diverged]
        self._frames.clear()
        if not left:
            return
        self.surprises += 1
        bucket = bucket_of(self._shapes)
        self._surprised[bucket] = self._surprised.get(bucket, 0) + 1
        if self._surprised[bucket] > MAX_SURPRISES and bucket not in self._given_up:
            self._given_up.add(bucket)
            warnings.warn(
                f"adacc: the forward of {left[0]} keeps changing for one batch shape, so it is recomputed without a "
                "plan from now on (results are right; memory is low, time is that of full recomputation)",
                stacklevel=2,
            )
        elif self._due is None:
            self._due = f"{left[0]} left its plan"

    # -- director of the regions -------------------------------------------------------------------------------------
    def open_frame(self, name: str, module: nn.Module | None, inputs: Any) -> Frame | None:
        """See :class:`~ygglight.engines.adacc.regions.Director`."""
        self._opened += 1
        profiler = self._profiler
        region: RegionPlan | None = None
        if self.forced is not None:
            region = self.forced.get(name)
        elif profiler is None:
            region = self.plan.regions.get(name, _UNKNOWN) if self.plan is not None else _UNKNOWN  # type: ignore
        if region is None and (profiler is None or self.forced is not None):
            return None
        seed = hash((self.config.seed, self._forwards, self._opened)) & 0x7FFFFFFF
        if region is not None and region is not _UNKNOWN and not region.needs_tape:
            frame = Frame(name, region, None, seed)
        else:
            tape = Tape(self._is_state)
            known = None if region is _UNKNOWN else region
            frame = Frame(name, known, tape, seed, observer=profiler if self.forced is None else None)
            if region is _UNKNOWN:
                frame.diverged = self.plan is not None  # a region that the plan has never heard of
            elif profiler is not None and self.forced is None:
                profiler.opened(name, module, frame)
                if self._study is not None and module is not None:
                    self._study.opened(len(profiler.traces) - 1, name, module, inputs)
        if profiler is None:
            self._frames.append(frame)
        return frame

    def frame_closed(self, name: str, frame: Frame | None, outputs: Any) -> None:
        """See :class:`~ygglight.engines.adacc.regions.Director`."""
        if self._profiler is not None and self.forced is None and frame is not None:
            self._profiler.closed(frame)
            if self._study is not None:
                self._study.closed(name, outputs)

    def _is_state(self, tensor: Tensor) -> bool:
        return isinstance(tensor, nn.Parameter) or storage_key(tensor) in self._state

    # -- checkpoints -------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """Plans and statistics as plain values."""
        plan = self.plan
        return {
            "optimizer_steps": self.optimizer_steps,
            "forwards": self._forwards,
            "replans": self.replans,
            "history": [list(item) for item in self.history],
            "plan": None if plan is None else plan.to_dict(),
            "policies": {} if plan is None else plan.policies_dict(),
            "snapshot": None if self._snapshot is None else self._snapshot.to_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue: counters now, the stored plan once the first micro-batch has shown that it still applies."""
        self.optimizer_steps = int(state["optimizer_steps"])
        self._forwards = int(state["forwards"])
        self.replans = int(state["replans"])
        self.history = [(int(step), str(reason)) for step, reason in state["history"]]
        self._restored = state


_UNKNOWN: Any = object()


def _plain_storage(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
