"""Everything that depends on how transformers is made inside; written for 5.17.

transformers takes seconds to import, so it is imported inside the functions. Nothing here reaches a network:
every ``from_pretrained`` is given ``local_files_only=True``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ygglight.compat.extras import require

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "convert_gguf",
    "decoder_layers",
    "linear_head",
    "load_causal_lm",
    "load_config",
    "load_tokenizer",
    "unwrap",
]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide transformers' reports of what it meant to do anyway (bars, dropped layers)."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def load_tokenizer(directory: Path | str) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a directory, with a padding token, without a network.

    Args:
        directory: A Hugging Face model directory.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    except Exception as error:  # transformers raises whatever its parsers raise
        raise ValueError(f"no tokenizer can be loaded from {directory}: {str(error).splitlines()[0]}") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer in {directory} has no end token: set eos_token in its tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        # Padding is always masked, so any token will do.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(directory: Path | str, overrides: dict[str, Any] | None = None) -> PreTrainedConfig:
    """Load a configuration and change some of its fields.

    Args:
        directory: A Hugging Face model directory.
        overrides: New values of fields that are there, e.g. ``{"num_hidden_layers": 4}``.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(directory), local_files_only=True)
    unknown = [name for name in overrides or {} if not hasattr(config, name)]
    if unknown:
        raise ValueError(f"config_overrides names fields that {type(config).__name__} has not: {', '.join(unknown)}")
    for name, value in (overrides or {}).items():
        if name == "num_hidden_layers" and getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:value]  # one entry a layer, and transformers checks the count
        setattr(config, name, value)
    return config


def load_causal_lm(
    directory: Path | str,
    *,
    dtype: torch.dtype | str = torch.float32,
    attention: str = "sdpa",
    overrides: dict[str, Any] | None = None,
    pretrained: bool = True,
    quantization: str | None = None,
    device: torch.device | None = None,
) -> PreTrainedModel:
    """Build a causal language model from a directory.

    Args:
        directory: A Hugging Face model directory.
        dtype: Of the weights; ``auto`` takes what the files say.
        attention: The ``attn_implementation`` of transformers.
        overrides: See :func:`load_config`.
        pretrained: Load the weights, or start from random ones.
        quantization: ``4bit``, ``8bit`` (bitsandbytes, CUDA) or None.
        device: Where to put quantised weights.
    """
    from transformers import AutoModelForCausalLM

    config = load_config(directory, overrides)
    with _quiet():
        if not pretrained:
            dtype = torch.float32 if dtype == "auto" else dtype
            return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
        extra: dict[str, Any] = {}
        if quantization is not None:
            extra = {"quantization_config": _bnb_config(quantization, dtype), "device_map": {"": device}}
        try:
            return AutoModelForCausalLM.from_pretrained(
                str(directory),
                config=config,
                dtype=dtype,
                attn_implementation=attention,
                local_files_only=True,
                use_safetensors=True,  # never a pickle
                **extra,
            )
        except RuntimeError as error:
            if overrides and "mismatch" in str(error):
                raise ValueError(
                    f"config_overrides {overrides} changes the shape of the stored weights: use init='random', or "
                    "override only what leaves shapes alone (num_hidden_layers)"
                ) from error
            raise


def _bnb_config(quantization: str, dtype: torch.dtype | str) -> Any:
    from transformers import BitsAndBytesConfig

    require("bitsandbytes", "bnb")
    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = torch.bfloat16 if isinstance(dtype, str) else dtype
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
    )


def unwrap(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model inside a peft model, or the model itself.

    Args:
        model: A transformers or peft model.
    """
    base = getattr(model, "get_base_model", None)  # peft's
    return base() if callable(base) else model


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Return the repeated blocks of a model, in order.

    Args:
        model: A transformers or peft model.
    """
    names = set(getattr(unwrap(model), "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def linear_head(model: nn.Module) -> tuple[nn.Linear, float | None] | None:
    """Return the output head and its soft cap if the logits are just ``softcap(head(last hidden state))``.

    Some models scale or shift their logits in ``forward``, each by a configuration field of its own. Rather than keep
    a list, the model is asked: its decoder is replaced for one call by a known hidden state, and its logits compared.

    Args:
        model: A transformers or peft model, on any device, not sharded yet.

    Returns:
        None if the logits are anything else (then only the model itself can compute them).
    """
    hf = unwrap(model)
    head, decoder = hf.get_output_embeddings(), hf.get_decoder()
    if type(head) is not nn.Linear or decoder is hf or getattr(hf.config, "output_router_logits", False):
        return None
    softcap = getattr(hf.config, "final_logit_softcapping", None)
    if head.weight.is_meta:
        return head, softcap
    hidden = torch.linspace(-1, 1, head.in_features, device=head.weight.device).sin().repeat(1, 2, 1)
    with torch.no_grad():
        largest = head(hidden.to(head.weight.dtype)).abs().max().clamp_min(1e-6).float()
        hidden = (hidden * 60 / largest).to(head.weight.dtype)  # far into any soft cap
        expected = head(hidden).float()
        if softcap is not None:
            expected = softcap * torch.tanh(expected / softcap)
        logits = _logits_of(hf, decoder, hidden)
    if logits is None or logits.shape != expected.shape:
        return None
    tolerance = 1e-4 if head.weight.dtype == torch.float32 else 2e-2
    same = (logits - expected).abs().max() <= tolerance * expected.abs().max()
    return (head, softcap) if bool(same) else None


def _logits_of(hf: nn.Module, decoder: nn.Module, hidden: torch.Tensor) -> torch.Tensor | None:
    from transformers.modeling_outputs import BaseModelOutputWithPast

    before = decoder.__dict__.get("forward")  # accelerate keeps its own there
    decoder.forward = lambda *args, **kwargs: BaseModelOutputWithPast(last_hidden_state=hidden)
    try:
        tokens = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        return hf(input_ids=tokens, use_cache=False).logits.float()
    except Exception:  # a decoder that returns something else is simply not a plain head
        return None
    finally:
        del decoder.forward
        if before is not None:
            decoder.forward = before


def convert_gguf(gguf: Path, directory: Path) -> None:
    """Write a .gguf file as an ordinary Hugging Face directory in float32.

    Args:
        gguf: The file; any architecture that transformers reads.
        directory: Receives config.json, model.safetensors, the tokenizer and generation_config.json.
    """
    reader = require("gguf", "gguf")
    require("accelerate", "gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.quantization_config import GgufConfig

    source = {"gguf_file": gguf.name, "local_files_only": True}
    with _quiet():
        packed = AutoModelForCausalLM.from_pretrained(
            str(gguf.parent), dtype=torch.float32, quantization_config=GgufConfig(dequantize=True), **source
        )
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), **source)
    _mend_tokenizer(tokenizer, reader.GGUFReader(gguf))
    tokenizer.model_max_length = getattr(packed.config, "max_position_embeddings", tokenizer.model_max_length)
    # Although its weights are plain now, the loaded model still counts as quantised and refuses to be saved.
    config = packed.config
    vars(config).pop("quantization_config", None)
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(packed.state_dict(), assign=True)
    model.tie_weights()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _mend_tokenizer(tokenizer: PreTrainedTokenizerBase, reader: Any) -> None:
    """Undo what transformers gets wrong when it rebuilds a tokenizer from a .gguf file."""
    from tokenizers import pre_tokenizers

    def field(name: str) -> Any:
        found = reader.fields.get(f"tokenizer.ggml.{name}")
        return None if found is None else found.contents()

    # 1. The Llama converter takes the end token from the id of the BEGIN token (integrations/ggml.py, 5.17), so
    #    generation would never stop and documents would be joined by the wrong token.
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = field(f"{key}_token_id")
        if index is not None:
            setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(int(index)))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    # 2. SmolLM splits every digit off before the byte-level rule; the converter knows only the byte-level rule, which
    #    differs where white space runs into a digit.
    if field("pre") == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    # 3. It asks for a clean-up that eats spaces before punctuation.
    tokenizer.clean_up_tokenization_spaces = False
