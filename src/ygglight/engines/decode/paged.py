"""A batch of sequences over pages of one arena: prompts in chunks, then a token a sequence and step."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from ygglight.engines.decode import attention
from ygglight.engines.decode.call import ModelCall, Step
from ygglight.engines.decode.graphs import Graphs
from ygglight.engines.decode.pages import PAGE, PagedCache
from ygglight.engines.memory.arena import Arena

__all__ = ["PagedCache", "PagedDecoder"]

PREFILL_CHUNK = 512
"""Prompt tokens a forward at most: bounds the mask (chunk x context bytes) and the activations."""
LEAST_PAGES = 16
"""A recorded step reads at least so many pages: below it a graph of its own would save nothing."""


class PagedDecoder:
    """Runs an unmodified transformers causal LM over sequences whose keys and values lie in pages.

    Who owns which page is the caller's: a sequence is a list of chunks of the arena, in the order of its text, and a
    length. The token at position ``p`` lies in page ``p // page``. Not thread-safe: one thread decodes.

    Args:
        model: Any causal LM of transformers whose attention goes through its attention interface.
        arena: Chunks of ``PagedCache.chunk_bytes(config, dtype, page)`` or more, on the device of the model.
        page: Tokens a page, a power of two.
        graphs: Replay a CUDA graph a (batch, pages) bucket in :meth:`decode`; default: on CUDA. It takes one chunk, for
            what padding rows write. On a CPU True pads alike and records nothing: it is there to test the padding.
        dtype: Of keys and values; default: the model's.

    Raises:
        ValueError: the arena lies elsewhere, has too small chunks or none for the padding, or the model has layers that
            keep no keys and values a token.
    """

    def __init__(
        self,
        model: Any,
        arena: Arena,
        *,
        page: int = PAGE,
        graphs: bool | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._call = ModelCall(model)
        self.model: Any = model
        self.config, self.device = self._call.config, self._call.device
        if arena.data.device != self.device:
            raise ValueError(f"the model is on {self.device}, the arena on {arena.data.device}: put both on one device")
        odd = [kind for kind, window in self._call.kinds.items() if window == -1]
        if odd:
            raise ValueError(f"layers of {', '.join(odd)} keep no keys and values a token: pages cannot hold them")
        self.arena, self.page = arena, page
        self.vocabulary = int(self.config.vocab_size)
        self.cache = PagedCache(self.config, arena, model.dtype if dtype is None else dtype, page)
        self.forwards = 0
        self.partition: Hashable = None
        """Of the device, in which the next steps run: a graph belongs to that in which it was recorded."""
        self._gathers = self.device.type != "cuda"
        self._scratch: list[int] | None = None
        if self.device.type == "cuda" if graphs is None else graphs:
            self._scratch = arena.allocate_kv(1)
            if self._scratch is None:
                raise ValueError("the arena has no free chunk for padding rows: make the decoder before leases are out")
        self._graphs: dict[Hashable, Graphs] = {}

    def close(self) -> None:
        """Give up the recorded graphs, and the page of the padding; from now on nothing is padded."""
        self._graphs.clear()
        if self._scratch is not None:
            self.arena.free_kv(self._scratch)
            self._scratch = None

    def pages_for(self, tokens: int) -> int:
        """Pages that so many tokens take."""
        return -(-tokens // self.page)

    # -- one sequence ------------------------------------------------------------------------------------------------
    def prefill(self, pages: Sequence[int], start: int, tokens: Tensor) -> Step:
        """Write a run of tokens of one sequence and return what follows the last one.

        Args:
            pages: Chunks of the sequence, enough for ``start + n`` tokens. start: Position of the first token; all
                before it have been run. tokens: int64 ``[n]``, n >= 1, on any device.

        Returns:
            Logits ``[1, 1, V]`` and hidden state ``[1, 1, H]`` of the last token.

        Raises:
            ValueError: there are no tokens, or more than the pages hold.
        """
        if not len(tokens):
            raise ValueError("no tokens: a chunk has 1 or more")
        self._check(pages, start + len(tokens))
        step = None
        for chunk in tokens.to(self.device).split(PREFILL_CHUNK):
            end = start + len(chunk)
            positions = torch.arange(start, end, device=self.device)[None]
            table = self._to_device([list(pages[: self.pages_for(end)])])
            self.forwards += 1
            step = self._run(chunk[None], positions, table, last_only=True)
            start = end
        assert step is not None
        return step

    # -- a batch -----------------------------------------------------------------------------------------------------
    def decode(self, tables: Sequence[Sequence[int]], lengths: Sequence[int], tokens: Tensor) -> Step:
        """Run one token of each sequence.

        Args:
            tables: The chunks of each sequence, enough for one token more than its length. lengths: Tokens before this
                one, which is its position. tokens: int64 ``[B]``, on any device.

        Returns:
            Logits ``[B, 1, V]``.

        Raises:
            ValueError: the numbers of tables, lengths and tokens differ or are 0, or pages are missing.
        """
        count = len(tables)
        if not count or len(lengths) != count or tokens.shape != (count,):
            raise ValueError(
                f"{count} tables, {len(lengths)} lengths, tokens {list(tokens.shape)}: give one of each a sequence"
            )
        for table, length in zip(tables, lengths, strict=True):
            self._check(table, length + 1)
        width = self.pages_for(max(lengths) + 1)
        rows, filler = count, None
        if self._scratch is not None:
            rows, width, filler = self.bucket(count), _page_bucket(width), self._scratch[0]
        # What fills a row is masked, but it is read: a page of finite numbers.
        numbers = [
            [length, *table[: self.pages_for(length + 1)]] for table, length in zip(tables, lengths, strict=True)
        ]
        for row in numbers:
            row.extend([row[1] if filler is None else filler] * (width + 1 - len(row)))
        if filler is not None:
            numbers.extend([0, *[filler] * width] for _ in range(rows - count))
        sent = self._to_device(numbers)
        tokens = tokens.to(self.device)
        if rows > count:
            tokens = torch.cat([tokens, tokens.new_zeros(rows - count)])
        step = self._step(tokens[:, None], sent[:, :1], sent[:, 1:])
        if rows == count:
            return step
        return Step(step.logits[:count], None if step.hidden is None else step.hidden[:count])

    @staticmethod
    def bucket(count: int) -> int:
        """Rows that a padded batch of ``count`` sequences has: powers of two up to 32, then multiples of 32."""
        return 1 << (count - 1).bit_length() if count <= 32 else -(-count // 32) * 32

    def record(self, batch: int, tokens: int) -> None:
        """Record the graphs of all batches up to ``batch`` and contexts up to ``tokens`` before they are needed.

        Recording waits for the device and takes tenths of a second: a step that had to do it would be late. Without
        graphs it does nothing.

        Args:
            batch: Sequences. tokens: The longest context.
        """
        if self._scratch is None:
            return
        widths = {_page_bucket(pages) for pages in range(1, self.pages_for(tokens) + 1)}
        # The largest first: all share one memory pool, which then need not grow.
        for rows in sorted({self.bucket(count) for count in range(1, batch + 1)}, reverse=True):
            for width in sorted(widths, reverse=True):
                sent = self._to_device([[0, *self._scratch * width]] * rows)
                self._step(torch.zeros(rows, 1, dtype=torch.long, device=self.device), sent[:, :1], sent[:, 1:])

    # -- the forward -------------------------------------------------------------------------------------------------
    def _step(self, tokens: Tensor, positions: Tensor, table: Tensor) -> Step:
        self.forwards += 1
        if self._scratch is None or self.device.type != "cuda":
            return self._run(tokens, positions, table)
        graphs = self._graphs.get(self.partition)
        if graphs is None:
            graphs = self._graphs[self.partition] = Graphs(lambda *inputs: self._run(*inputs[:3]))
        return graphs(tokens, positions, table, {})

    def _run(self, tokens: Tensor, positions: Tensor, table: Tensor, *, last_only: bool = False) -> Step:
        """The forward; its masks are made in here, and so inside of a graph, from the positions."""
        dense = self._gathers or tokens.shape[1] > attention.MAX_TREE
        self.cache.begin(positions, table, dense=dense)
        distance = positions[:, None, :, None] - torch.arange(self.cache.visible, device=self.device)  # [B, 1, W, C]
        full = distance >= 0
        masks = {
            kind: full if window is None else full & (distance < window) for kind, window in self._call.kinds.items()
        }
        return self._call(tokens, positions, masks, self.cache, last_only=last_only, table=None if dense else table)

    # -- numbers -----------------------------------------------------------------------------------------------------
    def _check(self, pages: Sequence[int], tokens: int) -> None:
        if len(pages) < self.pages_for(tokens):
            raise ValueError(f"{tokens} tokens take {self.pages_for(tokens)} pages, here are {len(pages)}: give more")

    def _to_device(self, rows: list[list[int]]) -> Tensor:
        numbers = torch.tensor(rows)
        if self.device.type == "cpu":
            return numbers
        return numbers.pin_memory().to(self.device, non_blocking=True)  # without pinning the host would wait


def _page_bucket(pages: int) -> int:
    return max(LEAST_PAGES, 1 << (pages - 1).bit_length())
