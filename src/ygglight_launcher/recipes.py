"""The recipes that ship with ygglight: where they are, what they are, and how a name finds its file.

Standard library only, for `ygglight recipes` must not wait for anything else.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple


class Recipe(NamedTuple):
    """One packaged recipe, as its path and its opening comments tell.

    `name` is what `--config` takes: `adacc/fit_smollm2.yaml` for system `adacc`, verb `fit`, model `smollm2`.
    """

    name: str
    system: str
    verb: str
    model: str
    needs: str
    command: str
    path: Path


def recipes_dir() -> Path:
    """The folder of packaged recipes.

    A wheel has them at `ygglight/recipes`. An editable install has no such folder and finds the repository's
    `recipes/`. Through `find_spec`, which finds the package without running it.
    """
    spec = find_spec("ygglight")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("the ygglight package is not installed beside its launcher: reinstall it")
    package = Path(spec.submodule_search_locations[0])
    packaged = package / "recipes"
    return packaged if packaged.is_dir() else package.parents[1] / "recipes"


def list_recipes(folder: Path | None = None) -> list[Recipe]:
    """All recipes in a folder laid out as `<system>/<verb>_<model>.yaml`, sorted by name."""
    folder = recipes_dir() if folder is None else folder
    return [_read(path, folder) for path in sorted(folder.glob("*/*.yaml"))]


def _read(path: Path, folder: Path) -> Recipe:
    verb, _, model = path.stem.partition("_")
    needs = command = ""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if not line.startswith("#"):
                break
            text = line.lstrip("# ").rstrip()
            if text.startswith("needs:"):
                needs = text.removeprefix("needs:").strip()
            elif text.startswith("ygglight ") and not command:
                command = text
    return Recipe(path.relative_to(folder).as_posix(), path.parent.name, verb, model, needs, command, path)


def near(word: str, known: Iterable[str]) -> str:
    """`"; did you mean 'a' or 'b'?"`, or nothing when no known name is close."""
    found = difflib.get_close_matches(word, list(known), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(repr(name) for name in found)}?" if found else ""


def resolve(name: str, folder: Path | None = None) -> str:
    """Turns what stands after `--config` into the path of a file.

    A file that exists is taken as it is, so that a local copy wins over the packaged recipe of the same name. Inline
    YAML or JSON, which jsonargparse takes too, passes through.

    Args:
        name: A path, a recipe's name with or without `.yaml`, or inline text.
        folder: Where to look for recipes. Default: the packaged ones.

    Raises:
        ValueError: Neither a file nor a recipe; names the nearest recipes.
    """
    if "\n" in name or name.startswith("{") or ": " in name or Path(name).is_file():
        return name
    known = {recipe.name: recipe.path for recipe in list_recipes(folder)}
    for candidate in (name, f"{name}.yaml"):
        if candidate in known:
            return str(known[candidate])
    hint = near(name, known) or near(f"{name}.yaml", known)
    raise ValueError(
        f"--config {name}: no such file, and no recipe of that name{hint} `ygglight recipes` lists them all."
        if hint
        else f"--config {name}: no such file, and no recipe of that name; there are {', '.join(known) or 'none'}."
    )


def resolve_arguments(argv: Sequence[str]) -> list[str]:
    """Resolves every `--config X`, `--config=X` and `-c X` in a command line."""
    resolved: list[str] = []
    expects_config = False
    for word in argv:
        if expects_config:
            word = resolve(word)
        elif word.startswith("--config="):
            word = "--config=" + resolve(word.removeprefix("--config="))
        expects_config = word in ("--config", "-c")
        resolved.append(word)
    return resolved


def table(rows: Sequence[Sequence[str]]) -> str:
    """Left-aligned columns, two spaces apart; the first row is the heading."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def main(argv: Sequence[str]) -> int:
    """`ygglight recipes`: one line a recipe."""
    parser = argparse.ArgumentParser(prog="ygglight recipes", description="List the packaged recipes.")
    parser.add_argument("system", nargs="?", help="only those of one system, e.g. adacc")
    args = parser.parse_args(argv[1:])
    recipes = list_recipes()
    if args.system is not None:
        systems = sorted({recipe.system for recipe in recipes})
        if args.system not in systems:
            raise ValueError(f"no recipes for {args.system!r}; there are some for: {', '.join(systems) or 'none'}")
        recipes = [recipe for recipe in recipes if recipe.system == args.system]
    rows = [(recipe.system, recipe.verb, recipe.model, recipe.needs, recipe.name) for recipe in recipes]
    print(table([("SYSTEM", "VERB", "MODEL", "NEEDS", "RECIPE"), *rows]))
    if recipes:
        print(f"\nRun one:   {recipes[0].command}\nCopy one:  cp {recipes[0].path} .")
    return 0
