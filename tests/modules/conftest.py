from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from ygglight.data.loading import ResumableLoader, ShuffledSampler
from ygglight.modules.testing import tiny_causal_lm


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_causal_lm(tmp_path_factory.mktemp("tiny"), chat=True)


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 300, (3, 17), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    return {"input_ids": ids, "labels": ids.masked_fill(mask == 0, -100), "attention_mask": mask}


@pytest.fixture
def loader() -> DataLoader:
    ids = torch.randint(1, 300, (24, 16), generator=torch.Generator().manual_seed(2))
    samples = [{"input_ids": row, "labels": row} for row in ids]
    return ResumableLoader(samples, batch_size=4, sampler=ShuffledSampler(samples, 4))
