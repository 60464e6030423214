"""HarliStrategy: LoRA finetuning with what decoding leaves over, while clients are served from the same weights."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from ygglight.compat import transformers as hf
from ygglight.engines.harli.config import HarliConfig
from ygglight.engines.harli.engine import Engine
from ygglight.engines.harli.finetune import FinetuneSession
from ygglight.engines.harli.gate import Gate
from ygglight.engines.harli.report import Report
from ygglight.engines.harli.scheduler import Scheduler
from ygglight.strategies.base import OneDeviceStrategy
from ygglight.strategies.harli_adapter import (
    find_lora_model,
    find_tokenizer,
    kept_state,
    load_adapter,
    lora_models,
    remove_adapter_folder,
    save_adapter,
)  # fmt: skip
from ygglight.strategies.harli_interrupt import Interrupts
from ygglight.strategies.harli_logs import StepOnce
from ygglight.strategies.harli_traffic import Traffic, parse_requests, parse_server

log = logging.getLogger(__name__)


class HarliStrategy(OneDeviceStrategy):
    """Finetunes a LoRA adapter beside serving (Harli, arXiv 2511.11729), on one device, inside a latency target.

    While ``fit`` runs, requests are answered from the very base weights that are being finetuned over: ``base`` is the
    model without the adapter, ``adapter`` with the newest published version of it. The training loop is Lightning's and
    its arithmetic untouched: the step waits between two layers whenever decoding needs the machine. The LightningModule
    must hold one transformers model with LoRA adapters of peft; ``modules.CausalLM(lora=...)`` does.

    Args:
        server: The HTTP front: ``{host, port, api_key_env, max_queue, max_body_bytes, max_prompt_tokens,
            max_answer_tokens, drain_seconds}``, all optional; ``false``: none. Default: 127.0.0.1:8000, or none where
            ``requests`` are given.
        requests: Requests to replay instead of clients: a ``.jsonl`` file, or ``{rate, seconds, prompt_tokens,
            max_tokens, model, seed}`` for Poisson arrivals.
        tpot_slo_ms: Target time per output token, as a mean over each request. Default: twice what a decode step of a
            full batch takes by itself, measured at the start.
        max_gap_ms: Longest time between two tokens. Default: four times the target.
        memory: Of keys, values and the finetuning's activations together, such as ``4GiB``. Default: half of what the
            CUDA device has free; 1 GiB on a CPU.
        max_batch: Most sequences that decode at once.
        max_context: Longest prompt and answer in tokens. Default: what model and memory allow.
        prefill_chunk: Most prompt tokens between two decode steps.
        executor: How the device is shared: ``auto``, ``green_contexts``, ``streams``, ``threads`` or ``slices``.
        publish_every: Optimizer steps between two versions of the adapter that requests see.
        tokenizer: Directory of the tokenizer; default: the module's or the data module's own.
        keep_serving: Go on serving when the fit is over, until Ctrl-C.
        enabled: ``false`` trains as Lightning does, and serves nobody.
        accelerator: Set by the Trainer.
        checkpoint_io: Set by the Trainer.
        precision_plugin: Set by the Trainer.

    Attributes:
        report: Counts of the latest run; None before the first.
        url: Where clients are answered; None without a server.
    """

    policy: ClassVar[Any] = Scheduler
    """Decides how much finetuning goes with each decode step."""

    def __init__(
        self,
        server: bool | dict[str, Any] | None = None,
        requests: str | dict[str, Any] | None = None,
        tpot_slo_ms: float | None = None,
        max_gap_ms: float | None = None,
        memory: int | str | None = None,
        max_batch: int = 8,
        max_context: int | None = None,
        prefill_chunk: int = 128,
        executor: str = "auto",
        publish_every: int = 1,
        tokenizer: str | None = None,
        keep_serving: bool = False,
        enabled: bool = True,
        accelerator: Any = None,
        checkpoint_io: Any = None,
        precision_plugin: Any = None,
    ) -> None:
        super().__init__(accelerator=accelerator, checkpoint_io=checkpoint_io, precision_plugin=precision_plugin)
        self._server = parse_server(server, default=requests is None)
        self._requests = parse_requests(requests)
        self._config = HarliConfig(
            tpot_slo=None if tpot_slo_ms is None else tpot_slo_ms / 1000,
            max_gap=None if max_gap_ms is None else max_gap_ms / 1000,
            memory=memory, max_batch=max_batch, max_queue=self._server.max_queue if self._server else 1 << 20,
            max_context=max_context, prefill_chunk=prefill_chunk, executor=executor, publish_every=publish_every,
        )  # fmt: skip
        if keep_serving and self._server is None:
            raise ValueError("keep_serving=True needs the server: set server, or leave requests out")
        self._tokenizer, self._keep_serving, self._enabled = tokenizer, keep_serving, enabled
        self.report: Report | None = None
        self._forget()

    def _forget(self) -> None:
        self._engine: Engine | None = None
        self._session: FinetuneSession | None = None
        self._traffic: Traffic | None = None
        self._lora: Any = None
        self._once, self._interrupts = StepOnce(), Interrupts()
        self._step: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self._tokens = self._steps = 0
        self._stream: Any = None

    @property
    def url(self) -> str | None:
        """Base of the addresses that clients talk to, as ``http://127.0.0.1:8000``."""
        return None if self._traffic is None else self._traffic.url

    @property
    def engine(self) -> Engine | None:
        """The decode side while a fit runs."""
        return self._engine

    # -- life --------------------------------------------------------------------------------------------------------
    def setup(self, trainer: Trainer) -> None:
        """Take the port, set up as Lightning does, measure decoding, and begin to serve.

        Raises:
            TypeError: the module holds no LoRA model, or several. ValueError: it cannot be served while it trains, the
                port is taken, or numbers do not fit; the text names the mend.
        """
        fitting = trainer.state.fn == TrainerFn.FITTING
        self._forget()
        if not fitting or not self._enabled:
            super().setup(trainer)
            return
        module = self.lightning_module
        assert module is not None
        self._lora = find_lora_model(module)
        blocks = hf.decoder_layers(self._lora)
        if not blocks:
            name = type(hf.unwrap(self._lora)).__name__
            raise TypeError(f"{name} does not name its layers, so its training step cannot be cut between them")
        tokenizer = find_tokenizer(module, trainer, self._tokenizer)
        self._traffic = Traffic(self._server, self._requests)  # takes the port before anything long
        try:
            super().setup(trainer)
            gate = _gate(self.root_device)
            self._engine = Engine(self._lora, tokenizer, self._config, gate, policy=self.policy)
            self._session = FinetuneSession(module, blocks, gate, self._engine.arena, self.root_device)
            self._slice_clipping(self._session)
            rank_zero_info("harli: measuring decode latencies on this machine ...")
            self._engine.start()
            self._traffic.start(self._engine)
        except BaseException:
            self._end(drain_seconds=0.0)
            raise
        self.report = report = self._engine.report
        where = f"serving at {self.url} (models base and adapter), " if self.url else ""
        rank_zero_info(
            f"harli: {where}target {report.tpot_slo * 1000:.3g} ms a token, no gap above {report.max_gap * 1000:.3g} "
            f"ms; device shared by {report.executor}"
        )

    def on_exception(self, exception: BaseException) -> None:
        """On Ctrl-C save a checkpoint; requests under way are finished at teardown."""
        trainer = None if self.lightning_module is None else self.lightning_module.trainer
        if self._session is not None:
            self._session.gate.close()
            self._session.detach()
        if isinstance(exception, KeyboardInterrupt) and self._session is not None and trainer is not None:
            path = Path(trainer.default_root_dir) / "harli-interrupted.ckpt"
            if self._interrupts.half_done:
                log.warning("interrupted within an optimizer step: its weights are half old, so no checkpoint is saved")
            else:
                trainer.save_checkpoint(path)
                rank_zero_info(f"harli: interrupted; trained so far in {path}: resume with ckpt_path={str(path)!r}")
        super().on_exception(exception)

    def teardown(self) -> None:
        """Finish the requests under way, stop serving, say what was done."""
        self._interrupts.check()
        engine, traffic = self._engine, self._traffic
        if engine is not None and traffic is not None:
            engine.training_ended()
            engine.gate.close()
            if self._keep_serving and self.lightning_module is not None and _finished(self.lightning_module):
                traffic.serve_on(engine)
            self._end(traffic.drain_seconds)
            rank_zero_info(f"harli:\n{engine.report.table()}")
        super().teardown()

    def _end(self, drain_seconds: float) -> None:
        with ExitStack() as stack:  # each is done, whatever becomes of the others
            if self.lightning_module is not None:
                stack.callback(self._once.detach, self.lightning_module)
            for name in ("clip_grad_by_norm", "clip_grad_by_value"):
                stack.callback(self.precision_plugin.__dict__.pop, name, None)
            if self._session is not None:
                stack.callback(self._session.detach)
            if self._engine is not None:
                stack.callback(self._engine.stop, drain_seconds)
            if self._traffic is not None:
                stack.callback(self._traffic.stop, drain_seconds)
            self._engine = self._session = self._traffic = None

    # -- the step ----------------------------------------------------------------------------------------------------
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Lightning's training step, in quanta; run again if it had to be given up."""
        session, module = self._session, self.lightning_module
        if session is None or module is None:
            return super().training_step(*args, **kwargs)
        self._interrupts.check()
        self._step = args, kwargs
        self._tokens = loss_tokens(args[0] if args else kwargs)
        self._once.attach(module)
        return self._forward(session, module, replayable=module.automatic_optimization)

    def _forward(self, session: FinetuneSession, module: LightningModule, replayable: bool) -> Any:
        args, kwargs = self._step
        step = super().training_step

        def run() -> Any:
            with self._once.run(module):
                return step(*args, **kwargs)

        with self._on_stream():
            return session.forward(run, self._tokens, replayable=replayable)

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Lightning's backward, in quanta; the micro-batch is run again if it had to be given up."""
        session, module = self._session, self.lightning_module
        if session is None or module is None:
            return super().backward(closure_loss, optimizer, *args, **kwargs)
        results: list[Tensor] = []
        back = super().backward

        def run() -> None:
            results.append(back(closure_loss, optimizer, *args, **kwargs))

        def replay() -> None:
            assert module is not None
            output = self._forward(session, module, replayable=True)
            loss = output["loss"] if isinstance(output, dict) else output
            results.append(back(loss / module.trainer.accumulate_grad_batches, optimizer, *args, **kwargs))

        if module.automatic_optimization:
            self._once.backward()
        with self._on_stream():
            session.backward(run, replay if module.automatic_optimization else None)
        self._unbind()
        if self._engine is not None:
            self._engine.report.trained(self._tokens, self._engine.clock())
            self._engine.report.replays = session.counts.replays
        return results[-1]

    def optimizer_step(self, optimizer: Any, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """Lightning's optimizer step, in slices; afterwards requests may see the new adapter."""
        session, engine = self._session, self._engine
        if session is None or engine is None:
            return super().optimizer_step(optimizer, closure, model, **kwargs)

        with ExitStack() as stack:

            def closed() -> Any:
                result = closure()
                stack.enter_context(self._interrupts.held_back(engine.gate.close))
                return result

            if getattr(self.precision_plugin, "scaler", None) is not None:  # it looks at the optimizer itself
                output = super().optimizer_step(optimizer, closed, model, **kwargs)
            else:
                with self._on_stream(), session.slicing(optimizer):
                    output = super().optimizer_step(optimizer, closed, model, **kwargs)
            self._steps += 1
            if self._steps % self._config.publish_every == 0:
                engine.publish(self._lora)
        return output

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Lightning's, in quanta while a fit runs."""
        if self._session is None:
            return super().validation_step(*args, **kwargs)
        self._interrupts.check()
        with self._on_stream(), self._session.step(0):
            return super().validation_step(*args, **kwargs)

    def _slice_clipping(self, session: FinetuneSession) -> None:
        plugin: Any = self.precision_plugin
        plugin.clip_grad_by_norm = lambda optimizer, clip_val: session.clip(plugin.main_params(optimizer), clip_val)
        plugin.clip_grad_by_value = lambda optimizer, clip_val: session.clip_value(
            plugin.main_params(optimizer), clip_val
        )

    @contextmanager
    def _on_stream(self) -> Iterator[None]:
        """On a GPU: work on the stream that the executor gives to the micro-batch, from its forward to its backward."""
        bind = None if self._engine is None else getattr(self._engine.executor, "bind", None)
        if bind is None:
            yield
            return
        if self._stream is None:
            self._stream = bind()
        stream, before = self._stream, torch.cuda.current_stream()
        stream.wait_stream(before)
        with torch.cuda.stream(stream):
            yield
        before.wait_stream(stream)

    def _unbind(self) -> None:
        if self._stream is not None and self._engine is not None:
            self._engine.executor.unbind()  # type: ignore[attr-defined]
        self._stream = None

    # -- checkpoints -------------------------------------------------------------------------------------------------
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Without the frozen base: the adapter, and what the module holds besides the LoRA model."""
        state = super().lightning_module_state_dict()
        return state if self._lora is None else kept_state(self.lightning_module, self._lora, state)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Take the adapter back; the base is there already."""
        assert self.lightning_module is not None
        found = lora_models(self.lightning_module)
        if len(found) == 1:  # to validate or test what a fit saved, too
            load_adapter(self.lightning_module, found[0], checkpoint["state_dict"])
        else:
            super().load_model_state_dict(checkpoint, strict)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Beside the checkpoint, a folder ``<name>-adapter`` that ``peft.PeftModel.from_pretrained`` loads."""
        super().save_checkpoint(checkpoint, filepath, storage_options=storage_options)
        if self._lora is not None:
            save_adapter(self._lora, filepath)

    def remove_checkpoint(self, filepath: Any) -> None:
        """The checkpoint, and the folder beside it."""
        super().remove_checkpoint(filepath)
        remove_adapter_folder(filepath)


def _gate(device: torch.device) -> Gate:
    if device.type != "cuda":
        return Gate()
    from ygglight.engines.harli.stopwatch import CudaStopwatch

    return Gate(stopwatch=CudaStopwatch(device))


def _finished(module: LightningModule) -> bool:
    return not module.trainer.interrupted


def loss_tokens(batch: Any) -> int:
    """Tokens of a micro-batch that count in the loss: labels but the first that are not -100; without labels all."""
    if isinstance(batch, dict):
        labels, tokens = batch.get("labels"), batch.get("input_ids")
        if isinstance(labels, Tensor) and labels.dim() > 1:
            return int((labels[:, 1:] != -100).sum())
        if isinstance(tokens, Tensor):
            return tokens.numel()
        batch = list(batch.values())
    if isinstance(batch, Tensor):
        return batch.numel() if not batch.is_floating_point() else len(batch)
    if isinstance(batch, list | tuple) and batch:
        return loss_tokens(batch[0])
    return 0
