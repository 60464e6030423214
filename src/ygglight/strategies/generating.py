"""What strategies over ``generate`` share: they find the models that generate, and decode for them inside the steps."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from ygglight.compat.generation import generation_models
from ygglight.engines.decode.method import DecodingMethod, routed
from ygglight.strategies.base import OneDeviceStrategy


class GeneratingStrategy(OneDeviceStrategy):
    """Inside each predict, validation and test step, and nowhere else, ``generate`` decodes by a method of ours.

    Subclasses set ``name`` and say in :meth:`_make_methods` what decodes for which model.

    Args:
        progress: Count tokens in a progress bar; default: where the Trainer has one.
        enabled: ``false`` leaves everything to transformers, and says so at the end.
        accelerator: Set by the Trainer.
        checkpoint_io: Set by the Trainer.
        precision_plugin: Set by the Trainer.
    """

    resident: ClassVar[bool] = True
    name: ClassVar[str]
    """As tables and errors call it."""

    def __init__(
        self,
        progress: bool | None = None,
        enabled: bool = True,
        accelerator: Any = None,
        checkpoint_io: Any = None,
        precision_plugin: Any = None,
    ) -> None:
        super().__init__(accelerator=accelerator, checkpoint_io=checkpoint_io, precision_plugin=precision_plugin)
        self._progress, self._enabled = progress, enabled
        self._models: dict[str, Any] = {}
        self._methods: dict[str, DecodingMethod[Any, Any]] = {}
        self._bar: Any = None
        self._told = self._fits = False

    @abstractmethod
    def _make_methods(self, named: Mapping[str, Any]) -> dict[str, Any]:
        """What decodes, by name of the model in the module; models left out are left to transformers.

        Args:
            named: The generation models of the module by their names in it.
        """

    # -- setting up --------------------------------------------------------------------------------------------------
    def setup(self, trainer: Trainer) -> None:
        """Find the generation models and make their methods.

        Raises:
            TypeError: there is no generation model. ValueError: from the subclass, of a model it cannot do.
        """
        self._models, self._methods, self._told = {}, {}, False
        self._fits = trainer.state.fn == TrainerFn.FITTING
        super().setup(trainer)
        if not self._enabled:
            return
        named = self._generation_models()
        if not named:
            if self._fits:
                return  # nothing to speed up, but then fit did not ask for it
            raise TypeError(
                f"{type(self.lightning_module).__name__} holds no causal language model of transformers, so there is "
                "no `generate` to speed up: use another strategy, or load the model before predict starts (in "
                "configure_model)"
            )
        self._methods = self._make_methods(named)
        self._models = {name: named[name] for name in self._methods}
        for method in self._methods.values():
            method.on_tokens = self._count
        if self._shows_progress(trainer):
            from tqdm.auto import tqdm

            self._bar = tqdm(desc="tokens", unit=" tokens", position=1, leave=False)

    def _generation_models(self) -> dict[str, nn.Module]:
        module: Any = self.lightning_module
        found = generation_models(module)
        return {name: m for name, m in module.named_modules() if any(m is g for g in found)}

    def _shows_progress(self, trainer: Trainer) -> bool:
        if self._progress is not None:
            return self._progress
        bar = trainer.progress_bar_callback
        return not self._fits and bar is not None and bool(getattr(bar, "is_enabled", True))

    def _count(self, tokens: int) -> None:
        if self._bar is not None:
            self._bar.update(tokens)

    # -- the steps ---------------------------------------------------------------------------------------------------
    @contextmanager
    def _generating(self) -> Iterator[None]:
        with ExitStack() as stack:
            for name, method in self._methods.items():
                stack.enter_context(routed([self._models[name]], method))
            yield

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """The module's, with ``generate`` by our method."""
        with self._generating():
            return super().predict_step(*args, **kwargs)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """The module's, with ``generate`` by our method."""
        with self._generating():
            return super().validation_step(*args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """The module's, with ``generate`` by our method."""
        with self._generating():
            return super().test_step(*args, **kwargs)

    def on_validation_end(self) -> None:
        """Inside a fit, give the caches back: training needs the memory."""
        if self._fits:
            for method in self._methods.values():
                method.release()
        super().on_validation_end()

    # -- the end -----------------------------------------------------------------------------------------------------
    def teardown(self) -> None:
        """Say what was done; give the caches back."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        with ExitStack() as stack:  # all of it is done, whatever fails
            stack.callback(super().teardown)
            if torch.cuda.is_available() and self.root_device.type == "cuda":
                stack.callback(torch.cuda.empty_cache)
            if not self._told:
                self._told = True
                for name, method in reversed(self._methods.items()):  # the first of a stack comes last
                    stack.callback(self._tell, name, method)
                    stack.callback(method.release)  # first, for it completes the report
                if not self._enabled:
                    rank_zero_info(f"{self.name}: off (enabled=False): transformers generated everything")

    def _tell(self, name: str, method: DecodingMethod[Any, Any]) -> None:
        if method.used:
            rank_zero_info(f"{self.name}, {name}:\n{method.report.table()}")
