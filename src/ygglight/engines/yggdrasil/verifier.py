"""From the target's logits over a tree to the tokens that are accepted: node by node on a CPU, all at once on a GPU.

Both follow one rule: at each node draw ONE token from the target's processed distribution; if a child holds it,
descend, else stop and emit it (brief, trap 18). Exact for any tree that does not depend on that draw, greedy or
sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ygglight.engines.decode.drawing import Drawing, sample
from ygglight.engines.decode.processors import NodeProcessors
from ygglight.engines.yggdrasil.tree import TokenTree
from ygglight.engines.yggdrasil.verify import Accepted, accept, walk


@dataclass(frozen=True)
class Verdict:
    """What came of one tree.

    Args:
        path: accepted nodes, the root first, on the host. tokens: what the text grows by: the accepted nodes' tokens
            and the bonus token.
    """

    path: list[int]
    tokens: list[int]


class Verifier(Drawing):
    """Draws and walks.

    Args:
        processors: of the logits. do_sample: draw, or take the best token (lowest index among equals).
        generator: of the draws; None: torch's own. static: all nodes at once with one host read, as on a GPU.
    """

    def __init__(
        self, processors: NodeProcessors, *, do_sample: bool, generator: torch.Generator | None, static: bool
    ) -> None:
        super().__init__(processors, do_sample=do_sample, generator=generator)
        self.static = static

    # -- node by node ------------------------------------------------------------------------------------------------
    def walk(self, tree: TokenTree, logits: Tensor, text: Sequence[int]) -> Verdict:
        """Look at visited nodes only: processors and softmax over a large vocabulary cost milliseconds a row on a CPU.

        Args:
            tree: verified nodes. logits: ``[K, V]``. text: all tokens up to and including the root.
        """
        if not self.processors and not self.do_sample:
            best = logits.argmax(dim=-1).tolist()

            def draw(node: int, path: list[int]) -> int:
                return int(best[node])
        else:

            def draw(node: int, path: list[int]) -> int:
                return self.token(logits[node], torch.tensor([*text, *path], device=logits.device))

        tokens = torch.where(torch.isfinite(tree.scores), tree.tokens, -1)  # no token of the target's meets a dead node
        walked = walk(tokens.tolist(), tree.parents.tolist(), draw)
        return Verdict(list(walked.path), list(walked.tokens))

    # -- all at once -------------------------------------------------------------------------------------------------
    def drawn(self, tree: TokenTree, logits: Tensor, text: Sequence[int]) -> Tensor:
        """The token that the target draws at each node, int64 ``[K]``, without a host read."""
        scores = logits.float()
        if self.processors:
            prefixes, lengths = self._prefixes(tree, text)
            scores = self.processors.rows(logits, prefixes, lengths)
        if not self.do_sample:
            return scores.argmax(dim=-1)
        return sample(torch.softmax(scores, dim=-1), self.generator)

    def accept(self, tree: TokenTree, drawn: Tensor) -> Accepted:
        """The accepted path, on the device."""
        return accept(tree, drawn)

    def _prefixes(self, tree: TokenTree, text: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Each node's own prefix, flushed right, -1 before it: ``[K, len(text) + depths]``, and its length."""
        count, device = len(tree.tokens), tree.tokens.device
        deepest = count  # static: no path is longer than the tree has nodes
        # Node u's token goes to column depth(u) of every row that has u on its path, else to a spare column.
        columns = torch.where(tree.ancestors, tree.depths[None, :], deepest)
        spare = torch.full((count, deepest + 1), -1, dtype=torch.long, device=device)
        paths = spare.scatter(1, columns, tree.tokens[None, :].expand(count, count))[:, :deepest]
        whole = torch.cat([torch.tensor(text[:-1], device=device).expand(count, -1), paths], dim=1)
        lengths = len(text) + tree.depths
        shift = whole.shape[1] - lengths
        index = torch.arange(whole.shape[1], device=device)[None, :] - shift[:, None]
        return torch.where(index >= 0, whole.gather(1, index.clamp_min(0)), -1), lengths
