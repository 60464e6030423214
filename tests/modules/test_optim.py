import itertools
import math

import pytest
import torch

from ygglight.modules.optim import build_optimizer, rate


def test_rate_rises_then_falls_to_a_tenth():
    assert [rate(s, 4, 100, "linear") for s in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    for schedule in ("linear", "cosine"):
        values = [rate(s, 4, 100, schedule) for s in range(4, 101)]
        assert all(a >= b for a, b in itertools.pairwise(values))
        assert values[0] == 1.0 and values[-1] == pytest.approx(0.1)
    assert rate(52, 4, 100, "cosine") == pytest.approx(0.55)
    assert rate(500, 4, 100, "cosine") == pytest.approx(0.1)


def test_rate_is_constant_without_an_end():
    assert rate(10**6, 4, math.inf, "cosine") == rate(50, 0, 100, "constant") == 1.0


def test_nothing_trainable_is_an_error():
    frozen = torch.nn.Parameter(torch.zeros(2, 2), requires_grad=False)
    with pytest.raises(ValueError, match="lora"):
        build_optimizer("adamw", [frozen], 1e-3, 0.0)
