"""One CUDA graph a width: the forward of W tokens recorded once and replayed on static buffers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ygglight.engines.decode.call import Step

WARM_UPS = 2
"""Runs on a side stream before the recording: lazily made state (cuBLAS workspaces, Triton binaries) must exist."""


class _Recorded:
    def __init__(self, inputs: tuple[Tensor, ...], graph: torch.cuda.CUDAGraph, step: Step) -> None:
        self.inputs, self.graph, self.step = inputs, graph, step


class Graphs:
    """Replays ``run`` for shapes that it has seen, records it for those that it has not.

    All graphs share one memory pool, so the outputs of one are overwritten by the next: read them before. Record the
    widest first (``captures`` says what was recorded), or the pool grows in steps.

    Args:
        run: ``(tokens, positions, slots, masks) -> Step`` without host reads or shapes that depend on data.
    """

    def __init__(self, run: Callable[..., Step]) -> None:
        self._run = run
        self._recorded: dict[Any, _Recorded] = {}
        self._pool: Any = None

    @property
    def captures(self) -> int:
        """How many graphs were recorded."""
        return len(self._recorded)

    def __call__(self, tokens: Tensor, positions: Tensor, slots: Tensor, masks: dict[str, Tensor]) -> Step:
        """Copy the inputs to the static buffers of this shape and replay; record first if need be."""
        inputs = (tokens, positions, slots, *masks.values())
        key = tuple(t.shape for t in inputs)
        recorded = self._recorded.get(key)
        if recorded is None:
            recorded = self._recorded[key] = self._record(inputs, tuple(masks))
        for static, value in zip(recorded.inputs, inputs, strict=True):
            static.copy_(value)
        recorded.graph.replay()
        return recorded.step

    def _record(self, inputs: tuple[Tensor, ...], kinds: tuple[str, ...]) -> _Recorded:
        static = tuple(t.clone() for t in inputs)
        masks = dict(zip(kinds, static[3:], strict=True))
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self._run(*static[:3], masks)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may train meanwhile: their allocations and event queries must not break the recording.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            step = self._run(*static[:3], masks)
        self._pool = graph.pool()
        return _Recorded(static, graph, step)
