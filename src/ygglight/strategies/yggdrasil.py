"""YggdrasilStrategy: generation inside predict, validation and test steps by tree speculation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from ygglight.engines.yggdrasil.drafts import check_draft
from ygglight.engines.yggdrasil.generate import TreeGenerate
from ygglight.engines.yggdrasil.predictor import DepthPredictor
from ygglight.engines.yggdrasil.report import Report
from ygglight.strategies.draft_files import load_draft
from ygglight.strategies.generating import GeneratingStrategy


class YggdrasilStrategy(GeneratingStrategy):
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

    name: ClassVar[str] = "yggdrasil"

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
        super().__init__(progress, enabled, accelerator, checkpoint_io, precision_plugin)
        self._options: dict[str, Any] = {
            "tree": tree, "plan": plan, "max_depth": max_depth, "max_width": max_width, "max_verify": max_verify,
            "predictor": predictor, "log": log, "max_tokens": max_tokens, "compile": compile,
        }  # fmt: skip
        TreeGenerate("lookup", **self._options)  # raises on bad numbers before anything is loaded
        self._draft, self._draft_dtype = draft, draft_dtype

    def _make_methods(self, named: Mapping[str, Any]) -> dict[str, Any]:
        """A tree with its draft for each model, or for those that ``draft`` names.

        Raises:
            ValueError: a draft does not fit its model, or belongs to none.
        """
        return {name: self._method(named[name], draft) for name, draft in self._drafts(named).items()}

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
        return TreeGenerate(draft, **self._options)

    @property
    def report(self) -> Report:
        """What was generated, over all models."""
        total = Report()
        for method in self._methods.values():
            total.add(method.report)
        return total
