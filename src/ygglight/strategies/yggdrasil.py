"""YggdrasilStrategy: generation inside predict, validation and test steps by tree speculation."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from ygglight.compat.generation import generation_models
from ygglight.engines.yggdrasil.drafts import check_draft
from ygglight.engines.yggdrasil.generate import TreeGenerate, routed
from ygglight.engines.yggdrasil.predictor import DepthPredictor
from ygglight.engines.yggdrasil.report import Report
from ygglight.strategies.base import OneDeviceStrategy
from ygglight.strategies.draft_files import load_draft

log = logging.getLogger(__name__)


class YggdrasilStrategy(OneDeviceStrategy):
    """Same text, sooner: ``generate`` drafts a tree of tokens and verifies it in one pass of the model.

    Inside each predict, validation and test step, and nowhere else, ``generate`` of every causal language model of
    transformers in the LightningModule goes through the tree (Yggdrasil, arXiv 2512.23858). Greedy text is that of
    plain ``generate``, sampled text has its distribution. Training steps are not touched; of the validation inside a
    fit no cache is left over.

    Args:
        draft: What drafts: ``lookup`` copies from the text and needs no model; a directory, .gguf file or packaged name
            of a smaller model with the same tokenizer (make one with the recipe ``yggdrasil/fit_draft.yaml``); or a
            model. A mapping of attribute name to any of these gives each generation model of the module its own.
        tree: ``auto`` measures this machine and chooses the tree by what is accepted; or fixed numbers
            ``{width: 4, depth: 4, verify: 12}``.
        plan: ``auto``, or the stages to run ahead of time: ``{tail: true, head: true, prune: fixed}``.
        max_depth: Deepest tree that ``auto`` tries.
        max_width: Its widest.
        max_verify: Most nodes that are verified at once.
        predictor: Directory of a depth predictor (recipe ``yggdrasil/fit_depth_predictor.yaml``).
        log: Directory to which every iteration is written, to fit a depth predictor from.
        max_tokens: Longest text, prompt and answer together, which bounds the KV cache. Default: what each call asks
            for.
        draft_dtype: Of a draft that is loaded here; by default that of the model.
        compile: Run model and draft through ``torch.compile``.
        progress: Count tokens in a progress bar; default: where the Trainer has one.
        enabled: ``false`` leaves everything to transformers, and says so in the table.
        accelerator: Set by the Trainer.
        checkpoint_io: Set by the Trainer.
        precision_plugin: Set by the Trainer.
    """

    resident: ClassVar[bool] = True

    def __init__(
        self,
        draft: Any = "lookup",
        tree: str | dict[str, int] = "auto",
        plan: str | dict[str, Any] = "auto",
        max_depth: int = 8,
        max_width: int = 8,
        max_verify: int = 64,
        predictor: str | None = None,
        log: str | None = None,
        max_tokens: int | None = None,
        draft_dtype: str | None = None,
        compile: bool = False,
        progress: bool | None = None,
        enabled: bool = True,
        accelerator: Any = None,
        checkpoint_io: Any = None,
        precision_plugin: Any = None,
    ) -> None:
        super().__init__(accelerator=accelerator, checkpoint_io=checkpoint_io, precision_plugin=precision_plugin)
        self._options: dict[str, Any] = {
            "tree": tree, "plan": plan, "max_depth": max_depth, "max_width": max_width, "max_verify": max_verify,
            "predictor": predictor, "log": log, "max_tokens": max_tokens, "compile": compile,
        }  # fmt: skip
        TreeGenerate("lookup", **self._options)  # raises on bad numbers before anything is loaded
        self._draft, self._draft_dtype = draft, draft_dtype
        self._progress, self._enabled = progress, enabled
        self._methods: dict[str, TreeGenerate] = {}
        self._models: dict[str, Any] = {}
        self._bar: Any = None
        self._told = self._fits = False

    # -- setting up --------------------------------------------------------------------------------------------------
    def setup(self, trainer: Trainer) -> None:
        """Find the generation models and load their drafts.

        Raises:
            TypeError: there is no generation model. ValueError: a draft does not fit its model.
        """
        super().setup(trainer)
        self._models, self._methods, self._told = {}, {}, False
        if not self._enabled:
            return
        self._fits = trainer.state.fn == TrainerFn.FITTING
        module: Any = self.lightning_module
        named = {name: m for name, m in module.named_modules() if any(m is g for g in generation_models(module))}
        if not named:
            if self._fits:
                return  # nothing to speed up, but then fit did not ask for it
            raise TypeError(
                f"{type(module).__name__} holds no causal language model of transformers, so there is no `generate` to "
                "speed up: use another strategy, or load the model before predict starts (in configure_model)"
            )
        for name, draft in self._drafts(named).items():
            self._models[name] = named[name]
            self._methods[name] = self._method(named[name], draft)
        if self._shows_progress(trainer):
            from tqdm.auto import tqdm

            self._bar = tqdm(desc="tokens", unit=" tokens", position=1, leave=False)

    def _drafts(self, named: Mapping[str, nn.Module]) -> dict[str, Any]:
        if not isinstance(self._draft, Mapping):
            return dict.fromkeys(named, self._draft)
        found: dict[str, Any] = {}
        for key, draft in self._draft.items():
            matches = [key] if key in named else [name for name in named if name.startswith(f"{key}.")]
            if not matches:
                raise ValueError(f"draft names {key!r}, but the generation models here are: {', '.join(named)}")
            found |= dict.fromkeys(matches, draft)
        return found

    def _method(self, model: Any, draft: Any) -> TreeGenerate:
        if isinstance(draft, str | Path) and draft != "lookup":
            draft = load_draft(str(draft), model, self._draft_dtype, self.lightning_module)
        if isinstance(draft, nn.Module):
            check_draft(draft, int(model.config.get_text_config(decoder=True).vocab_size))
            draft = draft.to(next(model.parameters()).device).eval()
        predictor = self._options["predictor"]
        if predictor is not None:  # the engine reads it, too; here a wrong one is found before the first step
            hidden = int(model.config.get_text_config(decoder=True).hidden_size)
            DepthPredictor.load(predictor).check(hidden, predictor)
        method = TreeGenerate(draft, **self._options)
        method.on_tokens = self._count
        return method

    def _shows_progress(self, trainer: Trainer) -> bool:
        if self._progress is not None:
            return self._progress
        bar = trainer.progress_bar_callback
        return not self._fits and bar is not None and bool(getattr(bar, "is_enabled", True))

    def _count(self, tokens: int) -> None:
        if self._bar is not None:
            self._bar.update(tokens)

    # -- the steps ---------------------------------------------------------------------------------------------------
    @contextmanager
    def _generating(self) -> Iterator[None]:
        if not self._methods:
            yield
            return
        with _all(routed([self._models[name]], method) for name, method in self._methods.items()):
            yield

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """The module's, with ``generate`` by the tree."""
        with self._generating():
            return super().predict_step(*args, **kwargs)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """The module's, with ``generate`` by the tree."""
        with self._generating():
            return super().validation_step(*args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """The module's, with ``generate`` by the tree."""
        with self._generating():
            return super().test_step(*args, **kwargs)

    def on_validation_end(self) -> None:
        """Inside a fit, give the caches back: training needs the memory."""
        if self._fits:
            for method in self._methods.values():
                method.release()
        super().on_validation_end()

    # -- the end -----------------------------------------------------------------------------------------------------
    @property
    def report(self) -> Report:
        """What was generated, over all models."""
        total = Report()
        for method in self._methods.values():
            total.add(method.report)
        return total

    def teardown(self) -> None:
        """Say what was done; give the caches back."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        if not self._told:
            self._told = True
            for name, method in self._methods.items():
                if method.report.generations or method.report.fallbacks:
                    rank_zero_info(f"yggdrasil, {name}:\n{method.report.table()}")
                method.release()
            if not self._enabled:
                rank_zero_info("yggdrasil: off (enabled=False): transformers generated everything")
        if torch.cuda.is_available() and self.root_device.type == "cuda":
            torch.cuda.empty_cache()
        super().teardown()


@contextmanager
def _all(contexts: Iterator[Any]) -> Iterator[None]:
    from contextlib import ExitStack

    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield
