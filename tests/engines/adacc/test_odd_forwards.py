"""What forwards do that a toy does not expect: each stays bitwise right under every exact plan."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ygglight.engines.adacc.shapes import shapes_of

from .harness import Session, assert_exact, recomputed, same
from .models import GPT, tokens

WIDTH = 16


class Stack(nn.Module):
    """A stem, three blocks that run ``block(module, x)``, a head."""

    def __init__(self, block: type[Base], **kwargs: Any) -> None:
        super().__init__()
        self.stem = nn.Linear(8, WIDTH)
        self.blocks = nn.ModuleList(block(**kwargs) for _ in range(3))
        self.head = nn.Linear(WIDTH, 1)

    def loss(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        for block in self.blocks:
            h = block(h)
        return self.head(h).square().mean()


class Base(nn.Module):
    """Two Linears with :meth:`between` between them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def between(self, x: Tensor) -> Tensor:
        return F.gelu(self.a(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(x))


class WritesInputFirst(Base):
    def between(self, x: Tensor) -> Tensor:
        return F.gelu(self.a(x.mul_(2.0)))


class WritesInputAfterReadingIt(Base):
    def between(self, x: Tensor) -> Tensor:
        y = F.gelu(x + 1)
        x.mul_(0.5)
        return F.gelu(self.a(x)) + y


class BufferAfterUse(Base):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))

    def between(self, x: Tensor) -> Tensor:
        y = F.gelu(x + self.mean)
        with torch.no_grad():
            self.mean.mul_(0.9).add_(x.mean(0))
        return y


class BufferBeforeUse(BufferAfterUse):
    def between(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.mean.mul_(0.9).add_(x.mean(0))
        return F.gelu(x + self.mean)


class GradientInside(Base):
    def between(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            z = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(F.gelu(self.a(z)).sum(), z)
        return F.gelu(self.a(x + 0.1 * gradient))


class Vmap(Base):
    def between(self, x: Tensor) -> Tensor:
        return torch.vmap(lambda z: F.gelu(self.a(z)))(x)


class CheckpointInside(Base):
    reentrant = False

    def between(self, x: Tensor) -> Tensor:
        return checkpoint(lambda z: F.dropout(F.gelu(self.a(z)).exp(), 0.3), x, use_reentrant=self.reentrant)


class ReentrantInside(CheckpointInside):
    reentrant = True


class Numpy(Base):
    def between(self, x: Tensor) -> Tensor:
        ramp = torch.from_numpy(np.arange(WIDTH, dtype=np.float32) / 10)
        return F.gelu(self.a(x) * ramp + float(np.float64(0.3)))


class Complex(Base):
    def between(self, x: Tensor) -> Tensor:
        z = torch.fft.rfft(self.a(x))
        z = z * torch.polar(torch.ones(z.shape[-1]), torch.arange(z.shape[-1]) * 0.1)
        return F.gelu(torch.fft.irfft(z.conj() * z, n=WIDTH))


class TopK(Base):
    def between(self, x: Tensor) -> Tensor:
        top = self.a(x).topk(4, dim=-1)
        y = torch.zeros_like(x).scatter(-1, top.indices, F.gelu(top.values))
        y[:, ::2] = y[:, ::2].exp()
        return y[torch.arange(len(x)).flip(0)].clone()


class DataDependent(Base):
    def between(self, x: Tensor) -> Tensor:
        chosen = self.a(x) > 0
        y = torch.zeros_like(x)
        y[chosen] = F.gelu(x[chosen]).exp()
        return y * chosen


class Recurrent(Base):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru = (kind(WIDTH, WIDTH, batch_first=True) for kind in (nn.LSTM, nn.GRU))

    def between(self, x: Tensor) -> Tensor:
        return self.gru(F.gelu(self.lstm(x[:, None])[0]))[0].squeeze(1)


class Noise(Base):
    def between(self, x: Tensor) -> Tensor:
        noise = torch.rand_like(x)
        return F.silu(F.gelu(self.a(x) + noise) * noise + torch.empty_like(x).normal_())


class Expanded(Base):
    def between(self, x: Tensor) -> Tensor:
        return F.silu(self.a(x)).unsqueeze(1).expand(-1, 3, -1).exp().sum(1)


class FilledInPieces(Base):
    def between(self, x: Tensor) -> Tensor:
        out = torch.empty(len(x), 2 * WIDTH)
        out[:, :WIDTH] = self.a(x)
        out[:, WIDTH:] = F.gelu(x)
        return out.exp()[:, ::2]


class NonContiguous(Base):
    def between(self, x: Tensor) -> Tensor:
        return F.gelu((self.a(x).t().contiguous().t()[:, torch.arange(WIDTH)] * 2).view(-1, 4, 4).mT.exp()).flatten(1)


class InferenceConstant(Base):
    def between(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            shift = torch.arange(WIDTH) / WIDTH
        return F.gelu(self.a(x) + shift)


class OutVariant(Base):
    def between(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            twice = torch.empty_like(x)
            torch.mul(x, 2.0, out=twice)
        return F.gelu(self.a(x) + twice)


class Reparametrised(Base):
    def __init__(self) -> None:
        super().__init__()
        torch.nn.utils.parametrizations.weight_norm(self.a)
        torch.nn.utils.parametrizations.spectral_norm(self.b)


class Frozen(Base):
    def __init__(self) -> None:
        super().__init__()
        self.a.requires_grad_(False)


class CastInside(Base):
    def between(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.a(x)
        return F.gelu(y.float() + self.a(x).half().float())


class Recursive(Base):
    def forward(self, x: Tensor, depth: int = 0) -> Tensor:
        y = self.between(x)
        return self(y, depth + 1) if depth < 2 else self.b(y)


class RecursiveWithoutGrad(Base):
    def forward(self, x: Tensor, depth: int = 0) -> Tensor:
        if depth:
            return torch.tanh(self.a(x))
        with torch.no_grad():
            target = self(x, 1)
        return self.b(F.gelu(self.a(x + target)).exp())


KINDS = [
    WritesInputFirst, WritesInputAfterReadingIt, BufferAfterUse, BufferBeforeUse, GradientInside, Vmap,
    CheckpointInside, ReentrantInside, Numpy, Complex, TopK, DataDependent, Recurrent, Noise, Expanded, FilledInPieces,
    NonContiguous, InferenceConstant, OutVariant, Reparametrised, Frozen, CastInside, Recursive, RecursiveWithoutGrad,
]  # fmt: skip


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 8)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_block(kind: type[Base], x: Tensor) -> None:
    assert_exact(Session(Stack(kind), x))


@pytest.mark.parametrize("kind", [Base, Recursive, RecursiveWithoutGrad, Noise], ids=lambda kind: kind.__name__)
def test_much_of_it_is_really_recomputed(kind: type[Base], x: Tensor) -> None:
    """Else the tests above would show nothing."""
    session = Session(Stack(kind), x)
    session.profile()
    session.use("recompute")
    assert sum(name.startswith("blocks.") for name in recomputed(session)) >= 3
    session.close()


def test_a_region_ends_where_its_block_does_although_it_calls_itself_without_gradients(x: Tensor) -> None:
    session = Session(Stack(RecursiveWithoutGrad), x)
    session.profile()
    session.use("recompute")
    assert {"blocks.0/aten.add:0", "blocks.0/aten.exp:0"} <= set(recomputed(session)), "it ended too early"
    session.close()


# -- around the blocks -------------------------------------------------------------------------------------------------
class Around(Stack):
    """Blocks are called by :meth:`call`."""

    def __init__(self, call: Callable[[int, nn.Module, Tensor], Tensor], block: type[Base] = Base) -> None:
        super().__init__(block)
        self.call = call

    def loss(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        for index, block in enumerate(self.blocks):
            h = F.gelu(self.call(index, block, h))
        return self.head(h).square().mean()


class ReadsInputOnly(Base):
    """Saves nothing of its input, but is rebuilt from it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.gelu(x * 2 + 1))


def mutates_after(index: int, block: nn.Module, h: Tensor) -> Tensor:
    y = block(h)
    h.mul_(0.5)
    return h + y


def test_the_caller_may_overwrite_a_blocks_input_where_autograd_lets_it(x: Tensor) -> None:
    assert_exact(Session(Around(mutates_after, ReadsInputOnly), x))


def test_an_input_that_was_overwritten_for_the_first_time_is_an_error_not_a_wrong_gradient(x: Tensor) -> None:
    sometimes = SimpleNamespace(writes=False)

    def call(index: int, block: nn.Module, h: Tensor) -> Tensor:
        return mutates_after(index, block, h) if sometimes.writes else block(h) + h * 0.5

    session = Session(Around(call, ReadsInputOnly), x)
    session.profile()
    session.use("recompute")
    sometimes.writes = True
    truth = session.plain()
    with pytest.raises(RuntimeError, match=r"outside of blocks\.2.*overwritten in place"):
        session.managed()
    session.runtime.abort()
    assert same(session.plain(), truth)
    session.close()


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_around_blocks(x: Tensor, reentrant: bool) -> None:
    session = Session(Around(lambda i, block, h: checkpoint(block, h, use_reentrant=reentrant)), x)
    assert_exact(session)
    assert set(session.runtime.skipped) == (set() if reentrant else {"blocks.0", "blocks.1", "blocks.2"})


def test_a_checkpoint_around_a_block_and_dropout(x: Tensor) -> None:
    def call(i: int, block: nn.Module, h: Tensor) -> Tensor:
        return checkpoint(lambda z: F.dropout(block(z), 0.5), h, use_reentrant=False)

    assert_exact(Session(Around(call), x))


def test_save_on_cpu_around_one_block_leaves_that_one_alone(x: Tensor) -> None:
    def call(i: int, block: nn.Module, h: Tensor) -> Tensor:
        if i != 1:
            return block(h)
        with torch.autograd.graph.save_on_cpu():
            return block(h)

    session = Session(Around(call), x)
    assert_exact(session)
    assert list(session.runtime.skipped) == ["blocks.1"]
    assert "save_on_cpu" in session.runtime.skipped["blocks.1"]


def test_a_dispatch_mode_of_the_users(x: Tensor) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    def call(i: int, block: nn.Module, h: Tensor) -> Tensor:
        with FlopCounterMode(display=False):
            return block(h)

    assert_exact(Session(Around(call), x))


class Force(Stack):
    """Differentiates its own forward, as force fields and gradient penalties do."""

    def loss(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        h = self.stem(x)
        for block in self.blocks:
            h = block(h)
        energy = self.head(F.gelu(h)).sum()
        (force,) = torch.autograd.grad(energy, x, create_graph=True)
        return force.square().mean() + torch.tanh(energy * force.exp()).mean()


class Sensitivity(Stack):
    def loss(self, x: Tensor) -> Tensor:
        z = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(F.gelu(self.stem(z)).sum(), z)
        h = self.stem(x + gradient)
        for block in self.blocks:
            h = block(F.gelu(h) * 2)
        return self.head(F.gelu(h)).square().mean()


@pytest.mark.parametrize("model", [Force, Sensitivity])
def test_a_backward_inside_the_forward(model: type[Stack], x: Tensor) -> None:
    assert_exact(Session(model(Base), x))


def test_function_transforms_say_what_to_do(x: Tensor) -> None:
    """torch.func.grad refuses to run under any saved-tensor hooks; the message must not come from nowhere."""

    class Transformed(Base):
        def between(self, x: Tensor) -> Tensor:
            return F.gelu(self.a(x + torch.func.grad(lambda z: F.gelu(z).sum())(x.detach())))

    session = Session(Stack(Transformed), x)
    with pytest.raises(RuntimeError, match="saved tensor hooks") as caught:
        session.managed()
    assert any("enabled=False" in note for note in getattr(caught.value, "__notes__", []))
    session.runtime.abort()
    session.close()


# -- what goes in and out ----------------------------------------------------------------------------------------------
class Pair(NamedTuple):
    main: Tensor
    other: Tensor


@dataclass
class Output:
    state: Tensor
    extra: Any = None


class ManyInputs(nn.Module):
    """Keyword-only tensors, integers and booleans in; a dataclass out."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.table = nn.Embedding(5, WIDTH)

    def forward(self, *, state: Tensor, ids: Tensor, mask: Tensor, pair: Pair, scale: float = 1.0) -> Output:
        h = F.gelu(self.a(state) + self.table(ids)) * mask * scale
        return Output(self.b(h) + pair.other * pair.main, {"hidden": [h, (pair,)]})


class Structured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ManyInputs() for _ in range(3))

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        h, extra = batch["x"], torch.zeros(())
        for index, block in enumerate(self.blocks):
            pair = Pair(h.t().contiguous().t(), h * 2)
            out = block(state=h, ids=batch["ids"], mask=batch["mask"], pair=pair, scale=1 + 0.1 * index)
            h, extra = out.state.tanh(), extra + out.extra["hidden"][0].exp().mean()
        return h.square().mean() + extra


def test_keywords_integers_masks_dataclasses_and_gradients_of_inputs() -> None:
    x = torch.randn(WIDTH, 4).t().requires_grad_()
    batch = {"x": x, "ids": torch.randint(0, 5, (4,)), "mask": torch.rand(4, WIDTH) > 0.3}
    assert_exact(Session(Structured(), batch, inputs=[x]))


@pytest.mark.parametrize("kind", ["tuple", "dict", "none"])
def test_blocks_that_return_containers(kind: str, x: Tensor) -> None:
    class Container(Base):
        def forward(self, x: Tensor) -> Any:
            y = self.between(x)
            if kind == "none":
                self.left = self.b(y)
                return None
            return (self.b(y), y, None, 3) if kind == "tuple" else {"out": self.b(y), "hidden": y}

    def call(i: int, block: Any, h: Tensor) -> Tensor:
        out = block(h)
        if kind == "none":
            left, block.left = block.left, None
            return left
        first, second = out[:2] if kind == "tuple" else out.values()
        return first + second.exp()

    assert_exact(Session(Around(call, Container), x))


class Split(enum.Enum):
    TRAIN = 1


class Batch:
    """A user's own class that knows itself."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.tag, self.names, self.me = x, Split.TRAIN, ["a"], self


def test_batches_may_be_anything(x: Tensor) -> None:
    assert shapes_of({"b": x, "a": [x[0], None, "text"], "tag": Split.TRAIN, "kind": Split}) == ((8,), (4, 8))
    assert shapes_of(Batch(x))[0] == (4, 8)
    assert shapes_of("text") == () == shapes_of(None) == shapes_of(7)
    session = Session(Stack(Base), Batch(x), lambda module, batch: module.loss(batch.x))
    assert_exact(session, 1)


# -- how blocks are called ---------------------------------------------------------------------------------------------
class Shared(nn.Module):
    """One set of blocks called twice a step (siamese), and one block three times in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Stack(Base)

    def encode(self, x: Tensor) -> Tensor:
        h = self.net.stem(x)
        for block in self.net.blocks:
            h = block(h)
        for _ in range(3):
            h = self.net.blocks[0](h)
        return h

    def loss(self, x: Tensor) -> Tensor:
        left, right = self.encode(x), self.encode(x * 2)
        return F.cosine_similarity(left, right).mean() + left.exp().mean() + left.sigmoid().mean()


def test_shared_weights_and_many_calls(x: Tensor) -> None:
    session = Session(Shared(), x)
    assert_exact(session)
    names = session.built.step.names
    assert {"net.blocks.0", "net.blocks.0@1", "net.blocks.0@7", "net.blocks.2@1"} <= set(names)
    assert len(set(names)) == len(names)


class Aliased(nn.Module):
    """The same blocks under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.net = GPT()
        self.layers = self.net.blocks

    def loss(self, ids: Tensor) -> Tensor:
        return self.net.loss(ids)


def test_blocks_reachable_by_two_names_are_one() -> None:
    session = Session(Aliased(), tokens())
    assert list(session.runtime.blocks) == ["net.blocks.0", "net.blocks.1", "net.blocks.2"]
    assert_exact(session, 2)
    assert len([name for name in session.built.step.names if not name.startswith("training_step")]) == 3


def test_a_block_whose_output_nobody_uses(x: Tensor) -> None:
    unused = Session(Around(lambda i, block, h: h * block(h).detach().mean() if i == 1 else block(h)), x)
    assert_exact(unused)


def test_an_exception_that_the_user_catches(x: Tensor) -> None:
    class Fails(Base):
        def forward(self, x: Tensor, fail: bool = False) -> Tensor:
            y = F.gelu(self.a(x))
            if fail:
                raise ValueError("too large")
            return self.b(y)

    def call(i: int, block: nn.Module, h: Tensor) -> Tensor:
        try:
            return block(h, fail=i == 1)
        except ValueError:
            return block(h * 0.5)

    assert_exact(Session(Around(call, Fails), x))
