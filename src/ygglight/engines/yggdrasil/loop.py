"""The decoding loop: draft, prune, verify, accept, for one sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ygglight.engines.decode import Decoder
from ygglight.engines.decode.clock import Clock
from ygglight.engines.decode.stopping import Stopping
from ygglight.engines.yggdrasil import prune
from ygglight.engines.yggdrasil.config import StagePlan
from ygglight.engines.yggdrasil.drafts import Draft, ModelDraft
from ygglight.engines.yggdrasil.objective import Shape
from ygglight.engines.yggdrasil.report import Report
from ygglight.engines.yggdrasil.selector import Selector
from ygglight.engines.yggdrasil.tree import TokenTree
from ygglight.engines.yggdrasil.verifier import Verdict, Verifier

MICRO = 1e6
"""Real numbers travel among the integers of the one host read in millionths."""


@dataclass
class Iteration:
    """One round, for those who watch (logs, tests).

    Args:
        shape: of the tree; None: a plain step. tree: the verified nodes. verdict: what was accepted.
        hidden: ``[H]``, the target's last hidden state of the deepest accepted node before this round: what a depth
            predictor reads. position: tokens of text before this round.
    """

    shape: Shape | None
    tree: TokenTree
    verdict: Verdict
    hidden: Tensor | None
    position: int


class Loop:
    """Generates one text.

    Args:
        target: decoder of the model whose text it is. draft: grows trees. selector: chooses their shape.
        verifier: draws tokens. stopping: ends the text. plan: gives the stage plan of the coming iteration.
        predict: survival P(accepted >= d) from a hidden state ``[H]``, or None.
        watch: called with every iteration. temperature: of the draft's distribution.
    """

    def __init__(
        self,
        target: Decoder,
        draft: Draft,
        selector: Selector,
        verifier: Verifier,
        stopping: Stopping,
        *,
        plan: Callable[[], StagePlan],
        predict: Callable[[Tensor], Tensor] | None = None,
        watch: Callable[[Iteration], None] | None = None,
        temperature: float = 1.0,
    ) -> None:
        self.target, self.draft, self.selector = target, draft, selector
        self.verifier, self.stopping, self.plan = verifier, stopping, plan
        self.predict, self.watch, self.temperature = predict, watch, temperature
        self.report = Report(generations=1)
        self.text: list[int] = []
        self._hidden: Tensor | None = None
        self._survival: list[float] | None = None

    def run(self, prompt: Tensor, shown: Tensor, limit: int) -> Iterator[list[int]]:
        """Yield the new tokens, a few at a time.

        Args:
            prompt: int64 ``[L]`` on the target's device. shown: the prompt as processors and criteria see it, that is
                with the padding before it. limit: longest text, ``shown`` and all.
        """
        clock = Clock(self.report, self.target.device)
        try:
            with clock.stage("prefill"):
                self.target.reset()
                step = self.target.append(prompt)
                self.text = shown.tolist()
                root = self.verifier.first(step.logits[0, -1], self.text)
                self._remember(step.hidden, 0)
            count, done = self.stopping.cut(self.text, [root])
            self.text.append(root)
            self.report.tokens += count
            yield [root]
            if done:
                return
            with clock.stage("prefill"):
                self.draft.start(self.text[len(shown) - len(prompt) :], self.target.capacity, self.temperature)
            while len(self.text) < limit:
                tokens, done = self._iterate(clock, limit)
                yield tokens
                if done:
                    return
        finally:
            clock.close()

    def _iterate(self, clock: Clock, limit: int) -> tuple[list[int], bool]:
        report, position = self.report, len(self.text)
        shape = self._shape(limit - position)
        with clock.stage("draft"):
            tree, grown = self._tree(shape)
        with clock.stage("verify"):
            offsets = torch.arange(len(tree.tokens), device=tree.tokens.device)
            step = self.target.nodes(tree.tokens, tree.depths, offsets, tree.ancestors)
            before = self._hidden
            verdict, path = self._judge(tree, grown, step.logits[0], step.hidden)
            self.target.keep(path, len(verdict.path))
        report.iterations += 1
        report.verified += len(tree.tokens)
        if shape is not None:
            report.drafted += 1
            report.shapes[shape.width, shape.depth] += 1
            report.accepted += len(verdict.path) - 1
        if self.watch is not None:
            self.watch(Iteration(shape, tree, verdict, before, position))
        count, done = self.stopping.cut(self.text, verdict.tokens)
        tokens = verdict.tokens[:count]
        if not done:
            if shape is None:
                self.draft.extend(verdict.tokens)
            else:
                self.draft.commit(grown[path], verdict.tokens)
        self.text.extend(tokens)
        report.tokens += count
        return tokens, done

    # -- the tree ----------------------------------------------------------------------------------------------------
    def _shape(self, remaining: int) -> Shape | None:
        shape = self.selector.next(self._survival)
        if shape is None or remaining <= 1:
            return None
        depth = min(shape.depth, remaining - 1)  # deeper nodes could never be part of the text
        return Shape(shape.width, depth, min(shape.verify, 1 + shape.width * depth))

    def _tree(self, shape: Shape | None) -> tuple[TokenTree, Tensor]:
        """The nodes to verify, and their ids in the grown tree."""
        device = self.target.device
        if shape is None:
            root = TokenTree.from_paths(self.text[-1], [], 1, device=device)
            return root, root.depths  # its one id is 0
        plan = self.plan()
        if isinstance(self.draft, ModelDraft):
            self.draft.plan = plan
        grown = self.draft.grow(shape.width, shape.depth, self.selector.calibration)
        values = prune.values(grown)
        count = min(shape.verify, len(grown.tokens))
        if plan.prune == "tree" or grown.tokens.device != device:
            expected = self._read(prune.expected(values))
            live = sum(b > a for a, b in zip([0.0, *expected], expected, strict=False))
            count = min(max(1, live), self.selector.verify(expected, shape))
        ids = prune.keep(values, count)
        tree = grown.select(ids)
        return (
            (tree, ids) if ids.device == device else (tree.to(device), ids.to(device))
        )  # copied text is made on the host

    # -- the verdict -------------------------------------------------------------------------------------------------
    def _judge(self, tree: TokenTree, grown: Tensor, logits: Tensor, hidden: Tensor | None) -> tuple[Verdict, Tensor]:
        """The verdict, and its path as ids of ``tree`` on the device."""
        if not self.verifier.static:
            verdict = self.verifier.walk(tree, logits, self.text)
            self.report.reads += 1
            self._remember(hidden, verdict.path[-1])
            path = torch.tensor(verdict.path, device=tree.tokens.device)
            if self._learns(tree):
                drawn = torch.tensor(verdict.tokens, device=path.device)
                ranks, firsts = self._ranks(grown[path], drawn).tolist(), tree.firsts.tolist()
                self._learn(verdict, ranks, tree.parents.tolist(), tree.edges.tolist(), firsts)
            return verdict, path
        drawn = self.verifier.drawn(tree, logits, self.text)
        found = self.verifier.accept(tree, drawn)
        if isinstance(self.draft, ModelDraft) and self.draft.plan.head and len(tree.tokens) > 1:
            self.draft.head_ahead(grown[found.last], found.bonus)
        size = len(found.path)
        packed = [found.count[None], found.path, found.tokens]
        learns = self._learns(tree)
        if learns:
            visited = grown[found.path.clamp_max(size - 1)]
            micro = (tree.edges.clamp_min(-100.0) * MICRO).long()
            packed += [self._ranks(visited, found.tokens), tree.parents, micro, tree.firsts.long()]
        if hidden is not None and (self.predict is not None or self.watch is not None):
            self._hidden = hidden[0, found.last].clone()
            if self.predict is not None:
                packed.append((self.predict(self._hidden) * MICRO).long())
        numbers = self._read(torch.cat(packed))
        count = numbers[0]
        parts = [numbers[1 + i * size : 1 + (i + 1) * size] for i in range(6 if learns else 2)]
        verdict = Verdict(parts[0][: count + 1], parts[1][: count + 1])
        if learns:
            self._learn(
                verdict, parts[2][: count + 1], parts[3], [n / MICRO for n in parts[4]], list(map(bool, parts[5]))
            )
        if self.predict is not None and hidden is not None:
            self._survival = [n / MICRO for n in numbers[1 + len(parts) * size :]]
        return verdict, found.path[: count + 1]

    def _read(self, tensor: Tensor) -> list[Any]:
        """The one place where the host waits for the device."""
        self.report.reads += self.draft.needs_model or tensor.device.type == "cuda"
        return tensor.tolist()

    def _remember(self, hidden: Tensor | None, node: int) -> None:
        """Keep the hidden state that a depth predictor reads, and ask it."""
        if hidden is None or (self.predict is None and self.watch is None):
            return
        self._hidden = hidden[0, node].clone()
        if self.predict is not None:
            self._survival = self.predict(self._hidden).tolist()

    # -- learning ----------------------------------------------------------------------------------------------------
    def _learns(self, tree: TokenTree) -> bool:
        return len(tree.tokens) > 1

    def _ranks(self, visited: Tensor, drawn: Tensor) -> Tensor:
        """For grown nodes, the draft's rank of the token that the target drew: -1: none, -2: nothing was drafted."""
        candidates = self.draft.ranks()
        if candidates is None:  # copied text has no ranks
            return torch.full_like(visited, -1)
        rows = candidates[visited]
        same = rows == drawn[: len(rows), None]
        rank = torch.where(same.any(1), same.int().argmax(1), -1)
        return torch.where(rows[:, 0] < 0, -2, rank)

    def _learn(
        self, verdict: Verdict, ranks: list[int], parents: list[int], edges: list[float], firsts: list[bool]
    ) -> None:
        """Tell the selector how the draft fared at each visited node."""
        on_path = set(verdict.path)
        offered = [n for n in range(1, len(parents)) if parents[n] in on_path and edges[n] > -99.0]
        if self.draft.ranks() is None:
            seen: list[int | None] = [0] * (len(verdict.path) - 1)
            seen += [None] if any(parents[n] == verdict.path[-1] for n in offered) else []
        else:
            seen = [None if rank == -1 else rank for rank in ranks if rank != -2]
        self.selector.observe(
            seen, [edges[n] for n in offered], [firsts[n] for n in offered], [n in on_path for n in offered]
        )
