"""Decoding and finetuning at once on one GPU: by the priority of streams, or on disjoint sets of SMs.

Not yet run on a GPU here (``tests/engines/harli/test_executors_gpu.py`` is what has to pass there).

Autograd runs the backward of an operation on the stream of its forward. So a micro-batch is bound to one stream from
its start to its end (``bind``, ``unbind``: the training thread); only the stream of decoding may change meanwhile.
A captured CUDA graph is bound to the partition that it was captured on: one set of graphs a level, or none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ygglight.engines.harli.executors import RUNGS, TimeSlices, Unavailable
from ygglight.engines.harli.partitions import Partition
from ygglight.engines.harli.sm_split import GROUP_SMS, SMSplit

if TYPE_CHECKING:
    from ygglight.engines.harli.gate import Gate
    from ygglight.engines.harli.scheduler import Decision


class PriorityStreams(TimeSlices):
    """Both on all SMs; the blocks of decode kernels are scheduled first. Nothing is kept free for decoding.

    Args:
        device: CUDA.

    Raises:
        Unavailable: the device knows one priority only.
    """

    name = "priority_streams"

    def __init__(self, device: torch.device) -> None:
        super().__init__(torch.cuda.get_device_properties(device).multi_processor_count)
        least, most = torch.cuda.Stream.priority_range()  # type: ignore[call-arg]
        if least == most:
            raise Unavailable(f"{device} has one stream priority only")
        self.ladder.append(Partition(self.units, self.units, True))
        self.device = device
        self._decode = torch.cuda.Stream(device, priority=most)
        self._finetune = torch.cuda.Stream(device, priority=least)
        self.held: int | None = None
        """SMs that the micro-batch under way is bound to, for the scheduler's situations; None: all, or none is."""
        self._before: torch.cuda.Stream | None = None

    def bind(self) -> torch.cuda.Stream:
        """The stream of the micro-batch that begins; the caller orders it after what it depends on."""
        return self._finetune

    def unbind(self) -> None:
        """The micro-batch has ended."""
        self.held = None

    def begin(self, decision: Decision, gate: Gate) -> None:
        """Also makes the stream of decoding current on this thread."""
        self._use(self._decode)
        super().begin(decision, gate)

    def close(self) -> None:
        """Wait for both streams, and give the decode thread its own back."""
        self._decode.synchronize()
        self._finetune.synchronize()
        if self._before is not None:
            torch.cuda.set_stream(self._before)
            self._before = None

    def _use(self, stream: torch.cuda.Stream) -> None:
        current = torch.cuda.current_stream(self.device)
        if self._before is None:
            self._before = current
        if stream != current:
            stream.wait_stream(current)  # KV pages and the tokens of the step before were written there
            torch.cuda.set_stream(stream)


class GreenContexts(PriorityStreams):
    """Decoding and finetuning on sets of SMs that do not overlap. Bandwidth, L2 and copies are shared all the same.

    Args:
        device: CUDA. group_sms: SMs by which partitions differ. split: for tests.

    Raises:
        Unavailable: see :class:`SMSplit`.
    """

    name = "green_contexts"

    def __init__(self, device: torch.device, group_sms: int = GROUP_SMS, split: SMSplit | None = None) -> None:
        if device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        super().__init__(device)
        self._split = split or SMSplit(device, group_sms)
        sizes = self._split.sizes
        _, most = torch.cuda.Stream.priority_range()  # type: ignore[call-arg]
        self.ladder = self.ladder[:2]
        self._levels: dict[int, tuple[Any, Any]] = {}  # SMs of finetuning -> streams of (decoding, finetuning)
        counts = range(1, len(sizes))
        try:
            for count in counts[:: -(-len(counts) // RUNGS)]:
                rung = Partition(sum(sizes[:count]), sum(sizes[count:]), True)
                decode = self._split.stream(range(count), most)
                self._levels[rung.finetune] = decode, self._split.stream(range(count, len(sizes)))
                self.ladder.append(rung)
        except Unavailable:
            self._split.close()
            raise
        self._next = self.units

    def bind(self) -> torch.cuda.Stream:
        """A stream on the SMs of the latest decision. One on all SMs lets no decode step run beside the micro-batch."""
        self.held = sms = self._next
        return self._levels[sms][1] if sms in self._levels else self._finetune

    def begin(self, decision: Decision, gate: Gate) -> None:
        """See :class:`Executor`. Decoding alone or in turn has the whole device."""
        concurrent = decision.partition.concurrent
        if decision.partition.finetune:
            self._next = decision.partition.finetune
        self._use(self._levels[decision.partition.finetune][0] if concurrent else self._decode)
        TimeSlices.begin(self, decision, gate)

    def close(self) -> None:
        """Wait for all streams, then give all SMs back."""
        for streams in self._levels.values():
            for stream in streams:
                stream.synchronize()
        super().close()
        self._split.close()
