"""The twin serves from the base weights that are being trained, and versions of the adapter never mix (T3)."""

from __future__ import annotations

import threading
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from ygglight.compat.copying import share_tensors
from ygglight.engines.harli.adapters import Adapters, VersionedLoRA, serving_twin

from .conftest import VOCABULARY, llama, shake, with_lora


def pair(model: Any, **kwargs: Any) -> tuple[Any, Adapters]:
    twin = serving_twin(model)
    return twin, Adapters(twin, model, **kwargs)


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def ids(rows: int = 3) -> Tensor:
    return torch.randint(0, VOCABULARY, (rows, 7), generator=torch.Generator().manual_seed(0))


def base_logits(model: Any, tokens: Tensor) -> Tensor:
    with model.disable_adapter():
        return logits(model, tokens)


# -- sharing ----------------------------------------------------------------------------------------------------------
def test_every_base_tensor_is_shared_and_no_module_is() -> None:
    model = with_lora(llama(tie_word_embeddings=True))
    twin, _ = pair(model)
    inner = model.get_base_model()
    found = {name.replace(".base_layer", ""): p for name, p in inner.named_parameters() if "lora_" not in name}
    mine = {name.replace(".base_layer", ""): p for name, p in twin.named_parameters()}
    assert found.keys() == mine.keys() and len(found) > 15
    assert all(mine[name] is found[name] for name in found)
    assert {b.data_ptr() for b in twin.buffers()} == {b.data_ptr() for b in inner.buffers()} != set()
    assert not {id(m) for m in twin.modules()} & {id(m) for m in inner.modules()}
    assert twin.config is not inner.config
    assert twin.lm_head.weight is twin.model.embed_tokens.weight


def test_what_is_set_on_the_live_model_does_not_reach_the_twin() -> None:
    model = with_lora(llama(), lora_dropout=0.5)
    ran: list[int] = []
    hooked = model.get_base_model().model.layers[0]
    hooked.register_forward_hook(lambda *args: ran.append(1))  # before the twin is made
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable()
    model.train()
    twin, adapters = pair(model)
    hooked.register_forward_pre_hook(lambda *args: ran.append(2))  # and after
    model.get_base_model().set_attn_implementation("eager")
    model.get_base_model().config.use_cache = False
    tokens = ids()
    with adapters.activate([0, 0, 0]):
        found = logits(twin, tokens)
    assert not ran and not any(module.training for module in twin.modules())
    assert not twin.is_gradient_checkpointing
    assert twin.config._attn_implementation == "sdpa" and twin.config.use_cache
    model.eval()
    torch.testing.assert_close(found, logits(model, tokens))
    assert ran  # the control: the live model's hooks do run


def test_what_is_set_on_the_twin_does_not_reach_the_live_model() -> None:
    model = with_lora(llama()).train()
    twin, _ = pair(model)
    twin.set_attn_implementation("eager")
    twin.model.layers[0].register_forward_hook(lambda *args: None)
    twin.eval()
    assert model.training and model.get_base_model().config._attn_implementation == "sdpa"
    assert not model.get_base_model().model.layers[0]._forward_hooks
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)


def test_a_forward_that_cannot_be_bound_to_a_copy_is_named() -> None:
    model = with_lora(llama())
    layer = model.get_base_model().model.layers[1].mlp
    original = layer.forward
    layer.forward = lambda *args, **kwargs: original(*args, **kwargs)
    with pytest.raises(ValueError, match=r"forward of model\.layers\.1\.mlp"):
        serving_twin(model)


def test_tensors_in_plain_attributes_are_shared_and_containers_are_not() -> None:
    module = nn.Linear(2, 2)
    module.state = {"absmax": torch.ones(3)}  # type: ignore[assignment]
    copied = share_tensors(module)
    assert copied.state["absmax"] is module.state["absmax"] and copied.state is not module.state  # type: ignore[index]


def test_an_8_bit_layer_is_started_before_it_is_copied() -> None:
    class Eight(nn.Linear):
        """As bitsandbytes': the quantised weight leaves the parameter at the first forward."""

        def __init__(self) -> None:
            super().__init__(2, 2)
            self.weight.CB = torch.ones(2, 2)  # type: ignore[attr-defined]
            self.state: dict[str, Tensor] = {}

        def init_8bit_state(self) -> None:
            self.state["CB"], self.weight.CB = self.weight.CB, None  # type: ignore[attr-defined]

    layer = Eight()
    copied = share_tensors(layer)
    assert copied.state["CB"] is layer.state["CB"] and copied.state is not layer.state


# -- numerics ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("lora", [{}, {"use_rslora": True, "r": 8}, {"target_modules": ["q_proj", "down_proj"]}])
def test_uniform_batches_are_bitwise_pefts(lora: dict[str, Any]) -> None:
    model = with_lora(llama(), **lora)
    twin, adapters = pair(model)
    tokens = ids()
    with adapters.activate([0, 0, 0]):
        assert torch.equal(logits(twin, tokens), logits(model, tokens))
    base = base_logits(model, tokens)
    with adapters.activate([None] * 3):
        assert torch.equal(logits(twin, tokens), base)
    assert torch.equal(logits(twin, tokens), base)  # nothing is active outside
    assert not torch.allclose(base, logits(model, tokens), atol=0.1)  # the control: the adapter says something


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_base_under_float32_adapters(dtype: torch.dtype) -> None:
    model = with_lora(llama().to(dtype))
    assert model.get_base_model().model.layers[0].mlp.up_proj.lora_A["default"].weight.dtype is torch.float32
    twin, adapters = pair(model)
    with adapters.activate([0, 0]):
        found = logits(twin, ids(2))
    assert found.dtype is dtype
    assert torch.equal(found, logits(model, ids(2)))


def test_conv1d_bases() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=2))
    model = with_lora(gpt.eval(), target_modules=["c_attn"], fan_in_fan_out=True)
    twin, adapters = pair(model)
    with adapters.activate([0, 0, 0]):
        assert torch.equal(logits(twin, ids()), logits(model, ids()))


def test_mixed_rows_have_each_their_own() -> None:
    model = with_lora(llama())
    twin, adapters = pair(model)
    tokens = ids(5)
    old = logits(model, tokens)
    adapters.pin(0)
    shake(model, 9)
    assert adapters.publish(model) == 1
    new, base = logits(model, tokens), base_logits(model, tokens)
    with adapters.activate([1, None, 0, 1, 0]):
        found = logits(twin, tokens)
    expected = torch.stack([new[0], base[1], old[2], new[3], old[4]])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    # The control: every wrong assignment is far away.
    assert min(float((a - b).abs().max()) for a, b in ((new, old), (new, base), (old, base))) > 0.1


def test_padding_rows_at_the_end_are_the_bases() -> None:
    model = with_lora(llama())
    twin, adapters = pair(model)
    tokens = ids(4)
    with adapters.activate([None, 0]):
        found = logits(twin, tokens)
    base = base_logits(model, tokens)
    torch.testing.assert_close(found[[0, 2, 3]], base[[0, 2, 3]])
    torch.testing.assert_close(found[1], logits(model, tokens)[1], atol=1e-5, rtol=1e-5)


def test_fewer_rows_than_versions_is_an_error() -> None:
    twin, adapters = pair(with_lora(llama()))
    with adapters.activate([None, 0]), pytest.raises(RuntimeError, match="got 1 rows of a batch of 2"):
        logits(twin, ids(1))


def test_base_rows_cost_no_adapter_and_uniform_rows_no_indexing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_lora(llama())
    twin, adapters = pair(model)
    seen: list[tuple[int, bool]] = []
    add = VersionedLoRA._add

    def spy(self: VersionedLoRA, result: Tensor, x: Tensor, matrices: Any) -> Tensor:
        seen.append((x.shape[0], len(adapters._route.groups) > 1))
        return add(self, result, x, matrices)

    monkeypatch.setattr(VersionedLoRA, "_add", spy)
    monkeypatch.setattr(torch.Tensor, "index_select", lambda *args: pytest.fail("rows were indexed"))
    with adapters.activate([None] * 3):
        logits(twin, ids())
    assert not seen
    with adapters.activate([0] * 3):
        logits(twin, ids())
    assert {rows for rows, _ in seen} == {3}
    monkeypatch.undo()
    monkeypatch.setattr(VersionedLoRA, "_add", spy)
    seen.clear()
    with adapters.activate([None, 0, None]):
        logits(twin, ids())
    assert {rows for rows, _ in seen} == {1}


# -- versions ---------------------------------------------------------------------------------------------------------
def test_a_pinned_version_outlives_publishing_and_goes_with_its_last_pin() -> None:
    model = with_lora(llama())
    twin, adapters = pair(model)
    tokens = ids()
    old = logits(model, tokens)
    assert adapters.pin() == adapters.pin() == 0
    for seed in (5, 6, 7):
        shake(model, seed)
        adapters.publish(model)
    assert adapters.current_version == 3 and adapters.versions == [0, 3]
    with adapters.activate([0] * 3):
        assert torch.equal(logits(twin, tokens), old)
    adapters.unpin(0)
    assert adapters.versions == [0, 3]
    adapters.unpin(0)
    assert adapters.versions == [3]
    with pytest.raises(ValueError, match="version 0 of the adapter is not kept"), adapters.activate([0]):
        pass
    with pytest.raises(ValueError, match="version 0 is not pinned"):
        adapters.unpin(0)


def test_training_in_place_does_not_change_what_is_published() -> None:
    model = with_lora(llama())
    twin, adapters = pair(model)
    with adapters.activate([0]):
        before = logits(twin, ids(1))
        shake(model, 8)
        assert torch.equal(logits(twin, ids(1)), before)
    assert not torch.allclose(logits(model, ids(1)), before, atol=0.1)


def test_memory_of_dropped_versions_is_used_again() -> None:
    model = with_lora(llama())
    _, adapters = pair(model)
    places = set()
    for _ in range(6):
        adapters.publish(model)
        places.add(adapters._versions[adapters.current_version].matrices[0][0].data_ptr())
    assert len(places) == 2


def test_bounded_slots_keep_the_version_until_one_is_free() -> None:
    model = with_lora(llama())
    _, adapters = pair(model, slots=2)
    adapters.pin(0)
    assert adapters.publish(model) == 1
    adapters.pin(1)
    assert adapters.publish(model) == 1 and adapters.skipped == 1
    adapters.unpin(0)
    assert adapters.publish(model) == 2
    with pytest.raises(ValueError, match="slots=1"):
        pair(model, slots=1)


def test_signatures_tell_memory_apart() -> None:
    model = with_lora(llama())
    _, adapters = pair(model)
    base, first = adapters.signature([None, None]), adapters.signature([0])
    adapters.pin(0)
    adapters.publish(model)
    assert len({base, first, adapters.signature([1, 1])}) == 3
    assert adapters.signature([0, 0, 0]) == first
    assert adapters.signature([0, None]) is None


# -- threads ----------------------------------------------------------------------------------------------------------
def test_served_in_one_thread_while_trained_in_another() -> None:
    model = with_lora(llama(), lora_dropout=0.0)
    twin, adapters = pair(model)
    tokens, truths = ids(), {0: logits(model, ids())}
    stop, served = threading.Event(), []

    def serve() -> None:
        while not stop.is_set():
            version = adapters.pin()
            with adapters.activate([version] * 3):
                served.append((version, logits(twin, tokens)))
            adapters.unpin(version)

    def losses(watched: bool) -> list[float]:
        shake(model, 1)
        model.train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        found = []
        for _ in range(12):
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
            if watched:
                version = adapters.publish(model)
                truths[version] = logits(model.eval(), tokens)
                model.train()
        return found

    alone = losses(watched=False)
    thread = threading.Thread(target=serve, name="ygglight-test-serve")
    thread.start()
    try:
        together = losses(watched=True)
    finally:
        stop.set()
        thread.join()
    assert together == alone  # serving changes nothing in training
    # Nor training in serving: each forward is of its version (other threads may sum in another order), and no other.
    apart = min(float((truths[v] - truths[v + 1]).abs().max()) for v in range(12))
    assert served and apart > 1e-3
    for version, found in served:
        torch.testing.assert_close(found, truths[version], atol=1e-5, rtol=1e-5)


# -- what cannot be served --------------------------------------------------------------------------------------------
def dora(model: Any) -> Any:
    return with_lora(model, use_dora=True)


def saved(model: Any) -> Any:
    return with_lora(model, target_modules=["q_proj"], modules_to_save=["lm_head"])


def biased(model: Any) -> Any:
    for layer in model.model.layers:
        layer.mlp.up_proj.bias = nn.Parameter(torch.zeros(layer.mlp.up_proj.out_features))
    return with_lora(model, bias="all")


def lora_biased(model: Any) -> Any:
    return with_lora(model, target_modules=["q_proj"], lora_bias=True)


def embedded(model: Any) -> Any:
    return with_lora(model, target_modules=["embed_tokens", "q_proj"])


def merged(model: Any) -> Any:
    wrapped = with_lora(model)
    wrapped.merge_adapter()
    return wrapped


def two(model: Any) -> Any:
    wrapped = with_lora(model)
    wrapped.add_adapter("second", peft.LoraConfig(target_modules=["q_proj"]))
    wrapped.base_model.set_adapter(["default", "second"])
    return wrapped


def ia3(model: Any) -> Any:
    return peft.get_peft_model(model, peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]))


def thawed(model: Any) -> Any:
    wrapped = with_lora(model)
    wrapped.get_base_model().model.norm.weight.requires_grad_(True)
    return wrapped


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (dora, "DoraLinearVariant is no plain LoRA"), (saved, "lm_head is a ModulesToSaveWrapper"),
        (biased, "up_proj.*bias is trained too"), (lora_biased, "it has a bias"), (embedded, "embed_tokens.*Embedding"),
        (merged, "merged into the base"), (two, "are active at once"), (ia3, "not LoRA"),
        (thawed, "norm.weight is trained too"), (lambda model: model, "no active LoRA layer"),
    ],
)  # fmt: skip
def test_anything_but_plain_lora_is_named(make: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        serving_twin(make(llama()))


def test_adapters_need_a_twin() -> None:
    model = with_lora(llama())
    with pytest.raises(ValueError, match="serving_twin"):
        Adapters(model.get_base_model(), model)


# -- bitsandbytes -----------------------------------------------------------------------------------------------------
@pytest.mark.gpu
@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_bases(bits: int, tmp_path: Any) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    llama(hidden_size=64, intermediate_size=128).half().save_pretrained(tmp_path)
    quantised = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        quantization_config=BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8),
        device_map={"": 0},
        dtype=torch.float16,
    )
    model = with_lora(quantised.eval())
    twin, adapters = pair(model)
    tokens = ids().cuda()
    shared = {p.data_ptr() for p in model.get_base_model().parameters()}
    assert all(p.data_ptr() in shared for p in twin.parameters())
    with adapters.activate([0, 0, 0]):
        found = logits(twin, tokens)
    assert torch.equal(found, logits(model, tokens))
    with adapters.activate([None, 0, None]):
        mixed = logits(twin, tokens)
    # 8-bit products choose outliers by the whole batch, so a row depends a little on its neighbours.
    near, base = (0.1 if bits == 4 else 0.5), base_logits(model, tokens)
    torch.testing.assert_close(mixed[1], found[1], atol=near, rtol=0)
    torch.testing.assert_close(mixed[[0, 2]], base[[0, 2]], atol=near, rtol=0)
    assert float((found - base).abs().max()) > 1
