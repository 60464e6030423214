"""Overwriting what autograd saved raises whatever is done with it, as it does in plain torch (A2, trap 1)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ygglight.engines.adacc.graph import Action, Policy

from .harness import COMPRESS, KEEP, RECOMPUTE, Session, error, nothing_left

ROWS, WIDTH = 64, 128
MESSAGE = "modified by an inplace operation"


class Block(nn.Module):
    """Saves a sigmoid's output and a gelu's input; ``inside`` gets the former, and may keep it in ``left``."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.inside: Callable[[Tensor], object] = lambda y: None

    def forward(self, x: Tensor) -> Tensor:
        y = torch.sigmoid(self.a(x))
        z = F.gelu(self.b(x))
        w = y + self.c(z)
        self.inside(y)
        return w


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Linear(8, WIDTH), nn.ModuleList(Block() for _ in range(2))
        self.between: Callable[[nn.Module], object] = lambda block: None

    def loss(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        for block in self.blocks:
            h = block(h)
            self.between(block)
        return h.square().mean()


@pytest.fixture
def session() -> Session:
    found = Session(Model(), torch.randn(ROWS, 8), compress=True)
    found.profile()
    return found


def use(session: Session, sigmoid: Action, gelu: Action) -> None:
    """``sigmoid`` on what sigmoid returned, ``gelu`` on what gelu was given; the rest is kept."""
    kinds = []
    for graph in session.built.step.types:
        actions, codecs = {v.id: KEEP for v in graph.actionable}, {}
        for value in graph.actionable:
            action = {"aten.sigmoid:0": sigmoid, "b/aten.addmm:0": gelu}.get(value.name, KEEP)
            actions[value.id] = action
            if action is COMPRESS:
                codecs[value.id] = "int8"
        kinds.append(Policy(actions, codecs))
    session.use([kinds[i] for i in session.built.step.sequence])


ROUTES = {
    "kept beside a recomputed one": (KEEP, RECOMPUTE),
    "kept beside a compressed one": (KEEP, COMPRESS),
    "compressed": (COMPRESS, KEEP),
    "compressed beside a recomputed one": (COMPRESS, RECOMPUTE),
    "recomputed": (RECOMPUTE, KEEP),
    "recomputed beside a compressed one": (RECOMPUTE, COMPRESS),
}
WRITES: dict[str, Callable[[Tensor], object]] = {
    "add_": lambda y: y.add_(1.0),
    "a part": lambda y: y[:, :4].zero_(),
    "detached": lambda y: y.detach().mul_(2.0),
    "no_grad": torch.no_grad()(lambda y: y.mul_(2.0)),
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("where", ["inside the block", "by the caller"])
def test_a_saved_tensor_that_is_overwritten_raises(session: Session, route: str, write: str, where: str) -> None:
    use(session, *ROUTES[route])
    truth = session.plain()
    assert error(session.managed(), truth) < 0.02, "nothing is overwritten yet"
    overwrite(session.module, where, WRITES[write])
    assert MESSAGE in failure(session.plain)
    with nothing_left():
        assert MESSAGE in failure(session.managed)
    session.close()


def overwrite(model: Model, where: str, write: Callable[[Tensor], object]) -> None:
    last = model.blocks[1]
    if where == "inside the block":
        last.inside = write
        return
    left: list[Tensor] = []
    last.inside = left.append
    model.between = lambda block: write(left.pop()) if left else None


def failure(step: Callable[[], object]) -> str:
    """What ``step`` raises, without its traceback (which would hold on to the graph)."""
    try:
        step()
    except RuntimeError as raised:
        return str(raised)
    return ""


@pytest.mark.parametrize("where", ["inside the block", "by the caller"])
def test_the_watched_step_raises_too(where: str) -> None:
    session = Session(Model(), torch.randn(ROWS, 8), compress=True)
    overwrite(session.module, where, WRITES["add_"])
    assert MESSAGE in failure(session.managed)
    session.close()


def test_overwriting_what_was_not_saved_raises_nowhere(session: Session) -> None:
    """The negative control: the same writes on a copy."""
    for where, write in (("inside the block", lambda y: (y * 2.0).add_(1.0)), ("by the caller", lambda y: y + 1.0)):
        overwrite(session.module, where, write)
        truth = session.plain()
        for route in ROUTES.values():
            use(session, *route)
            assert error(session.managed(), truth) < 0.02
    session.close()


def test_the_message_names_the_region_and_the_shape(session: Session) -> None:
    use(session, RECOMPUTE, KEEP)
    session.module.blocks[1].inside = WRITES["add_"]
    assert "(64, 128) torch.float32, saved in blocks.1" in failure(session.managed)
    session.close()


def test_weights_that_an_optimizer_changed_between_forward_and_backward_raise(session: Session) -> None:
    def late(loss: Tensor) -> None:
        with torch.no_grad():
            session.module.blocks[0].c.weight.add_(1.0)
        loss.backward()

    use(session, RECOMPUTE, RECOMPUTE)
    assert MESSAGE in failure(lambda: session.plain(backward=late))
    assert MESSAGE in failure(lambda: session.managed(backward=late))
    session.close()


def test_a_weight_that_only_a_replay_needs_raises_too_rather_than_giving_wrong_gradients() -> None:
    """Plain torch saves no bias and no embedding table, so changing them is legal there; here it must not go unseen."""

    class Embedded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.out = nn.Embedding(10, WIDTH), nn.Linear(WIDTH, 1)

        def loss(self, ids: Tensor) -> Tensor:
            return self.out(F.gelu(self.table(ids) + 1)).mean()

    def late(loss: Tensor) -> None:
        with torch.no_grad():
            session.module.table.weight.mul_(2.0)
        loss.backward()

    session = Session(Embedded(), torch.randint(0, 10, (ROWS,)))
    session.profile()
    session.use("recompute")
    session.plain(backward=late)
    assert "overwritten in place" in failure(lambda: session.managed(backward=late))
    session.use("keep")
    session.managed(backward=late)
    session.close()
