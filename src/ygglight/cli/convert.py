"""`ygglight convert moe-draft MODEL --out FILE`: write the 4-bit draft of a mixture of experts once, for many runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ygglight.data.assets import resolve_model
from ygglight.data.documents import find_sources
from ygglight.data.tokens import tokenize
from ygglight.engines.memory.sizes import format_bytes
from ygglight.engines.moe_speq.checkpoint import load_without_experts
from ygglight.engines.moe_speq.config import STAGING, Config
from ygglight.engines.moe_speq.draft import DraftExperts
from ygglight.engines.moe_speq.engine import Engine
from ygglight.engines.moe_speq.layout import find_sites
from ygglight.engines.moe_speq.quantize import Calibration, passes, record

KINDS = ("moe-draft",)
DTYPES = ("auto", "float32", "bfloat16", "float16")


def main(argv: Sequence[str]) -> int:
    """Runs `convert`."""
    parser = argparse.ArgumentParser(prog="ygglight convert", description="Write files that a run would else make.")
    parser.add_argument("kind", choices=KINDS, help="moe-draft: the routed experts in 4 bits, for MoESpeQStrategy")
    parser.add_argument("model", help="directory of a mixture of experts (safetensors), or a packaged name")
    parser.add_argument("--out", type=Path, required=True, help="file to write (safetensors)")
    parser.add_argument(
        "--calibrate", nargs="+", metavar="TEXT", help="text to calibrate with (GPTQ): files, folders or packaged names"
    )
    parser.add_argument("--tokens", type=int, default=8192, help="of the text that are used (default: %(default)s)")
    parser.add_argument(
        "--dtype", default="auto", choices=DTYPES,
        help="of the weights, as the run will have them: for CausalLM float32 unless told so (default: the file's)",
    )  # fmt: skip
    parser.add_argument("--force", action="store_true", help="replace the file if it is there")
    args = parser.parse_args(argv[1:])
    _check(args)
    write_draft(args.model, args.out, args.calibrate, args.tokens, args.dtype)
    return 0


def _check(args: argparse.Namespace) -> None:
    if not args.out.resolve().parent.is_dir():
        raise ValueError(f"--out {args.out}: no such folder; make it first")
    if args.out.exists() and not args.force:
        raise ValueError(f"--out {args.out} is there already: choose another name, or add --force")
    if args.tokens < 1:
        raise ValueError(f"--tokens {args.tokens}: at least 1")


def write_draft(name: str, out: Path, texts: list[str] | None, tokens: int, dtype: str) -> None:
    """Quantise the routed experts of a model and write them.

    Args:
        name: Of the model. out: File to write. texts: To calibrate with; None: round to nearest.
        tokens: Of the text. dtype: Of the weights.

    Raises:
        ValueError: no mixture of experts, or one that cannot be quantised; or no text.
    """
    directory = resolve_model(name)
    sources = find_sources(texts) if texts else []
    model, store = load_without_experts(directory, dtype if dtype == "auto" else getattr(torch, dtype))
    try:
        sites = find_sites(model)
        calibration = _calibrate(model, store, directory, sources, tokens) if sources else None
        with _bar("experts") as step:
            draft = DraftExperts.build(sites, store, device="cpu", calibration=calibration, progress=step)
        draft.save(out)
    finally:
        store.close()
    print(
        f"{out}: {format_bytes(out.stat().st_size)} for {format_bytes(store.bytes_total)} of experts, "
        f"{draft.calibrated} of them by GPTQ, {draft.nearest} rounded to nearest"
    )


def _calibrate(model: Any, store: Any, directory: Path, sources: list[Any], tokens: int) -> Calibration:
    """What the experts see of the text: the model runs over it with its experts brought on demand."""
    from ygglight.compat.transformers import load_tokenizer

    text = torch.from_numpy(tokenize(sources, load_tokenizer(directory), tokens).tokens[:tokens].astype("int64"))
    sites = find_sites(model)
    budget = (len(sites) + STAGING) * store.nbytes
    engine = Engine(model, Config(budget, draft_bits=None), store=store).attach()
    try:
        with _bar("calibration tokens") as step:
            return record(sites, passes(model, text, step), tokens)
    finally:
        engine.detach()


class _bar:
    """A progress bar as the engines call one: with (done, in all)."""

    def __init__(self, name: str) -> None:
        from tqdm.auto import tqdm

        self._bar: Any = tqdm(desc=name)

    def __enter__(self) -> Callable[[int, int], None]:
        return self._step

    def _step(self, done: int, total: int) -> None:
        self._bar.total = total
        self._bar.update(done - self._bar.n)

    def __exit__(self, *why: Any) -> None:
        self._bar.close()
