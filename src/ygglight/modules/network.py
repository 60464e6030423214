"""What CausalLM puts on a loaded network: quantised training, LoRA, sharding, in this order."""

from __future__ import annotations

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ygglight.compat import transformers as hf
from ygglight.compat.extras import require

__all__ = ["add_lora", "load_without_experts", "prepare_quantized", "shard"]


def load_without_experts(directory: Path, dtype: str, attention: str) -> nn.Module:
    """Load a mixture of experts whose routed experts stay in its files, for MoESpeQStrategy to read them there.

    Args:
        directory: A Hugging Face model directory. dtype: Of the weights, by name, or "auto". attention: See CausalLM.

    Returns:
        The model; where its experts are is its ``expert_store``.
    """
    from ygglight.engines.moe_speq.checkpoint import load_without_experts as load

    model, store = load(directory, dtype if dtype == "auto" else getattr(torch, dtype))
    model.set_attn_implementation(attention)
    model.expert_store = store
    return model  # type: ignore[no-any-return]


def add_lora(model: nn.Module, lora: dict[str, Any], seed: int, *, cast_adapters: bool = True) -> nn.Module:
    """Freeze a model and put LoRA adapters on it.

    Args:
        model: A transformers model.
        lora: Arguments of ``peft.LoraConfig``; without ``target_modules`` every linear layer but the head gets one.
        seed: Of the adapters' start, the same on every rank.
        cast_adapters: Keep the adapters in float32 over a half-precision base.
    """
    peft = require("peft", "lora")
    settings = {"task_type": "CAUSAL_LM", "target_modules": "all-linear"} | lora
    try:
        config = peft.LoraConfig(**settings)
    except TypeError as error:
        keys = "its keys are those of peft.LoraConfig: r, lora_alpha, target_modules, ..."
        raise ValueError(f"lora: {str(error).partition(') ')[2] or error} ({keys})") from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return peft.get_peft_model(model, config, autocast_adapter_dtype=cast_adapters)
        except ValueError as error:
            if "not found in the base model" not in str(error):
                raise
            names = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
            raise ValueError(f"lora.target_modules matches no layer of this model; it has {names}") from error


def prepare_quantized(model: nn.Module, gradient_checkpointing: bool) -> nn.Module:
    """Make a bitsandbytes-quantised model trainable under LoRA (norms in float32, inputs that carry gradients).

    Args:
        model: A quantised transformers model.
        gradient_checkpointing: Also recompute activations in the backward pass.
    """
    peft = require("peft", "lora")
    return peft.prepare_model_for_kbit_training(
        model,
        use_gradient_checkpointing=gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )


def shard(model: nn.Module, mesh: DeviceMesh, loss: Callable[..., torch.Tensor]) -> None:
    """Shard a model in place with FSDP2, one unit a decoder layer and one for the rest.

    The loss becomes a method ``ygg_loss`` of the model: weights are gathered only on entering the model's own methods.

    Args:
        model: A transformers or peft model.
        mesh: Lightning's mesh, with the dimensions ``data_parallel`` and ``tensor_parallel``.
        loss: Called with the model first.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    if mesh["tensor_parallel"].size() > 1:
        raise ValueError(
            "CausalLM is sharded over data_parallel only, which is not the default of ModelParallelStrategy: set "
            f"data_parallel_size={mesh.size()} and tensor_parallel_size=1"
        )
    layers = hf.decoder_layers(model)
    if not layers:
        raise ValueError(f"{type(hf.unwrap(model)).__name__} does not name its layers, so it cannot be sharded")
    for layer in layers:
        fully_shard(layer, mesh=mesh["data_parallel"])
    fully_shard(model, mesh=mesh["data_parallel"])
    object.__setattr__(model, "ygg_loss", types.MethodType(loss, model))
    for method in ("ygg_loss", "generate"):
        register_fsdp_forward_method(model, method)
