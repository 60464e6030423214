"""FSDP2 on two CPU processes: minutes on a busy machine, so it runs with the slow tests."""

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

pytestmark = pytest.mark.slow


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def _train(rank: int, directory: str, port: str, lora: dict | None, out: str) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": "2", "NODE_RANK": "0", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test",
    }  # fmt: skip
    torch.set_num_threads(1)
    import lightning.pytorch as L
    from lightning.pytorch.strategies import ModelParallelStrategy
    from torch.distributed.tensor import DTensor

    from ygglight.data.loading import ResumableLoader, ShuffledSampler
    from ygglight.modules import CausalLM

    ids = torch.randint(1, 300, (16, 16), generator=torch.Generator().manual_seed(2))
    samples = [{"input_ids": row, "labels": row} for row in ids]
    loader = ResumableLoader(samples, batch_size=2, sampler=ShuffledSampler(samples, 2, world_size=2, rank=rank))
    module = CausalLM(directory, lora=lora, learning_rate=1e-2)
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False)
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy=strategy, max_steps=3, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, default_root_dir=out,
    )  # fmt: skip
    trainer.fit(module, loader)
    assert all(isinstance(p, DTensor) for p in module.parameters())
    trainer.save_checkpoint(Path(out) / "sharded.ckpt")


@pytest.mark.parametrize("lora", [None, {"r": 4}])
def test_two_shards_train_as_one_model(tmp_path, tiny, lora):
    import lightning.pytorch as L

    from ygglight.data.loading import ResumableLoader, ShuffledSampler
    from ygglight.modules import CausalLM

    mp.spawn(_train, (str(tiny), _free_port(), lora, str(tmp_path)), nprocs=2)
    sharded = torch.load(tmp_path / "sharded.ckpt", weights_only=True)["state_dict"]

    # Each rank takes every second sample of the one order, so both ranks' batches together are the batches of one.
    ids = torch.randint(1, 300, (16, 16), generator=torch.Generator().manual_seed(2))
    samples = [{"input_ids": row, "labels": row} for row in ids]
    loader = ResumableLoader(samples, batch_size=4, sampler=ShuffledSampler(samples, 4))
    module = CausalLM(str(tiny), lora=lora, learning_rate=1e-2)
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_steps=3, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, loader)
    whole = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
    assert sharded.keys() == whole.keys()
    for name, parameter in whole.items():
        difference = (sharded[name] - parameter).norm() / parameter.norm()
        assert difference < 1e-4, (name, difference)
