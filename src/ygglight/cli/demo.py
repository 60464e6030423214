"""`ygglight demo [SYSTEM]`: what the systems do, shown on a real model."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from ygglight.registry import DEMOS, load
from ygglight_launcher.recipes import near


def main(argv: Sequence[str]) -> int:
    """Runs the demos named, or all."""
    parser = argparse.ArgumentParser(prog="ygglight demo", description="Show what the systems do, on a real model.")
    parser.add_argument("system", nargs="*", help=f"which (default: all): {', '.join(DEMOS)}")
    parser.add_argument("--long", action="store_true", help="the full form; the short one takes minutes on two cores")
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="folder for pictures (default: demo_out)")
    args = parser.parse_args(argv[1:])
    for system in args.system:
        if system not in DEMOS:
            raise ValueError(f"no demo of {system!r}{near(system, DEMOS)} (there are: {', '.join(DEMOS)})")
    for system in args.system or DEMOS:
        out = args.out / system
        out.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        print(f"== {system} ==", flush=True)
        load(DEMOS[system])(short=not args.long, out=out)
        print(f"== {system}: {time.perf_counter() - start:.0f} s, files in {out} ==", flush=True)
    return 0
