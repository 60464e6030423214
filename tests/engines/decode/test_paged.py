"""Decoding over pages against plain forwards of each sequence alone, and against `generate`."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from ygglight.engines.decode import PagedCache, PagedDecoder
from ygglight.engines.decode import paged as module
from ygglight.engines.memory import Arena

SHAPE: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 256, "initializer_range": 0.2, "bos_token_id": None, "eos_token_id": None,
    "pad_token_id": None,
}  # fmt: skip
GROUPED = SHAPE | {"num_key_value_heads": 2}
PAGE = 4


def llama(**changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**GROUPED | changes)).eval()


def qwen2() -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**GROUPED)).eval()


def neox() -> Any:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    return GPTNeoXForCausalLM(GPTNeoXConfig(**SHAPE)).eval()


def mistral() -> Any:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**GROUPED, sliding_window=6)).eval()


def gemma2() -> Any:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(**GROUPED, head_dim=8, sliding_window=5, attn_implementation="eager"))
    assert set(model.config.layer_types) == {"sliding_attention", "full_attention"}
    return model.eval()


MODELS = [llama, qwen2, neox, mistral, gemma2]


def close(make: Any) -> float:
    """How near float64 logits must be; Gemma 2's own eager attention takes its softmax in float32."""
    return 5e-6 if make is gemma2 else 1e-9


def text(count: int, seed: int = 1) -> Tensor:
    return torch.randint(0, SHAPE["vocab_size"], (count,), generator=torch.Generator().manual_seed(seed))


def plain(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens[None], use_cache=False).logits[0]  # type: ignore[no-any-return]


def arena_for(model: Any, chunks: int, spare: int = 0) -> Arena:
    return Arena(PagedCache.chunk_bytes(model.config, model.dtype, PAGE) + spare, chunks, model.device)


class Bench:
    """A decoder, and sequences whose pages lie in no order."""

    def __init__(self, model: Any, chunks: int = 64, *, read_pages: bool = False, spare: int = 0, **options: Any):
        self.arena = arena_for(model, chunks, spare)
        self.decoder = PagedDecoder(model, self.arena, page=PAGE, **options)
        if read_pages:  # as on a GPU; the attention's twin in torch looks the table up
            self.decoder._gathers = False
        order = torch.randperm(chunks - (self.decoder._scratch is not None), generator=torch.Generator().manual_seed(3))
        taken = self.arena.allocate_kv(len(order))
        assert taken is not None
        self.free = [taken[i] for i in order.tolist()]

    def pages(self, tokens: int) -> list[int]:
        return [self.free.pop() for _ in range(self.decoder.pages_for(tokens))]


@pytest.mark.parametrize("read_pages", [False, True], ids=["gathered", "pages"])
@pytest.mark.parametrize("make", MODELS)
def test_a_batch_over_scrambled_pages_is_each_sequence_alone(make: Any, read_pages: bool) -> None:
    model = make().double()
    bench = Bench(model, read_pages=read_pages)
    lengths = [3, 17, 8, 1]
    texts = [text(length + 6, seed) for seed, length in enumerate(lengths)]
    expected = [plain(model, t) for t in texts]
    tables = [bench.pages(len(t)) for t in texts]
    for row, length in enumerate(lengths):
        step = bench.decoder.prefill(tables[row], 0, texts[row][:length])
        assert step.logits.shape == (1, 1, SHAPE["vocab_size"])
        assert (step.logits[0, 0] - expected[row][length - 1]).abs().max() < close(make)
    for ahead in range(6):
        positions = [length + ahead for length in lengths]
        tokens = torch.stack([t[p] for t, p in zip(texts, positions, strict=True)])
        step = bench.decoder.decode(tables, positions, tokens)
        assert step.logits.shape == (4, 1, SHAPE["vocab_size"])
        for row, position in enumerate(positions):
            assert (step.logits[row, 0] - expected[row][position]).abs().max() < close(make)
            others = [other for other in range(4) if other != row]
            assert (step.logits[others, 0] - expected[row][position]).abs().amax(dim=1).min() > 1e-3  # the control


@pytest.mark.parametrize("make", MODELS)
def test_in_float32_too(make: Any) -> None:
    model = make()
    bench = Bench(model)
    sequence = text(20)
    table = bench.pages(20)
    bench.decoder.prefill(table, 0, sequence[:13])
    expected = plain(model, sequence)
    for position in range(13, 20):
        logits = bench.decoder.decode([table], [position], sequence[position : position + 1]).logits
        assert (logits[0, 0] - expected[position]).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("make", [llama, gemma2])
def test_chunks_of_prompts_and_decode_steps_may_be_mixed(make: Any) -> None:
    model = make().double()
    bench = Bench(model)
    first, second, third = text(30, 1), text(25, 2), text(12, 3)
    tables = [bench.pages(len(t)) for t in (first, second, third)]
    decoder = bench.decoder
    decoder.prefill(tables[2], 0, third[:5])
    for position, (begin, end, which) in enumerate(
        [(0, 7, 0), (0, 10, 1), (7, 8, 0), (8, 21, 0), (10, 25, 1), (21, 30, 0)], start=5
    ):
        whole = (first, second)[which]
        logits = decoder.prefill(tables[which], begin, whole[begin:end]).logits
        assert (logits[0, 0] - plain(model, whole)[end - 1]).abs().max() < close(make)
        logits = decoder.decode([tables[2]], [position], third[position : position + 1]).logits
        assert (logits[0, 0] - plain(model, third)[position]).abs().max() < close(make)


@pytest.mark.parametrize("make", [llama, mistral])
@pytest.mark.parametrize("junk", [1e6, float("nan")])
def test_pages_used_before_do_not_show(make: Any, junk: float) -> None:
    model = make().double()
    arena = arena_for(model, 6)
    decoder = PagedDecoder(model, arena, page=PAGE)
    taken, lease = arena.allocate_kv(3), arena.lease(3 * arena.chunk_bytes)
    assert taken and lease
    decoder.prefill(taken, 0, text(12, 7))
    lease.view((lease.nbytes // 8,), torch.float64).fill_(junk)
    arena.data.view(torch.float64)[taken] = junk
    arena.free_kv(taken)
    arena.release(lease)
    sequence = text(22)
    table = arena.allocate_kv(6)
    assert table is not None
    decoder.prefill(table, 0, sequence[:18])
    expected = plain(model, sequence)
    for position in range(18, 22):
        logits = decoder.decode([table], [position], sequence[position : position + 1]).logits
        assert (logits[0, 0] - expected[position]).abs().max() < 1e-9
    # The mask alone hides finite junk behind the last token, but not NaN: the arena's zeros are needed.
    arena.data[table[5]].view(torch.float64).view(3, 2, 2, PAGE, 8)[..., 2:, :] = junk
    again = decoder.decode([table], [21], sequence[21:]).logits
    assert torch.equal(again, logits) if junk == 1e6 else again.isnan().any()


@pytest.mark.parametrize("make", MODELS)
def test_greedy_text_is_that_of_generate(make: Any) -> None:
    model = make()
    prompts = [text(9, 1), text(2, 2), text(14, 3)]
    bench = Bench(model)
    tables = [bench.pages(len(p) + 12) for p in prompts]
    texts = [p.tolist() for p in prompts]
    for table, tokens, prompt in zip(tables, texts, prompts, strict=True):
        tokens.append(int(bench.decoder.prefill(table, 0, prompt).logits[0, 0].argmax()))
    for _ in range(11):
        step = bench.decoder.decode(tables, [len(t) - 1 for t in texts], torch.tensor([t[-1] for t in texts]))
        for tokens, chosen in zip(texts, step.logits[:, 0].argmax(-1).tolist(), strict=True):
            tokens.append(chosen)
    for prompt, tokens in zip(prompts, texts, strict=True):
        with torch.no_grad():
            whole = model.generate(prompt[None], max_new_tokens=12, do_sample=False)[0].tolist()
        assert tokens == whole
    assert len({tuple(t[-12:]) for t in texts}) == 3


def test_padding_changes_nothing_and_writes_to_its_own_page_only() -> None:
    model = llama().double()
    bench = Bench(model, graphs=True)
    scratch = bench.decoder._scratch
    assert scratch is not None and bench.arena.counts().free == 0
    texts = [text(7, 1), text(11, 2), text(5, 3)]
    tables = [bench.pages(len(t)) for t in texts]
    for table, tokens in zip(tables, texts, strict=True):
        bench.decoder.prefill(table, 0, tokens[:-1])
    before = bench.arena.data.clone()
    shapes = []
    run = bench.decoder._run
    bench.decoder._run = lambda *inputs, **named: shapes.append([t.shape for t in inputs]) or run(*inputs, **named)
    step = bench.decoder.decode(tables, [6, 10, 4], torch.stack([t[-1] for t in texts]))
    assert shapes == [[(4, 1), (4, 1), (4, module.LEAST_PAGES)]] and step.logits.shape[0] == 3
    for row, tokens in enumerate(texts):
        assert (step.logits[row, 0] - plain(model, tokens)[-1]).abs().max() < 1e-9
    changed = (bench.arena.data != before).any(dim=1).nonzero().flatten().tolist()
    assert set(changed) == {scratch[0], tables[0][1], tables[1][2], tables[2][1]}
    bench.decoder.close()
    assert bench.arena.counts().free == 1
    bench.decoder.close()


def test_buckets_and_what_is_recorded_ahead() -> None:
    assert [PagedDecoder.bucket(count) for count in (1, 2, 3, 5, 8, 17, 32, 33, 64, 65)] == [
        1, 2, 4, 8, 8, 32, 32, 64, 64, 96
    ]  # fmt: skip
    bench = Bench(llama(), graphs=True)
    shapes = []
    bench.decoder._run = lambda *inputs: shapes.append((inputs[0].shape[0], inputs[2].shape[1]))  # type: ignore[assignment]
    bench.decoder.record(3, 33 * PAGE)
    assert shapes == [(rows, width) for rows in (4, 2, 1) for width in (64, 32, 16)]
    none = Bench(llama())
    none.decoder.record(4, 100)
    assert none.decoder.forwards == 0


def test_a_long_run_of_tokens_goes_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PREFILL_CHUNK", 16)
    model = llama().double()
    bench = Bench(model)
    prompt = text(90)
    table = bench.pages(90)
    bench.decoder.prefill(table, 0, prompt[:10])
    logits = bench.decoder.prefill(table, 10, prompt[10:]).logits
    assert (logits[0, 0] - plain(model, prompt)[-1]).abs().max() < 1e-9
    assert bench.decoder.forwards == 6


@pytest.mark.parametrize("read_pages", [False, True], ids=["gathered", "pages"])
def test_wide_chunks_take_the_other_kernel_to_the_same_logits(read_pages: bool) -> None:
    model = llama().double()
    bench = Bench(model, read_pages=read_pages)
    prompt = text(200)
    step = bench.decoder.prefill(bench.pages(200), 0, prompt)
    assert (step.logits[0, 0] - plain(model, prompt)[-1]).abs().max() < 1e-9
    assert step.hidden is not None and torch.allclose(model.lm_head(step.hidden), step.logits)


@pytest.mark.parametrize("spare", [16, 512, 3 * 1024])
def test_chunks_may_be_larger_than_a_page_needs(spare: int) -> None:
    model = llama(hidden_size=48).double()  # heads of 12: rows of the gather are parts of a head
    bench = Bench(model, spare=spare)
    sequence = text(19)
    table = bench.pages(19)
    bench.decoder.prefill(table, 0, sequence[:-1])
    logits = bench.decoder.decode([table], [18], sequence[-1:]).logits
    assert (logits[0, 0] - plain(model, sequence)[-1]).abs().max() < 1e-9


def test_attention_is_run_once_a_layer_whatever_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    bench = Bench(model)
    tables = [bench.pages(10) for _ in range(6)]
    gathers = []
    gather = PagedCache.gather
    monkeypatch.setattr(PagedCache, "gather", lambda self, layer: gathers.append(layer) or gather(self, layer))
    bench.decoder.decode(tables, [0, 9, 3, 5, 1, 0], text(6))
    assert gathers == [0, 1, 2] and bench.decoder.cache.visible == 3 * PAGE  # as many pages as the longest needs


def test_the_layout_of_a_chunk_is_layers_sides_heads_tokens() -> None:
    model = llama()
    assert PagedCache.chunk_bytes(model.config, torch.float32, PAGE) == 3 * 2 * 2 * PAGE * 8 * 4
    assert PagedCache.chunk_bytes(model.config, torch.bfloat16, 1) == 512  # 192 bytes, rounded up
    bench = Bench(model)
    table = bench.pages(6)
    bench.decoder.prefill(table, 0, text(6))
    with torch.no_grad():
        cache = model(text(6)[None], use_cache=True).past_key_values
    page = bench.arena.data[table[1]].view(torch.float32).view(3, 2, 2, PAGE, 8)
    for layer in range(3):
        assert torch.allclose(page[layer, 0, :, :2], cache.layers[layer].keys[0, :, 4:], atol=1e-5)
        assert torch.allclose(page[layer, 1, :, :2], cache.layers[layer].values[0, :, 4:], atol=1e-5)


def test_keys_may_be_kept_in_another_dtype_than_the_models() -> None:
    model = llama()
    arena = Arena(PagedCache.chunk_bytes(model.config, torch.bfloat16, PAGE), 8)
    decoder = PagedDecoder(model, arena, page=PAGE, dtype=torch.bfloat16)
    table = arena.allocate_kv(5)
    assert table is not None
    sequence = text(18)
    decoder.prefill(table, 0, sequence[:-1])
    logits, expected = decoder.decode([table], [17], sequence[-1:]).logits, plain(model, sequence)[-1]
    error = (logits[0, 0] - expected).norm() / expected.norm()
    assert logits.dtype is torch.float32 and 1e-5 < error < 0.1
    decoder._gathers = False
    with pytest.raises(ValueError, match=r"keys are torch\.float32, pages torch\.bfloat16"):
        decoder.decode([table], [17], sequence[-1:])


def test_another_thread_may_run_the_same_kind_of_model_meanwhile() -> None:
    model, other = llama().double(), llama(num_hidden_layers=2).double()
    bench = Bench(model, read_pages=True)
    sequence = text(9)
    table = bench.pages(9)
    results: list[Tensor] = []

    def beside(*_: Any) -> None:  # in the middle of the forward, from another thread, gathered and not by pages
        second = Bench(other)
        results.append(second.decoder.prefill(second.pages(9), 0, sequence).logits[0, 0])
        results.append(plain(other, sequence)[-1])

    def start(*_: Any) -> None:
        thread = threading.Thread(target=beside)
        thread.start()
        thread.join()

    hook = model.model.layers[1].register_forward_hook(start)
    logits = bench.decoder.prefill(table, 0, sequence).logits
    hook.remove()
    assert (logits[0, 0] - plain(model, sequence)[-1]).abs().max() < 1e-9
    assert (results[0] - results[1]).abs().max() < 1e-9
    assert model.config._attn_implementation == "sdpa"


def test_what_does_not_fit_is_said() -> None:
    model = llama()
    bench = Bench(model)
    decoder = bench.decoder
    with pytest.raises(ValueError, match="9 tokens take 3 pages, here are 2"):
        decoder.prefill(bench.pages(8), 0, text(9))
    with pytest.raises(ValueError, match="9 tokens take 3 pages, here are 2"):
        decoder.decode([bench.pages(8)], [8], text(1))
    with pytest.raises(ValueError, match="no tokens"):
        decoder.prefill(bench.pages(8), 0, text(0))
    with pytest.raises(ValueError, match=r"1 tables, 2 lengths, tokens \[1\]"):
        decoder.decode([bench.pages(8)], [1, 2], text(1))
    with pytest.raises(ValueError, match="0 tables"):
        decoder.decode([], [], text(0))
    small = Arena(512, 4)
    with pytest.raises(ValueError, match="a chunk of the arena has 512"):
        PagedDecoder(model, small, page=PAGE)
    with pytest.raises(ValueError, match="power of two"):
        PagedCache.chunk_bytes(model.config, torch.float32, 12)
    with pytest.raises(ValueError, match="put both on one device"):
        PagedDecoder(model, Arena(1 << 14, 2, "meta"), page=PAGE)
    full = arena_for(model, 2)
    full.allocate_kv(2)
    with pytest.raises(ValueError, match="no free chunk for padding rows"):
        PagedDecoder(model, full, page=PAGE, graphs=True)


def test_models_whose_keys_are_not_what_the_configuration_says_are_refused() -> None:
    model = llama()
    model.config.num_key_value_heads = 4
    bench = Bench(model)
    with pytest.raises(ValueError, match="2 heads of 8, the configuration says 4 of 8"):
        bench.decoder.prefill(bench.pages(4), 0, text(4))
    model = llama()
    model.config.layer_types = ["full_attention", "linear_attention", "full_attention"]
    with pytest.raises(ValueError, match="layers of linear_attention keep no keys"):
        Bench(model)


@pytest.mark.gpu
@pytest.mark.parametrize("make", MODELS)
def test_graphs_on_a_gpu(make: Any) -> None:
    model = make().cuda()
    eager, graphed = Bench(model, graphs=False), Bench(model)
    graphed.decoder.record(4, 20)
    captures = graphed.decoder._graphs[None].captures
    texts = [text(16, seed) for seed in range(3)]
    tables = [(eager.pages(16), graphed.pages(16)) for _ in texts]
    starts = [9, 4, 1]
    for tokens, pair, start in zip(texts, tables, starts, strict=True):
        for bench, table in zip((eager, graphed), pair, strict=True):
            bench.decoder.prefill(table, 0, tokens[:start])
    expected = [plain(model, tokens.cuda()) for tokens in texts]
    for ahead in range(6):
        positions = [start + ahead for start in starts]
        tokens = torch.stack([t[p] for t, p in zip(texts, positions, strict=True)])
        steps = [
            bench.decoder.decode([pair[which] for pair in tables], positions, tokens)
            for which, bench in enumerate((eager, graphed))
        ]
        for row, position in enumerate(positions):
            scale = expected[row].abs().max()
            for step in steps:
                assert (step.logits[row, 0] - expected[row][position]).abs().max() < 1e-3 * scale
    assert graphed.decoder._graphs[None].captures == captures == 3  # buckets of 1, 2 and 4 rows: nothing recorded late


@pytest.mark.gpu
def test_recording_while_another_thread_allocates_on_a_gpu() -> None:
    bench = Bench(llama().cuda())
    going, failed = threading.Event(), []

    def train() -> None:
        try:
            while not going.is_set():
                torch.randn(256, 256, device="cuda", requires_grad=True).square().sum().backward()
        except RuntimeError as error:
            failed.append(error)

    thread = threading.Thread(target=train)
    thread.start()
    try:
        bench.decoder.record(4, 100)
    finally:
        going.set()
        thread.join()
    assert not failed and bench.decoder._graphs[None].captures == 6
