"""Samples, batches, and a DataLoader that a resumed run continues in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler

from ygglight.data.tokens import Spans

__all__ = ["Blocks", "Documents", "ResumableLoader", "ShuffledSampler", "pad_batch"]

IGNORE = -100


class Blocks(Dataset[dict[str, Tensor]]):
    """Full blocks of tokens, documents running on from one to the next.

    Args:
        spans: The tokens.
        block_size: Tokens a block; a last part-block is dropped.
    """

    def __init__(self, spans: Spans, block_size: int) -> None:
        self.spans, self.block_size = spans, block_size

    def __len__(self) -> int:
        return len(self.spans) // self.block_size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)  # ends `for sample in dataset`
        ids = torch.from_numpy(self.spans.read(index * self.block_size, self.block_size).astype(np.int64))
        return {"input_ids": ids, "labels": ids}


class Documents(Dataset[dict[str, Tensor]]):
    """One document a sample, a long one cut into several.

    Args:
        spans: The tokens, a stretch a document.
        block_size: Most tokens a sample.
    """

    def __init__(self, spans: Spans, block_size: int) -> None:
        self.tokens = spans.tokens
        cuts = [
            (begin, min(block_size, start + length - begin))
            for start, length in zip(spans.starts.tolist(), spans.lengths.tolist(), strict=True)
            for begin in range(start, start + length, block_size)
        ]
        # A lone token has nothing to predict.
        self.cuts = np.asarray([cut for cut in cuts if cut[1] > 1], dtype=np.int64).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self.cuts)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        begin, length = self.cuts[index]
        ids = torch.from_numpy(self.tokens[begin : begin + length].astype(np.int64))
        return {"input_ids": ids, "labels": ids}


def pad_batch(samples: list[dict[str, Tensor]], pad_token_id: int) -> dict[str, Tensor]:
    """Join samples of different lengths, padded at the right; padding is masked and has label -100.

    Args:
        samples: From :class:`Documents`.
        pad_token_id: Any token.
    """
    ids = [sample["input_ids"] for sample in samples]
    longest = max(map(len, ids))

    def pad(tensors: list[Tensor], value: int) -> Tensor:
        return torch.stack([torch.nn.functional.pad(t, (0, longest - len(t)), value=value) for t in tensors])

    return {
        "input_ids": pad(ids, pad_token_id),
        "labels": pad([sample["labels"] for sample in samples], IGNORE),
        "attention_mask": pad([torch.ones_like(t) for t in ids], 0),
    }


class ShuffledSampler(DistributedSampler):
    """An endless stream of samples, one permutation after another, of which each pass takes an epoch's worth.

    A permutation depends on the seed and its number alone. Every pass goes on where the last one stopped, wherever
    that was, because Lightning's own count of epochs cannot place a resumed run: a run that ended by ``max_steps`` is
    counted as a whole epoch, and one that is resumed at the end of an epoch takes one more step in it (2.6.6).
    Being a DistributedSampler, it is left alone by Lightning.

    Args:
        dataset: The samples.
        batch_size: Samples a batch on this rank; what does not fill one is left out of a permutation.
        seed: Of the permutations.
        world_size: Number of ranks that share the samples.
        rank: Which of them this is.
    """

    def __init__(self, dataset: Dataset, batch_size: int, seed: int = 0, world_size: int = 1, rank: int = 0) -> None:
        super().__init__(dataset, num_replicas=world_size, rank=rank, seed=seed, drop_last=world_size > 1)
        self._length = self.num_samples // batch_size * batch_size
        if not self._length:
            each = f" for each of {world_size} devices" if world_size > 1 else ""
            raise ValueError(
                f"{self.num_samples} samples{each} do not fill one batch of {batch_size}: lower batch_size"
            )
        #: Where in the stream the next pass begins.
        self.start = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        number, offset = divmod(self.start, self._length)
        return iter((self._permutation(number) + self._permutation(number + 1))[offset : offset + self._length])

    def _permutation(self, number: int) -> list[int]:
        self.epoch = number
        return list(super().__iter__())[: self._length]

    def set_epoch(self, epoch: int) -> None:
        """Do nothing; see the class.

        Args:
            epoch: Lightning's count.
        """


class ResumableLoader(DataLoader):
    """A shuffling DataLoader whose place in the stream Lightning saves with a checkpoint and restores.

    Args:
        dataset: The samples.
        batch_size: Samples a batch on this rank.
        sampler: Their order.
        **kwargs: For DataLoader.
    """

    def __init__(self, dataset: Dataset, *, batch_size: int, sampler: Sampler, **kwargs: Any) -> None:
        super().__init__(dataset, batch_size=batch_size, sampler=sampler, **kwargs)
        self._done = 0

    def __iter__(self) -> Any:
        if isinstance(self.sampler, ShuffledSampler):  # Lightning puts another in for `overfit_batches`
            self.sampler.start = self._done * (self.batch_size or 1)
        for batch in super().__iter__():
            self._done += 1  # counted here and not in the sampler, which workers read ahead
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the batches handed out so far, for Lightning's checkpoint."""
        return {"batches": self._done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after the batches that were handed out before.

        Args:
            state: From :meth:`state_dict`.
        """
        self._done = state["batches"]
