"""The decoding loop: draft a chain while experts travel, verify it in one pass, keep what the target agrees with."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ygglight.engines.decode import Decoder
from ygglight.engines.decode.clock import Clock
from ygglight.engines.decode.stopping import Stopping
from ygglight.engines.moe_speq.acceptance import ChainDrawing
from ygglight.engines.moe_speq.ahead import Ahead
from ygglight.engines.moe_speq.lookahead import observed_steps
from ygglight.engines.moe_speq.report import Report
from ygglight.engines.moe_speq.runtime import Runtime


@dataclass(frozen=True)
class Round:
    """One cycle, for those who watch (the governor, tests).

    Args:
        k: Drafted tokens. accepted: Of them. tokens: What the text grew by. position: Tokens of text before it, the
            padding apart. cached: Tokens in the KV cache after it. seconds: In all. drafting: Of them, until all was
            drafted.
    """

    k: int
    accepted: int
    tokens: list[int]
    position: int
    cached: int
    seconds: float
    drafting: float = 0.0


class Loop:
    """Generates one text. Draft and target share one KV cache; what the draft wrote, the target writes anew.

    Args:
        decoder: Of the model. runtime: Whose experts it runs with. drawing: From logits to tokens.
        stopping: Ends the text. choose: Tokens to draft in the coming cycle, given the most that make sense.
        ahead: How much to send ahead. watch: Called with every cycle.
    """

    def __init__(
        self,
        decoder: Decoder,
        runtime: Runtime,
        drawing: ChainDrawing,
        stopping: Stopping,
        *,
        choose: Callable[[int], int],
        ahead: Ahead,
        watch: Sequence[Callable[[Round], None]] = (),
    ) -> None:
        self.decoder, self.runtime, self.drawing, self.stopping = decoder, runtime, drawing, stopping
        self.choose, self.ahead, self.watch = choose, ahead, watch
        self.report = Report(generations=1)
        self.text: list[int] = []
        self._padding = 0

    def run(self, prompt: Tensor, shown: Tensor, limit: int) -> Iterator[list[int]]:
        """Yield the new tokens, a few at a time.

        Args:
            prompt: int64 ``[L]`` on the decoder's device. shown: The prompt as processors and criteria see it, that is
                with the padding before it. limit: Longest text, ``shown`` and all.
        """
        clock = Clock(self.report, self.decoder.device)
        self._padding = len(shown) - len(prompt)
        try:
            with clock.stage("prefill"):
                self.decoder.reset()
                self.decoder.replays = False
                with self.runtime.window(prefill=True):
                    step = self.decoder.append(prompt)
                self.text = shown.tolist()
                root = self.drawing.first(step.logits[0, -1], self.text)
            count, done = self.stopping.cut(self.text, [root])
            self.text.append(root)
            self.report.tokens += count
            yield [root]
            while not done and len(self.text) < limit:
                tokens, done = self._cycle(clock, limit)
                yield tokens
        finally:
            clock.close()

    def _cycle(self, clock: Clock, limit: int) -> tuple[list[int], bool]:
        started, report, position = time.perf_counter(), self.report, len(self.text) - self._padding
        k = self.choose(limit - len(self.text) - 1)  # the target's own token takes the last place
        text = torch.tensor(self.text, device=self.decoder.device)
        with clock.stage("draft"):
            drafted, q, left = self._draft(text, k)
        drafting = time.perf_counter() - started
        with clock.stage("verify"), self.runtime.window(prefill=False, stream=left):
            nodes = torch.cat([text[-1:], drafted])
            places = torch.arange(len(nodes), device=nodes.device)
            step = self.decoder.nodes(nodes, places, places, places[:, None] >= places[None, :])
            verdict = self.drawing.verify(step.logits[0], text, drafted, q).tolist()
        accepted = verdict[0]
        self.runtime.committed(accepted + 1)
        count, done = self.stopping.cut(self.text, verdict[1 : accepted + 2])
        tokens = verdict[1 : count + 1]
        # All but the last token of the text are in the cache: the last is chosen, but not run (or not to be kept).
        self.decoder.advance(count)
        self.text.extend(tokens)
        report.tokens += count
        report.cycles += 1
        report.drafted += k
        report.accepted += accepted
        report.drafting[k] += 1
        seconds = time.perf_counter() - started
        for watcher in self.watch:
            watcher(Round(k, accepted, tokens, position, self.decoder.length, seconds, drafting))
        return tokens, done

    def _draft(self, text: Tensor, k: int) -> tuple[Tensor, Tensor | None, int]:
        """Draft k tokens, and send the experts ahead that they chose.

        Returns:
            int64 ``[k]``; the distributions they were drawn from ``[k, V]``, None for a greedy text; bytes that may
            still be sent ahead.
        """
        drafted: list[Tensor] = []
        distributions: list[Tensor] = []
        to_slots, left = (self.ahead.to_slots, self.ahead.cap) if k else (0, 0)
        following = observed_steps(k)  # the first routes alone would choose too narrowly
        places = torch.arange(k, device=text.device)  # at once: to bring a number to a GPU is to wait for it
        token, self.decoder.replays = text[-1:], True
        try:
            for done in range(k):
                place = places[done : done + 1]
                seen = torch.ones(1, done + 1, dtype=torch.bool, device=text.device)
                with self.runtime.drafting():
                    logits = self.decoder.nodes(token, place, place, seen).logits[0, -1]
                token, q = self.drawing.draft(logits, text, drafted)
                drafted.append(token)
                if q is not None:
                    distributions.append(q)
                if left > 0 and (done + 1 >= following or done + 1 == k):
                    slotted, staged = self.runtime.prefetch(
                        min(to_slots, left), 1 + self.ahead.hides(k - done - 1), left
                    )
                    to_slots, left = to_slots - slotted, left - slotted - staged
                    following = done + 1 + self.ahead.pause(slotted + staged)
        finally:
            self.decoder.replays = False
        chain = torch.cat(drafted) if drafted else text[:0]
        if not self.drawing.do_sample:
            return chain, None, left
        empty = torch.empty(0, self.decoder.vocabulary, device=text.device)
        return chain, torch.stack(distributions) if distributions else empty, left
