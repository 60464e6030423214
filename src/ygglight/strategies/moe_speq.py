"""MoESpeQStrategy: mixtures of experts whose routed experts do not fit the device, inside predict, validation, test."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from ygglight.engines.memory.sizes import parse_bytes
from ygglight.engines.moe_speq.budget import free_for_experts
from ygglight.engines.moe_speq.config import STAGING, Config
from ygglight.engines.moe_speq.engine import Engine
from ygglight.engines.moe_speq.generate import MoESpeQGenerate
from ygglight.engines.moe_speq.layout import find_sites
from ygglight.engines.moe_speq.report import Report
from ygglight.strategies.generating import GeneratingStrategy


class MoESpeQStrategy(GeneratingStrategy):
    """Runs a Mixture-of-Experts model whose experts do not fit the device: same text, experts on demand and ahead.

    While predict, validate or test runs, the routed experts of every mixture-of-experts model of transformers in the
    LightningModule lie in host memory (or in a file), and a budget of device memory holds those that are used. Where
    that is faster a copy of them in 4 bits drafts the next tokens, and its routes say which experts to fetch while it
    computes (MoE-SpeQ, arXiv 2511.14102). Any forward of the model works, ``generate`` speculates; the text is that of
    the unoffloaded model. On a CPU the budget is of memory, and the experts lie on disk.

    Args:
        expert_budget: Device memory for routed experts, as "8GiB" or in bytes: the draft, the slots of the cache and
            the staging buffers together; several models share it. "auto": what the device has free once the rest of
            the model is there, less a tenth.
        k: Tokens to draft a cycle: ``auto`` measures this machine and chooses as it goes, and has a draft only while
            that is better than a larger cache; or a fixed number, with a draft from the beginning.
        k_max: Most tokens that ``auto`` drafts.
        draft_bits: 4: a copy of the experts in four bits drafts; null: no draft, all memory is cache.
        draft: A file that ``ygglight convert moe-draft`` wrote; null: made by rounding when wanted.
        experts: Where all experts are kept: ``host``, ``disk``, or ``auto`` (host memory beside a GPU, else disk).
        path: Of the file, for experts on disk; by default in ygglight's cache folder.
        drop_cache: Read experts from the disk itself, past the operating system's cache in memory.
        prefetch: Send experts ahead that the draft chose.
        prefetch_cap: Most bytes a cycle to send ahead; null: as many as prove to be used.
        staging: Buffers of one expert each, for experts that find no slot.
        link: ``{bandwidth: bytes a second, latency: seconds a copy}``: slow copies down to another machine's link.
        max_cycle_seconds: ``auto`` drafts so few tokens that a cycle takes no longer; null: any time.
        max_tokens: Longest text, prompt and answer together, which bounds the KV cache. Default: what each call asks
            for.
        progress: Count tokens in a progress bar; default: where the Trainer has one.
        enabled: ``false`` leaves everything to transformers, and says so in the table.
        accelerator: Set by the Trainer.
        checkpoint_io: Set by the Trainer.
        precision_plugin: Set by the Trainer.
    """

    name: ClassVar[str] = "moe_speq"

    def __init__(
        self,
        expert_budget: int | str = "auto",
        k: int | str = "auto",
        k_max: int = 8,
        draft_bits: int | None = 4,
        draft: str | None = None,
        experts: str = "auto",
        path: str | None = None,
        drop_cache: bool = False,
        prefetch: bool = True,
        prefetch_cap: int | str | None = None,
        staging: int = STAGING,
        link: dict[str, float] | None = None,
        max_cycle_seconds: float | None = None,
        max_tokens: int | None = None,
        progress: bool | None = None,
        enabled: bool = True,
        accelerator: Any = None,
        checkpoint_io: Any = None,
        precision_plugin: Any = None,
    ) -> None:
        super().__init__(progress, enabled, accelerator, checkpoint_io, precision_plugin)
        self._budget = expert_budget
        self._options: dict[str, Any] = {
            "k": k, "k_max": k_max, "draft_bits": draft_bits, "draft": draft, "experts": experts, "path": path,
            "drop_cache": drop_cache, "prefetch": prefetch, "prefetch_cap": prefetch_cap, "staging": staging,
            "link": link, "max_cycle_seconds": max_cycle_seconds, "max_tokens": max_tokens,
        }  # fmt: skip
        Config(1 if expert_budget == "auto" else expert_budget, **self._options)  # raises before anything is loaded

    def model_to_device(self) -> None:
        """Take the experts off the model, then move the rest: the whole would not fit.

        Raises:
            ValueError: there is no mixture of experts, or one that cannot be taken, or the budget is too small; or the
                Trainer fits, which needs all experts.
        """
        if self._enabled:
            self._attach()
        super().model_to_device()

    def _attach(self) -> None:
        if self._fits:
            raise ValueError(
                "MoESpeQStrategy runs predict, validate and test, for experts that are not on the device cannot be "
                "trained: fit with another strategy"
            )
        sparse, refusals = {}, []
        for name, model in self._generation_models().items():
            try:
                find_sites(model)
            except ValueError as error:
                refusals.append(error)
            else:
                sparse[name] = model
        if refusals and not sparse:
            raise ValueError(f"MoESpeQStrategy: {refusals[0]}") from refusals[0]
        sizes = {name: sum(s.experts * s.layout.nbytes for s in find_sites(model)) for name, model in sparse.items()}
        total = unserved = sum(sizes.values())
        for name, model in sparse.items():  # each gets its share of one budget
            if self._budget == "auto":
                budget = free_for_experts(model, self.root_device) * sizes[name] // unserved
            else:
                budget = parse_bytes(self._budget) * sizes[name] // total
            unserved -= sizes[name]
            method = self._methods[name] = MoESpeQGenerate(budget, device=str(self.root_device), **self._options)
            method.engine(model)

    def _make_methods(self, named: Mapping[str, Any]) -> dict[str, Any]:
        return self._methods

    @property
    def report(self) -> Report:
        """What was done, over all models."""
        total = Report()
        for method in self._methods.values():
            total.add(method.report)
        return total

    @property
    def methods(self) -> dict[str, Any]:
        """What decodes, by name of the model in the module; after a run, what did."""
        return self._methods

    @property
    def brings_experts(self) -> bool:
        """Whether a model can run whose experts are not in memory, as ``CausalLM(experts="disk")`` makes it."""
        return self._enabled

    @property
    def engines(self) -> dict[str, Engine]:
        """What has the experts, by name of the model in the module; empty outside of a run."""
        if self._told:  # an engine that is asked for now would take the experts once more
            return {}
        return {name: method.engine(self._models[name]) for name, method in self._methods.items()}
