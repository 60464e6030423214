"""A yield point of the chunked loss: something to call between two chunks, set for the thread that calls the loss."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

OnChunk = Callable[[int], None]
"""Called with the index of the chunk that comes next, from 1."""


class _Local(threading.local):
    on_chunk: OnChunk | None = None


_local = _Local()


@contextmanager
def between_chunks(callback: OnChunk) -> Iterator[None]:
    """Calls ``callback`` between the chunks of every chunked loss whose forward runs inside, on this thread.

    Backward calls it too, also when it runs after the context has ended, and then on the thread that evaluates the
    graph: on a GPU that is autograd's own. What it raises ends the forward or backward. It must not change the random
    state or the tensors of the loss; the arithmetic is the same with and without.

    Args:
        callback: See :data:`OnChunk`.
    """
    outer, _local.on_chunk = _local.on_chunk, callback
    try:
        yield
    finally:
        _local.on_chunk = outer


def current() -> OnChunk | None:
    """What :func:`between_chunks` set for this thread, or None."""
    return _local.on_chunk
