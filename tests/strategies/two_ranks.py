"""Run by test_adacc_distributed.py in two processes: ``python two_ranks.py KIND RESULTS_FOLDER``."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from ygglight.strategies.adacc import AdaccDDPStrategy, AdaccModelParallelStrategy

spec = importlib.util.spec_from_file_location("models", Path(__file__).with_name("conftest.py"))
assert spec is not None and spec.loader is not None
models = importlib.util.module_from_spec(spec)
spec.loader.exec_module(models)

KIND, FOLDER = sys.argv[1], Path(sys.argv[2])
ADACC: dict[str, Any] = {"memory_budget": 0.75, "compress": False}
SHARDED: dict[str, Any] = {"data_parallel_size": 2, "tensor_parallel_size": 1}


class Model(models.UserGPT):  # type: ignore[misc, name-defined]
    sharded = False

    def configure_model(self) -> None:
        if self.device_mesh is not None and not self.sharded:
            from torch.distributed.fsdp import fully_shard

            for block in self.blocks:
                fully_shard(block, mesh=self.device_mesh["data_parallel"])
            self.sharded = True


class Mine:
    """Every rank its own batches."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(models.tokens()[trainer.global_rank :: 2])

    def __len__(self) -> int:
        return 4


torch.set_num_threads(1)
strategy: Any = {
    "ddp": lambda: DDPStrategy(process_group_backend="gloo"),
    "adacc_ddp": lambda: AdaccDDPStrategy(**ADACC, process_group_backend="gloo"),
    "fsdp2": lambda: ModelParallelStrategy(**SHARDED, process_group_backend="gloo"),
    "adacc_fsdp2": lambda: AdaccModelParallelStrategy(**ADACC, **SHARDED, process_group_backend="gloo"),
}[KIND]()
model = Model(p=0.0)
trainer = L.Trainer(
    strategy=strategy, accelerator="cpu", devices=2, max_steps=5, logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
)  # fmt: skip
trainer.fit(model, Mine())
plan = getattr(strategy, "plan", None)
result = {"losses": model.losses, "actions": None if plan is None else plan.actions}
(FOLDER / f"{KIND}-{trainer.global_rank}.json").write_text(json.dumps(result))
# Seen once in CI: a thread of gloo aborts the process while Python shuts down ("terminate called without an active
# exception"). All that is tested has happened: wait for the other rank's file, then leave without the shutdown.
torch.distributed.barrier()
sys.stdout.flush()
sys.stderr.flush()
os._exit(0)
