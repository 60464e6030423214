"""Models and batches that benchmarks of training steps choose from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.harness import BadInput

SMOLLM2: dict[str, Any] = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True, "max_position_embeddings": 8192,
}  # fmt: skip
LLAMA_1B: dict[str, Any] = {
    "hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 24, "num_attention_heads": 16,
    "num_key_value_heads": 16, "vocab_size": 32000, "tie_word_embeddings": False, "max_position_embeddings": 4096,
}  # fmt: skip

SHAPES = {"smollm2": SMOLLM2, "llama-1.3b": LLAMA_1B}


@dataclass(frozen=True)
class Size:
    """A model and a batch.

    Args:
        model: "smollm2" (real weights where the package is there) or "llama-1.3b" (random weights).
        batch: sequences. tokens: per sequence. dtype: of the weights, and so of everything.
        overrides: changed fields of the configuration; a changed shape means random weights.
    """

    model: str
    batch: int
    tokens: int
    dtype: Literal["float32", "bfloat16"]
    overrides: tuple[tuple[str, int], ...] = ()


SIZES = {
    # The whole vocabulary of 49,152 would drown six layers in the gradient of the tied embedding.
    "quick": Size("smollm2", 1, 256, "float32", (("num_hidden_layers", 6), ("vocab_size", 4096))),
    "smollm2-1x512": Size("smollm2", 1, 512, "float32"),
    "smollm2-1x1024": Size("smollm2", 1, 1024, "float32"),
    "quick-cuda": Size("smollm2", 4, 1024, "bfloat16", (("num_hidden_layers", 6), ("vocab_size", 4096))),
    "smollm2-16x2048": Size("smollm2", 16, 2048, "bfloat16"),
    "llama-1.3b-8x2048": Size("llama-1.3b", 8, 2048, "bfloat16"),
}
DEFAULTS = {("cpu", False): ("smollm2-1x512",), ("cpu", True): ("quick",),
            ("cuda", False): ("llama-1.3b-8x2048", "smollm2-16x2048"), ("cuda", True): ("quick-cuda",)}  # fmt: skip


def sizes(device: str, quick: bool, name: str | None) -> tuple[str, ...]:
    """Names of the sizes to run.

    Raises:
        BadInput: there is no such size; the text lists those that there are.
    """
    if name is None:
        return DEFAULTS[device, quick]
    if name not in SIZES:
        raise BadInput(f"no size {name!r}; there are: {', '.join(SIZES)}")
    return (name,)
