"""The tiny trained Mixtral that other tests build on has learnt, and its routes have structure."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from ygglight.modules.routing import Routing, RoutingStatistics

from .trained import TOP_K, held_out, tiny_trained_moe


def routing_of(model: Any) -> tuple[Routing, float]:
    """The routes on held-out text, and bits a byte there."""
    tokens = held_out()
    statistics = RoutingStatistics(TOP_K)
    with torch.no_grad():
        out = model(tokens, output_router_logits=True, use_cache=False)
    statistics.add(out.router_logits, torch.ones_like(tokens))
    loss = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    return statistics.result(), float(loss) / math.log(2)


def test_it_reads_and_routes_for_real() -> None:
    model = tiny_trained_moe()
    routing, bits = routing_of(model)
    assert bits < 3.7, "a byte of English; 8 knows nothing, and 4.5 the letters' frequencies alone"
    assert routing.decided
    means = routing.summary()
    assert means["reuse"] < 0.8 * means["chance"], "neighbouring letters are not alike, and so are their experts"
    for layer in model.model.layers:
        layer.mlp.gate.weight.data.zero_()
    assert not routing_of(model)[0].decided


def test_each_caller_has_one_of_its_own() -> None:
    first, second = tiny_trained_moe(), tiny_trained_moe()
    first.model.layers[0].mlp.experts.down_proj.data.zero_()
    assert float(second.model.layers[0].mlp.experts.down_proj.detach().abs().max()) > 0
    block = second.model.layers[0].mlp
    assert block.experts.config is second.config and not block.gate._forward_hooks, "nothing of the training is left"
