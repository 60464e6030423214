"""Copies of experts to a GPU on a stream of their own.

Not yet run on a GPU here (``tests/engines/moe_speq/test_link_gpu.py`` is what has to pass there).

Order between copies and computation is by events alone, for slabs are used again and again and never freed meanwhile,
which is what ``record_stream`` would be for:

* a copy first waits for the event after the last computation that read its slab (``Ticket.after``);
* computation first waits for the event after the copy (``Ticket.ready``), unless the host has seen that pass;
* copies into one slab are in order because they are on one stream.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ygglight.engines.moe_speq.link import Link, Source, Ticket


class StreamCopier:
    """Pinned host memory to the device.

    Args:
        source: The experts. What it has no pinned slab of is read into pinned memory of this class first.
        device: CUDA.
    """

    depth = 2  # the next copy waits on the stream while the host sees the first one end; deeper would make demand wait

    def __init__(self, source: Source, device: torch.device) -> None:
        self._source, self._device = source, device
        self._stream = torch.cuda.Stream(device)
        self._bounce: dict[int, Tensor] = {}
        self._copies = 0

    def start(self, ticket: Ticket) -> None:
        """Put the copy on the stream."""
        slab = self._source.slab(ticket.layer, ticket.expert)
        if slab is None or not slab.is_pinned():  # from pageable memory the copy would block this thread, and be slow
            bounced = self._bounced(ticket.out.numel())
            if slab is None:
                self._source.read_into(ticket.layer, ticket.expert, bounced)
            else:
                bounced.copy_(slab)
            slab = bounced
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            if ticket.after is not None:
                self._stream.wait_event(ticket.after)
            ticket.out.copy_(slab, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record(self._stream)
            ticket.ready = ready
        self._copies += 1

    def finish(self, ticket: Ticket) -> None:
        """Block this thread, and no other."""
        ticket.ready.synchronize()

    def follow(self, ticket: Ticket) -> None:
        """The current stream of the calling thread waits, not its host."""
        torch.cuda.current_stream(self._device).wait_event(ticket.ready)

    def mark(self) -> torch.cuda.Event:
        """An event on the current stream."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def stop(self) -> None:
        """Nothing sleeps."""

    def _bounced(self, nbytes: int) -> Tensor:
        """Pinned bytes of a copy that has ended: at most ``depth - 1`` are under way when the next one starts."""
        index = self._copies % self.depth
        if index not in self._bounce or self._bounce[index].numel() < nbytes:
            with torch.inference_mode(False):
                self._bounce[index] = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        return self._bounce[index][:nbytes]


class StreamLink(Link):
    """From pinned memory, or disk by way of it, to a GPU.

    Args:
        source: The experts. device: CUDA.
    """

    def __init__(self, source: Source, device: torch.device) -> None:
        if device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        super().__init__(StreamCopier(source, device))
