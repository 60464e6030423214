"""What a user may say about co-located finetuning and serving."""

from __future__ import annotations

from dataclasses import dataclass

from ygglight.engines.memory.sizes import parse_bytes

EXECUTORS = ("auto", "green_contexts", "streams", "threads", "slices")


@dataclass(frozen=True)
class HarliConfig:
    """Harli (arXiv 2511.11729): LoRA finetuning with what decoding leaves over. The paper's inside is not public to us;
    these knobs are ours.

    Args:
        tpot_slo: Target time per output token in seconds, as a mean over each request; None: twice what a decode step
            of ``max_batch`` sequences takes by itself on this machine.
        max_gap: Longest time between two tokens of a request in seconds; None: four times the target.
        memory: Bytes of the arena that keys, values and finetuning's activations share, or text such as ``4GiB``;
            None: half of what a CUDA device has free, 1 GiB on a CPU.
        max_batch: Most sequences that decode at once.
        max_queue: Most requests that wait; more are refused.
        max_context: Longest text in tokens, prompt and answer together; None: what the model was made for, and at most
            what the arena holds.
        prefill_chunk: Most prompt tokens between two decode steps.
        executor: How the device is shared: ``auto`` takes the best that there is; ``green_contexts`` (disjoint sets of
            SMs), ``streams`` (priorities), ``threads`` (CPU cores), ``slices`` (in turn).
        publish_every: Optimizer steps between two versions of the adapter that requests see.

    Raises:
        ValueError: A value that cannot be, named.
    """

    tpot_slo: float | None = None
    max_gap: float | None = None
    memory: int | str | None = None
    max_batch: int = 8
    max_queue: int = 64
    max_context: int | None = None
    prefill_chunk: int = 128
    executor: str = "auto"
    publish_every: int = 1

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_queue", "prefill_chunk", "publish_every"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}: give a whole number from 1")
        if self.max_context is not None and self.max_context < 2:
            raise ValueError(f"max_context is {self.max_context}: a token of prompt and one of answer are the least")
        if self.tpot_slo is not None and not self.tpot_slo > 0:
            raise ValueError(f"the target time per output token is {self.tpot_slo * 1000:g} ms: give more than 0")
        if self.max_gap is not None and not self.max_gap > 0:
            raise ValueError(f"the longest gap is {self.max_gap * 1000:g} ms: give more than 0")
        if self.max_gap is not None and not self.max_gap >= (self.tpot_slo or 0):
            raise ValueError(
                f"the longest gap ({self.max_gap * 1000:g} ms) is shorter than the target time per output token "
                f"({(self.tpot_slo or 0) * 1000:g} ms): no request could keep both"
            )
        if self.executor not in EXECUTORS:
            raise ValueError(f"executor is {self.executor!r}: one of {', '.join(EXECUTORS)}")
        if self.memory is not None and parse_bytes(self.memory) < 1:
            raise ValueError(f"memory is {self.memory!r}: give more than 0 bytes")
