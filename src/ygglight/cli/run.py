"""`ygglight fit | validate | test | predict`: LightningCLI, with recipes by name and a few conveniences."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.cli import ArgsType, LightningCLI

from ygglight.cli.errors import TerseParser, check_strategy_name, raise_constructor_error
from ygglight_launcher.recipes import resolve_arguments


class YggLightCLI(LightningCLI):
    """A LightningCLI in which the config names the classes of module, data and strategy.

    Args:
        verb: The subcommand to build a parser for. One and not four: each costs about half a second to build.
        args: The command line from the verb on.
        trainer_class: A Trainer that has a method named like the verb.
        **kwargs: More for `LightningCLI`.
    """

    def __init__(self, verb: str, args: Sequence[str], trainer_class: type[Trainer] = Trainer, **kwargs: Any) -> None:
        self._verb = verb
        kwargs.setdefault("save_config_kwargs", {"overwrite": True})  # without it the second run into a folder fails
        super().__init__(
            model_class=None,  # any class, named in the config; with None `data` may also be left out,
            datamodule_class=None,  # for modules that bring their own dataloaders
            trainer_class=trainer_class,
            subclass_mode_model=True,
            subclass_mode_data=True,
            parser_class=TerseParser,
            parser_kwargs={"prog": "ygglight"},
            args=list(args),
            **kwargs,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # a staticmethod there; only called on self
        """The one verb at hand, with those of its arguments that are not for the command line."""
        skip = {"model", "datamodule", "dataloaders", "train_dataloaders", "val_dataloaders"}
        return {self._verb: skip}

    def parse_arguments(self, parser: Any, args: ArgsType) -> None:
        """Parses the command line after looking up recipes by name.

        Not by changing `sys.argv`: under DDP Lightning starts the other ranks with it, and they look up again.
        """
        assert isinstance(args, list)
        self.config = parser.parse_args(resolve_arguments(args))

    def before_instantiate_classes(self) -> None:
        """Checks the strategy's name, and lets the data take the model's tokenizer when the config names none."""
        config = self.config[self._verb]
        check_strategy_name(config.trainer.strategy)
        link_tokenizer(config)

    def instantiate_classes(self) -> None:
        """Builds module, data and Trainer; a constructor's own error comes out as it is."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            if "Union subtypes" in str(error):
                raise_constructor_error(self.config[self._verb])
            raise


def link_tokenizer(config: Namespace) -> None:
    """Sets `data.tokenizer` to `model.model` where the data class has such an argument and it was left empty.

    Done here and not by `link_arguments`, for a linked argument can no longer be set by the user.

    Args:
        config: The parsed config of one subcommand; changed in place.
    """
    model, data = config.get("model.init_args.model"), config.get("data.init_args")
    if isinstance(model, str) and data is not None and "tokenizer" in data and data["tokenizer"] is None:
        data["tokenizer"] = model


def import_from_here() -> None:
    """Makes classes in the current folder importable for `class_path`, last in line so that they shadow nothing.

    Python does it for `python -m`, but not for a console script.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def main(argv: Sequence[str]) -> int:
    """Runs the verb `argv[0]`."""
    import_from_here()
    YggLightCLI(argv[0], argv)
    return 0
