"""One call of a region between its forward and its backward: what autograd saved, and how each piece comes back.

A frame is autograd's packing partner for one region call. In forward every saved tensor becomes a small
:class:`Handle`; what the handle stands for is kept, compressed, or dropped and later run again from the tape. In
backward the frame follows the plan's schedule as long as autograd reads in the planned order, and finds its way by
itself when it does not (same values, more memory).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import Tensor

from ygglight.compat.torch import retains_graph, storage_key, version_of
from ygglight.engines.adacc.graph import Action
from ygglight.engines.adacc.handles import (
    MUTATED,
    OVERWRITTEN,
    Handle,
    Opaque,
    RegionPlan,
    version_sentinel,
    whole_storage,
)
from ygglight.engines.adacc.replay import ancestors, is_rebuildable, replaying, run_again
from ygglight.engines.adacc.tape import Ref, Tape, clone_storage
from ygglight.engines.memory.meter import is_plain, tensors_in
from ygglight.kernels.act_codec import Packed, is_mask, pack, unpack
from ygglight.kernels.act_codec.spec import AFFINE_DTYPES, MASK_DTYPES


class Frame:
    """See module docstring.

    Args:
        name: of the region instance, for messages.
        plan: what to do; None recomputes all that can be (profiling, or a forward that no plan knows).
        tape: the tape of this call; None for a plan that recomputes nothing.
        seed: of the stochastic rounding; differs between steps, micro-batches and instances.
        is_state: storage key -> whether it is a parameter or buffer.
        observer: told of every save, read and rebuilt value (profiling).

    Attributes:
        diverged: forward or backward left the plan; the results are right, the plan's memory promise is not.
    """

    def __init__(
        self,
        name: str,
        plan: RegionPlan | None,
        tape: Tape | None,
        seed: int = 0,
        is_state: Callable[[Tensor], bool] = lambda _: False,
        observer: Any = None,
    ) -> None:
        self.name, self.plan, self.tape, self.seed = name, plan, tape, seed
        self._is_state, self._observer = is_state, observer
        self.diverged = False
        self._static = plan is not None
        self._checked = 0
        self._saved = 0
        self._tick = 0
        self._store: dict[int, Tensor] = {}
        self._codes: dict[int, Packed] = {}
        self._code_views: dict[int, Tensor] = {}
        self._memo: dict[int, Tensor] = {}
        self._by_key: dict[int, int] = {}
        self._held_tensors: dict[int, int] = {}
        self._alive: dict[int, int] = {}
        self._pending: set[int] = set()
        self._saved_values: set[int] = set()
        self._closed = False
        self._base_versions: dict[int, int] = {}
        if plan is not None and tape is not None:
            tape.wanted = plan.bases

    # -- forward ---------------------------------------------------------------------------------------------------
    def save(self, tensor: Tensor) -> Handle | Opaque:
        """Autograd's pack hook."""
        if not is_plain(tensor):
            return Opaque(tensor.detach())
        slot = self._saved
        self._saved += 1
        if self.tape is not None:
            value = self.tape.value_of(tensor)
            action = self._action_on_tape(value)
        else:
            value, action = self._action_by_order(slot, tensor)
        if action is Action.COMPRESS and not self._fits(value, tensor):
            self._leave_plan()  # another tensor than the one that was planned for
            action = Action.KEEP
        if action is Action.KEEP:
            # An operator's saved output knows the operator: held as it is, neither would ever die without a backward.
            watched = tensor.detach() if tensor.grad_fn is not None else tensor
            self._store.setdefault(value, watched)
            self._held_tensors[value] = self._held_tensors.get(value, 0) + 1
        else:
            watched = version_sentinel(tensor)
            if action is Action.COMPRESS and value not in self._codes:
                self._compress(value, tensor)
        if self.tape is not None:
            self.tape.early.pop(value, None)
        ref = Ref(value, tensor.size(), tensor.stride(), int(tensor.storage_offset()), tensor.dtype)
        self._saved_values.add(value)
        self._alive[slot] = value
        self._pending.add(slot)
        if self._observer is not None:
            self._observer.saved(self, slot, value, action, tensor)
        return Handle(self, slot, value, ref, watched)

    def _action_on_tape(self, value: int) -> Action:
        tape, plan = self.tape, self.plan
        assert tape is not None
        if plan is not None and not self.diverged:
            seen = len(tape.signature)
            if tape.signature[self._checked : seen] != plan.signature[self._checked : seen]:
                self._leave_plan()
            self._checked = seen
        traced = tape.values[value]
        if traced.producer is None or traced.state:
            return Action.KEEP
        if plan is not None and not self.diverged:
            action = plan.policy.actions.get(value)
            if action is not None:
                return action
            self._leave_plan()
        # An operator that runs right now is not on the tape yet: its inputs are, and they decide.
        at_hand = (self._store, self._codes, tape.early)
        return Action.RECOMPUTE if is_rebuildable(tape, value, *at_hand) else Action.KEEP

    def _action_by_order(self, slot: int, tensor: Tensor) -> tuple[int, Action]:
        """Without a tape a saved tensor is known by its turn; storages must repeat exactly where the plan says."""
        plan, key = self.plan, storage_key(tensor)
        assert plan is not None
        if not self.diverged and slot < len(plan.slots):
            value = plan.slots[slot]
            if value not in self._saved_values:  # a dead storage's address may come again: the later one counts
                self._by_key[key] = value
            if self._by_key.get(key) == value:
                return value, plan.policy.actions.get(value, Action.KEEP)
        self._leave_plan()
        return -1 - slot, Action.KEEP

    def _leave_plan(self) -> None:
        self.diverged = True
        self._static = False

    def _fits(self, value: int, tensor: Tensor) -> bool:
        """Whether ``tensor`` can be what the plan compresses there; without a tape nothing else vouches for it."""
        assert self.plan is not None
        if value in self._codes:
            return True
        mask = self.plan.specs[value].name == "mask"
        if tensor.dtype not in (MASK_DTYPES if mask else AFFINE_DTYPES):
            return False
        return not mask or self.tape is not None or tensor.dtype is torch.bool or is_mask(whole_storage(tensor))

    def _compress(self, value: int, tensor: Tensor) -> None:
        assert self.plan is not None
        self._codes[value] = pack(whole_storage(tensor), self.plan.specs[value], self.seed * 4099 + value)

    def close(self, outputs: Any) -> None:
        """The region's forward is over: hold what a replay will need, let go of the rest."""
        if self._closed:
            return
        self._closed = True
        tape, plan = self.tape, self.plan
        self._by_key.clear()
        if not self._alive:
            self._clear()
            return
        if tape is None:
            if plan is not None and self._saved != len(plan.slots):
                self._leave_plan()
            return
        if plan is not None and not self.diverged and tape.signature != plan.signature:
            self._leave_plan()
        for tensor in tensors_in(outputs):
            # Alive for as long as the caller wants it, and maybe overwritten by it: hold it, watch its version.
            if is_plain(tensor):
                value = tape.known(tensor)
                if value is not None and value in self._saved_values and value not in self._store:
                    self._store[value] = tensor.detach()
                    self._held_tensors[value] = 1
                    self._base_versions[value] = version_of(tensor)
        if self._static and plan is not None:
            needed: Iterable[int] = plan.schedule.leaves
        else:
            needed = self._dynamic_leaves()
        if not self._static:  # what was to be saved later, and then was not, may be all that others are made from
            for value, tensor in tape.early.items():
                if value not in self._codes and not tape.values[value].superseded:
                    self._base_versions[value] = version_of(self._store.setdefault(value, tensor))
        for value in needed:
            if value in tape.leaves:
                if tape.values[value].superseded:  # the copy made before it was overwritten
                    self._store[value] = tape.leaves[value]
                leaf = self._store.setdefault(value, tape.leaves[value])
                self._base_versions[value] = version_of(leaf)
        tape.early.clear()
        tape.forget_leaves(())

    def protect(self, key: int) -> set[int]:
        """A storage is about to be overwritten: copy what replays need of it.

        Returns:
            The values that were copied.
        """
        found = {v for v in self._base_versions if v in self._store and storage_key(self._store[v]) == key}
        for value in found:
            self._store[value] = clone_storage(self._store[value])
            self._base_versions[value] = version_of(self._store[value])
        return found

    def holds(self, value: int) -> tuple[Tensor, int] | None:
        """The tensor stored for ``value`` and how many tensors of ours share its storage; None when not stored."""
        tensor = self._store.get(value)
        return None if tensor is None else (tensor, self._held_tensors.get(value, 1))

    # -- backward --------------------------------------------------------------------------------------------------
    def read(self, handle: Handle) -> Tensor:
        """Autograd's unpack hook."""
        value = handle.value
        self._check_version(handle)
        if self._observer is not None:
            self._observer.reading(self, handle.slot)
        if not self._closed:  # backward inside the forward: what is to come is not known yet
            self._static = False
        base = self._store.get(value)
        if self._static:
            base = self._read_planned(handle, base)
        if base is None:
            base = self._materialise(value)
        self._pending.discard(handle.slot)
        tensor = handle.ref.view(base)
        if self._observer is not None:
            self._observer.read(self, handle.slot, tensor)
        return tensor

    def _read_planned(self, handle: Handle, base: Tensor | None) -> Tensor | None:
        plan = self.plan
        assert plan is not None
        tick = self._tick
        if tick >= len(plan.reads) or plan.reads[tick] != handle.slot:
            self._leave_plan()  # another order, or a second backward over a retained graph
            return base if base is not None else self._memo.get(handle.value)
        self._tick = tick + 1
        if tick and plan.reads[tick - 1] in self._alive and retains_graph():
            self._release(tick - 1)
        todo = plan.schedule.ticks[tick]
        for value in todo.unpack:
            self._memo[value] = unpack(self._codes[value])
        if todo.replay:
            with replaying():
                for step in todo.replay:
                    self._run(step.op, step.bind, step.free_after)
                    for value in step.free_after:
                        self._memo.pop(value, None)
        return base if base is not None else self._memo.get(handle.value)

    def _materialise(self, value: int) -> Tensor:
        """Find the way to ``value`` without a schedule."""
        base = self._memo.get(value)
        if base is not None:
            return base
        unpacks, operators = self._closure(value)
        for code in unpacks:
            self._memo[code] = unpack(self._codes[code])
        steps = [] if self.tape is None else self.tape.steps
        for index in operators:
            if not steps[index].replayable:
                raise RuntimeError(
                    f"adacc: the forward of {self.name} left its plan after it had dropped a tensor that only "
                    f"{steps[index].func} could make, which must not run twice. Pass enabled=False"
                )
        made = {v for index in operators for v in steps[index].outputs}
        last = {v: index for index in operators for v in (*steps[index].inputs, *steps[index].outputs)}
        keep = self._wanted_of(made) | {value}
        with replaying():
            for index in operators:
                done = [v for v in made if last[v] == index and v not in keep]
                self._run(index, [v for v in steps[index].outputs if v not in self._store], done)
                for v in done:
                    self._memo.pop(v, None)
        if operators:
            self._forget_unneeded(value)
        return self._memo[value]

    def _wanted_of(self, made: set[int]) -> set[int]:
        """Of the values that are about to be made, those that what is still to be read builds on."""
        wanted: set[int] = set()
        for slot in self._pending:
            wanted |= made & ancestors(self.tape, self._alive[slot], self._store, self._codes, self._memo, made)
        return wanted

    def _run(self, index: int, bind: Collection[int], stealable: Collection[int] = ()) -> None:
        assert self.tape is not None
        step = self.tape.steps[index]
        run_again(step, bind, self._base, self._memo, stealable)
        if self._observer is not None:
            self._observer.rebuilt(self, step, [(v, self._memo[v]) for v in bind if v in self._memo])

    def _base(self, value: int) -> Tensor:
        base = self._memo.get(value)
        if base is None:
            base = self._store.get(value)
            known = self._base_versions.get(value)
            if base is not None and known is not None and known != version_of(base):
                raise RuntimeError(OVERWRITTEN.format(region=self.name, shape=tuple(base.shape), dtype=base.dtype))
        if base is None and self.tape is not None and not self._closed:
            base = self.tape.leaves.get(value, self.tape.early.get(value))
        if base is None:
            raise RuntimeError(f"value {value} of {self.name} is needed to run an operator again, but is gone")
        return base

    def _check_version(self, handle: Handle) -> None:
        if handle.watched._version != handle.version:
            shape = tuple(handle.ref.size)
            raise RuntimeError(MUTATED.format(shape=shape, dtype=handle.ref.dtype, region=self.name))

    # -- letting go ------------------------------------------------------------------------------------------------
    def _dropped(self, handle: Handle) -> None:
        self._alive.pop(handle.slot, None)
        self._pending.discard(handle.slot)
        if not self._closed:
            return  # what is left of the forward may still need it
        if not self._alive:
            self._clear()
        elif self._static and self._tick and self.plan is not None and self.plan.reads[self._tick - 1] == handle.slot:
            self._release(self._tick - 1)
        elif self._static and self.plan is not None:
            self._release_read(handle.slot)
        else:
            self._forget_unneeded(None)

    def _clear(self) -> None:
        for held in (self._store, self._codes, self._memo):
            held.clear()  # type: ignore[attr-defined]
        self.tape = None

    def _release_read(self, slot: int) -> None:
        """Of several tensors read by one node, all but the last are let go when their own handles die."""
        assert self.plan is not None
        reads = self.plan.reads
        for tick in range(self._tick - 1, max(-1, self._tick - 9), -1):
            if reads[tick] == slot:
                self._release(tick)
                return

    def _release(self, tick: int) -> None:
        assert self.plan is not None
        keep_graph = retains_graph()
        for value in self.plan.schedule.ticks[tick].release:
            self._memo.pop(value, None)
            if not keep_graph:
                self._store.pop(value, None)
                self._codes.pop(value, None)

    def _forget_unneeded(self, in_use: int | None) -> None:
        """Without a schedule: hold what the handles that are still alive can come to need."""
        if not self._closed:  # what is left of the forward may still need it
            return
        wanted: set[int] = set() if in_use is None else {in_use}
        stored: set[int] = set()
        retained = retains_graph()
        for slot, value in self._alive.items():
            if slot in self._pending and not retained:
                if value in self._memo:
                    wanted.add(value)
                    continue
                seen = ancestors(self.tape, value, self._store, self._codes, self._memo)
                wanted |= seen
                stored |= seen
            else:  # it may be read again, because the graph is retained
                if slot in self._pending and value in self._memo:
                    wanted.add(value)
                stored |= ancestors(self.tape, value, self._store, self._codes)
        self._memo = {v: t for v, t in self._memo.items() if v in wanted}
        self._store = {v: t for v, t in self._store.items() if v in stored or v in wanted}
        self._codes = {v: c for v, c in self._codes.items() if v in stored or v in wanted}

    def _dynamic_leaves(self) -> set[int]:
        have = (self._store, self._codes, self._memo)
        return set().union(*(ancestors(self.tape, value, *have) for value in self._alive.values()))

    def _closure(self, value: int) -> tuple[list[int], list[int]]:
        """Codes to unpack and operators to run, in forward order, to have ``value``."""
        tape = self.tape
        unpacks, operators = [], set()
        for current in ancestors(self.tape, value, self._store, self._codes, self._memo):
            if current in self._memo or current in self._store:
                continue
            if current in self._codes:
                unpacks.append(current)
            elif tape is not None and tape.values[current].producer is not None:
                operators.add(tape.values[current].producer)
        return unpacks, sorted(index for index in operators if index is not None)
