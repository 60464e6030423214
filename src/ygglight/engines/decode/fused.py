"""The attention half of a model's decoder layers as one fused block, for the steps of one token a sequence."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from ygglight.compat.attention import text_config
from ygglight.compat.decoder_layers import attention_name, has_hooks
from ygglight.compat.transformers import decoder_layers, unwrap
from ygglight.engines.decode import attention
from ygglight.engines.decode.latent import LatentParts, is_latent, recognise_latent
from ygglight.engines.decode.places import Lengths, Place, place
from ygglight.engines.decode.recognise import LayerParts, NotFusable, recognise
from ygglight.kernels.cluster_decode import BlockSpec, Choice, LatentSpec, choose_path, decode_block

_WITHOUT_SOFTCAP = "sdpa"
"""Transformers' sdpa drops a soft cap (5.17); what replaces it has to do as it does."""
_KNOWN = (_WITHOUT_SOFTCAP, "eager", attention.NAME)
_PROMPT = 6
# A wrong rotary or norm moves outputs by tens of per cent, other kernels by far less.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.03}


def fusable(layer: nn.Module) -> str | None:
    """Why the make of a decoder layer rules the fused block out, or None. Costs next to nothing.

    Args:
        layer: One of a model's decoder layers.
    """
    try:
        _parts_of(layer)
    except NotFusable as error:
        return str(error)
    return None


def _parts_of(layer: nn.Module) -> LayerParts | LatentParts:
    return recognise_latent(layer) if is_latent(layer) else recognise(layer)


class FusedAttention:
    """Runs the attention half of a model's layers by `decode_block`, while it is installed; use it as a context.

    Layers are taken by their make, and each is proven: one token runs through it both ways, and what comes out has to
    agree. Weights are read from the modules at each step, and shared. Only steps of one token a sequence with a cache
    change, in evaluation mode and without gradients; prompts, training, compiled and odd calls run the model's own
    code, as do other threads meanwhile. Do not copy a model while it is installed: the copy would run the original's.

    Args:
        model: A causal language model of transformers, or of peft around one.
        block: What to run, in the form of `decode_block`, for layers of latent attention with a `LatentSpec`.

    Raises:
        torch.OutOfMemoryError: there is no room to try it; so with MemoryError and OSError.
    """

    def __init__(self, model: Any, *, block: Callable[..., Tensor] = decode_block) -> None:
        self._layers: list[_FusedLayer] = []
        self.reasons: list[str | None] = []
        """For each decoder layer why it is left as it is, or None where it is fused."""
        lengths = Lengths()
        for index, layer in enumerate(decoder_layers(model)):
            try:
                self._layers.append(_FusedLayer(index, layer, _parts_of(layer), lengths, block))
                self.reasons.append(None)
            except NotFusable as error:
                self.reasons.append(str(error))
        self._installed = False
        if self._layers:
            self._prove(unwrap(model))

    @property
    def fused(self) -> int:
        """How many layers run fused."""
        return len(self._layers)

    @property
    def choices(self) -> list[Choice]:
        """Which implementation each fused layer runs by default and why, in the order of the layers."""
        weights = [layer.parts.norm.weight for layer in self._layers]
        return [
            choose_path(layer.spec, weight.dtype, weight.device)  # type: ignore[arg-type, union-attr]
            for layer, weight in zip(self._layers, weights, strict=True)
        ]

    @property
    def paths(self) -> list[str]:
        """The names of :attr:`choices`."""
        return [choice.path for choice in self.choices]

    @property
    def calls(self) -> int:
        """How often any layer ran fused, on the host's side: a CUDA graph counts once, when it is recorded."""
        return sum(layer.calls for layer in self._layers)

    def install(self) -> None:
        """Take the place of the layers' forwards; twice is as once."""
        if not self._installed:
            for layer in self._layers:
                layer.install()
        self._installed = True

    def remove(self) -> None:
        """Put everything back as it was."""
        if self._installed:
            for layer in self._layers:
                layer.remove()
        self._installed = False

    def __enter__(self) -> FusedAttention:
        """See :meth:`install`."""
        self.install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """See :meth:`remove`."""
        self.remove()

    def _prove(self, model: Any) -> None:
        """Run a short prompt and one more token, of which each layer tries its block; drop those that differ.

        That token is put at the last position there is: some models scale queries by where a token is (Ministral 3).
        """
        config = text_config(model)
        last = max(_PROMPT, (getattr(config, "max_position_embeddings", None) or 0) - 1)
        cache = DynamicCache(config=config)
        tokens = (torch.arange(_PROMPT + 1, device=model.device) * 7 + 3)[None] % int(config.vocab_size)
        self.install()
        try:
            with evaluating(model), torch.no_grad(), torch.autocast(model.device.type, enabled=False):
                model(input_ids=tokens[:, :_PROMPT], past_key_values=cache, use_cache=True)
                for layer in self._layers:
                    layer.why_different = "the model does not run it one token at a time with a cache it knows"
                    layer.trying = True
                position = torch.full_like(tokens[:, _PROMPT:], last)
                model(input_ids=tokens[:, _PROMPT:], position_ids=position, past_key_values=cache, use_cache=True)
        except (torch.OutOfMemoryError, MemoryError, OSError):
            raise  # says nothing of the layers, and must not be remembered
        except Exception as error:  # whatever a model that is made otherwise stumbles over
            for layer in self._layers:
                layer.why_different = f"the model cannot be tried ({type(error).__name__}: {_first_line(error)})"
        finally:
            self.remove()
        for layer in self._layers:
            layer.trying = False
            self.reasons[layer.index] = layer.why_different
        self._layers = [layer for layer in self._layers if layer.why_different is None]


class _FusedLayer:
    """One decoder layer, its norm and its attention, with their forwards replaced."""

    def __init__(
        self,
        index: int,
        layer: nn.Module,
        parts: LayerParts | LatentParts,
        lengths: Lengths,
        block: Callable[..., Tensor],
    ) -> None:
        self.index, self.layer, self.parts = index, layer, parts
        self.spec: BlockSpec | LatentSpec = parts.spec
        self.cache_index = int(getattr(parts.attention, "layer_idx", index))
        self.calls = 0
        self.trying = False
        self.why_different: str | None = None
        self._lengths, self._block = lengths, block
        self._modules = [layer, parts.norm, parts.attention]
        self._forwards: list[Callable[..., Any]] = [module.forward for module in self._modules]
        self._before: list[Callable[..., Any] | None] = []
        self._inside, self._children = list(parts.modules()), list(parts.attention.children())
        self._below = [module for module in self._inside if module not in self._modules]
        # .attended, while this thread's layer runs around a result; .own, to keep what its attention gives
        self._now = threading.local()

    def install(self) -> None:
        replaced = (self._layer_forward, self._norm_forward, self._attention_forward)
        self._before = [vars(module).get("forward") for module in self._modules]
        for module, original, new in zip(self._modules, self._forwards, replaced, strict=True):
            module.forward = functools.wraps(original)(functools.partial(new))

    def remove(self) -> None:
        for module, before in zip(self._modules, self._before, strict=True):
            vars(module).pop("forward", None)
            if before is not None:  # of another one, installed around this
                module.forward = before

    # -- the forwards ------------------------------------------------------------------------------------------------
    def _norm_forward(self, *args: Any, **kwargs: Any) -> Any:
        if getattr(self._now, "attended", None) is None:
            return self._forwards[1](*args, **kwargs)
        return args[0] if args else kwargs["hidden_states"]  # the block has a norm of its own

    def _attention_forward(self, *args: Any, **kwargs: Any) -> Any:
        attended = getattr(self._now, "attended", None)
        if attended is not None:
            return attended[:, None], None
        output, own = self._forwards[2](*args, **kwargs), getattr(self._now, "own", None)
        if own is not None:
            own.append(_tensor_of(output).clone())  # the layer may add to it in place
        return output

    def _layer_forward(self, *args: Any, **kwargs: Any) -> Any:
        found = self._place(args, kwargs)
        if found is None:
            return self._forwards[0](*args, **kwargs)
        if self.trying:
            return self._try(found, *args, **kwargs)
        attended, keys, values = self._attend(self.spec, found, args[0], kwargs)
        found.finish(keys, values)
        self.calls += 1
        return self._around(attended, *args, **kwargs)

    def _around(self, attended: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The layer's own forward around a result of the block."""
        self._now.attended = attended
        try:
            return self._forwards[0](*args, **kwargs)
        finally:
            self._now.attended = None

    # -- the block ---------------------------------------------------------------------------------------------------
    def _place(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Place | None:
        """Where this step's keys and values go; None if the step is not one for the block."""
        if len(args) != 1 or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        hidden, attention_module = args[0], self.parts.attention
        angles = self.parts.angles(kwargs.get("position_embeddings"), self.spec)
        if hidden.dim() != 3 or hidden.shape[1] != 1:
            return None
        if angles is None:
            if self.trying:
                self.why_different = "the model gives it no angles of a rotary embedding, or none of its size"
            return None
        config = getattr(attention_module, "config", None)
        wants_weights = kwargs.get("output_attentions") or getattr(config, "output_attentions", False)
        if attention_module.training or wants_weights:
            return None
        if torch.is_autocast_enabled(hidden.device.type) or attention_name(attention_module) not in _KNOWN:
            return None
        if list(attention_module.children()) != self._children:  # an adapter was put in
            return None
        if any("forward" in vars(module) for module in self._below):
            return None
        cos, weight = angles[0], self.parts.norm.weight
        fits = cos.dim() == 3 and cos.shape[0] in (1, len(hidden)) and cos.shape[1] == 1
        if not fits or hidden.dtype is not weight.dtype or hidden.device != weight.device or has_hooks(self._inside):
            return None
        found = place(kwargs.get("past_key_values"), self.cache_index, kwargs.get("attention_mask"), len(hidden))
        if found is None or found.keys.dtype is not hidden.dtype:
            return None
        if not self.parts.fits(found.keys, found.values):
            if self.trying:
                self.why_different = "its cache holds something else than the keys and values of such a layer"
            return None
        return found

    def _attend(
        self, spec: BlockSpec | LatentSpec, found: Place, hidden: Tensor, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch, count, parts = len(hidden), found.keys.shape[2], self.parts
        if isinstance(spec, BlockSpec) and attention_name(parts.attention) == _WITHOUT_SOFTCAP:
            spec = replace(spec, softcap=None)
        angles = parts.angles(kwargs["position_embeddings"], spec)
        assert angles is not None  # `_place` has seen to it
        cos, sin = (part[:, 0].expand(batch, -1) for part in angles)  # one row of angles may be for all sequences
        stored = found.store is not None
        new_keys, new_values = parts.new(hidden) if found.store is None else map(parts.cached, found.store)
        lengths = self._lengths(kwargs["past_key_values"], batch, count, hidden.device, fixed=stored)
        attended = self._block(
            hidden[:, 0], parts.weights(), spec, cos, sin, parts.cached(found.keys), parts.cached(found.values),
            lengths, new_keys, new_values, mask=found.mask, slots=found.slots,
        )  # fmt: skip
        return attended, parts.states(new_keys), parts.states(new_values)

    def _try(self, found: Place, *args: Any, **kwargs: Any) -> Any:
        """Run the step both ways and note whether they agree; what the model sees is its own result.

        The block is compared with the layer's own attention, and the layer around that attention with the whole: behind
        it the least difference may send a token to other experts.
        """
        before, position = args[0].clone(), kwargs["position_embeddings"]
        tried = [(spec, *self._attend(spec, found, before, kwargs)) for spec in self.parts.candidates(position)]
        own: list[Tensor] = []
        self._now.own = own
        try:
            output = self._forwards[0](*args, **kwargs)
        finally:
            self._now.own = None
        if len(own) != 1 or own[0].shape != before.shape[:2] + own[0].shape[2:]:
            self.why_different = "its attention does not run once a step with one output a token"
            return output
        attended, cached = own[0][:, 0], kwargs["past_key_values"].layers[self.cache_index]
        exact = (attended, cached.keys[:, :, -1:], cached.values[:, :, -1:])
        errors = [(max(map(_off, results, exact)), spec) for spec, *results in tried]
        error, self.spec = min(errors, key=lambda entry: entry[0])
        allowed = _TOLERANCE.get(before.dtype, 0.0)
        self.why_different = None
        if not error <= allowed:
            self.why_different = f"the block gives other results than the layer ({error:.1%} off)"
            return output
        around = _tensor_of(self._around(attended, before.clone(), **kwargs))
        error = _off(around - before, _tensor_of(output) - before)
        if not error <= allowed:
            self.why_different = f"the layer gives other results around its attention alone ({error:.1%} off)"
        return output


def _off(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over that of what is expected; infinite where there is no such number."""
    if actual.shape != expected.shape:
        return math.inf
    difference, size = float((actual - expected).float().norm()), float(expected.float().norm())
    error = difference / size if size else difference
    return math.inf if math.isnan(error) else error  # `min` and `max` keep or drop a NaN by where it stands


def _tensor_of(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; then each module as it was.

    Args:
        model: Any.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
