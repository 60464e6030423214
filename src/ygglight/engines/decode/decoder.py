"""One causal language model over a static KV cache: prompts, chains, trees and batches through one forward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ygglight.engines.decode import attention
from ygglight.engines.decode.cache import SlotCache
from ygglight.engines.decode.call import ModelCall, Step
from ygglight.engines.decode.fusion import SingleSteps
from ygglight.engines.decode.graphs import Graphs

PREFILL_CHUNK = 512
"""Prompt tokens a forward: bounds the mask (chunk x capacity bytes) and the activations."""
RECORDED_APPEND = 2
"""Tokens up to which an append is replayed from a CUDA graph; prompts have too many lengths to record."""
GRAIN = 64
"""On a CPU only as many slots as are in use are read, rounded up to this."""


class Decoder:
    """Runs an unmodified transformers causal LM.

    Slot and position are two things: a token's slot is where its key and value lie, its position is what RoPE sees.
    For committed tokens both are the index in the text. A tree over them takes the slots that follow, one a node, while
    siblings share the position text length + depth.

    Args:
        model: Any causal LM of transformers whose attention goes through its attention interface.
        capacity: Slots a sequence: text, plus the nodes of the largest tree.
        batch: Sequences.
        graphs: Replay a CUDA graph a width (widths up to 128 tokens); default: on CUDA. Not on a CPU.
        compile: Run the model's forward through ``torch.compile`` with static shapes.
        fused: Run passes of one token a sequence with the attention half of each layer as one block
            (:mod:`ygglight.engines.decode.fusion`); default: where recorded passes measure faster so. Not if compiled.
    """

    def __init__(
        self,
        model: Any,
        capacity: int,
        *,
        batch: int = 1,
        graphs: bool | None = None,
        compile: bool = False,
        fused: bool | None = None,
    ) -> None:
        self._call = ModelCall(model, compile=compile)
        self.model: Any = model
        self.config = self._call.config
        self.capacity, self.batch = capacity, batch
        self.device: torch.device = self._call.device
        self.kinds = self._call.kinds
        self.vocabulary = int(self.config.vocab_size)
        self.cache = SlotCache(int(self.config.num_hidden_layers), capacity)
        self.length: int = 0
        self.forwards = 0
        self._static = self.device.type == "cuda" or compile
        with torch.inference_mode(False):  # or they could not be written in a later run outside of it
            self._columns = torch.arange(capacity, device=self.device)
            # The position of what lies in each slot: of a tree's nodes it is not the slot.
            self._where: Tensor = self._columns.clone()
        self._windowed = any(window is not None for window in self.kinds.values())
        on = self.device.type == "cuda" if graphs is None else graphs
        self._graphs = Graphs(self._run) if on and self.device.type == "cuda" else None
        key = {"capacity": capacity, "batch": batch}
        self.single = SingleSteps(model, self.device, False if compile else fused, key)
        """How passes of one token run, and why."""
        self.replays = True
        """Whether passes may come from graphs now: one in which the host reads what the device found cannot."""

    def forget_graphs(self) -> None:
        """Record anew what comes: modules of the model work on other tensors from now on."""
        if self._graphs is not None:
            self._graphs = Graphs(self._run)

    # -- the forward -------------------------------------------------------------------------------------------------
    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        slots: Tensor,
        masks: dict[str, Tensor],
        *,
        last_only: bool = False,
    ) -> Step:
        """Run ``W`` tokens of each sequence.

        Args:
            tokens: int64 ``[B, W]``. positions: int64 ``[B, W]``. slots: int64 ``[B, W]``, where keys and values go.
            masks: Kind of layer -> bool ``[B, 1, W, C]``, True where a token attends to a slot; ``C`` is the capacity,
                or on a CPU any prefix of it that holds all slots in use.
            last_only: Logits of the last token alone, ``[B, 1, V]``.
        """
        self.forwards += 1
        if self._graphs is not None and self.replays and not last_only and tokens.shape[1] <= attention.MAX_TREE:
            if tokens.shape[1] == 1:
                self.single.decide(partial(self._trial, tokens, positions, slots, masks))
            return self._graphs(tokens, positions, slots, masks)
        return self._run(tokens, positions, slots, masks, last_only)

    def _run(
        self, tokens: Tensor, positions: Tensor, slots: Tensor, masks: dict[str, Tensor], last_only: bool = False
    ) -> Step:
        self.cache.slots, self.cache.visible = slots, next(iter(masks.values())).shape[-1]
        with self.single.around(tokens.shape[1]):
            return self._call(tokens, positions, masks, self.cache, last_only=last_only)

    def _trial(
        self, tokens: Tensor, positions: Tensor, slots: Tensor, masks: dict[str, Tensor]
    ) -> Callable[[], object]:
        """This pass as it would be over half of the cache, recorded; it writes nothing that the pass will not."""
        seen = {}
        for kind, window in self.kinds.items():
            columns = torch.arange(masks[kind].shape[-1], device=self.device)
            half = len(columns) // 2
            seen[kind] = masks[kind] | ((columns < half) & (columns >= half - (half if window is None else window)))
        step = partial(Graphs(self._run), tokens, positions, slots, seen)
        step()
        return step

    # -- one sequence ------------------------------------------------------------------------------------------------
    def reset(self) -> None:
        """Forget the text. The cache keeps its memory; what it holds is masked from now on."""
        self.length = 0

    def append(self, tokens: Tensor) -> Step:
        """Commit tokens to the text and return what follows the last one; a long run goes in chunks.

        Args:
            tokens: int64 ``[n]``, n >= 1.

        Returns:
            Logits ``[1, 1, V]`` and hidden state ``[1, 1, H]`` of the last token.

        Raises:
            ValueError: the text does not fit the cache.
        """
        total = self.length + len(tokens)
        if total > self.capacity:
            raise ValueError(f"{total} tokens do not fit a cache of {self.capacity} slots: give it more capacity")
        step = None
        for chunk in tokens.split(PREFILL_CHUNK):
            count = len(chunk)
            offsets = torch.arange(count, device=self.device)
            lower = offsets[:, None] >= offsets[None, :]
            # A token or two (plain decoding, a draft's first pass) go like nodes of a tree, whose passes are recorded.
            few = count <= RECORDED_APPEND
            step = self.nodes(chunk, offsets, offsets, lower, last_only=not few)
            if few:
                step = Step(step.logits[:, -1:], None if step.hidden is None else step.hidden[:, -1:])
            self.length += count
        assert step is not None
        return step

    def nodes(
        self, tokens: Tensor, depths: Tensor, offsets: Tensor, ancestors: Tensor, *, last_only: bool = False
    ) -> Step:
        """Run tree nodes that hang on the text, without committing them.

        Args:
            tokens: int64 ``[W]``. depths: int64 ``[W]``, position less text length. offsets: int64 ``[W]``, slot less
                text length. ancestors: bool ``[W, N]``, which of the N slots after the text each node attends to, its
                own among them.
            last_only: See :meth:`forward`.

        Returns:
            Logits ``[1, W, V]``.
        """
        slots = self.length + offsets
        masks = self._masks(self.length + depths, slots, ancestors)
        return self.forward(tokens[None], (self.length + depths)[None], slots[None], masks, last_only=last_only)

    def _masks(self, positions: Tensor, slots: Tensor, ancestors: Tensor) -> dict[str, Tensor]:
        """The mask of each kind of layer, ``[1, 1, W, C]``, for nodes on top of ``length`` committed tokens."""
        width = ancestors.shape[1]
        used = self.length + width
        visible = self.capacity if self._static else min(self.capacity, -(-used // GRAIN) * GRAIN)
        columns = self._columns[:visible]
        full = (columns < self.length).expand(len(positions), visible).clone()
        full[:, self.length : used] = ancestors
        if self._windowed:
            self._where.index_copy_(0, slots, positions)
        masks = {}
        for kind, window in self.kinds.items():
            mask = full
            if window is not None:
                mask = full & (positions[:, None] - self._where[None, :visible] < window)
            masks[kind] = mask[None, None]
        return masks

    def keep(self, offsets: Tensor, count: int) -> None:
        """Commit nodes of a tree: move their keys and values to the end of the text.

        Args:
            offsets: int64 ``[n]``, slots less text length, ascending. count: how many of them, from the first.
        """
        if count:
            source = self.length + offsets[:count]
            target = torch.arange(self.length, self.length + count, device=self.device)
            self.cache.move(source, target)
        self.length += count
        if self._windowed:
            self._where.copy_(self._columns)

    def advance(self, count: int) -> None:
        """Commit the first nodes of a chain, which lie where the text goes on: nothing moves.

        Args:
            count: How many.
        """
        self.length += count

    def crop(self, length: int) -> None:
        """Shorten the text to its first ``length`` tokens."""
        self.length = min(self.length, length)
