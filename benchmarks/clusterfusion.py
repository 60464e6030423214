"""ClusterFusion: the attention half of a decode step as one block, against compiled torch in a CUDA graph.

Blocks: the attention half of one layer at the shapes of known models, batch 1 and 4, at several lengths of text.
Several layers with weights and caches of their own run one after the other, so that none finds its weights in L2; on
CUDA all of them are one CUDA graph, for the baselines as well. ``compiled`` is inductor's max-autotune over cuBLAS and
flash attention, the best that torch gives. A fused variant is timed only if its error against float32 is at most 1.5
times that of plain bfloat16. ``roofline`` is the time in which a copy moves the bytes of weights and cache, over the
time.

Layers of latent attention (`clusterfusion_latent.py`): a step of a transformers model that has one, by its own code,
which expands the whole text, and with absorbed weights; on a CPU.

Models: seconds a token of greedy decoding by the decode engine, plain, fused and by measured choice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import clusterfusion_latent as latent
from benchmarks.clusterfusion_blocks import SHAPES, Layer, dense_step, latent_step, make_layer
from benchmarks.harness import (
    BadInput,
    Goal,
    Incorrect,
    Options,
    Report,
    Skip,
    Variant,
    measure,
    paired_ratio,
    quantile,
)
from benchmarks.tree_attention import record
from ygglight.engines.decode import Decoder
from ygglight.kernels.cluster_decode import block_ways
from ygglight.kernels.cluster_decode.mla import LatentSpec
from ygglight.kernels.testing import rms_ratio

COLUMNS = ("us_per_layer", "roofline", "error", "unfused_error", "tpot_ms", "way", "logits_off")
CONTEXTS, BATCHES = (1024, 4096, 16384), (1, 4)
ALLOWED = 1.5
"""Error of a fused block, of that of plain torch in the same dtype; both against float32."""
APPENDED = 4e-3
"""Error of keys and values: half a unit in the last place of bfloat16."""
LOGITS = 0.05
"""Difference of logits, of their rms: two ways of rounding in every layer."""
FUSED = ("split_k", "cluster-1", "cluster-2", "cluster-4", "cluster-8")
DEFAULTS = {
    ("cpu", True): ("tiny", "tiny-latent", "tiny-latent-layer", "tiny-model"),
    ("cpu", False): ("llama3-8b", "deepseek-v2-lite-layer", "smollm2"),
    ("cuda", True): ("llama3-8b", "deepseek-v2-lite", "smollm2"),
    ("cuda", False): ("llama2-7b", "llama3-8b", "deepseek-v2-lite", "smollm2"),
}
MODELS = ("tiny-model", "smollm2")


def run(options: Options) -> list[Report]:
    """One report per shape, batch and length of text, and one per model.

    Args:
        options: from the command line; ``size`` is a shape or a model.
    """
    known = (*SHAPES, *latent.LAYERS, *MODELS)
    if options.size and options.size not in known:
        raise BadInput(f"size {options.size!r}: there are {', '.join(known)}")
    if options.size in latent.LAYERS and options.device != "cpu":
        raise BadInput(f"size {options.size!r} is for a CPU: on a GPU take the blocks, which run inside a graph")
    names = (options.size,) if options.size else DEFAULTS[options.device, options.quick]
    contexts = (64,) if options.device == "cpu" and options.quick else CONTEXTS[:1] if options.quick else CONTEXTS
    reports = []
    for name in names:
        if name in MODELS:
            reports.append(_model(name, options))
        elif name in latent.LAYERS:
            lengths = (64,) if options.quick else latent.CONTEXTS
            reports += [
                latent.run(name, length, dtype, options, COLUMNS) for length in lengths for dtype in latent.DTYPES
            ]
        else:
            batches = BATCHES[:1] if options.quick else BATCHES
            reports += [_blocks(name, batch, context, options) for batch in batches for context in contexts]
    return reports


# -- blocks ------------------------------------------------------------------------------------------------------------
def _blocks(name: str, batch: int, context: int, options: Options) -> Report:
    if options.device == "cuda":
        torch.compiler.reset()  # or it would stop compiling after a few cases
    spec, first = SHAPES[name], make_layer(SHAPES[name], batch, context, options.device, 0)
    count = 2
    if options.device == "cuda":  # twice L2 between two uses of a layer
        count = 1 + max(1, math.ceil(2 * torch.cuda.get_device_properties(0).L2_cache_size / first.moved))
    layers = [first, *(make_layer(spec, batch, context, options.device, seed) for seed in range(1, count))]
    case = f"{name}, batch {batch}, context {context}, {count} layers, bfloat16"
    print(f"clusterfusion: {case}", flush=True)
    with torch.inference_mode():
        results = measure(_variants(spec, layers, options), options)
    report = Report("clusterfusion", case, results, ("eager", "compiled"), COLUMNS)
    copy = report.get("copy")
    for result in results:
        if result.ok:
            result.metrics["us_per_layer"] = result.p50 / count * 1e6
            if copy is not None and copy.ok and result is not copy and options.device == "cuda":
                shares = [c / 2 / s for c, s in zip(copy.seconds, result.seconds, strict=True)]
                result.metrics["roofline"] = quantile(shares, 0.5)
    report.goals.extend(_goals(report))
    return report


def _goals(report: Report) -> Iterator[Goal]:
    compiled, fused = report.get("compiled"), [r for r in report.results if r.ok and r.name in FUSED]
    if compiled is None or not compiled.ok or not fused:
        yield Goal("faster than compiled torch", None)
        return
    best = min(fused, key=lambda result: result.p50)
    gain = paired_ratio(compiled.seconds, best.seconds)
    yield Goal(f"{best.name} {gain:.2f}x over compiled torch; goal above 1", gain > 1)


def _variants(spec: Any, layers: list[Layer], options: Options) -> Iterator[Variant]:
    cuda = options.device == "cuda"
    inner = 20 if cuda else 1
    source = torch.empty(sum(layer.moved for layer in layers), dtype=torch.uint8, device=options.device)
    yield Variant("copy", partial(torch.empty_like(source).copy_, source), inner=inner)
    step = latent_step if isinstance(spec, LatentSpec) else dense_step
    exact = layers[0].exact()
    unfused_error = rms_ratio(layers[0].unfused(step)(), exact[0])
    ways, why = block_ways(torch.device(options.device))

    def variant(name: str, make: Callable[[Layer], Callable[[], Tensor]]) -> Variant:
        calls: list[Callable[[], Tensor]] = []
        running: list[Callable[[], Any]] = []

        def prepare() -> dict[str, Any]:
            if name == "compiled" and not cuda:
                raise Skip("compiled torch in a CUDA graph needs a CUDA device")
            if name in FUSED and name.replace("-", " ") not in ways:
                raise Skip(f"it cannot run here: {why}")
            if name == "split_k" and isinstance(spec, LatentSpec):
                raise Skip("latent attention has no split-K kernels")
            calls.extend(make(layer) for layer in layers)
            metrics = _check(name, calls[0], layers[0], exact, unfused_error)
            running.append(record(lambda: [call() for call in calls]).replay if cuda else lambda: [c() for c in calls])
            return metrics

        return Variant(name, lambda: running[0](), prepare, inner=inner)

    yield variant("eager", lambda layer: layer.unfused(step))
    compiled: Any = torch.compile(step, mode="max-autotune-no-cudagraphs", dynamic=False)
    yield variant("compiled", lambda layer: layer.unfused(compiled))
    for name in FUSED if cuda else ("torch", *FUSED):
        yield variant(name, partial(_fused, name))


def _fused(name: str, layer: Layer) -> Callable[[], Tensor]:
    return layer.fused(name)


def _check(
    name: str, call: Callable[[], Tensor], layer: Layer, exact: tuple[Tensor, ...], unfused_error: float
) -> dict[str, Any]:
    error = rms_ratio(call(), exact[0])
    limit = ALLOWED * unfused_error
    if not error <= limit:
        raise Incorrect(f"{error:.2g} of the rms off, plain bfloat16 {unfused_error:.2g}, allowed {limit:.2g}")
    for mine, theirs in zip(layer.appended(), exact[1:], strict=True):
        off = rms_ratio(mine, theirs)
        # Plain torch rounds before the rotary embedding and after it.
        if not off <= APPENDED and name not in ("eager", "compiled"):
            raise Incorrect(f"what was appended to the cache is {off:.2g} of the rms off, allowed {APPENDED:.2g}")
    return {"error": error, "unfused_error": unfused_error, "moved_bytes": layer.moved}


# -- models ------------------------------------------------------------------------------------------------------------
def _model(name: str, options: Options) -> Report:
    model, tokens, prompt = _load(name, options.device), 16 if options.quick else 128, 64 if options.quick else 1024
    case = f"{name}, {prompt} + {tokens} tokens, batch 1, {str(model.dtype).removeprefix('torch.')}"
    print(f"clusterfusion: {case}", flush=True)
    with torch.inference_mode():
        results = measure(_decoders(model, prompt, tokens, options), options)
    report = Report("clusterfusion", case, results, ("plain", "compiled"), COLUMNS)
    for result in results:
        if result.ok:
            result.metrics["tpot_ms"] = result.p50 / tokens * 1e3
    return report


def _load(name: str, device: str) -> Any:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    if name == "tiny-model":
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.2,
        )  # fmt: skip
        model: Any = LlamaForCausalLM(config)
    else:
        from benchmarks.decode_pairs import SMOLLM2
        from ygglight.compat.transformers import load_causal_lm
        from ygglight.data.assets import resolve_model

        model = load_causal_lm(resolve_model(SMOLLM2))
    return model.to(device, dtype).requires_grad_(False).eval()


def _decoders(model: Any, prompt: int, tokens: int, options: Options) -> Iterator[Variant]:
    """Each decodes anew from behind the same prompt; all are fed the text that the first one wrote."""
    ids = torch.arange(prompt, device=options.device) * 7 % int(model.config.vocab_size)
    text: list[Tensor] = []
    expected: list[Tensor] = []

    def variant(name: str, **how: Any) -> Variant:
        made: list[Decoder] = []

        def step() -> Tensor:
            made[0].crop(prompt)
            for token in text:
                logits = made[0].append(token).logits
            return logits

        def prepare() -> dict[str, Any]:
            if name == "compiled" and options.device != "cuda":
                raise Skip("compiled torch in CUDA graphs needs a CUDA device")
            made.append(Decoder(model, prompt + tokens + 8, **how))
            logits = made[0].append(ids).logits[0, -1]
            found = []
            for number in range(tokens):
                if len(text) <= number:
                    text.append(logits.argmax()[None])
                logits = made[0].append(text[number]).logits[0, -1].clone()
                found.append(logits)
            decision = made[0].single.decision
            metrics: dict[str, Any] = {"way": "plain" if decision is None else decision.way}
            if not expected:
                expected.extend(found)
                return metrics
            off = rms_ratio(torch.stack(found), torch.stack(expected))
            if not off <= LOGITS:
                raise Incorrect(f"logits are {off:.2g} of their rms off plain decoding's, allowed {LOGITS}")
            return metrics | {"logits_off": off}

        return Variant(name, step, prepare)

    yield variant("plain", fused=False)
    yield variant("compiled", compile=True)
    yield variant("fused", fused=True)
    yield variant("auto")
