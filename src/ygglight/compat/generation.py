"""How transformers' ``generate`` hands over to a decoding method, and what it expects back; written for 5.17."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "generation_models", "hugging_face_loop", "inputs_besides_tokens", "lost_streamer", "output_wishes", "padded_rows",
    "stored_mode", "through", "wrap_output",
]  # fmt: skip


def generation_models(module: nn.Module) -> list[nn.Module]:
    """The causal LMs with a ``generate`` of transformers' inside a module, innermost objects (no peft wrappers)."""
    from transformers import GenerationMixin, PreTrainedModel

    return [m for m in module.modules() if isinstance(m, PreTrainedModel) and isinstance(m, GenerationMixin)]


def through(model: Any, method: Callable[..., Any]) -> Callable[..., Any]:
    """A ``generate`` for one model that decodes by ``method``, and takes everything that transformers' own does.

    In 5.17 a callable ``custom_generate`` loses the tokenizer, the streamer and the assistant on the way
    (``_extract_generation_mode_kwargs``): calls with a streamer or an assistant are left to transformers, and stop
    strings are made into a criterion here.

    Args:
        model: A generation model. method: In the form of ``custom_generate``.
    """
    original = model.generate  # bound; a wrapper that the user put on the model itself stays in the way
    names = list(inspect.signature(type(model).generate).parameters)[1:]

    @functools.wraps(original)
    def generate(*args: Any, **kwargs: Any) -> Any:
        kwargs = dict(zip(names, args, strict=False)) | kwargs
        theirs = next(
            (k for k in ("streamer", "assistant_model", "custom_generate") if kwargs.get(k) is not None), None
        )
        config = kwargs.get("generation_config") or model.generation_config
        if theirs is None and (kwargs.get("prompt_lookup_num_tokens") or config.prompt_lookup_num_tokens):
            theirs = "prompt_lookup_num_tokens"
        if theirs is None:  # modes whose code transformers fetches, unless it is told of another method
            modes = ("penalty_alpha", "dola_layers")
            theirs = next((name for name in modes if kwargs.get(name) or getattr(config, name, None)), None)
        if theirs is not None:
            notify = getattr(method, "_fall_back", None)
            if notify is not None:
                notify(f"generate(..., {theirs}=...)", 1)
            return original(**kwargs)
        return original(**_stop_strings(model, kwargs) | {"custom_generate": method})

    return generate


def _stop_strings(model: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    from transformers import StoppingCriteriaList, StopStringCriteria

    config = kwargs.get("generation_config")
    strings = kwargs.get("stop_strings") or (config or model.generation_config).stop_strings
    if not strings:
        return kwargs
    tokenizer = kwargs.get("tokenizer")
    if tokenizer is None:
        raise ValueError("generate was given stop strings and no tokenizer to read them with: add tokenizer=...")
    kwargs = dict(kwargs, stop_strings=None)
    if config is not None and config.stop_strings:
        import copy

        kwargs["generation_config"] = copy.deepcopy(config)
        kwargs["generation_config"].stop_strings = None
    criteria = StoppingCriteriaList(kwargs.pop("stopping_criteria", None) or ())
    kwargs["stopping_criteria"] = StoppingCriteriaList([*criteria, StopStringCriteria(tokenizer, strings)])
    return kwargs


def lost_streamer() -> Any:
    """The streamer of the ``generate`` call that runs our method, or None.

    In 5.17 a callable ``custom_generate`` is not handed the streamer, and a streamer that is never ended lets its
    reader wait for ever. It is a local of the frame that called, and nowhere else.
    """
    from transformers import GenerationMixin

    code = inspect.unwrap(GenerationMixin.generate).__code__
    frame = sys._getframe(1)
    for _ in range(4):
        if frame is None:
            return None
        if frame.f_code is code:
            return frame.f_locals.get("streamer")
        frame = frame.f_back  # type: ignore[assignment]
    return None


def stored_mode(config: Any) -> str | None:
    """Name of the decoding mode that a config asks for, if transformers does not hold its code any more."""
    from transformers.generation.utils import GENERATION_MODES_MAPPING

    mode = config.get_generation_mode(None)
    return str(mode.value) if "/" in GENERATION_MODES_MAPPING[mode] else None


def hugging_face_loop(
    model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any, **kwargs: Any
) -> Any:
    """The decoding loop that transformers would have run without a ``custom_generate``, on what it has prepared."""
    from transformers.generation.utils import GENERATION_MODES_MAPPING

    mode = generation_config.get_generation_mode(kwargs.get("assistant_model"))
    method = getattr(type(model), GENERATION_MODES_MAPPING[mode])
    return method(
        model,
        input_ids,
        logits_processor=logits_processor,
        stopping_criteria=stopping_criteria,
        generation_config=generation_config,
        **kwargs,
    )


def inputs_besides_tokens(model: Any, kwargs: dict[str, Any]) -> list[str]:
    """Names of what the loop would feed the model that does not follow from the tokens and the padding.

    Args:
        model: A generation model. kwargs: What ``generate`` hands to its loop besides the tokens.
    """
    names = [k for k, v in kwargs.items() if isinstance(v, Tensor) and k not in ("attention_mask", "position_ids")]
    positions, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
    if positions is not None:  # generate makes some where the user gave none
        count = positions.shape[-1]
        usual = torch.arange(count, device=positions.device) if mask is None else mask.bool().long().cumsum(-1) - 1
        seen = torch.ones_like(usual, dtype=torch.bool) if mask is None else mask.bool()
        if usual.shape[-1] != count or bool(((positions != usual) & seen).any()):
            names.append("position_ids")
    # Prompt tuning (peft) puts a method on the model that adds inputs of its own; so may a class of the user's.
    made_by = getattr(model.prepare_inputs_for_generation, "__func__", None)
    usual_one = type(model).prepare_inputs_for_generation
    if made_by is not usual_one or not usual_one.__module__.startswith("transformers."):
        names.append("prepare_inputs_for_generation")
    return names


def output_wishes(config: Any) -> list[str]:
    """Outputs besides the tokens that a generation config asks for."""
    if not config.return_dict_in_generate:
        return []
    names = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
    return [name for name in names if getattr(config, name, False)]


def padded_rows(input_ids: Tensor, texts: list[list[int]], config: Any) -> Tensor:
    """Prompts and the new tokens of each row, padded on the right as transformers pads finished rows."""
    longest = max(map(len, texts))
    pad = config._pad_token_tensor
    fill = int(pad.flatten()[0]) if pad is not None else 0
    rows = [text + [fill] * (longest - len(text)) for text in texts]
    return torch.cat([input_ids, torch.tensor(rows, device=input_ids.device)], dim=1)  # int64, as its loop gives


def wrap_output(sequences: Tensor, config: Any) -> Any:
    """The tokens, or the output object that ``return_dict_in_generate`` asks for."""
    if not config.return_dict_in_generate:
        return sequences
    from transformers.generation.utils import GenerateDecoderOnlyOutput

    return GenerateDecoderOnlyOutput(sequences=sequences)
