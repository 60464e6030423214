"""One training step of ``modules.CausalLM`` that all variants share, and what is measured of it besides time.

A step is forward and backward. The optimizer is left out: it costs all variants the same and would only make their
differences look smaller.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.allocator import allocated
from benchmarks.harness import Incorrect
from benchmarks.sizes import SHAPES, Size
from ygglight.compat import transformers as hf
from ygglight.data import assets
from ygglight.engines.memory.meter import LiveBytes
from ygglight.modules import CausalLM
from ygglight.modules.loss import chunked_loss

GPU_ERROR = 2e-3
"""Relative gradient error that an exact variant may show on a GPU in any case: about one bfloat16 rounding."""


class Workload:
    """A loaded model with one batch.

    Args:
        size: what to load. device: where.

    Attributes:
        module: the CausalLM. batch: token ids and labels. weights: "real" or "random". layers: the decoder layers.
    """

    def __init__(self, size: Size, device: str) -> None:
        self.size, self.device = size, torch.device(device)
        self.module, self.weights = _load(size)
        self.module.to(self.device).train()
        self.network: Any = _network(self.module)
        self.layers: list[Any] = list(hf.decoder_layers(self.network))
        self.parameters = [p for p in self.module.parameters() if p.requires_grad]
        ids = _tokens(size, self.module, self.weights).to(self.device)
        self.batch = {"input_ids": ids, "labels": ids}
        self._held = 0
        self._between: Callable[[], Any] | None = None
        self._exact: list[Tensor] = []
        self._noise: float | None = None

    @property
    def case(self) -> str:
        """For the report."""
        config = self.network.config
        return (
            f"{self.size.model} ({config.num_hidden_layers} layers, {self.weights} weights), "
            f"{self.size.batch}x{self.size.tokens} tokens, {self.size.dtype}"
        )

    # -- the step --------------------------------------------------------------------------------------------------
    def loss(self) -> Tensor:
        """Forward, with the chunked loss."""
        return chunked_loss(self.network, self.batch["input_ids"], self.batch["labels"])

    def backward(self, loss: Tensor) -> None:
        """Backward, and before it whatever :meth:`between` asked for."""
        if self._between is not None:
            self._between()
        loss.backward()

    @contextmanager
    def between(self, call: Callable[[], Any]) -> Iterator[None]:
        """Inside, ``call`` is called between forward and backward."""
        self._between = call
        try:
            yield
        finally:
            self._between = None

    def step(self) -> None:
        """The plain step."""
        self.backward(self.loss())

    def clear(self) -> None:
        """Drop all gradients, as Lightning does before a step."""
        for parameter in self.parameters:
            parameter.grad = None

    # -- what is measured ------------------------------------------------------------------------------------------
    def bytes_of(self, step: Callable[[], Any], around: Callable[[], Any] = nullcontext) -> dict[str, int]:
        """``peak_bytes``, what ``memory_budget`` bounds; ``held_bytes``, alive between forward and backward; and
        ``allocator_bytes``, the peak that the allocator saw with nobody watching."""
        peak = self.peak(step, around)
        held = self._held
        with around():
            unwatched, _ = allocated(step, self.device, self.between)
        return {"peak_bytes": peak, "held_bytes": held, "allocator_bytes": unwatched}

    def peak(self, step: Callable[[], Any], around: Callable[[], Any] = nullcontext) -> int:
        """Live bytes above state of ``step``; on a CPU by ``LiveBytes``, on CUDA from the allocator.

        Gradients exist before, so that none of them is counted at one end of the step and not at the other.
        """
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        with around():
            if self.device.type == "cuda":
                peak, self._held = allocated(step, self.device, self.between)
                return peak
            with LiveBytes(self.parameters, self.device) as meter, self.between(lambda: self._hold(meter)):
                step()
                return meter.peak

    def _hold(self, meter: LiveBytes) -> None:
        self._held = meter.live

    def remember_exact(self) -> None:
        """Two plain steps: the gradients that all others are held against, and how far plain is from itself."""
        self.clear()
        self.step()
        self._exact = [p.grad.clone() for p in self.parameters if p.grad is not None]
        self.clear()
        self.step()
        self._noise = self.gradient_error()

    def gradient_error(self) -> float:
        """Relative error of the whole gradient that lies in ``.grad`` now; 0.0 only when bitwise equal."""
        found = [p.grad for p in self.parameters]
        if any(g is None for g in found):
            raise Incorrect("a parameter has no gradient")
        pairs = [(a, b) for a, b in zip(self._exact, found, strict=True) if b is not None and not torch.equal(a, b)]
        if not pairs:
            return 0.0
        # Per-tensor sums in float32 (their terms are O(1) relative to the largest), the rest in Python's float64.
        difference = math.fsum(float((a.float() - b.float()).square().sum()) for a, b in pairs)
        total = math.fsum(float(a.float().square().sum()) for a in self._exact)
        error = math.sqrt(difference / total) if total else math.inf
        return max(error, 5e-324)

    def check(
        self, step: Callable[[], Any], around: Callable[[], Any] = nullcontext, bound: float | None = 0.0
    ) -> float:
        """Run ``step`` and compare its gradients with the plain ones.

        Args:
            step: forward and backward. around: as for a variant.
            bound: largest relative error; 0 means bitwise equality on a CPU, and elsewhere about what plain differs
                from itself (atomics add in any order); None: any finite error.

        Returns:
            The relative error.

        Raises:
            Incorrect: it is larger.
        """
        self.clear()
        with around():
            step()
        error = self.gradient_error()
        if not math.isfinite(error):
            raise Incorrect("the gradient is not finite")
        if bound == 0.0 and self.device.type != "cpu":
            bound = max(4 * (self._noise or 0.0), GPU_ERROR)
        if bound is not None and error > bound:
            raise Incorrect(f"relative gradient error {error:.3g}, allowed {bound:.3g}")
        return error


# -- loading ---------------------------------------------------------------------------------------------------------
def _load(size: Size) -> tuple[CausalLM, str]:
    shape = SHAPES[size.model] | dict(size.overrides)
    keeps_shapes = all(name == "num_hidden_layers" for name, _ in size.overrides)
    if size.model == "smollm2" and keeps_shapes and _has_smollm2():
        module = CausalLM(assets.SMOLLM2, dtype=size.dtype, config_overrides=dict(size.overrides) or None)
        module.configure_model()
        return module, "real"
    from transformers import LlamaConfig

    with tempfile.TemporaryDirectory() as folder:
        LlamaConfig(**shape, architectures=["LlamaForCausalLM"]).save_pretrained(Path(folder))
        module = CausalLM(folder, dtype=size.dtype, init="random")
        module.configure_model()
    return module, "random"


def _network(module: CausalLM) -> Any:
    return module.model


def _has_smollm2() -> bool:
    try:
        assets.resolve_model(assets.SMOLLM2)
    except (ModuleNotFoundError, ValueError, OSError):
        return False
    return True


def _tokens(size: Size, module: CausalLM, weights: str) -> Tensor:
    """Real text for real weights, if there is any; else random tokens."""
    count = size.batch * size.tokens
    if weights == "real" and assets.is_installed("gsm8k"):
        text = assets.resolve("gsm8k").read_text(encoding="utf-8")[: 16 * count]
        ids = module.tokenizer(text, return_tensors="pt")["input_ids"][0, :count]
        if len(ids) == count:
            return ids.reshape(size.batch, size.tokens)
    generator = torch.Generator().manual_seed(0)
    config: Any = module.model.config  # type: ignore[union-attr]
    return torch.randint(0, config.vocab_size, (size.batch, size.tokens), generator=generator)
