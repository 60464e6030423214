"""Handing a model's routed experts to a runtime, and back.

While a runtime has them the experts' parameters are no part of the model: ``model.to(device)`` moves the rest only, and
``state_dict()`` and ``named_parameters()`` do not name them. All that is needed to go back lies on the experts modules.
"""

from __future__ import annotations

import weakref
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn

from ygglight.compat.experts import experts_config, register_experts
from ygglight.compat.generation import generation_models
from ygglight.engines.moe_speq.layout import find_sites

__all__ = ["NAME", "Attachment", "ExpertsRuntime"]

NAME = "moe_speq"  # in transformers' table of experts functions
_KEY = "_moe_speq"  # on the module


class ExpertsRuntime(Protocol):
    """What computes experts."""

    def forward(self, site: int, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Compute the routed experts of one layer.

        Args:
            site: Index of the layer among the sparse ones.
            hidden: ``[T, H]``. index: Experts of each token, ``[T, k]``. weights: Of each of them, ``[T, k]``.

        Returns:
            ``[T, H]``.
        """
        ...


class _Binding:
    """What an experts module needs while a runtime has its experts, and to have them back.

    The runtime has threads, streams and open files; neither it nor a module without its weights can be copied.
    """

    def __init__(self, runtime: ExpertsRuntime, site: int, module: nn.Module) -> None:
        self.runtime, self.site = runtime, site
        self.parameters = dict(module._parameters)
        self.config = module.config

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("a model whose experts MoE-SpeQ runs cannot be copied or pickled: detach it first")


def _forward(module: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    binding: _Binding | None = module.__dict__.get(_KEY)
    if binding is None:
        raise RuntimeError(f"experts_implementation={NAME!r} is set by MoE-SpeQ itself: choose another for this model")
    return binding.runtime.forward(binding.site, hidden, index, weights)


def _refuse_saving(*args: Any, **kwargs: Any) -> NoReturn:
    raise RuntimeError("MoE-SpeQ has the experts of this model, and they would be missing in the file: detach it first")


def _living(references: list[weakref.ref[nn.Module]]) -> list[nn.Module]:
    return [module for reference in references if (module := reference()) is not None]


class Attachment:
    """The link between one model and the runtime that computes its experts."""

    def __init__(self) -> None:
        self._modules: list[weakref.ref[nn.Module]] = []  # weak: an attachment forgotten keeps no model alive
        self._savers: list[weakref.ref[nn.Module]] = []

    @property
    def attached(self) -> bool:
        """Whether a living model's experts are at the runtime."""
        return bool(_living(self._modules))

    def attach(self, model: nn.Module, runtime: ExpertsRuntime) -> Attachment:
        """Let a runtime compute the experts of a model; all of them, or none if something fails.

        Doing it again with the same model and runtime changes nothing.

        Args:
            model: A transformers model. runtime: Answers for its sites, in the order of ``find_sites``.

        Raises:
            ValueError: the model has no experts that can be taken, or a runtime has them already.
        """
        if self.attached:
            modules = {id(module) for module in model.modules()}
            if all(id(m) in modules and m.__dict__[_KEY].runtime is runtime for m in _living(self._modules)):
                return self
            raise ValueError("this attachment has a model and a runtime already: detach it first")
        sites = find_sites(model)
        register_experts(NAME, torch.compiler.disable(_forward))  # cache and copies are nothing that could be compiled
        configs: dict[int, Any] = {}
        try:
            for site in sites:
                module = site.module
                binding = _Binding(runtime, site.index, module)
                key = id(binding.config)
                config = configs[key] = configs.get(key) or experts_config(binding.config, NAME)
                module.__dict__[_KEY] = binding  # past nn.Module.__setattr__: a runtime is no part of the model
                self._modules.append(weakref.ref(module))
                module.config = config
                module._parameters.clear()
            for part in generation_models(model):
                if part.__dict__.setdefault("save_pretrained", _refuse_saving) is _refuse_saving:
                    self._savers.append(weakref.ref(part))
        except BaseException:
            self.detach()
            raise
        return self

    def detach(self) -> None:
        """Give the model its parameters and configuration back: the same objects, in the same order."""
        for part in _living(self._savers):
            if part.__dict__.get("save_pretrained") is _refuse_saving:
                del part.__dict__["save_pretrained"]
        for module in _living(self._modules):
            binding: _Binding = module.__dict__.pop(_KEY)
            module._parameters.clear()
            module._parameters.update(binding.parameters)
            module.config = binding.config
        self._modules, self._savers = [], []
