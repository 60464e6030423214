"""One layer of latent attention in a transformers model, a step of one token: its own code against absorbed weights.

All besides the attention half is next to nothing (a vocabulary of 32, an MLP of 16), and every variant runs it. The
cache is transformers' static one, of just as many slots as there are tokens, so that the model's own code expands none
in vain; its content is random. ``transformers`` attends by sdpa, ``transformers-eager`` by plain products; ``torch`` is
the same model under :class:`~ygglight.engines.decode.fused.FusedAttention`, as the callback installs it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Goal, Incorrect, Options, Report, Variant, measure, paired_ratio
from ygglight.engines.decode.fused import FusedAttention
from ygglight.kernels.cluster_decode.testing import cast_weights
from ygglight.kernels.testing import rms_ratio

LAYERS: dict[str, dict[str, int]] = {
    "tiny-latent-layer": {
        "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16, "v_head_dim": 32, "kv_lora_rank": 64,
    },
    "deepseek-v2-lite-layer": {
        "hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 16, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "v_head_dim": 128, "kv_lora_rank": 512,
    },
}  # fmt: skip
CONTEXTS = (1024, 4096)
DTYPES = (torch.float32, torch.bfloat16)
ALLOWED, ALLOWED_EAGER, EXACT = 1.5, 3.0, 1e-5
"""Error against the same weights in float64: at most so many times that of the model's own code with sdpa, or this."""


def run(name: str, context: int, dtype: torch.dtype, options: Options, columns: tuple[str, ...]) -> Report:
    """One report: the layer's own code by sdpa and eager, and absorbed.

    Args:
        name: of the layer. context: committed tokens. dtype: of weights and cache. options: from the command line.
        columns: of the table.
    """
    case = f"{name}, batch 1, context {context}, 1 layer in a model, {str(dtype).removeprefix('torch.')}"
    print(f"clusterfusion: {case}", flush=True)
    with torch.no_grad():
        results = measure(_variants(_model(LAYERS[name], context, dtype), context, dtype), options)
    report = Report("clusterfusion", case, results, ("transformers", "transformers-eager"), columns)
    for result in results:
        if result.ok:
            result.metrics["us_per_layer"] = result.p50 * 1e6
    report.goals.extend(_goals(report))
    return report


def _goals(report: Report) -> Iterator[Goal]:
    plain = [each for each in report.results if each.ok and each.name != "torch"]
    ours = report.get("torch")
    if not plain or ours is None or not ours.ok:
        yield Goal("faster than the model's own code", None)
        return
    best = min(plain, key=lambda result: result.p50)
    gain = paired_ratio(best.seconds, ours.seconds)
    yield Goal(f"torch {gain:.1f}x over {best.name}; goal above 1", gain > 1)


def _model(sizes: dict[str, int], context: int, dtype: torch.dtype) -> Any:
    """With weights that make attention look at some tokens more than at others."""
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    torch.manual_seed(0)
    config = DeepseekV2Config(
        **sizes, q_lora_rank=None, vocab_size=32, intermediate_size=16, num_hidden_layers=1, first_k_dense_replace=1,
        max_position_embeddings=2 * context, initializer_range=2 * sizes["hidden_size"] ** -0.5,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=None, pad_token_id=None,
        attn_implementation="sdpa",
    )  # fmt: skip
    return cast_weights(DeepseekV2ForCausalLM(config).requires_grad_(False).eval(), dtype)


def _step(model: Any, context: int, dtype: torch.dtype) -> Callable[[], Tensor]:
    """One token behind a random text; each call writes the same slot again."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=context + 1)
    first, token = torch.tensor([[1]]), torch.tensor([[5]])
    model(input_ids=first, past_key_values=cache)  # allocates
    layer: Any = cache.layers[0]
    generator = torch.Generator().manual_seed(1)
    for states in (layer.keys, layer.values):
        states[:, :, :context].copy_(torch.randn(states[:, :, :context].shape, generator=generator).to(dtype))

    def step() -> Tensor:
        layer.cumulative_length.fill_(context)
        if hasattr(layer, "cumulative_length_int"):
            layer.cumulative_length_int = context
        return model(input_ids=token, past_key_values=cache).logits[0, -1]  # type: ignore[no-any-return]

    return step


def _variants(model: Any, context: int, dtype: torch.dtype) -> Iterator[Variant]:
    expected = _step(cast_weights(copy.deepcopy(model), torch.float64), context, dtype)()
    step = _step(model, context, dtype)
    plain = rms_ratio(step(), expected)

    def variant(
        name: str, around: Callable[[], AbstractContextManager[Any]], check: Callable[[], None] = lambda: None,
        allowed: float = ALLOWED,
    ) -> Variant:  # fmt: skip
        def prepare() -> dict[str, Any]:
            with around():
                error = rms_ratio(step(), expected)
            check()
            limit = max(allowed * plain, EXACT)
            if not error <= limit:
                raise Incorrect(f"{error:.2g} of the rms off, the model's own code {plain:.2g}, allowed {limit:.2g}")
            return {"error": error, "unfused_error": plain}

        return Variant(name, step, prepare, around)

    yield variant("transformers", nullcontext)
    yield variant("transformers-eager", lambda: _Attending(model, "eager"), allowed=ALLOWED_EAGER)
    fused = FusedAttention(model)

    def ran() -> None:
        if not fused.calls:
            raise Incorrect(f"it did not run: {fused.reasons[0]}")

    yield variant("torch", lambda: fused, ran)


class _Attending(AbstractContextManager[None]):
    """The model with another of transformers' attention functions."""

    def __init__(self, model: Any, name: str) -> None:
        self._model, self._name = model, name

    def __enter__(self) -> None:
        self._model.set_attn_implementation(self._name)

    def __exit__(self, *exception: object) -> None:
        self._model.set_attn_implementation("sdpa")
