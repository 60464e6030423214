"""How a transformers model is made to attend by our function: names, switches and mask kinds; written for 5.17.

transformers is imported inside the functions, as everywhere in `compat`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["attending_by", "configs_of", "layer_kinds", "register_attention", "text_config", "uses_attention_interface"]

FULL, SLIDING = "full_attention", "sliding_attention"


def register_attention(name: str, function: Callable[..., Any]) -> None:
    """Make an attention function known under a name; doing it again changes nothing.

    No mask function comes with it: a caller hands the model ready masks of four dimensions, which transformers passes
    on as they are. (A name that borrowed sdpa's mask function would get no mask at prefill, and be non-causal.)

    Args:
        name: As in ``config._attn_implementation``.
        function: ``(module, query, key, value, mask, scaling=, **kwargs) -> (output [B, W, H, D], None)``.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if name not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        ALL_ATTENTION_FUNCTIONS.register(name, function)


def uses_attention_interface(model: nn.Module) -> bool:
    """Whether the model's attention goes through transformers' table of attention functions."""
    return bool(getattr(type(model), "_supports_attention_backend", False))


def text_config(model: nn.Module) -> PreTrainedConfig:
    """The configuration of the language part."""
    config: Any = model.config
    return config.get_text_config(decoder=True)  # type: ignore[no-any-return]


def configs_of(model: nn.Module) -> list[Any]:
    """Every configuration object that modules of the model read, each once."""
    found = {id(c): c for m in model.modules() if hasattr(c := getattr(m, "config", None), "_attn_implementation")}
    return list(found.values())


@contextmanager
def attending_by(name: str, configs: list[Any]) -> Iterator[None]:
    """Let the modules behind these configurations use another attention function.

    Models built from one configuration object share it, and other code may run them next, so it is put back each time.

    Args:
        name: A registered attention function. configs: from :func:`configs_of`.
    """
    before = [config._attn_implementation_internal for config in configs]
    for config in configs:
        config._attn_implementation_internal = name  # the public setter spreads to sub-configurations, for good
    try:
        yield
    finally:
        for config, value in zip(configs, before, strict=True):
            config._attn_implementation_internal = value


def layer_kinds(config: PreTrainedConfig) -> dict[str, int | None]:
    """Kind of attention -> window in tokens (None: all), for the kinds that the layers have.

    Args:
        config: Of the language part.

    Returns:
        One entry for most models, two for those that mix sliding and full attention; kinds that are neither come back
        with a window of -1.
    """
    window = getattr(config, "sliding_window", None)
    kinds = list(dict.fromkeys(getattr(config, "layer_types", None) or ()))
    if not kinds:
        used = getattr(config, "use_sliding_window", True)
        return {FULL: window if used and isinstance(window, int) else None}
    return {kind: None if kind == FULL else window if kind == SLIDING else -1 for kind in kinds}
