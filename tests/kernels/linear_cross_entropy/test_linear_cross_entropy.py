"""The chunked loss against plain cross entropy: values, gradients, memory, and the corners."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ygglight.kernels.linear_cross_entropy import default_chunk_tokens, linear_cross_entropy
from ygglight.kernels.linear_cross_entropy.reference import linear_cross_entropy as reference
from ygglight.kernels.testing import assert_close, poisoned_empty

TOKENS, WIDTH, VOCABULARY = 37, 24, 53
# Of the rms of the full-logits gradient; 16-bit: one rounding of the logits' gradient on each side.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}


def inputs(dtype=torch.float32, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator).to(dtype)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator).to(dtype)
    offset = torch.randn(VOCABULARY, generator=generator).to(dtype) if bias else None
    target = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    target[::5] = -100
    return hidden, weight, offset, target


def run(loss, hidden, weight, bias, target, **options):
    """Loss and gradients of hidden, weight and bias."""
    leaves = [None if t is None else t.clone().requires_grad_() for t in (hidden, weight, bias)]
    value = loss(leaves[0], leaves[1], target, bias=leaves[2], **options)
    (value * 3.0).backward()
    return [value.detach(), *[leaf.grad for leaf in leaves if leaf is not None]]


@pytest.mark.parametrize("chunk", [1, 8, 37, 1000, None])
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_value_and_gradients(dtype, bias, softcap, chunk):
    tensors = inputs(dtype, bias)
    with poisoned_empty():
        ours = run(linear_cross_entropy, *tensors, softcap=softcap, chunk_tokens=chunk)
    theirs = run(reference, *tensors, softcap=softcap)
    assert_close(ours[0], theirs[0], 1e-6 if dtype is not torch.float64 else 1e-14, "loss")
    for name, one, other in zip(("hidden", "weight", "bias"), ours[1:], theirs[1:], strict=False):
        assert_close(one, other, TOLERANCE[dtype], name)


def test_gradcheck():
    hidden, weight, bias, target = inputs(torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (hidden[:6, :5].clone(), weight[:7, :5].clone(), bias[:7].clone())]
    target = target[:6] % 7

    def loss(h, w, b):
        return linear_cross_entropy(h, w, target, bias=b, chunk_tokens=4, softcap=3.0)

    assert torch.autograd.gradcheck(loss, leaves)


def test_sums_of_16_bit_chunks_keep_their_precision():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(512, WIDTH, generator=generator).bfloat16()
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator).bfloat16()
    target = torch.randint(0, VOCABULARY, (512,), generator=generator)
    exact = run(reference, hidden.double(), weight.double(), None, target)[2]
    one_by_one = run(linear_cross_entropy, hidden, weight, None, target, chunk_tokens=1)[2]
    assert_close(one_by_one.double(), exact, 1e-2)


def test_other_ignore_index():
    hidden, weight, bias, target = inputs()
    target[target == -100] = 3
    ours = run(linear_cross_entropy, hidden, weight, bias, target, ignore_index=3, chunk_tokens=8)
    theirs = run(reference, hidden, weight, bias, target, ignore_index=3)
    for one, other in zip(ours, theirs, strict=True):
        assert_close(one, other, 2e-6)


def test_all_ignored_is_nan_with_zero_gradients_as_in_torch():
    hidden, weight, bias, target = inputs()
    target.fill_(-100)
    for loss in (linear_cross_entropy, reference):
        value, *gradients = run(loss, hidden, weight, bias, target)
        assert value.isnan()
        assert all(bool((gradient == 0).all()) for gradient in gradients)


def test_no_tokens():
    hidden, weight, bias, target = inputs()
    assert linear_cross_entropy(hidden[:0], weight, target[:0], bias=bias).isnan()


@pytest.mark.parametrize("trained", ["hidden", "weight", "bias"])
def test_only_asked_gradients_are_computed(trained):
    hidden, weight, bias, target = inputs()
    leaf = {"hidden": hidden, "weight": weight, "bias": bias}[trained].requires_grad_()
    linear_cross_entropy(hidden, weight, target, bias=bias, chunk_tokens=8).backward()
    expected = run(reference, hidden.detach(), weight.detach(), bias.detach(), target)
    place = ["hidden", "weight", "bias"].index(trained)
    assert_close(leaf.grad * 3, expected[1 + place], 2e-6)
    assert sum(t.grad is not None for t in (hidden, weight, bias)) == 1


def test_autocast_matches_the_reference():
    hidden, weight, bias, target = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        theirs = run(reference, hidden, weight, bias, target)
        ours = run(linear_cross_entropy, hidden, weight, bias, target, chunk_tokens=8)
    assert ours[0].dtype == torch.float32
    for one, other in zip(ours, theirs, strict=True):
        assert_close(one, other, 1e-2)


def test_double_backward_is_refused():
    hidden, weight, _, target = inputs()
    hidden.requires_grad_()
    (gradient,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, target), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        (gradient.sum() + hidden.sum()).backward()


def test_hooks_see_everything_that_is_saved():
    hidden, weight, bias, target = inputs()
    hidden.requires_grad_()
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(tuple(t.shape)) or t, lambda t: t):
        loss = linear_cross_entropy(hidden, weight, target, bias=bias)
    loss.backward()
    assert sorted(seen) == sorted([(37, 24), (53, 24), (37,), (53,), (37,), ()])


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned."""

    def __init__(self):
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.nbytes = max(self.nbytes, tensor.untyped_storage().nbytes())
        return out


def test_full_logits_never_exist():
    hidden, weight = torch.randn(512, 16, requires_grad=True), torch.randn(1000, 16, requires_grad=True)
    target = torch.randint(0, 1000, (512,))
    full = 512 * 1000 * 4
    with Largest() as ours:
        linear_cross_entropy(hidden, weight, target, chunk_tokens=32).backward()
    with Largest() as theirs:
        reference(hidden, weight, target).backward()
    assert ours.nbytes == full // 16
    assert theirs.nbytes >= full


@pytest.mark.parametrize("vocabulary", [1, 1000, 32_000, 128_256, 10_000_000])
def test_default_chunk(vocabulary):
    tokens = default_chunk_tokens(vocabulary)
    assert tokens >= 1 and (tokens == 1 or 4 * tokens * vocabulary <= 32 * 2**20)
    assert default_chunk_tokens(vocabulary, "cuda") >= 256


def test_errors_name_the_mend():
    hidden, weight, _, target = inputs()
    with pytest.raises(ValueError, match="do not fit"):
        linear_cross_entropy(hidden[:, :3], weight, target)
    with pytest.raises(ValueError, match="target must be"):
        linear_cross_entropy(hidden, weight, target.int())
    with pytest.raises(ValueError, match="bias must be"):
        linear_cross_entropy(hidden, weight, target, bias=torch.zeros(3))
    with pytest.raises(ValueError, match="chunk_tokens"):
        linear_cross_entropy(hidden, weight, target, chunk_tokens=0)
    with pytest.raises(ValueError, match="softcap"):
        linear_cross_entropy(hidden, weight, target, softcap=0.0)
    with pytest.raises(ValueError, match="use autocast"):
        linear_cross_entropy(hidden, weight.bfloat16(), target)
