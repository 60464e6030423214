"""Mixtures of experts, links and prompts for benchmarks of offloaded experts."""

from __future__ import annotations

import copy
import gc
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import BadInput, Skip
from ygglight.compat import transformers as hf
from ygglight.data import assets
from ygglight.data.documents import find_sources, read_prompts
from ygglight.data.tokens import tokenize
from ygglight.demos.moe_speq import DENSE, copies
from ygglight.engines.moe_speq.config import STAGING
from ygglight.engines.moe_speq.draft import DraftExperts
from ygglight.engines.moe_speq.layout import Site, find_sites
from ygglight.engines.moe_speq.quantize import Calibration, passes, record
from ygglight.engines.moe_speq.stores import ExpertStore, store_for
from ygglight.kernels import _dispatch

MODEL = "smollm2-moe-8x10"
COPIES = "smollm2-135m-instruct, each FFN in 8 copies"
"""Writes SmolLM2's own text whatever its routers choose, so a draft is accepted as often as one of a good model is."""
TINY: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_local_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": 512,
    "initializer_range": 0.2, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
    "tie_word_embeddings": False,
}  # fmt: skip
CALIBRATION = 8192
"""Tokens of text for GPTQ, as `ygglight convert moe-draft` takes."""
PROMPT = "Question: {}\nAnswer:"
"""As the model was trained."""


@dataclass(frozen=True)
class Case:
    """A model, the memory and the link that its experts have, and what it is asked.

    Args:
        model: A name for ``CausalLM``, ``COPIES``, or "tiny": random weights. dtype: Of the weights.
        slots: Of the cache, a layer, beside a draft; without one there are as many more as the draft would take.
        bandwidth: Bytes a second of the link; None: as fast as it goes. latency: Seconds more a copy.
        disk: Experts are read from the disk, past the page cache; else they lie in host memory.
        noise: On the draft's weights, as a part of their spread.
        tokens: New ones a prompt. shortest: Tokens of a prompt, at least.
        hooked: New tokens by accelerate's hooks, where one takes seconds.
    """

    model: str
    dtype: str
    slots: int
    bandwidth: float | None
    latency: float = 0.0
    disk: bool = False
    noise: float = 0.0
    tokens: int = 32
    shortest: int = 128
    hooked: int = 5


_SLOW = Case(COPIES, "bfloat16", 2, 0.25e9, 3e-4)
_FAST = replace(_SLOW, bandwidth=4e9, latency=1e-4)
CASES = {
    "quick": Case("tiny", "float32", 2, 50e6, 1e-4, tokens=12, shortest=16, hooked=3),
    "fast": _FAST,
    "slow": _SLOW,
    "large": replace(_SLOW, slots=5),
    "noisy": replace(_FAST, noise=1.0),
    "mixture": replace(_SLOW, model=MODEL),
    "disk": replace(_SLOW, model=MODEL, bandwidth=None, latency=0.0, disk=True),
    "gpu": replace(_SLOW, bandwidth=None, latency=0.0, hooked=32),
    "gpu-large": replace(_SLOW, bandwidth=None, latency=0.0, hooked=32, slots=5),
    "gpu-noisy": replace(_SLOW, bandwidth=None, latency=0.0, hooked=32, noise=1.0),
}
DEFAULTS = {"cpu": ("fast", "slow", "large", "noisy", "mixture", "disk"), "cuda": ("gpu", "gpu-large", "gpu-noisy")}
"""By device. A GPU has a link of its own, which nothing slows down."""


def cases(quick: bool, name: str | None, device: str) -> tuple[str, ...]:
    """Names of the cases to run.

    Args:
        quick: The smallest. name: Of one, or several with commas between them. device: To run on.

    Raises:
        BadInput: there is no such case; the text lists those that there are.
    """
    if name is None:
        return ("quick",) if quick else DEFAULTS[device]
    names = tuple(name.split(","))
    for each in names:
        if each not in CASES:
            raise BadInput(f"no size {each!r}; there are: {', '.join(CASES)}")
    return names


class Subject:
    """A model with its experts in memory, a store with copies of them, and prompts.

    Args:
        case: Which. count: Of prompts. device: Where the models run.

    Raises:
        Skip: the model is not there (the text says how to make it), or the case is for another device.
    """

    def __init__(self, case: Case, count: int, device: str = "cpu") -> None:
        if device != "cpu" and (case.bandwidth is not None or case.disk):
            raise Skip("links are slowed down, and disks read, on a CPU only: take a size that begins with gpu")
        self.case, self.device = case, device
        self.model, self.prompts = _MODELS.get(case.model, _mixture)(case, count)
        self.model.generation_config.eos_token_id = None  # all texts are of one length
        own = copy.deepcopy(self.model)  # the store takes these experts; the first ones stay for comparison
        self.store: ExpertStore = store_for(
            own, find_sites(own), where="disk" if case.disk else "host", device=device, drop_cache=case.disk
        )
        if case.disk and getattr(self.store, "io", "") == "cached":
            raise Skip("this file system reads through the page cache only: a read from it is no read of a disk")
        self._own = own.to(device)
        self.model.to(device)
        self.prompts = [prompt.to(device) for prompt in self.prompts]
        gc.collect()

    @property
    def sites(self) -> list[Site]:
        """The sparse layers."""
        return find_sites(self.model)

    @cached_property
    def draft(self) -> DraftExperts:
        """In four bits, by GPTQ, which takes minutes: made once a model. One with noise is rounded to nearest."""
        case, sites = self.case, self.sites
        if case.noise:
            return DraftExperts.build(sites, NoisyStore(self.store, sites, case.noise), device=self.device)
        key = case.model, case.dtype
        if key not in _DRAFTS:
            calibration = None if case.model == "tiny" else _calibrate(self.model, case.model)
            _DRAFTS[key] = DraftExperts.build(sites, self.store, device=self.device, calibration=calibration)
        return _DRAFTS[key]

    @cached_property
    def loop_draft(self) -> DraftExperts:
        """The same that widens its weights, expert by expert, as without a kernel for four bits."""
        before = os.environ.get(_dispatch.ENVIRONMENT_VARIABLE)
        os.environ[_dispatch.ENVIRONMENT_VARIABLE] = "reference"
        try:
            return DraftExperts.build(self.sites, self.store, device=self.device)
        finally:
            del os.environ[_dispatch.ENVIRONMENT_VARIABLE]
            if before is not None:
                os.environ[_dispatch.ENVIRONMENT_VARIABLE] = before

    def budget(self, *, draft: bool = True) -> int:
        """Bytes for experts.

        Args:
            draft: With what the draft takes.
        """
        slabs = self.case.slots * len(self.sites) + STAGING
        return slabs * self.store.nbytes + (self.draft.nbytes if draft else 0)

    def twin(self) -> Any:
        """Another model of the same weights, that experts can be taken from alone."""
        shared = {id(t): t for t in (*self._own.parameters(), *self._own.buffers())}
        model = copy.deepcopy(self._own, shared)
        model.expert_store = self.store
        return model

    @property
    def line(self) -> str:
        """For the report."""
        case, experts, slab = self.case, self.sites[0].experts, self.store.nbytes
        more = min(experts, (self.budget() // slab - STAGING) // len(self.sites))
        if case.disk:
            link = f"disk ({getattr(self.store, 'io', '')} reads)"
        elif case.bandwidth is None:
            link = "host memory" if self.device == "cpu" else "pinned host memory over the device's own link"
        else:
            link = f"link {case.bandwidth / 1e9:g} GB/s + {1000 * case.latency:g} ms"
        noise = f", draft with noise {case.noise:g}" if case.noise else ""
        return (
            f"{case.model}, {case.dtype}, {case.slots} of {experts} experts a layer beside the draft or {more} without "
            f"one, {link}{noise}, {case.tokens} new tokens"
        )


class NoisyStore:
    """A store whose experts are not quite those of the model.

    Args:
        store: The right ones. sites: Of the model. noise: Of the weights, as a part of their spread.
    """

    kind = "host"

    def __init__(self, store: ExpertStore, sites: list[Site], noise: float) -> None:
        self._store, self.layout, self._noise = store, sites[0].layout, noise
        self.layers, self.nbytes, self.bytes_total = store.layers, store.nbytes, store.bytes_total
        self._draw = torch.Generator().manual_seed(1)

    def slab(self, layer: int, expert: int) -> None:
        """None: it must be read."""

    def read_into(self, layer: int, expert: int, out: Tensor) -> None:
        """The right expert, and noise on it."""
        self._store.read_into(layer, expert, out)
        for view in self.layout.views(out).values():
            drawn = torch.randn(view.shape, generator=self._draw).to(view.dtype)
            view.add_(drawn * (self._noise * view.std()))

    def close(self) -> None:
        """Nothing to do."""


def _found(model: str) -> Path:
    try:
        return assets.resolve_model(model)
    except FileNotFoundError as error:
        raise Skip(str(error)) from error


def _mixture(case: Case, count: int) -> tuple[Any, list[Tensor]]:
    directory = _found(case.model)
    model: Any = hf.load_causal_lm(directory, dtype=getattr(torch, case.dtype))
    # A model as small as this one falls into a loop, and a loop asks for the same experts again and again.
    model.generation_config.repetition_penalty = 1.3
    model.generation_config.no_repeat_ngram_size = 3
    tokenizer = hf.load_tokenizer(directory)
    prompts = (tokenizer(PROMPT.format(text), return_tensors="pt").input_ids for text in read_prompts("gsm8k-test"))
    return _greedy(model), _long(prompts, case, count)


def _copies(case: Case, count: int) -> tuple[Any, list[Tensor]]:
    directory = _found(DENSE)
    dense: Any = hf.load_causal_lm(directory, dtype=torch.float32)
    tokenizer = hf.load_tokenizer(directory)
    questions = read_prompts("gsm8k-test")
    model = copies(dense, tokenizer).to(getattr(torch, case.dtype))
    prompts = (
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        for question in questions
    )
    return _greedy(model), _long(prompts, case, count)


def _calibrate(model: Any, name: str) -> Calibration:
    tokenizer = hf.load_tokenizer(_found(DENSE if name == COPIES else name))
    text = tokenize(find_sources("gsm8k"), tokenizer, CALIBRATION).tokens[:CALIBRATION].astype("int64")
    return record(find_sites(model), passes(model, torch.from_numpy(text).to(model.device)))


def _greedy(model: Any) -> Any:
    model.generation_config.do_sample = False
    for name in ("temperature", "top_p", "top_k"):  # they would only be warned about
        setattr(model.generation_config, name, None)
    return model.requires_grad_(False).eval()


def _long(prompts: Iterable[Tensor], case: Case, count: int) -> list[Tensor]:
    return list(islice((ids for ids in prompts if ids.shape[1] >= case.shortest), count))


def _tiny(case: Case, count: int) -> tuple[Any, list[Tensor]]:
    from transformers import MixtralConfig, MixtralForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = MixtralForCausalLM(MixtralConfig(**TINY)).requires_grad_(False).eval()
        prompts = [torch.randint(1, TINY["vocab_size"], (1, 16 + i)) for i in range(count)]
    return model, prompts


_MODELS = {"tiny": _tiny, COPIES: _copies}
_DRAFTS: dict[tuple[str, str], DraftExperts] = {}
