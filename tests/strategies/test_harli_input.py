"""What cannot be is refused with one clear error, before anything long, and leaves nothing behind."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch

from ygglight.callbacks import HarliMonitor
from ygglight.engines.harli.measure import Measurements
from ygglight.modules import CausalLM
from ygglight.strategies import HarliStrategy

from .harli_cases import Tuned, fit, strategy, trainer


@pytest.fixture(autouse=True)
def nothing_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring decoding is the long part of a start."""

    def measured(*_: Any) -> None:
        raise AssertionError("it measured before it complained")

    monkeypatch.setattr(Measurements, "alone", measured)


# -- arguments ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tpot_slo_ms": 0}, "give more than 0"),
        ({"tpot_slo_ms": -5}, "give more than 0"),
        ({"tpot_slo_ms": float("nan")}, "give more than 0"),
        ({"tpot_slo_ms": 20, "max_gap_ms": 10}, "shorter than the target"),
        ({"max_gap_ms": 0}, "give more than 0"),
        ({"memory": "0"}, "must be positive"),
        ({"memory": 0}, "positive|more than 0"),
        ({"memory": "lots"}, "lots"),
        ({"max_batch": 0}, "max_batch"),
        ({"max_context": 1}, "max_context"),
        ({"prefill_chunk": 0}, "prefill_chunk"),
        ({"publish_every": 0}, "publish_every"),
        ({"executor": "magic"}, "green_contexts"),
        ({"server": {"prot": 80}}, "no option prot: there are host, port"),
        ({"server": {"port": "8000"}}, "port is '8000'"),
        ({"server": {"max_queue": 0}}, "max_queue"),
        ({"server": {"drain_seconds": -1}}, "drain_seconds"),
        ({"server": 8000}, "give true, false or options"),
        ({"requests": {"rate": 3}}, "max_tokens, prompt_tokens, rate, seconds"),
        ({"requests": {"rate": -1, "seconds": 1, "prompt_tokens": 4, "max_tokens": 4}}, "negative"),
        ({"requests": "nowhere.jsonl"}, "nowhere.jsonl cannot be read"),
        ({"server": False, "keep_serving": True}, "needs the server"),
    ],
)
def test_arguments(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        HarliStrategy(**options)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no request"),
        ('{"arrival": 0, "prompt": "a", "max_tokens": 3}\n{"arrival": 1}\n', "line 2: max_tokens is missing"),
        ('{"arrival": 0, "prompt": "a", "max_tokens": "3"}', "line 1: max_tokens is '3'"),
        ('{"arrival": 0, "prompt": "a", "max_tokens": 3, "prio": 1}', "line 1: prio: no such field"),
        ("no json", "line 1"),
    ],
)
def test_trace_files(tmp_path: Path, text: str, says: str) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text(text)
    with pytest.raises(ValueError, match=says):
        HarliStrategy(requests=str(trace))


@pytest.mark.parametrize("chosen", ["harli", "object"])
def test_several_devices(chosen: str) -> None:
    with pytest.raises(ValueError, match="HarliStrategy runs on one device, but the Trainer was given 2"):
        L.Trainer(strategy=strategy() if chosen == "object" else chosen, accelerator="cpu", devices=2)


# -- the module --------------------------------------------------------------------------------------------------------
class Plain(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        raise AssertionError("it trained before it complained")

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def several(tiny: Path) -> Any:
    module = Tuned(tiny)
    module.other = Tuned(tiny).lm
    return module


def two_adapters(tiny: Path) -> Any:
    from peft import LoraConfig

    module = Tuned(tiny)
    module.lm.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    module.lm.base_model.set_adapter(["default", "second"])
    return module


def without_tokenizer(tiny: Path) -> Any:
    module = Tuned(tiny)
    del module.tokenizer
    return module


def thawed(tiny: Path) -> Any:
    module = Tuned(tiny)
    module.lm.get_base_model().model.norm.weight.requires_grad_(True)
    return module


MODULES: dict[str, Any] = {
    "no LoRA": (lambda tiny: Plain(), TypeError, "holds no LoRA model"),
    "a CausalLM without": (lambda tiny: CausalLM(str(tiny)), TypeError, "lora={'r': 16}"),
    "two models": (several, TypeError, "holds 2 LoRA models"),
    "two adapters": (two_adapters, ValueError, "set_adapter one of them"),
    "DoRA": (lambda tiny: Tuned(tiny, use_dora=True), ValueError, "use_dora"),
    "base weights": (thawed, ValueError, "model.norm.weight is trained too"),
    "embeddings": (lambda tiny: Tuned(tiny, target_modules=["embed_tokens"]), ValueError, "linear layers only"),
    "whole modules": (lambda tiny: Tuned(tiny, modules_to_save=["lm_head"]), ValueError, "LoRA matrices"),
    "no tokenizer": (without_tokenizer, ValueError, "no attribute `tokenizer`"),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules(tiny: Path, name: str) -> None:
    make, kind, says = MODULES[name]
    module, chosen = make(tiny), strategy(server={"port": 0})
    with pytest.raises(kind, match=says):
        fit(module, chosen)
    assert chosen.engine is None and chosen.url is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_a_module_without_tokenizer_is_helped_by_the_option(tiny: Path) -> None:
    with pytest.raises(AssertionError, match="it measured"):  # so all before was fine
        fit(without_tokenizer(tiny), strategy(tokenizer=str(tiny)))
    with pytest.raises(FileNotFoundError, match="'nowhere' is neither a directory"):
        fit(Tuned(tiny), strategy(tokenizer="nowhere"))


# -- the machine -------------------------------------------------------------------------------------------------------
def test_a_port_that_is_taken(tiny: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        chosen = strategy(server={"port": taken.getsockname()[1]})
        with pytest.raises(ValueError, match=r"cannot listen on port \d+ of 127\.0\.0\.1"):
            fit(Tuned(tiny), chosen)
    assert chosen.url is None


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"memory": "10KiB"}, "too little for max_context"),
        ({"memory": "1MiB", "max_context": 10_000}, "made for 256 tokens"),
        ({"memory": "40KiB", "max_context": 250}, "give more memory"),
        ({"server": {"port": 70_000}}, "port 70000 does not exist"),
        ({"server": {"port": 0, "host": "no.such.host.invalid"}}, "no address of this machine"),
        ({"server": {"port": 0, "api_key_env": "HARLI_NO_SUCH_KEY"}}, "not set"),
        ({"server": {"port": 0, "max_body_bytes": 0}}, "max_body_bytes"),
        ({"executor": "streams"}, "not for cpu"),
    ],
)
def test_what_the_machine_cannot_give(tiny: Path, options: dict[str, Any], says: str) -> None:
    chosen = strategy(**options)
    with pytest.raises(ValueError, match=says):
        fit(Tuned(tiny), chosen)
    assert chosen.engine is None and chosen.url is None


@pytest.mark.parametrize(("missing", "extra"), [("fastapi", "serve"), ("peft", "lora"), ("matplotlib", "plot")])
def test_an_extra_that_is_not_there(tiny: Path, monkeypatch: pytest.MonkeyPatch, missing: str, extra: str) -> None:
    import importlib

    usual = importlib.import_module

    def absent(name: str, *args: Any) -> Any:
        if name.partition(".")[0] == missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=missing)
        return usual(name, *args)

    module = Tuned(tiny)
    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(ModuleNotFoundError, match=rf"this needs {missing}.*{extra}"):
        fit(module, strategy(server={"port": 0}), HarliMonitor(picture="run.png"))


@pytest.mark.parametrize("other", ["auto", "yggdrasil"])
def test_the_monitor_under_another_strategy(tiny: Path, other: str) -> None:
    with pytest.raises(TypeError, match="HarliMonitor watches HarliStrategy"):
        trainer(other, [HarliMonitor()]).fit(Tuned(tiny), [])
