"""A folder of the user's for what is computed once: converted weights and tokenised text.

Knows nothing of models or text. An entry is a folder that appears whole or not at all, so readers need no locks.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

__all__ = ["cache_root", "publish"]


def cache_root() -> Path:
    """Return the cache folder: ``$YGGLIGHT_CACHE``, else ``$XDG_CACHE_HOME/ygglight``, else ``~/.cache/ygglight``."""
    own = os.environ.get("YGGLIGHT_CACHE")
    if own:
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared).expanduser() if shared else Path.home() / ".cache") / "ygglight"


def publish(entry: str, build: Callable[[Path], None]) -> Path:
    """Return the folder of a cache entry, building it first if it is not there.

    Two processes may build the same entry at once; both succeed and the one that finishes first is kept.

    Args:
        entry: Path of the entry below the cache folder, e.g. ``models/smollm2-b179c952``. It must name its content
            (a hash), since an entry that is there is never rebuilt.
        build: Fills the empty folder it is given.

    Returns:
        The finished folder.
    """
    final = cache_root() / entry
    if final.is_dir():
        return final
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".building-", dir=final.parent))
    except OSError as error:
        raise OSError(
            f"cannot write to the cache folder {cache_root()} ({error.strerror}): set YGGLIGHT_CACHE to a writable one"
        ) from error
    try:
        build(scratch)
        scratch.chmod(0o755)  # mkdtemp and safetensors write for the owner alone; a shared cache must be readable
        for file in scratch.rglob("*"):
            file.chmod(0o755 if file.is_dir() else 0o644)
        try:
            scratch.rename(final)
        except OSError:
            if not final.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return final
