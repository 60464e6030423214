"""HarliStrategy through the Trainer: the losses of plain Lightning, the text of plain generation, at the same time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch

from ygglight.modules import CausalLM
from ygglight.strategies import HarliStrategy
from ygglight.strategies.harli_traffic import parse_server

from .harli_cases import (
    Asked,
    At,
    Beside,
    Record,
    Tuned,
    adapter,
    client,
    close,
    eventually,
    fit,
    loader,
    solo,
    strategy,
    trainer,
)  # fmt: skip

NOTHING = "finetuning has nothing to do"


def two(engine: Any) -> list[Asked]:
    """One greedy, one that draws without a seed of its own: it must not draw from the generator of the dropout."""
    return [Asked(engine, [5, 6, 7], 120), Asked(engine, [9, 8], 120, "adapter", temperature=1.0)]


HARD: dict[str, Any] = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.3, "max_steps": 4}


# -- finetuning --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("executor", ["slices", "threads"])
def test_losses_are_those_of_plain_lightning_while_requests_are_served(tiny: Path, executor: str) -> None:
    plain, served = Tuned(tiny), Tuned(tiny)
    expected = fit(plain, **HARD)
    chosen = strategy(executor=executor)
    beside = Beside(chosen, two)
    found = fit(served, chosen, beside, **HARD)
    assert found.losses == pytest.approx(expected.losses, abs=1e-6) and len(found.losses) == 8
    assert len(set(expected.losses)) == 8, "losses that do not move prove nothing"
    assert close(adapter(served), adapter(plain)) and not close(adapter(served), adapter(Tuned(tiny)), 1e-3)
    assert found.logged == [pytest.approx(row, abs=1e-6) for row in expected.logged]
    assert [asked.ended for asked in beside.asked] == ["length", "length"]
    report = chosen.report
    assert report is not None and report.micro_batches == 8 and report.requests == 2 and report.versions == 4
    assert report.finetune_tokens == 8 * 2 * 23 and report.output_tokens == 240
    assert sum(count for reason, count in report.reasons.items() if reason != NOTHING) > 0, "nothing was co-located"


def test_clipping_by_value_and_validation_within_the_fit(tiny: Path) -> None:
    options: dict[str, Any] = {
        "gradient_clip_val": 0.01, "gradient_clip_algorithm": "value", "max_steps": 4, "val_check_interval": 2,
        "num_sanity_val_steps": 1, "limit_val_batches": 2,
    }  # fmt: skip
    results = []
    for chosen in ("auto", strategy()):
        module, record = Tuned(tiny), Record()
        beside = [Beside(chosen, two)] if isinstance(chosen, HarliStrategy) else []
        trainer(chosen, [record, *beside], **options).fit(module, loader(), loader(4))
        results.append((record.losses, record.logged[-1], adapter(module)))
    (losses, logged, weights), (found, noted, served) = results
    assert found == pytest.approx(losses, abs=1e-6) and noted == pytest.approx(logged, abs=1e-6)
    assert "val_loss" in noted and close(served, weights)


def test_manual_optimization(tiny: Path) -> None:
    plain, served = Tuned(tiny, automatic=False), Tuned(tiny, automatic=False)
    expected = fit(plain)
    chosen = strategy()
    found = fit(served, chosen, Beside(chosen, two))
    assert found.losses == pytest.approx(expected.losses, abs=1e-6)
    assert found.logged == [pytest.approx(row, abs=1e-6) for row in expected.logged]
    assert close(adapter(served), adapter(plain))
    assert chosen.report is not None and chosen.report.versions == 4 and chosen.report.replays == 0


def test_the_modules_own_causal_lm(tiny: Path) -> None:
    lora = {"r": 4, "lora_dropout": 0.1}
    plain, served = CausalLM(str(tiny), lora=lora), CausalLM(str(tiny), lora=lora)
    expected = fit(plain, gradient_clip_val=0.5)
    chosen = strategy()
    found = fit(served, chosen, Beside(chosen, two), gradient_clip_val=0.5)
    assert found.losses == pytest.approx(expected.losses, abs=1e-6)
    assert found.logged == [pytest.approx(row, abs=1e-6) for row in expected.logged]
    assert close(adapter(served), adapter(plain))


def test_switched_off_it_is_plain_lightning(tiny: Path) -> None:
    plain, off = Tuned(tiny), Tuned(tiny)
    chosen = strategy(enabled=False)
    assert fit(off, chosen).losses == fit(plain).losses
    assert chosen.engine is None and chosen.report is None and chosen.url is None


def test_one_strategy_fits_twice(tiny: Path) -> None:
    chosen = strategy(server={"port": 0})
    reports = []
    for _ in range(2):
        module = Tuned(tiny)
        # Lightning takes no accelerator beside a strategy that has one from its first Trainer.
        record = fit(module, chosen, Beside(chosen, two), accelerator="auto")
        reports.append((record.losses, chosen.report))
        assert chosen.engine is None and "log" not in module.__dict__
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    assert reports[0][0] == pytest.approx(reports[1][0], abs=1e-6)
    assert reports[0][1] is not reports[1][1] and reports[1][1] is not None and reports[1][1].micro_batches == 4


# -- serving -----------------------------------------------------------------------------------------------------------
class Versions(L.Callback):
    """The adapter as it was when each version was published, and when versions changed."""

    def __init__(self, chosen: HarliStrategy) -> None:
        self.chosen = chosen
        self.states: dict[int, Any] = {}
        self.after_batch: list[int] = []
        self.after_backward: list[int] = []

    def _note(self, module: Any) -> int:
        assert self.chosen.engine is not None
        version = self.chosen.engine.version
        self.states.setdefault(version, adapter(module))
        return version

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._note(pl_module)

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self.chosen.engine is not None
        self.after_backward.append(self.chosen.engine.version)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.after_batch.append(self._note(pl_module))


def test_greedy_text_is_that_of_solo_generation_of_the_version_it_is_pinned_to(tiny: Path) -> None:
    module, chosen = Tuned(tiny), strategy()
    versions = Versions(chosen)
    prompts = {"base": list(range(40, 50)), "adapter": list(range(20, 53))}

    def ask(engine: Any) -> list[Asked]:
        return [Asked(engine, prompt, 60, model) for model, prompt in prompts.items()]

    late: list[Asked] = []
    later = At(3, lambda *_: late.extend(ask(chosen.engine)))
    beside = Beside(chosen, ask)
    fit(module, chosen, versions, beside, later, max_steps=6)
    with module.lm.disable_adapter():
        expected = solo(module.lm, prompts["base"], 60)
    assert len(set(expected)) >= 20, "boring text proves nothing"
    assert beside.asked[0].tokens == late[0].tokens == expected
    answers = []
    for asked in (beside.asked[1], late[1]):
        assert asked.request.adapter_version is not None
        module.load_state_dict(versions.states[asked.request.adapter_version], strict=False)
        answers.append(solo(module.lm, prompts["adapter"], 60))
        assert asked.tokens == answers[-1]
    assert (beside.asked[1].request.adapter_version, late[1].request.adapter_version) == (0, 3)
    assert answers[0] != answers[1], "versions that say the same prove nothing"


@pytest.mark.parametrize(("every", "after_batch"), [(1, [0, 1, 1, 2, 2, 3]), (2, [0, 0, 0, 1, 1, 1])])
def test_the_adapter_is_published_at_optimizer_boundaries_alone(tiny: Path, every: int, after_batch: list[int]) -> None:
    module, chosen = Tuned(tiny), strategy(publish_every=every)
    versions = Versions(chosen)
    fit(module, chosen, versions, accumulate_grad_batches=2, max_steps=3)
    assert versions.after_batch == after_batch
    assert versions.after_backward == [0, *after_batch[:-1]], "a version came between backward and optimizer"


@pytest.mark.parametrize("form", ["file", "poisson"])
def test_a_trace_is_replayed(tiny: Path, tmp_path: Path, form: str) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text(
        '{"arrival": 0, "prompt": "the lazy dog", "max_tokens": 9}\n'
        '{"arrival": 0.01, "prompt_tokens": 40, "max_tokens": 7, "model": "adapter"}\n'
    )
    requests: Any = {"rate": 100, "seconds": 0.05, "prompt_tokens": 5, "max_tokens": 8, "model": "adapter"}
    module, chosen = Tuned(tiny), strategy(server=None, requests=str(trace) if form == "file" else requests)
    replayed: list[Any] = []

    def wait(*_: Any) -> None:
        assert chosen._traffic is not None and chosen._traffic.replayer is not None
        assert chosen._traffic.replayer.wait(30)
        replayed.extend(chosen._traffic.replayer.results)

    fit(module, chosen, At(3, wait))
    assert chosen.url is None and chosen.report is not None and chosen.report.requests == len(replayed) > 1
    assert all(row.finish_reason == "length" for row in replayed)
    if form == "file":
        assert [(len(row.tokens), row.model) for row in replayed] == [(9, "base"), (7, "adapter")]
        with module.lm.disable_adapter():
            assert replayed[0].tokens == solo(module.lm, module.tokenizer.encode("the lazy dog"), 9)


# -- other runs and names ----------------------------------------------------------------------------------------------
def test_other_runs_are_lightnings_own(tiny: Path) -> None:
    chosen = strategy(server={"port": 0})
    results: dict[str, list[Any]] = {"plain": [], "harli": []}
    for name, used in (("plain", "auto"), ("harli", chosen)):
        module = Tuned(tiny).eval()
        run = trainer(used)
        results[name].append(run.validate(module, loader(4), verbose=False))
        results[name].append(run.test(module, loader(4), verbose=False))
        results[name].append(torch.stack(run.predict(module, loader(4))).tolist())
    assert results["plain"] == results["harli"]
    assert chosen.engine is None and chosen.report is None and chosen.url is None


def test_by_name_it_serves_on_the_usual_port_and_measures_its_target(tiny: Path) -> None:
    run = trainer("harli")
    chosen: Any = run.strategy
    assert isinstance(chosen, HarliStrategy)
    assert (chosen._server.host, chosen._server.port) == ("127.0.0.1", 8000)
    chosen._server = parse_server({"port": 0}, default=True)  # another test, or somebody else, may have the usual one
    answers: list[Any] = []

    def ask(*_: Any) -> None:
        with client(chosen.url) as openai:
            answers.append(openai.completions.create(model="adapter", prompt="the", max_tokens=3, temperature=0))

    run.callbacks.append(At(2, ask))  # type: ignore[attr-defined]
    run.fit(Tuned(tiny), loader())
    assert answers[0].usage.completion_tokens <= 3 and answers[0].system_fingerprint == "adapter-2"
    report = chosen.report
    assert 0 < report.tpot_slo < report.max_gap == pytest.approx(4 * report.tpot_slo)


def test_keep_serving_goes_on_until_ctrl_c(tiny: Path) -> None:
    import _thread
    import threading
    import urllib.request

    chosen = strategy(server={"port": 0}, keep_serving=True)
    said: list[Any] = []

    def after(url: str) -> None:
        try:
            with client(url) as openai:
                assert eventually(lambda: chosen.report is not None and chosen.report.ended is not None)
                said.append(openai.completions.create(model="adapter", prompt="the", max_tokens=3, temperature=0))
            said.append(urllib.request.urlopen(f"{url}/health").read().decode())
        finally:
            _thread.interrupt_main()

    threads: list[threading.Thread] = []

    def start(*_: Any) -> None:
        threads.append(threading.Thread(target=after, args=(chosen.url,)))
        threads[0].start()

    fit(Tuned(tiny), chosen, At(0, start))
    threads[0].join()
    assert said[0].system_fingerprint == "adapter-4" and '"finetuning":false' in said[1].replace(" ", "")
    assert chosen.url is None and chosen.engine is None
