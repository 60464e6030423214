"""Two processes on a CPU: Adacc over DDP and FSDP2 trains bit for bit like the strategy under it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("two_ranks.py")


def run(kind: str, folder: Path) -> list[dict[str, Any]]:
    hidden = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK", "MASTER_PORT", "MASTER_ADDR"}
    env = {k: v for k, v in os.environ.items() if k not in hidden} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), kind, str(folder)], env=env, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{kind}-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize(
    ("plain", "managed"),
    [("ddp", "adacc_ddp"), pytest.param("fsdp2", "adacc_fsdp2", marks=pytest.mark.slow)],
)
def test_both_ranks_train_as_without_adacc(tmp_path: Path, plain: str, managed: str) -> None:
    expected, found = run(plain, tmp_path), run(managed, tmp_path)
    assert [rank["losses"] for rank in found] == [rank["losses"] for rank in expected]
    assert found[0]["losses"] != found[1]["losses"], "both ranks saw the same data"
    assert found[0]["actions"] == found[1]["actions"]
    assert "recompute" in found[0]["actions"].values(), "nothing was managed"
