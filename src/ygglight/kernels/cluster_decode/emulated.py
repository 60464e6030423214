# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Runs the source of the Gluon kernels with torch, one program after the other, for tests: Gluon has no interpreter.

A program's tensors are whole torch tensors, so layouts mean nothing and conversions do nothing: index arithmetic,
masks, reductions and orders of axes are the kernels' own lines, and who holds what is the compiler's part. Each access
must lie in its tensor's storage, integers have 32 bits, what a masked load gives without `other` is NaN, and a store
does not convert.
"""

from __future__ import annotations

import builtins
import functools
import inspect
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

PACKAGE = "ygglight.kernels.cluster_decode."
EMULATED = ("collectives", "cluster", "cluster_steps", "cluster_kernels", "cluster_mla", "cluster_mla_kernels")


class Value(Tensor):
    """A tensor or number of a program."""

    type = SimpleNamespace(layout=None)  # type: ignore[assignment]  # as Triton's tensors have it, not torch's


def value_of(number: Any, dtype: torch.dtype | None = None) -> Any:
    """A program's tensor or number.

    Args:
        number: a tensor or a Python number. dtype: of the result; default: torch's choice.
    """
    return torch.as_tensor(number, dtype=dtype).as_subclass(Value)


class Pointer:
    """Addresses of elements of one storage.

    Args:
        flat: all of the storage. at: places in it.
    """

    def __init__(self, flat: Tensor, at: Tensor) -> None:
        self.flat, self.at = flat, at
        self.dtype = SimpleNamespace(element_ty=flat.dtype)

    @classmethod
    def to(cls, tensor: Tensor) -> Pointer:
        """The address of a tensor's first element.

        Args:
            tensor: on the CPU, in any strides.
        """
        flat = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
        return cls(flat, torch.tensor(tensor.storage_offset()))

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.flat, self.at + torch.as_tensor(offset).as_subclass(Tensor).long())

    def checked(self, mask: Any, *shapes: torch.Size) -> tuple[Tensor, Tensor]:
        """Places and which of them are live, in one shape.

        Args:
            mask: of the access, or None. *shapes: what else takes part in the broadcast.

        Raises:
            IndexError: a live place is not in the storage.
        """
        live = torch.as_tensor(True if mask is None else mask).as_subclass(Tensor)
        shape = torch.broadcast_shapes(self.at.shape, live.shape, *shapes)
        at, live = self.at.expand(shape), live.expand(shape)
        wrong = live & ((at < 0) | (at >= len(self.flat)))
        if wrong.any():
            raise IndexError(f"{int(wrong.sum())} of {live.sum()} places out of bounds")
        return at, live


def load(pointer: Pointer, mask: Any = None, other: Any = None) -> Any:
    """Stands for `gl.load`.

    Args:
        pointer: addresses. mask: which are read. other: what the rest is; default: NaN.
    """
    at, live = pointer.checked(mask)
    found = torch.zeros(at.shape, dtype=pointer.flat.dtype)
    found[live] = pointer.flat[at[live]]
    missing = (torch.nan if found.is_floating_point() else 0x5A) if other is None else other
    return value_of(found.masked_fill(~live, missing))


def store(pointer: Pointer, value: Tensor, mask: Any = None) -> None:
    """Stands for `gl.store`.

    Args:
        pointer: addresses. value: what goes there. mask: where it goes.

    Raises:
        TypeError: value has another dtype than the memory.
    """
    at, live = pointer.checked(mask, value.shape)
    if value.dtype != pointer.flat.dtype:
        raise TypeError(f"{value.dtype} stored to {pointer.flat.dtype}")
    pointer.flat[at[live]] = value.as_subclass(Tensor).expand(at.shape)[live]


def _sum(x: Tensor, axis: int) -> Tensor:
    if x.dtype is not torch.float32:
        raise TypeError(f"a sum in {x.dtype}")
    return x.sum(axis)


class Language(ModuleType):
    """Stands for `gl` and `tl`."""

    def __init__(self) -> None:
        super().__init__("language")
        self.blocks, self.warps, self.program = 1, 8, (0, 0, 0)
        for name in ("float32", "float16", "bfloat16", "int32", "int64"):
            setattr(self, name, getattr(torch, name))
        self.constexpr = self.convert_layout = lambda value, *_: value
        self.BlockedLayout = self.SliceLayout = lambda *_: None
        self.load, self.store, self.sum = load, store, _sum
        self.max = lambda x, axis: x.amax(axis)
        self.where = lambda condition, yes, no: torch.where(torch.as_tensor(condition), yes, no)
        self.maximum = lambda x, y: torch.maximum(x, value_of(y, x.dtype))
        self.exp2, self.rsqrt = torch.exp2, torch.rsqrt
        self.full = lambda shape, number, dtype, layout=None: value_of(torch.full(shape, number, dtype=dtype))
        self.zeros = lambda shape, dtype, layout=None: self.full(shape, 0, dtype)
        self.zeros_like = torch.zeros_like
        self.arange = lambda begin, end, layout=None: value_of(torch.arange(begin, end, dtype=torch.int32))
        self.reshape, self.permute, self.expand_dims = torch.reshape, torch.permute, torch.unsqueeze
        self.gather = lambda x, index, axis: torch.gather(x, axis, index.long())
        self.join = lambda x, y: torch.stack((x, y), dim=-1)
        self.split = lambda x: x.unbind(-1)
        self.cdiv = lambda x, y: (x + y - 1) // y
        self.program_id = lambda axis: value_of(self.program[axis], torch.int32)
        self.static_range = range
        self.num_ctas, self.num_warps = lambda: self.blocks, lambda: self.warps


LANGUAGE = Language()


def _argument(value: Any) -> Any:
    """What a kernel sees of an argument that is no constexpr."""
    if isinstance(value, Tensor) and not isinstance(value, Value):
        return Pointer.to(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value_of(value, torch.int32 if isinstance(value, int) else torch.float32)
    return value


class Function:
    """What `jit` makes of a function: it can be called by another and launched over a grid.

    Args:
        function: the kernel or device function.
    """

    def __init__(self, function: Any) -> None:
        self.function, self.signature = function, inspect.signature(function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bound = self.signature.bind(*args, **kwargs)
        for name, value in bound.arguments.items():
            if self.signature.parameters[name].annotation is inspect.Parameter.empty:
                bound.arguments[name] = _argument(value)
        return self.function(*bound.args, **bound.kwargs)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*args: Any, num_warps: int, num_ctas: int = 1, enable_fp_fusion: bool = True, **constants: Any) -> None:
            LANGUAGE.blocks, LANGUAGE.warps = num_ctas, num_warps
            for program in torch.cartesian_prod(*(torch.arange(size) for size in (*grid, 1, 1)[:3])).tolist():
                LANGUAGE.program = tuple(program)
                self(*args, **constants)

        return run


def _jit(function: Any = None, **_: Any) -> Any:
    return Function if function is None else Function(function)


_GLUON = SimpleNamespace(jit=_jit, constexpr_function=lambda function: function, language=LANGUAGE)
_TRITON = SimpleNamespace(
    jit=_jit, language=LANGUAGE, cdiv=lambda x, y: -(-x // y), next_power_of_2=lambda n: 1 << (n - 1).bit_length()
)
_STAND_INS = {
    "triton": _TRITON,
    "triton.language": LANGUAGE,
    "triton.experimental": SimpleNamespace(gluon=_GLUON),
    "triton.experimental.gluon": _GLUON,
    "ygglight.kernels.tree_attention.triton": SimpleNamespace(LOG2E=1.4426950408889634),
}


def _import(name: str, globals_: Any = None, locals_: Any = None, names: Any = (), level: int = 0) -> Any:
    if name in _STAND_INS:
        return _STAND_INS[name] if names else {"triton": _TRITON}[name.split(".")[0]]
    if name.startswith(PACKAGE) and name.removeprefix(PACKAGE) in EMULATED:
        return emulated(name.removeprefix(PACKAGE))
    return __import__(name, globals_, locals_, names, level)


def _range(*bounds: Any) -> Any:
    return (value_of(number, torch.int32) for number in range(*map(int, bounds)))


@functools.cache
def emulated(name: str) -> Any:
    """A module of this package whose kernels run here, on CPU tensors, as do those that it imports.

    Args:
        name: One of `EMULATED`, e.g. "cluster".
    """
    path = Path(__file__).with_name(f"{name}.py")
    module = ModuleType(f"emulated_{name}")
    # Numbers of a loop are a program's numbers; a launch counts as Python does.
    changed = {"__import__": _import} if name == "cluster" else {"__import__": _import, "range": _range}
    module.__dict__["__builtins__"] = vars(builtins) | changed
    exec(compile(path.read_text(), str(path), "exec", dont_inherit=True), module.__dict__)
    return module
