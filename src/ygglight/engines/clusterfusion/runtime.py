"""Fused attention under the causal language models of a module, for as long as it is on."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from ygglight.compat.attention import text_config
from ygglight.engines.clusterfusion.report import ModelReport, table
from ygglight.engines.decode.fused import FusedAttention, evaluating
from ygglight.engines.decode.fusion import PLAIN, Decision, Prepare, Trial, decide, forced, ways_of

log = logging.getLogger(__name__)

Enabled = Literal["auto"] | bool


class ClusterFusionRuntime:
    """Decides for each model how its steps of one token run, and puts that in place between start and stop.

    Args:
        models: Causal language models by name.
        enabled: True: fused, measured or not; "auto": where that measures faster; False: not at all.
        cluster_size: The only number of blocks in a cluster to run; None: what measures fastest.
        context: Tokens of text at which steps are measured.
    """

    def __init__(
        self, models: Mapping[str, nn.Module], enabled: Enabled = "auto", cluster_size: int | None = None,
        context: int = 1024,
    ) -> None:  # fmt: skip
        self._models, self._enabled = dict(models), enabled
        self._cluster_size, self._context = cluster_size, context
        self._decisions: dict[str, Decision] = {}
        self._spent: dict[str, int] = {}

    def start(self) -> None:
        """Install; measure before that, the first time.

        Raises:
            ValueError: it is enabled, and no layer of a model can run fused.
        """
        for name, model in self._models.items():
            if name not in self._decisions:
                decision = self._decisions[name] = self._decide(name, model)
                self._spent[name] = 0 if decision.fused is None else decision.fused.calls
        try:
            for decision in self._decisions.values():
                if decision.fused is not None:
                    decision.fused.install()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Put everything back as it was."""
        for decision in reversed(self._decisions.values()):
            if decision.fused is not None:
                decision.fused.remove()

    def reports(self) -> list[ModelReport]:
        """What became of each model that was decided."""
        return [self._report(name, decision) for name, decision in self._decisions.items()]

    def table(self) -> str:
        """The reports, for people."""
        return table(self.reports())

    def _decide(self, name: str, model: nn.Module) -> Decision:
        if self._enabled is False:
            return Decision(PLAIN, "enabled=False")
        device = next(model.parameters()).device
        if self._enabled is True:
            decision = forced(model, self._cluster_size)
            if decision.fused is None:
                raise ValueError(
                    f"no decoder layer of {name} ({type(model).__name__}) can run fused: {decision.reason}. Set "
                    "enabled='auto' to run it as it is"
                )
            return decision
        ways, reason = ways_of(model, device)
        if not ways:  # before a prompt is run for nothing
            return Decision(PLAIN, reason)
        log.info("ClusterFusion: measuring steps of %s", name)
        with evaluating(model):
            return decide(
                model, device, _generation_step(model, device, self._context), cluster_size=self._cluster_size,
                key={"step": "generate", "context": self._context},
            )  # fmt: skip

    def _report(self, name: str, decision: Decision) -> ModelReport:
        fused = decision.fused
        if fused is None:
            return ModelReport(name, decision.way, decision.reason)
        return ModelReport(name, decision.way, decision.reason, tuple(fused.reasons), fused.calls - self._spent[name])


def _generation_step(model: Any, device: torch.device, context: int) -> Prepare:
    """A step as transformers' ``generate`` runs it: eager, on a cache that grows."""
    config = text_config(model)
    most = getattr(config, "max_position_embeddings", None) or 2 * context
    prompt = torch.arange(min(context, most // 2), device=device)[None] % int(config.vocab_size)
    cache = DynamicCache(config=config)

    def step() -> object:
        with torch.no_grad():
            return model(input_ids=prompt[:, -1:], past_key_values=cache, use_cache=True)

    def prepare(fused: FusedAttention | None) -> Trial:
        if not cache.get_seq_length():
            with torch.no_grad():
                model(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return Trial(step, nullcontext if fused is None else lambda: fused)

    return prepare
