"""Where drafted trees come from: a smaller model, or the text itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ygglight.engines.decode import Decoder, UnsupportedModel, check_tree_support, why_unsupported
from ygglight.engines.yggdrasil.calibration import Calibration
from ygglight.engines.yggdrasil.config import StagePlan
from ygglight.engines.yggdrasil.tree import Growth, TokenTree


class Draft(Protocol):
    """What the loop asks of a draft. The text is always one token longer than what the target has seen: the root."""

    name: str
    costs_nothing: bool
    needs_model: bool

    def start(self, text: Sequence[int], capacity: int, temperature: float) -> None:
        """Forget the last text and take in a new one, root included."""

    def grow(self, width: int, depth: int, calibrate: Calibration | None) -> TokenTree:
        """A tree on the root."""

    def commit(self, path: Tensor, tokens: Sequence[int]) -> None:
        """The nodes ``path`` (ids in the grown tree, root first) were accepted; ``tokens`` are those after the root,
        the bonus token last."""

    def extend(self, tokens: Sequence[int]) -> None:
        """The text grew by ``tokens`` without a tree."""

    def ranks(self) -> Tensor | None:
        """Drafted candidates of each node of the last tree in order of rank, int64 ``[N, ranks]``, -1 where none."""


class ModelDraft:
    """A causal LM of the target's vocabulary, grown as an equal-growth tree.

    Its KV cache holds the text without ``pending``: the tokens that its next head pass takes in, the root last.

    Args:
        model: The draft. vocabulary: of the target: drafted ids stay below it. plan: stages ahead of time.
    """

    needs_model, costs_nothing = True, False

    def __init__(self, model: nn.Module, vocabulary: int, *, compile: bool = False) -> None:
        self.model, self.vocabulary, self.compile = model, vocabulary, compile
        self.name = type(model).__name__
        self.plan = StagePlan()
        self.decoder: Decoder | None = None
        self._pending: list[int] = []
        self._growth: dict[tuple[int, int], Growth] = {}
        self._grown: Growth | None = None
        self._run = 0  # nodes of the grown tree whose keys and values are there (a prefix of the ids), root included
        self._temperature = 1.0
        self._head: Tensor | None = None  # logits after the root, when they were computed ahead of time

    def start(self, text: Sequence[int], capacity: int, temperature: float) -> None:
        """Forget the last text; the prompt is run through the draft with the first head pass."""
        if self.decoder is None or self.decoder.capacity < capacity:
            self.decoder = Decoder(self.model, capacity, compile=self.compile)
        self.decoder.reset()
        self._pending, self._temperature, self._head = list(text), temperature, None

    def grow(self, width: int, depth: int, calibrate: Calibration | None) -> TokenTree:
        """Head pass, then ``depth - 1`` passes of ``width`` nodes, and a tail pass if the plan has one."""
        decoder = self.decoder
        assert decoder is not None and self._pending
        growth = self._growth.get((width, depth))
        if growth is None:
            with torch.inference_mode(
                False
            ):  # its buffers are written in later runs, perhaps outside of inference mode
                growth = self._growth[width, depth] = Growth(width, depth, device=decoder.device)
        root = self._pending[-1]
        growth.start(root)
        logits = self._head
        if logits is None:
            logits = decoder.append(torch.tensor(self._pending, device=decoder.device)).logits[0]
        self._head = None
        growth.step(self._log_probabilities(logits), calibrate)
        for _ in range(depth - 1):
            growth.step(self._log_probabilities(self._expand(growth)), calibrate)
        self._run = 1 + width * (depth - 1)
        if self.plan.tail:
            self._expand(growth)
            self._run += width
        self._grown = growth
        return growth.tree

    def _expand(self, growth: Growth) -> Tensor:
        """Run the newest nodes; the root is committed already, so node i lies i - 1 slots after the text."""
        assert self.decoder is not None
        tree, rows = growth.tree, growth.frontier
        step = self.decoder.nodes(tree.tokens[rows], tree.depths[rows] - 1, rows - 1, tree.ancestors[rows][:, 1:])
        return step.logits[0]

    def _log_probabilities(self, logits: Tensor) -> Tensor:
        scores = logits[:, : self.vocabulary].float()
        return torch.log_softmax(scores if self._temperature == 1.0 else scores / self._temperature, dim=-1)

    def head_ahead(self, last: Tensor, bonus: Tensor) -> None:
        """Run the bonus token as one more node below the deepest accepted one, before the host knows either.

        Args:
            last: int64 ``[]``, id of the deepest accepted node in the grown tree. bonus: int64 ``[]``, the token.
        """
        assert self.decoder is not None and self._grown is not None
        tree = self._grown.tree
        count = len(tree.tokens)
        row = torch.cat([tree.ancestors[last][1:], tree.ancestors.new_ones(1)])[None]
        offset = torch.full((1,), count - 1, device=row.device)
        step = self.decoder.nodes(bonus[None], tree.depths[last][None], offset, row)
        self._head = step.logits[0].clone()  # a recorded graph's output is overwritten by its next replay

    def commit(self, path: Tensor, tokens: Sequence[int]) -> None:
        """Keep the keys and values of the accepted nodes; what has none waits for the next head pass."""
        decoder = self.decoder
        assert decoder is not None and self._grown is not None
        accepted = len(tokens) - 1
        if self._head is not None:
            # Every accepted node was run, and the bonus token after them: nothing is pending but its successors.
            count = len(self._grown.tree.tokens)
            offsets = torch.cat([path[1 : accepted + 1] - 1, path.new_full((1,), count - 1)])
            decoder.keep(offsets, accepted + 1)
            self._pending = [tokens[-1]]
            return
        held = accepted if self.plan.tail else self._held(path, accepted)
        decoder.keep(path[1:] - 1, held)
        self._pending = list(tokens[held:])

    def _held(self, path: Tensor, accepted: int) -> int:
        """Accepted nodes that were run, without a tail pass. Only the deepest can be one of the last drafted; on a GPU
        this is not looked up (a host read): it is run again, which writes the same keys and values."""
        if accepted and (path.device.type != "cpu" or int(path[accepted]) >= self._run):
            return accepted - 1
        return accepted

    def extend(self, tokens: Sequence[int]) -> None:
        """Take in tokens that were not drafted."""
        if self._head is not None:  # then the root went through the draft ahead of time, and is in its cache
            self._pending, self._head = [], None
        self._pending.extend(tokens)

    def ranks(self) -> Tensor | None:
        """Candidates of the expanded nodes."""
        return None if self._grown is None else self._grown.candidates


class LookupDraft:
    """Copies from the text: where its last tokens occurred before, what followed is drafted again. Needs no model.

    Each earlier occurrence of the last ``n`` tokens (longest ``n`` first, newest occurrence first) gives one path;
    paths are merged to a tree. How likely a path goes on is learnt for each length of match as the text grows.

    Args:
        longest: longest match looked for. shortest: shortest that counts.
    """

    name, needs_model, costs_nothing = "lookup", False, True

    def __init__(self, longest: int = 5, shortest: int = 2) -> None:
        if not 1 <= shortest <= longest:
            raise ValueError(f"shortest={shortest} and longest={longest} do not make a range of match lengths")
        self.longest, self.shortest = longest, shortest
        self.plan = StagePlan()
        self._text: list[int] = []
        self._seen: dict[tuple[int, ...], list[int]] = {}
        # (accepted, offered) first tokens by length of match, with a prior that longer matches are safer.
        self._counts = {n: [2.0 * n / (n + 2), 2.0] for n in range(shortest, longest + 1)}
        self._offered: dict[int, int] = {}

    def start(self, text: Sequence[int], capacity: int, temperature: float) -> None:
        """Index the text."""
        self._text, self._seen = [], {}
        self.extend(text)

    def extend(self, tokens: Sequence[int]) -> None:
        """Index what was added."""
        for token in tokens:
            self._text.append(token)
            end = len(self._text)
            for n in range(self.shortest, min(self.longest, end) + 1):
                self._seen.setdefault(tuple(self._text[end - n :]), []).append(end)

    def _rate(self, n: int) -> float:
        accepted, offered = self._counts[n]
        return min(0.99, accepted / offered)

    def grow(self, width: int, depth: int, calibrate: Calibration | None) -> TokenTree:
        """At most ``width`` paths of at most ``depth`` tokens."""
        text, end = self._text, len(self._text)
        paths: list[list[int]] = []
        scores: list[list[float]] = []
        self._offered = {}
        for n in range(min(self.longest, end), self.shortest - 1, -1):
            for position in reversed(self._seen.get(tuple(text[end - n :]), [])[:-1]):
                path = text[position : position + depth]
                if not path or any(path == other[: len(path)] for other in paths):
                    continue
                # Each further token that goes well lengthens the match.
                steps = [math.log(self._rate(min(self.longest, n + i))) for i in range(len(path))]
                paths.append(path)
                scores.append(steps)
                self._offered.setdefault(path[0], n)
                if len(paths) == width:
                    break
            if len(paths) == width:
                break
        return TokenTree.from_paths(text[-1], paths, 1 + width * depth, scores=scores)

    def commit(self, path: Tensor, tokens: Sequence[int]) -> None:
        """Learn from what was accepted, and index it."""
        for token, n in self._offered.items():
            self._counts[n][0] += token == tokens[0]
            self._counts[n][1] += 1
        self._offered = {}
        self.extend(tokens)

    def ranks(self) -> Tensor | None:
        """A copied path has no ranked candidates."""
        return None


def make_draft(draft: Any, vocabulary: int, *, compile: bool = False) -> Draft:
    """The draft that a user named.

    Args:
        draft: "lookup", a causal LM, or a :class:`Draft`. vocabulary: size of the target's.

    Raises:
        ValueError: the draft's vocabulary is another one, or it cannot be run over a tree. TypeError: it is none of
            these.
    """
    if draft == "lookup":
        return LookupDraft()
    if isinstance(draft, nn.Module):
        check_draft(draft, vocabulary)
        _prove(draft)
        return ModelDraft(draft, vocabulary, compile=compile)
    if hasattr(draft, "grow") and hasattr(draft, "commit"):
        return draft  # type: ignore[no-any-return]
    raise TypeError(f"draft={draft!r} is neither 'lookup' nor a causal language model")


def check_draft(draft: nn.Module, vocabulary: int) -> None:
    """Raise if the make of a model rules it out as a draft; costs nothing.

    Args:
        draft: The model. vocabulary: Size of the target's.

    Raises:
        ValueError: its vocabulary is another one, or it cannot be run over a tree.
    """
    reason = why_unsupported(draft)
    if reason is not None:
        raise _unfit(reason)
    check_vocabulary(draft, vocabulary)


def _prove(draft: nn.Module) -> None:
    try:
        check_tree_support(draft)
    except UnsupportedModel as error:
        raise _unfit(str(error)) from error


def _unfit(reason: str) -> ValueError:
    return ValueError(f"the draft cannot be used: {reason}: take another one, or draft='lookup'")


PADDING = 1024
"""Embeddings are padded to round numbers, differently in models of one family (Qwen: 151,936 and 152,064)."""


def check_vocabulary(draft: nn.Module, vocabulary: int) -> None:
    """Raise if the draft's vocabulary cannot be the target's; sizes may differ by padding only.

    Raises:
        ValueError: names both sizes.
    """
    config: Any = draft.config
    size = int(config.get_text_config(decoder=True).vocab_size)
    if abs(size - vocabulary) >= PADDING or (size != vocabulary and min(size, vocabulary) < 8 * PADDING):
        raise ValueError(
            f"the draft has a vocabulary of {size} tokens, the target of {vocabulary}: they must share a tokenizer: "
            "use a draft of the same family, draft='lookup', or distil one: recipe yggdrasil/fit_draft.yaml"
        )
