"""A second set of module objects over the same tensors."""

from __future__ import annotations

import copy
import types
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["share_tensors"]

# nn.Module keeps its hooks in these; checked on 2.11 and 2.13.
_HOOKS = (
    "_backward_pre_hooks", "_backward_hooks", "_forward_hooks", "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_state_dict_hooks",
    "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip


class _TensorsAreThemselves(TorchFunctionMode):
    """``copy.deepcopy`` of a tensor is the tensor, in this thread (quantisation states hold tensors of their own)."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return args[0] if func is Tensor.__deepcopy__ else func(*args, **(kwargs or {}))


def share_tensors(module: nn.Module) -> Any:
    """Copy modules, configurations and all other Python state, but not one tensor.

    What is set on the copy (modes, hooks, configuration, replaced submodules and parameters) does not reach the
    original, nor the other way round; what is written *into* a tensor does. Hooks are not copied: they belong to
    whoever put them on the original. Nor is what ``module.compile()`` made.

    Args:
        module: Any module.

    Returns:
        A module of the same type.

    Raises:
        ValueError: a module's ``forward`` was replaced by a plain function, which would go on calling the original.
    """
    memo: dict[int, Any] = {}
    for name, part in module.named_modules():
        if isinstance(part.__dict__.get("forward"), types.FunctionType):
            raise ValueError(
                f"the forward of {name or type(part).__name__} was replaced by a function that cannot be bound to a "
                "copy: bind it as types.MethodType(function, module), or patch the class"
            )
        # bitsandbytes' 8-bit layers move the quantised weight out of the parameter at the first forward, into a state
        # that each copy has its own of: of two copies only the one that runs first would have it.
        start = getattr(part, "init_8bit_state", None)
        if start is not None and getattr(part.weight, "CB", None) is not None:
            start()
        memo.update((id(tensor), tensor) for tensor in (*part.parameters(False), *part.buffers(False)))
        memo.update((id(hooks), OrderedDict()) for key in _HOOKS if (hooks := part.__dict__.get(key)) is not None)
    with _TensorsAreThemselves():
        return copy.deepcopy(module, memo)
