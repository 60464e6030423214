"""TextData: text files, or prompts, as a LightningDataModule for a causal language model."""

from __future__ import annotations

import functools
from typing import Any

import lightning.pytorch as L
import numpy as np
from torch.utils.data import DataLoader, Dataset

from ygglight.compat import transformers as hf
from ygglight.data.assets import check_model, resolve_model
from ygglight.data.documents import find_sources, read_prompts
from ygglight.data.loading import Blocks, Documents, ResumableLoader, ShuffledSampler, pad_batch
from ygglight.data.tokens import Spans, TokenFile, tokenize

__all__ = ["TextData"]


class TextData(L.LightningDataModule):
    """Text to train a causal language model on, and prompts for it to continue.

    Text is tokenised once and memory-mapped from the cache after that. Validation text is held out by whole documents
    (or, if there are few, from the end). A run resumed from a checkpoint goes on in the middle of the epoch.

    Args:
        path: A .txt or .jsonl file (perhaps .gz), a directory, a glob, a list of these, or the name of a packaged text
            (``gsm8k``, ``gsm8k-test``, ``shakespeare``).
        prompts: What to predict on: a list of prompts, or a file or packaged text that holds one a line or row
            (``gsm8k-test``, ``human-eval``).
        tokenizer: As ``model`` of CausalLM; by default the tokenizer of the module that is trained.
        block_size: Tokens a sample; without packing, the most.
        batch_size: Samples a batch on each device.
        field: Which field of a .jsonl row is the text (``text``), or the prompt (``prompt``).
        template: How a .jsonl row becomes text instead, with fields in braces: ``"{question}\\n{answer}"``.
        packing: Join the documents, each closed by the end token, and cut full blocks. Without it every sample is one
            document, and batches are padded.
        val_fraction: Part of the tokens that is held out for validation; 0 for none.
        max_tokens: Use the first so many tokens only.
        num_workers: Processes that load batches. Loading is cheap, so 0 is seldom the bottleneck.
        seed: Of the shuffling and of the choice of validation text.
    """

    def __init__(
        self,
        path: str | list[str] | None = None,
        prompts: str | list[str] | None = None,
        tokenizer: str | None = None,
        block_size: int = 512,
        batch_size: int = 4,
        field: str | None = None,
        template: str | None = None,
        packing: bool = True,
        val_fraction: float = 0.05,
        max_tokens: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        p = self._p
        if not path and not prompts:
            raise ValueError("TextData needs a path (to train) or prompts (to predict)")
        for name, least in {"block_size": 2, "batch_size": 1, "num_workers": 0, "max_tokens": 1}.items():
            if p[name] is not None and p[name] < least:
                raise ValueError(f"{name}={p[name]} must be at least {least}")
        if not 0 <= val_fraction < 1:
            raise ValueError(f"val_fraction={val_fraction} must be at least 0 and below 1")
        if tokenizer is not None:
            check_model(tokenizer)
        self._sources = find_sources(path, field, template) if path else []
        self._tokenizer: Any = None
        self._train: Dataset | None = None
        self._val: Dataset | None = None
        self._prompts: list[str] | None = None

    @property
    def tokenizer(self) -> Any:
        """The tokenizer: the one named, or that of the module in training."""
        if self._tokenizer is None:
            name = self._p.tokenizer
            if name is None and self.trainer is not None and self.trainer.lightning_module is not None:
                name = self.trainer.lightning_module.hparams.get("model")
            if not isinstance(name, str):
                raise ValueError("TextData does not know which tokenizer to use: set `tokenizer` (a model's directory)")
            self._tokenizer = hf.load_tokenizer(resolve_model(name))
        return self._tokenizer

    @property
    def _p(self) -> Any:
        """The constructor's arguments; Lightning types them as a mapping, which hides their names."""
        return self.hparams

    def prepare_data(self) -> None:
        """Tokenise into the cache, on one process a machine."""
        if self._sources and self._is_training():
            self._tokens()

    def setup(self, stage: str | None = None) -> None:
        """Open the tokens and split them, or read the prompts.

        Args:
            stage: ``fit``, ``validate``, ``test``, ``predict`` or None for all that is there.
        """
        if stage in (None, "predict") and self._p.prompts and self._prompts is None:
            self._prompts = read_prompts(self._p.prompts, self._p.field)
        if stage != "predict" and self._sources and self._train is None:
            self._split(self._tokens())

    def _is_training(self) -> bool:
        trainer = self.trainer
        return trainer is None or trainer.state.fn is None or trainer.state.fn.value != "predict"

    def _tokens(self) -> TokenFile:
        return tokenize(self._sources, self.tokenizer, self._p.max_tokens)

    def _split(self, tokens: TokenFile) -> None:
        p, total = self._p, len(tokens)
        least = p.block_size * (2 if p.val_fraction else 1) if p.packing else 2
        if total < least:
            both = " (training and validation need one each)" if p.val_fraction else ""
            raise ValueError(
                f"the text has {total} tokens, too few for blocks of {p.block_size}{both}: give more text, lower "
                f"block_size{', set val_fraction=0' if p.val_fraction else ''} or set packing=false"
            )
        train, val = split(tokens, p.val_fraction, p.block_size if p.packing else 1, p.seed)
        samples = Blocks if p.packing else Documents
        self._train, self._val = samples(train, p.block_size), samples(val, p.block_size) if val else None
        if not len(self._train):
            raise ValueError(f"val_fraction={p.val_fraction} leaves nothing to train on: lower it or give more text")

    def train_dataloader(self) -> DataLoader:
        """Return the shuffled batches of this rank."""
        if self._train is None:
            raise ValueError("TextData was given prompts alone: to train it needs a path")
        world, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        p = self._p
        sampler = ShuffledSampler(self._train, p.batch_size, p.seed, world, rank)
        return ResumableLoader(self._train, batch_size=p.batch_size, sampler=sampler, **self._options())

    def val_dataloader(self) -> DataLoader | list:
        """Return the held-out batches, in order; nothing if ``val_fraction`` is 0."""
        return self._in_order(self._val) if self._val is not None else []

    def test_dataloader(self) -> DataLoader:
        """Return all of the held-out text, or all text if none is held out."""
        samples = self._val if self._val is not None else self._train
        if samples is None:
            raise ValueError("TextData was given prompts alone: to test it needs a path")
        return self._in_order(samples)

    def predict_dataloader(self) -> DataLoader:
        """Return the prompts in lists of ``batch_size``."""
        if self._prompts is None:
            raise ValueError("TextData was given a path alone: to predict it needs prompts")
        prompts: Any = self._prompts  # a list is all that a DataLoader needs
        return DataLoader(prompts, batch_size=self._p.batch_size, collate_fn=list)

    def _in_order(self, samples: Dataset) -> DataLoader:
        return DataLoader(samples, batch_size=self._p.batch_size, **self._options())

    def _options(self) -> dict[str, Any]:
        p = self._p
        options = {"num_workers": p.num_workers, "persistent_workers": p.num_workers > 0}
        if not p.packing:
            options["collate_fn"] = functools.partial(pad_batch, pad_token_id=self.tokenizer.pad_token_id)
        return options


def split(tokens: TokenFile, fraction: float, least: int, seed: int) -> tuple[Spans, Spans | None]:
    """Hold out part of the tokens: randomly chosen whole documents or, if there are fewer than 20, the end.

    Args:
        tokens: All of them.
        fraction: How much to hold out; 0 gives None.
        least: Hold out at least so many tokens.
        seed: Of the choice.

    Returns:
        The tokens to train on and those held out.
    """
    starts = np.concatenate([[0], tokens.ends[:-1]])
    lengths = tokens.ends - starts
    if not fraction:
        return Spans(tokens.tokens, starts, lengths), None
    wanted = max(least, int(len(tokens) * fraction))
    if len(starts) < 20:
        cut = len(tokens) - wanted
        before = np.clip(cut - starts, 0, lengths)
        train, val = (starts, before), (starts + before, lengths - before)
    else:
        order = np.random.default_rng(seed).permutation(len(starts))
        count = int(np.searchsorted(np.cumsum(lengths[order]), wanted)) + 1
        held = np.zeros(len(starts), dtype=bool)
        held[order[:count]] = True
        train, val = (starts[~held], lengths[~held]), (starts[held], lengths[held])
    kept = [(s[n > 0], n[n > 0]) for s, n in (train, val)]
    return Spans(tokens.tokens, *kept[0]), Spans(tokens.tokens, *kept[1])
