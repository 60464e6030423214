"""Running a causal language model over a tree of tokens, or a batch of sequences, on a static KV cache."""

from ygglight.engines.decode.call import ModelCall, Step
from ygglight.engines.decode.decoder import Decoder
from ygglight.engines.decode.paged import PagedCache, PagedDecoder
from ygglight.engines.decode.support import UnsupportedModel, check_tree_support, why_unsupported

__all__ = [
    "Decoder",
    "ModelCall",
    "PagedCache",
    "PagedDecoder",
    "Step",
    "UnsupportedModel",
    "check_tree_support",
    "why_unsupported",
]
