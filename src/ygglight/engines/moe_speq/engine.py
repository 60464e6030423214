"""Experts on demand for one model: who has them, what the memory is spent on, and what was learnt, text after text."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ygglight.engines.decode import Decoder
from ygglight.engines.decode.processors import NodeProcessors
from ygglight.engines.decode.stopping import Stopping
from ygglight.engines.memory.sizes import format_bytes
from ygglight.engines.moe_speq.acceptance import ChainDrawing
from ygglight.engines.moe_speq.ahead import Ahead
from ygglight.engines.moe_speq.attach import Attachment
from ygglight.engines.moe_speq.budget import Split, split_budget
from ygglight.engines.moe_speq.calibration import measure_machine
from ygglight.engines.moe_speq.config import Config
from ygglight.engines.moe_speq.estimates import HOPE, Outlook
from ygglight.engines.moe_speq.governor import Cycle, Governor
from ygglight.engines.moe_speq.layout import find_sites
from ygglight.engines.moe_speq.link import open_link
from ygglight.engines.moe_speq.loop import Loop, Round
from ygglight.engines.moe_speq.machine import candidates, widths
from ygglight.engines.moe_speq.report import Report
from ygglight.engines.moe_speq.runtime import Runtime
from ygglight.engines.moe_speq.stores import DiskStore, ExpertStore, store_for

log = logging.getLogger(__name__)

CONTEXT_GRAIN = 512
"""The KV cache grows in steps of so many tokens."""


class Engine:
    """Runs one model with its routed experts elsewhere.

    From :meth:`attach` to :meth:`detach` every forward of the model brings its experts as it needs them, whoever calls
    it; :meth:`generate` speculates besides. With a fixed k there is a draft from the beginning. With ``k="auto"`` all
    memory is slots at first, and a draft takes the place of some while that promises to be faster.

    Args:
        model: A transformers model of a mixture of experts. config: What the user said.
        store: Where the experts are; None: they are moved off the model, by ``config``, and given back by detach.
        draft: What drafts (see :class:`draft.DraftExperts`); None: made from the experts when it is needed, if there is
            room for it. One that is given is kept for later while it does not draft, and its memory is the caller's.

    Raises:
        ValueError: the model cannot be run so, or the budget is too small; the text says how much is needed.
    """

    def __init__(self, model: Any, config: Config, *, store: ExpertStore | None = None, draft: Any = None) -> None:
        self.model, self.config = model, config
        self.sites = find_sites(model)
        self._home: torch.device = model.device
        self.device = torch.device(config.device) if config.device is not None else self._home
        self.store = store
        self.draft: Any = None
        self._given = draft
        self._owns_store = store is None
        if store is not None and store.layout != self.sites[0].layout:
            raise ValueError(
                f"the experts were opened as {store.layout.dtype} and the model is {self.sites[0].layout.dtype} by "
                "now: load it with the dtype that it shall run in, and leave the Trainer's precision out"
            )
        self.split: Split = self._split()
        self.runtime: Runtime | None = None
        self.decoder: Decoder | None = None
        self.governor: Governor | None = None
        self._attachment = Attachment()
        self._report = Report()
        self._ahead: Ahead | None = None
        self._seen: dict[str, int] = {}
        self._told: tuple[Counter[str], Counter[str]] = (Counter(), Counter())

    def _split(self) -> Split:
        layout = self.sites[0].layout
        wanted = 0
        if self.config.most and self._given is not None:
            wanted = self._given.nbytes
        elif self.config.most:
            from ygglight.engines.moe_speq.draft import draft_bytes

            wanted = draft_bytes(self.sites, self.device)
        return split_budget(
            self.config.budget, layers=len(self.sites), experts=max(s.experts for s in self.sites),
            slab=layout.nbytes, staging=self.config.staging, draft=wanted, insists=not self._adapts,
        )  # fmt: skip

    @property
    def _adapts(self) -> bool:
        return bool(self.config.k == "auto")

    # -- the model's experts -----------------------------------------------------------------------------------------
    def attach(self) -> Engine:
        """Take the experts off the model; again: nothing."""
        if self.runtime is not None:
            return self
        config, split = self.config, self.split
        if self.store is None:
            self.store = store_for(
                self.model, self.sites, where=config.experts, device=self.device, path=config.path,
                drop_cache=config.drop_cache,
            )  # fmt: skip
        try:
            slots = split.slots
            if split.draft and not self._adapts:
                self.draft = self._make_draft()
            elif split.draft:
                slots = split.more_slots
                self._check_draft()
            link = open_link(self.store, self.device, **dict(config.link or {}))
            self.runtime = Runtime(
                self.sites, self.store, slots=slots, staging=split.staging, link=link, draft=self.draft,
                device=self.device, widths=widths(config.most) if self._adapts else (1,),
            )  # fmt: skip
            self._ahead = Ahead(config, split, sum(site.experts for site in self.sites), link.speed)
            self._attachment.attach(self.model, self.runtime)
            if self.device != self._home:
                self.model.to(self.device)
        except BaseException:
            self.detach()
            raise
        if split.note is not None and config.most:
            self._report.notes.append(split.note)
        if self._owns_store and isinstance(self.store, DiskStore):
            size = format_bytes(self.store.bytes_total)
            self._report.notes.append(f"{self.store.path} ({size}) stays for the next run; delete it if none comes")
        return self

    def _make_draft(self) -> Any:
        from ygglight.engines.moe_speq.draft import DraftExperts

        assert self.store is not None
        if self._given is not None:
            return self._given
        if self.config.draft is not None:
            return DraftExperts.load(self.config.draft, self.sites, self.store, device=self.device)
        log.info("moe_speq: making the draft, %s", format_bytes(self.split.draft))
        return DraftExperts.build(self.sites, self.store, device=self.device)

    def _check_draft(self) -> None:
        """A file that is wrong is told now, and not when it is needed first."""
        from ygglight.engines.moe_speq.draft import DraftExperts

        if self._given is None and self.config.draft is not None:
            DraftExperts.check(self.config.draft, self.sites, self.store)

    @contextmanager
    def unnoticed(self) -> Iterator[None]:
        """What passes within ask for is in no report, and nothing is learnt from it."""
        runtime = self.runtime
        assert runtime is not None
        self._count()
        asked = sum(runtime.stats.requests)
        yield
        if sum(runtime.stats.requests) != asked:
            runtime.stats.reset()
            self._told = Counter(), Counter()

    def detach(self) -> None:
        """Give the model its experts back, and everything else free; again: nothing.

        Raises:
            OSError: they cannot be read from the disk any more: the model has to be loaded again.
        """
        store, runtime = self.store, self.runtime
        if runtime is not None:
            self._count()
            if self.device != self._home:
                self.model.to(self._home)
        self._attachment.detach()
        self._told = Counter(), Counter()
        self.runtime = self.decoder = self.governor = self.draft = None
        if runtime is not None:
            runtime.close()
        if self._owns_store and store is not None:
            self.store = None
            store.close()

    # -- one text ----------------------------------------------------------------------------------------------------
    def generate(
        self,
        prompt: Tensor,
        processors: NodeProcessors,
        stopping: Stopping,
        *,
        shown: Tensor | None = None,
        do_sample: bool = False,
        generator: torch.Generator | None = None,
        watch: Callable[[Round], None] | None = None,
    ) -> Generator[list[int], None, None]:
        """Yield the new tokens of one text, a few at a time.

        Args:
            prompt: int64 ``[L]``. processors: Of the logits. stopping: Its ``max_length`` bounds the text.
            shown: The prompt with the padding that processors and criteria see before it.
            do_sample: Draw, or take the best. generator: Of the draws. watch: Called with every cycle.

        Raises:
            ValueError: the prompt does not fit ``max_tokens``.
        """
        runtime = self.attach().runtime
        assert runtime is not None
        shown = prompt if shown is None else shown
        room = stopping.room(len(prompt), len(shown), self.config.max_tokens)
        limit = len(shown) + room
        if stopping.max_length is None or stopping.max_length > limit:
            stopping.max_length = limit
        self._make_room(len(prompt) + room)
        self._measure()
        self._seen = self._now()  # forwards that were not ours may have come between
        assert self.decoder is not None and self._ahead is not None
        loop = Loop(
            self.decoder, runtime, ChainDrawing(processors, do_sample=do_sample, generator=generator), stopping,
            choose=self._choose, ahead=self._ahead, watch=[self._learn] + ([] if watch is None else [watch]),
        )  # fmt: skip
        try:
            yield from loop.run(prompt.to(self.device), shown, limit)
        finally:
            self._report.add(loop.report)

    def _make_room(self, tokens: int) -> None:
        capacity = tokens + self.config.most + 1
        if self.decoder is None or self.decoder.capacity < capacity:
            self.decoder = None  # let go of the old cache before the new one is made
            self.decoder = Decoder(self.model, -(-capacity // CONTEXT_GRAIN) * CONTEXT_GRAIN)

    # -- decisions ---------------------------------------------------------------------------------------------------
    def _choose(self, most: int) -> int:
        """Tokens to draft in the coming cycle."""
        if self.governor is not None:
            return self.governor.choose(most)
        return 0 if self.draft is None else min(most, self.config.most)

    def _measure(self) -> None:
        """Meet this machine, once an engine."""
        if not self._adapts or not self.split.draft or self.governor is not None:
            return
        config, runtime = self.config, self.runtime
        assert self.decoder is not None and runtime is not None and self.store is not None and self._ahead is not None
        self._count()
        key = {"experts": self.store.kind, "link": dict(config.link or {}), "slots": runtime.slots}
        machine = measure_machine(
            self.decoder, runtime, config.most, ahead=self._ahead.cap / self.split.slab, slots=self.split.slots,
            seconds=config.profile_seconds, key=key,
        )  # fmt: skip
        self._told = Counter(), Counter()
        self._ahead.draft_token = machine.draft_token
        self.governor = Governor(machine, candidates(config.most), config.max_cycle_seconds or math.inf)

    def _learn(self, cycle: Round) -> None:
        """What a cycle was like, for the next ones."""
        runtime, ahead = self.runtime, self._ahead
        assert runtime is not None and ahead is not None
        now = self._now()
        new = {name: value - self._seen.get(name, 0) for name, value in now.items()}
        self._seen = now
        self._report.chose(cycle.k)
        governor = self.governor
        if cycle.k and (governor is None or governor.warm):
            ahead.drafted(cycle.k, cycle.drafting)
        ahead.learn(new)
        if governor is None:
            return
        missing = max(0, new["misses"] + new["ahead"] - new["displaced"])
        governor.observe(
            Cycle(cycle.k, cycle.accepted, new["requests"], missing, new["ahead"], cycle.seconds),
            self._outlook() if governor.due else None,
        )
        governor.machine = governor.machine.at(runtime.link.speed.seconds(self.split.slab), ahead.draft_token)
        if governor.wants_draft():
            self._take_draft(governor)
        elif governor.gives_up():
            self._drop_draft(governor)

    def _now(self) -> dict[str, int]:
        assert self.runtime is not None
        stats = self.runtime.stats
        more = ("ahead", "displaced", "streamed", "in_vain")
        return dict(stats.experts) | {name: sum(getattr(stats, name)) for name in more}

    def _outlook(self) -> Outlook:
        assert self.runtime is not None and self.governor is not None
        text, split, top_k = self.runtime.stats.text, self.split, self.governor.machine.top_k
        return Outlook(
            {n: text.unique(n, top_k) for n in text.widths},
            {n: text.missing(n, split.slots, top_k) for n in text.widths},
            text.missing(1, split.more_slots, top_k),
        )

    # -- the draft comes and goes ------------------------------------------------------------------------------------
    def _take_draft(self, governor: Governor) -> None:
        """Speculation promises to be faster: slots make room for the draft."""
        assert self.runtime is not None and self.decoder is not None
        started, split, failed = time.perf_counter(), self.split, ""
        try:
            self.runtime.resize(split.slots)
            self.draft = self._make_draft()
        except (OSError, ValueError, RuntimeError, MemoryError) as error:  # a CPU's lack of memory is a RuntimeError
            failed = str(error).partition("\n")[0] or type(error).__name__
        finally:
            if self.draft is None:  # outside of the handler, whose traceback holds what was made so far
                self.runtime.resize(split.more_slots)
        if failed:
            governor.never()
            self._note(f"k=0 from here on: the draft could not be made ({failed})")
            log.warning("moe_speq: %s", self._report.notes[-1])
            return
        self.runtime.draft = self.draft
        self.decoder.forget_graphs()  # of an earlier draft
        governor.begin(time.perf_counter() - started)
        self._note(
            f"k={governor.k}: {split.slots} slots a layer and a draft of {format_bytes(split.draft)} were predicted to "
            f"be faster than {split.more_slots} slots"
        )

    def _drop_draft(self, governor: Governor) -> None:
        """Plain decoding has won: the draft's memory becomes slots."""
        assert self.runtime is not None
        governor.end()
        self.draft = self.runtime.draft = None
        self.runtime.resize(self.split.more_slots)
        self._note(
            f"k=0: {self.split.more_slots} slots a layer were predicted to be faster than {self.split.slots} and a "
            f"draft of {format_bytes(self.split.draft)}, so the draft was dropped"
        )

    def _note(self, text: str) -> None:
        if text not in self._report.notes:  # it may come and go more than once
            self._report.notes.append(text)

    # -- what was done -----------------------------------------------------------------------------------------------
    def take_report(self) -> Report:
        """What was done since the last call."""
        self._count()
        report, self._report = self._report, Report()
        if self.runtime is None:
            return report
        split, speed = self.split, self.runtime.link.speed
        report.memory = {
            "slots": self.runtime.slots * split.layers * split.slab, "staging": split.staging * split.slab,
            "draft": 0 if self.draft is None else split.draft,
        }  # fmt: skip
        if speed.copies:
            report.bandwidth, report.copy_seconds = speed.bandwidth, speed.tau
        if self.governor is not None:
            report.errors, self.governor.errors = self.governor.errors, []
            if self.governor.untried:
                report.notes.append(
                    f"k=0: even {HOPE:.0%} of a draft accepted promised less than its memory as slots, so none was made"
                )
        return report

    def _count(self) -> None:
        """Take into the report what the runtime has counted since the last time."""
        if self.runtime is None:
            return
        stats = self.runtime.stats
        now = stats.experts, stats.moved
        for total, new, then in zip((self._report.experts, self._report.moved), now, self._told, strict=True):
            total.update(new)
            total.subtract(then)
        self._told = now
