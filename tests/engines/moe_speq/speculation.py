"""Drafts of every quality for the tiny models, and engines with a given number of slots."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from ygglight.engines.moe_speq.config import STAGING
from ygglight.engines.moe_speq.engine import Engine
from ygglight.engines.moe_speq.generate import MoESpeQGenerate
from ygglight.engines.moe_speq.layout import find_sites


class CopyDraft:
    """The model's own experts once more, with noise on them.

    Args:
        model: Before its experts are taken. noise: As a part of the weights' spread; infinite: weights of its own.
    """

    nbytes = 1 << 16

    def __init__(self, model: Any, noise: float = 0.0) -> None:
        self.calls = 0
        self._modules = [copy.deepcopy(site.module) for site in find_sites(model)]
        draw = torch.Generator().manual_seed(1)
        for module in self._modules:
            for weight in module.parameters():
                other = torch.randn(weight.shape, generator=draw).to(weight.dtype) * weight.std()
                weight.data = other if noise == float("inf") else weight.data + noise * other

    def forward(self, site: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        self.calls += 1
        return self._modules[site.index](hidden, index, weights)


def budget(model: Any, slots: int, draft: Any = None, staging: int = STAGING) -> int:
    sites = find_sites(model)
    return (slots * len(sites) + staging) * sites[0].layout.nbytes + (0 if draft is None else draft.nbytes)


def method(model: Any, slots: int, draft: Any = None, k: Any = 4, **options: Any) -> MoESpeQGenerate:
    """A decoding method whose engine of ``model`` has so many slots a layer, and this draft."""
    options = {"experts": "host", "draft_bits": None if draft is None else 4} | options
    made = MoESpeQGenerate(budget(model, slots, draft), k=k, **options)
    made._engines[model] = Engine(model, made.config, draft=draft)
    assert made._engines[model].split.slots == slots
    return made


def plain(model: Any, ids: Tensor, new: int, **kwargs: Any) -> Tensor:
    return model.generate(ids, do_sample=False, max_new_tokens=new, **kwargs)
