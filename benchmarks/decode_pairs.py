"""Targets, drafts and prompts for benchmarks of generation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import BadInput, Skip
from benchmarks.shell_model import shell
from ygglight.compat import transformers as hf
from ygglight.compat.folders import cache_root
from ygglight.data import assets
from ygglight.data.documents import read_prompts
from ygglight.strategies.draft_files import load_draft

SMOLLM2 = "smollm2-135m-instruct"
DRAFT = "smollm2-draft"
"""Folder that ``ygglight fit --config yggdrasil/fit_draft.yaml`` writes."""


@dataclass(frozen=True)
class Case:
    """A target, a draft and what they are asked.

    Args:
        target: packaged name, or a model of ``benchmarks.fetch_models``. draft: the same, a folder, or "lookup".
        prompts: name of packaged prompts. dtype: of both. tokens: new ones a prompt. chat: use the chat template.
        shell: shape of the big model that the target is put into; empty: as it is.
    """

    target: str
    draft: str
    prompts: str
    dtype: str
    tokens: int = 128
    chat: bool = True
    shell: str = ""


CASES = {
    "quick": Case(SMOLLM2, "lookup", "gsm8k-test", "float32", tokens=24),
    "smollm2": Case(SMOLLM2, DRAFT, "gsm8k-test", "float32"),
    "qwen": Case("qwen2.5-coder-1.5b", "qwen2.5-coder-0.5b", "human-eval", "bfloat16", tokens=64),
    "qwen-fp32": Case("qwen2.5-coder-1.5b", "qwen2.5-coder-0.5b", "human-eval", "float32", tokens=64),
    "shell-1b": Case(SMOLLM2, DRAFT, "gsm8k-test", "float32", shell="1b"),
    "shell-7b": Case(SMOLLM2, DRAFT, "gsm8k-test", "bfloat16", shell="7b"),
}
DEFAULTS = {
    ("cpu", True): ("quick",), ("cpu", False): ("smollm2", "qwen"),
    ("cuda", True): ("quick",), ("cuda", False): ("qwen", "shell-1b", "shell-7b"),
}  # fmt: skip


def cases(device: str, quick: bool, name: str | None) -> tuple[str, ...]:
    """Names of the cases to run.

    Raises:
        BadInput: there is no such case; the text lists those that there are.
    """
    if name is None:
        return DEFAULTS[device, quick]
    if name not in CASES:
        raise BadInput(f"no size {name!r}; there are: {', '.join(CASES)}")
    return (name,)


@dataclass
class Pair:
    """Loaded models and prompts.

    Args:
        target: with its generation config set to greedy. draft: a model or "lookup". prompts: int64 ``[1, L]`` each.
        case: where it comes from. tokenizer: of both.
    """

    target: Any
    draft: Any
    prompts: list[torch.Tensor]
    case: Case
    tokenizer: Any

    @property
    def line(self) -> str:
        """For the report."""
        case = self.case
        body = f"{case.target} in a {case.shell.upper()} shell" if case.shell else case.target
        return f"{body}, draft {Path(case.draft).name}, {case.dtype}, {case.prompts}, {case.tokens} new tokens, batch 1"


def load(case: Case, device: str, count: int) -> Pair:
    """Load a case.

    Args:
        case: which. device: where. count: of prompts.

    Raises:
        Skip: weights are missing; the text says how to get them.
    """
    directory = _directory(case.target)
    dtype = getattr(torch, case.dtype)
    target: Any = hf.load_causal_lm(directory, dtype=dtype).requires_grad_(False).eval()
    draft: Any = case.draft
    if draft != "lookup":
        draft = load_draft(str(_directory(case.draft)), target, None, None).to(device)
    if case.shell:
        target = shell(target, case.shell).to(dtype)
    tokenizer = hf.load_tokenizer(directory)
    target = target.to(device)
    target.generation_config.do_sample = False
    for name in ("temperature", "top_p", "top_k", "repetition_penalty"):  # greedy: they would only be warned about
        setattr(target.generation_config, name, None)
    texts = read_prompts(case.prompts)[:count]
    return Pair(target, draft, [_encode(tokenizer, text, case.chat).to(device) for text in texts], case, tokenizer)


def _encode(tokenizer: Any, text: str, chat: bool) -> torch.Tensor:
    if chat:
        turn = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        return tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids  # type: ignore[no-any-return]
    return tokenizer(text, return_tensors="pt").input_ids  # type: ignore[no-any-return]


def _directory(name: str) -> Path:
    if name == SMOLLM2:
        return assets.resolve_model(name)
    if Path(name).is_dir():
        return Path(name)
    if name == DRAFT:
        raise Skip(f"no folder {DRAFT} here: make it with `ygglight fit --config yggdrasil/fit_draft.yaml`")
    made = sorted((cache_root() / "models").glob(f"{name}-*-v*"))
    if not made:
        raise Skip(f"{name} is not here: `python -m benchmarks.fetch_models {name}`")
    return made[-1]
