"""The private names of PyTorch that ygglight needs, in one place. Checked on 2.11, 2.13; imports no Lightning."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_autograd: Any = torch._C._autograd  # type: ignore[attr-defined]


def storage_key(tensor: Tensor) -> int:
    """The identity of a tensor's storage, for as long as the storage lives."""
    return int(tensor.untyped_storage()._cdata)


def storage_use_count(tensor: Tensor) -> int:
    """Tensors that share the storage of ``tensor``, itself included."""
    # The Python object asked here counts as one more.
    return int(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)) - 1  # type: ignore[attr-defined]


def alias(tensor: Tensor) -> Tensor:
    """``tensor.detach()`` that shares the version counter even where dispatch modes run, below autograd."""
    key = torch._C.DispatchKey.ADInplaceOrView  # type: ignore[attr-defined]
    excluded = torch._C._dispatch_tls_is_dispatch_key_excluded(key)  # type: ignore[attr-defined]
    torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)  # type: ignore[attr-defined]
    try:
        return tensor.detach()
    finally:
        torch._C._dispatch_tls_set_dispatch_key_excluded(key, excluded)  # type: ignore[attr-defined]


def version_of(tensor: Tensor) -> int:
    """How often ``tensor`` was written in place; -1 for inference tensors, which do not count."""
    return -1 if tensor.is_inference() else tensor._version


def in_backward() -> bool:
    """Whether autograd's engine runs a backward on this thread."""
    return torch._C._current_graph_task_id() != -1  # type: ignore[attr-defined]


def retains_graph() -> bool:
    """Whether the backward that runs was started with ``retain_graph``; False outside of one."""
    return in_backward() and bool(_autograd._get_current_graph_task_keep_graph())


def current_node() -> tuple[int, str]:
    """(sequence number, name) of the autograd node that is being evaluated; (-1, "") outside of backward."""
    node = torch._C._current_autograd_node()  # type: ignore[attr-defined]
    return (-1, "") if node is None else (int(node._sequence_nr()), str(node.name()))


def top_saved_tensor_hooks() -> tuple[Any, Any] | None:
    """The innermost (pack, unpack) pair, or None."""
    return _autograd._top_saved_tensors_default_hooks(False)  # type: ignore[no-any-return]


def saved_tensor_hooks_allowed() -> bool:
    """False inside ``torch.autograd.graph.disable_saved_tensors_hooks`` and function transforms."""
    return bool(_autograd._saved_tensors_hooks_is_enabled())


def below_autograd() -> Any:
    """A context in which operators run without autograd, version counters or view tracking."""
    return torch._C._AutoDispatchBelowADInplaceOrView()


def current_dispatch_mode() -> Any:
    """The innermost ``TorchDispatchMode``, or None."""
    from torch.utils._python_dispatch import _get_current_dispatch_mode

    return _get_current_dispatch_mode()
