"""Private names of Lightning 2.6 that ygglight reads. Only strategies, callbacks and the CLI may import this."""

from __future__ import annotations

from collections.abc import Iterator

from lightning.pytorch import LightningModule, Trainer


def is_foreign_class(cls: type) -> bool:
    """Whether a class descends from one of `pytorch_lightning`.

    By the module names along the MRO, for Lightning's own test looks at the class itself only, and a subclass written
    in user code escapes it. `import pytorch_lightning` is not needed to find out.
    """
    return any(f"{base.__module__}.".startswith("pytorch_lightning.") for base in cls.__mro__)


def attached_trainer(model: LightningModule) -> Trainer | None:
    """The Trainer of a module, or None where the public property would raise: no Trainer, or Fabric's stand-in."""
    trainer = getattr(model, "_trainer", None)
    return trainer if isinstance(trainer, Trainer) else None


def _data_sources(trainer: Trainer) -> Iterator[object]:
    # A foreign data module passed by position (`fit(model, dm)`) is not recognised as one and lands here as a
    # dataloader.
    loops = (trainer.fit_loop, trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop)
    for loop in (*loops, trainer.predict_loop):
        yield getattr(loop._data_source, "instance", None)


def foreign_lightning_objects(trainer: Trainer) -> list[str]:
    """Names the `pytorch_lightning` objects that a Trainer was handed, each once: `"callback MyCallback"`."""
    candidates: list[tuple[str, object]] = [("callback", callback) for callback in vars(trainer)["callbacks"]]
    candidates += [("logger", logger) for logger in trainer.loggers]
    candidates += [("profiler", getattr(trainer, "profiler", None))]
    candidates += [("data module", getattr(trainer, "datamodule", None))]
    candidates += [("data module", source) for source in _data_sources(trainer)]
    candidates += [("module", trainer.strategy._lightning_module)]
    found = [f"{kind} {type(obj).__name__}" for kind, obj in candidates if is_foreign_class(type(obj))]
    return list(dict.fromkeys(found))
