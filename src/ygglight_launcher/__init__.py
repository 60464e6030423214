"""The `ygglight` command: finds the verb, and imports only what that verb needs.

It is a package of its own, beside `ygglight`, because importing any `ygglight.*` module first runs
`ygglight/__init__.py`, which registers the strategy names and for that imports Lightning (4.7 s on two cores). From
here `--version`, `--help` and `recipes` answer in about a tenth of a second, with the standard library alone and
without an import hook.
"""

from __future__ import annotations

import dis
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple


class Verb(NamedTuple):
    """A subcommand: where its `main(argv) -> int | None` is, and its line in the help."""

    target: str
    help: str


_LIGHTNING = "ygglight.cli.run:main"
VERBS: dict[str, Verb] = {
    "fit": Verb(_LIGHTNING, "train:      ygglight fit --config adacc/fit_smollm2.yaml"),
    "validate": Verb(_LIGHTNING, "validate a module"),
    "test": Verb(_LIGHTNING, "test a module"),
    "predict": Verb(_LIGHTNING, "generate or infer"),
    "plan": Verb("ygglight.cli.plan:main", "profile and solve, print the plan and its predicted peak, train nothing"),
    "convert": Verb("ygglight.cli.convert:main", "write files that runs would else make: the draft of a MoE"),
    "demo": Verb("ygglight.cli.demo:main", "show what the systems do, with a real model"),
    "recipes": Verb("ygglight_launcher.recipes:main", "list the recipes that --config knows by name"),
    "doctor": Verb("ygglight.cli.doctor:main", "versions, device, kernels, missing extras"),
}

# Packages whose errors are meant for the user, as told apart by `raised_on_purpose`.
HOUSE = ("ygglight", "ygglight_launcher")
# What ygglight raises on purpose to tell a user something. Anything else is a bug and keeps its traceback.
_TELLING = (ValueError, TypeError, ImportError, OSError)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb.

    Args:
        argv: Arguments after the program's name. Default: those of this process.

    Returns:
        The exit code: 0, or 2 after an error that the user can mend.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0
    if args[0] in ("-V", "--version", "version"):
        from importlib.metadata import version

        print(f"ygglight {version('ygglight')}")
        return 0
    verb = VERBS.get(args[0])
    if verb is None:
        from ygglight_launcher.recipes import near

        hint = near(args[0], VERBS)
        print(f"ygglight: no such command: {args[0]!r}{hint}\n\n{_usage()}", file=sys.stderr)
        return 2
    try:
        module, _, function = verb.target.partition(":")
        run: Callable[[list[str]], int | None] = getattr(importlib.import_module(module), function)
        return run(args) or 0
    except BrokenPipeError:
        if args[0] not in ("recipes", "doctor"):
            raise  # in a run it may be a worker that died, and not the reader of `ygglight recipes | head -3`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes at exit
        return 0
    except _TELLING as error:
        if os.environ.get("YGGLIGHT_TRACEBACK", "0") not in ("", "0") or not raised_on_purpose(error):
            raise
        print(f"ygglight: error: {error}\n(YGGLIGHT_TRACEBACK=1 shows where)", file=sys.stderr)
        return 2


def raised_on_purpose(error: BaseException) -> bool:
    """Whether a `raise` statement in a file of ygglight made this error, as opposed to a failing call or a library.

    Read from the innermost traceback entry: its file, and whether the instruction it stopped at is a raise. So no
    part of the house needs an exception class of its own, and a bug (`None + 1` is a TypeError too) still shows its
    traceback.
    """
    trace = error.__traceback__
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    code = trace.tb_frame.f_code
    package = str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
    return package in HOUSE and code.co_code[trace.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def _usage() -> str:
    lines = ["usage: ygglight COMMAND [ARGS] | --version | --help", ""]
    lines += [f"  {name:<10}{verb.help}" for name, verb in VERBS.items()]
    return "\n".join([*lines, "", "`ygglight COMMAND --help` says more."])
