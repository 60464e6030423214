"""Continuous batching says what plain generation says, whoever joins, leaves or is thrown out meanwhile."""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ygglight.engines.decode.call import Step
from ygglight.engines.decode.paged import PagedCache, PagedDecoder
from ygglight.engines.decode.sampling import SamplingParams
from ygglight.engines.harli.adapters import Adapters, serving_twin
from ygglight.engines.harli.batcher import Batcher
from ygglight.engines.harli.requests import Closing, QueueFull, Request, TokenEvent
from ygglight.engines.memory.arena import Arena

from .conftest import generated, llama, prompts, shake, with_lora

END = 90


class Clock:
    """A second a look."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


class FakeDecoder:
    """Says token + 1, and checks that whatever it is asked to attend to was written to the very pages before."""

    def __init__(self, page: int = 4, vocabulary: int = 100) -> None:
        self.page, self.vocabulary, self.device = page, vocabulary, torch.device("cpu")
        self.partition = None
        self.model = SimpleNamespace(config=SimpleNamespace(eos_token_id=None), generation_config=None)
        self.memory: dict[tuple[int, int], tuple[int, int]] = {}  # (page, offset) -> (position, token)
        self.calls: list[tuple[str, int]] = []
        self.fails = False

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page)

    def _write(self, pages: list[int], position: int, token: int) -> None:
        self.memory[pages[position // self.page], position % self.page] = (position, token)
        for before in range(position):
            assert self.memory[pages[before // self.page], before % self.page][0] == before

    def _step(self, tokens: list[int]) -> Step:
        logits = torch.zeros(len(tokens), 1, self.vocabulary)
        for row, token in enumerate(tokens):
            logits[row, 0, (token + 1) % self.vocabulary] = float("nan") if token == 66 else 1.0
        return Step(logits, None)

    def prefill(self, pages: list[int], start: int, tokens: Tensor) -> Step:
        self.calls.append(("prefill", len(tokens)))
        if self.fails:
            raise RuntimeError("the model broke")
        for offset, token in enumerate(tokens.tolist()):
            self._write(pages, start + offset, token)
        return self._step([int(tokens[-1])])

    def decode(self, tables: list[list[int]], lengths: list[int], tokens: Tensor) -> Step:
        self.calls.append(("decode", len(tables)))
        for table, length, token in zip(tables, lengths, tokens.tolist(), strict=True):
            self._write(table, length, token)
        return self._step(tokens.tolist())


@dataclass
class Heard:
    """A request, and all that its client heard."""

    request: Request
    events: list[TokenEvent] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return [event.token for event in self.events if event.token is not None]

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events)

    @property
    def reasons(self) -> list[str]:
        return [event.finish_reason for event in self.events if event.finish_reason is not None]


def ask(batcher: Batcher, prompt: list[int], model: str = "base", **sampling: Any) -> Heard:
    heard = Heard(None)  # type: ignore[arg-type]
    heard.request = Request(
        prompt, heard.events.append, SamplingParams(**{"temperature": 0.0, "max_tokens": 8} | sampling), model=model
    )
    batcher.submit(heard.request)
    return heard


def finish(batcher: Batcher, steps: int = 2000) -> None:
    """Run until nothing is here."""
    for _ in range(steps):
        work = batcher.next_work()
        if work is None:
            assert batcher.idle, "something waits and nothing moves"
            return
        batcher.run(work)
    raise AssertionError(f"not done after {steps} steps")


def fake(chunks: int = 64, **kwargs: Any) -> tuple[Batcher, FakeDecoder, Arena]:
    decoder, arena = FakeDecoder(), Arena(16, chunks)
    settings: dict[str, Any] = {"max_context": 40, "prefill_chunk": 8, "ends": {END}, "clock": Clock()} | kwargs
    return Batcher(decoder, arena, None, **settings), decoder, arena  # type: ignore[arg-type]


# -- one request ------------------------------------------------------------------------------------------------------
def test_a_request_from_arrival_to_end() -> None:
    batcher, decoder, arena = fake()
    heard = ask(batcher, list(range(10, 20)), max_tokens=4)
    request = heard.request
    assert batcher.load().waiting == 1 and not batcher.idle
    first = batcher.next_work()
    assert first is not None and (first.kind, first.tokens, first.context_tokens) == ("prefill", 8, 8)
    batcher.run(first)
    assert not heard.events
    second = batcher.next_work()
    assert second is not None and (second.kind, second.tokens, second.context_tokens) == ("prefill", 2, 12)
    batcher.run(second)
    assert heard.tokens == [20]  # the first token comes with the end of the prompt
    load = batcher.load()
    assert (load.batch, load.context_tokens, load.waiting, load.prefill_tokens) == (1, 12, 0, 0)
    finish(batcher)
    assert heard.tokens == request.output == [20, 21, 22, 23] and heard.reasons == ["length"]
    assert decoder.calls == [("prefill", 8), ("prefill", 2), ("decode", 1), ("decode", 1), ("decode", 1)]
    assert request.arrival is not None and request.admitted is not None and request.finished is not None
    times = [request.arrival, request.admitted, *request.token_times, request.finished]
    assert times == sorted(times) and request.first_token == request.token_times[0] and len(request.token_times) == 4
    assert arena.counts().free == arena.chunks and batcher.finished == {"length": 1} and batcher.tokens == 4


def test_an_end_token_ends_unless_ignored() -> None:
    batcher, _, _ = fake()
    ends, goes_on = (ask(batcher, [87], ignore_eos=ignore) for ignore in (False, True))
    finish(batcher)
    assert (ends.tokens, ends.reasons) == ([88, 89, END], ["stop"])
    assert (goes_on.tokens, goes_on.reasons) == (list(range(88, 96)), ["length"])


def test_events_carry_logprobs_when_asked() -> None:
    batcher, _, _ = fake()
    asked, silent = ask(batcher, [5], logprobs=1), ask(batcher, [5])
    finish(batcher)
    assert all(event.logprobs is not None and event.logprobs.top[0][0] == event.token for event in asked.events)
    assert all(event.logprobs is None for event in silent.events)


# -- the order of things ----------------------------------------------------------------------------------------------
def test_at_most_one_chunk_of_a_prompt_between_two_decode_steps() -> None:
    batcher, decoder, _ = fake(max_context=60)
    ask(batcher, [1, 2], max_tokens=12)
    batcher.run(batcher.next_work())  # type: ignore[arg-type]
    decoder.calls.clear()
    ask(batcher, list(range(1, 31)))
    finish(batcher)
    kinds = [kind for kind, _ in decoder.calls]
    assert kinds[:8] == ["decode", "prefill"] * 4  # 30 tokens in chunks of 8
    assert "prefill" not in kinds[8:]
    assert [count for kind, count in decoder.calls if kind == "prefill"] == [8, 8, 8, 6]


def test_a_prompt_that_is_held_back_waits_for_no_longer_than_anybody_decodes() -> None:
    batcher, decoder, _ = fake(max_context=60)
    running = ask(batcher, [1, 2], max_tokens=5)
    batcher.run(batcher.next_work())  # type: ignore[arg-type]
    assert batcher.next_prompt == 0
    held = ask(batcher, list(range(1, 11)), max_tokens=2)
    assert batcher.next_prompt == 10
    batcher.prefill_chunk = 0
    decoder.calls.clear()
    finish(batcher)
    assert [kind for kind, _ in decoder.calls[:5]] == ["decode"] * 4 + ["prefill"]
    assert len(running.tokens) == 5 and len(held.tokens) == 2


def test_first_come_first_served_even_if_a_later_one_would_fit() -> None:
    batcher, _, _ = fake(chunks=10, max_batch=8)
    order: list[str] = []
    first, long, short = (ask(batcher, [1] * count, max_tokens=4) for count in (20, 30, 1))
    for name, heard in (("first", first), ("long", long), ("short", short)):
        heard.request.on_event = lambda event, name=name: order.append(name) if event.finish_reason else None
    batcher.next_work()
    assert [heard.request.admitted is not None for heard in (first, long, short)] == [True, False, False]
    finish(batcher)
    assert order[0] == "first"
    assert long.request.admitted < short.request.admitted  # type: ignore[operator]


def test_no_more_than_max_batch_at_a_time() -> None:
    batcher, decoder, _ = fake(max_batch=3)
    asked = [ask(batcher, [i]) for i in range(8)]
    finish(batcher)
    assert max(count for kind, count in decoder.calls if kind == "decode") == 3
    assert all(heard.reasons == ["length"] for heard in asked)


# -- what cannot be, and what is too much -----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("prompt", "changes", "text"),
    [
        ([], {}, "prompt is empty"),
        ([1] * 40, {}, "prompt has 40 tokens, max_context is 40"),
        ([1] * 39, {"max_tokens": 2}, "39 prompt tokens and max_tokens=2 are more than max_context=40"),
        ([100], {}, "vocabulary of 100"),
        ([-1], {}, "vocabulary of 100"),
        ([1], {"model": "gpt"}, "no model 'gpt': ask for base"),
        ([1], {"model": "adapter"}, "no model 'adapter': ask for base"),
        ([1], {"stop": ("a",)}, "stop strings need a tokenizer"),
    ],
)
def test_what_can_never_be_served_is_refused_with_its_limit(
    prompt: list[int], changes: dict[str, Any], text: str
) -> None:
    batcher, _, _ = fake()
    with pytest.raises(ValueError, match=text):
        ask(batcher, prompt, **changes)
    assert batcher.idle
    assert ask(batcher, [1] * 39, max_tokens=1).request.prompt  # the most that fits is taken
    finish(batcher)


def test_a_context_that_does_not_fit_the_arena_is_refused_before_anybody_asks() -> None:
    with pytest.raises(ValueError, match="max_context=40, but the arena holds 36 tokens"):
        fake(chunks=9)
    fake(chunks=9, max_context=37)
    with pytest.raises(ValueError, match="max_batch=0"):
        fake(max_batch=0)


def test_a_full_queue_says_when_to_come_again() -> None:
    batcher, _, _ = fake(max_queue=2, max_batch=1)
    ask(batcher, [1])
    batcher.next_work()  # it is admitted, and waits no more
    gone = ask(batcher, [2])
    ask(batcher, [3])
    with pytest.raises(QueueFull) as full:
        ask(batcher, [4])
    assert 1 <= full.value.retry_after <= 60
    gone.request.cancel()
    batcher.next_work()
    ask(batcher, [4])
    with pytest.raises(QueueFull):
        ask(batcher, [5])
    finish(batcher)
    ask(batcher, [6])


def test_draining_finishes_what_is_here_and_stopping_cancels_it() -> None:
    batcher, _, arena = fake(max_batch=1)
    running, waiting = ask(batcher, [1]), ask(batcher, [2])
    batcher.run(batcher.next_work())  # type: ignore[arg-type]
    batcher.drain()
    with pytest.raises(Closing):
        ask(batcher, [3])
    finish(batcher)
    assert running.reasons == waiting.reasons == ["length"]

    batcher, _, arena = fake(max_batch=1)
    running, waiting = ask(batcher, [1]), ask(batcher, [2])
    batcher.run(batcher.next_work())  # type: ignore[arg-type]
    unseen = ask(batcher, [3])
    batcher.stop()
    assert batcher.next_work() is None and batcher.idle
    assert [heard.reasons for heard in (running, waiting, unseen)] == [["cancelled"]] * 3
    assert arena.counts().free == arena.chunks
    with pytest.raises(Closing):
        ask(batcher, [4])


def test_what_goes_wrong_ends_the_request_it_happens_to_and_no_other() -> None:
    batcher, decoder, arena = fake()
    fine, not_finite = ask(batcher, [1]), ask(batcher, [64])  # 66 is followed by NaN
    finish(batcher)
    assert fine.reasons == ["length"]
    assert (not_finite.tokens, not_finite.reasons) == ([65, 66], ["error"])
    assert not_finite.events[-1].error == "the model's logits are not finite"
    decoder.fails = True
    broken = ask(batcher, [1])
    finish(batcher)
    assert broken.reasons == ["error"] and broken.events[-1].error == "RuntimeError: the model broke"
    decoder.fails = False

    def deaf(event: TokenEvent) -> None:
        raise OSError("nobody listens")

    unheard = Request([1], deaf, SamplingParams(temperature=0, max_tokens=30))
    batcher.submit(unheard)
    beside = ask(batcher, [3])
    finish(batcher)
    assert beside.reasons == ["length"] and unheard.finish_reason == "cancelled" and len(unheard.output) < 30
    assert arena.counts().free == arena.chunks and batcher.idle


# -- cancelling -------------------------------------------------------------------------------------------------------
def test_a_cancelled_request_gives_its_pages_back_at_once() -> None:
    batcher, _, arena = fake(max_batch=2)
    prefilling, running, waiting = ask(batcher, [1] * 20), ask(batcher, [2]), ask(batcher, [3])
    batcher.run(batcher.next_work())  # type: ignore[arg-type]
    for heard in (prefilling, running, waiting):
        heard.request.cancel()
        heard.request.cancel()
    assert batcher.next_work() is None and batcher.idle
    assert all(heard.reasons == ["cancelled"] for heard in (prefilling, running, waiting))
    assert arena.counts().free == arena.chunks


# -- memory -----------------------------------------------------------------------------------------------------------
def test_when_pages_run_out_the_newest_goes_and_its_text_stays_the_same() -> None:
    batcher, _, arena = fake(chunks=10, max_batch=8)
    asked = [ask(batcher, [10 * i + j for j in range(6)], max_tokens=24, ignore_eos=True) for i in range(4)]
    finish(batcher)
    assert batcher.preemptions > 0
    assert asked[0].request.preemptions == 0  # the oldest always moves
    for i, heard in enumerate(asked):
        assert heard.tokens == [(10 * i + 6 + j) % 100 for j in range(24)], i
        assert heard.reasons == ["length"]
    assert arena.counts().free == arena.chunks


def test_a_sequence_without_a_page_waits_while_others_move() -> None:
    batcher, _, arena = fake(chunks=10, max_batch=2, max_context=20)
    first, second = ask(batcher, [2, 3], max_tokens=10), ask(batcher, [11], max_tokens=4)
    for _ in range(4):
        batcher.run(batcher.next_work())  # type: ignore[arg-type]
    assert (first.tokens, second.tokens) == ([4, 5, 6], [12, 13])  # the first has filled its page
    held = arena.lease(arena.counts().free * 16)  # finetuning has all the rest
    assert held is not None
    for _ in range(2):
        work = batcher.next_work()
        assert work is not None and work.requests == (second.request,)
        assert arena.pressure == 1
        batcher.run(work)
    assert second.reasons == ["length"] and first.tokens == [4, 5, 6]
    batcher.run(batcher.next_work())  # type: ignore[arg-type]
    assert first.tokens == [4, 5, 6, 7] and arena.pressure == 0  # the second gave a page back
    arena.release(held)
    finish(batcher)
    assert first.tokens == list(range(4, 14)) and batcher.preemptions == 0


def test_alone_it_waits_for_finetuning_and_says_so() -> None:
    batcher, _, arena = fake(chunks=10)
    heard = ask(batcher, [1, 2, 3, 4], max_tokens=10)
    batcher.run(batcher.next_work())  # type: ignore[arg-type]
    held = arena.lease(arena.counts().free * 16)
    assert held is not None
    later = ask(batcher, [5] * 6)
    for _ in range(3):
        assert batcher.next_work() is None
    assert arena.pressure > 0 and not batcher.idle and not later.events
    arena.release(held)
    finish(batcher)
    assert heard.reasons == later.reasons == ["length"] and batcher.preemptions == 0


def test_pressure_ends_with_the_wish() -> None:
    batcher, _, arena = fake(chunks=10)
    ask(batcher, [1], max_tokens=30)
    batcher.run(batcher.next_work())  # type: ignore[arg-type]
    held = arena.lease(6 * 16)
    assert held is not None
    big = ask(batcher, [2] * 32)
    batcher.run(batcher.next_work())  # type: ignore[arg-type]
    assert arena.pressure > 0
    big.request.cancel()
    batcher.run(batcher.next_work())  # type: ignore[arg-type]
    assert arena.pressure == 0
    arena.release(held)
    finish(batcher)


@pytest.mark.parametrize("seed", range(12))
def test_any_traffic_ends_with_the_right_text_and_all_pages_back(seed: int) -> None:
    choose = random.Random(seed)
    chunks = choose.randrange(10, 20)
    batcher, _, arena = fake(chunks=chunks, max_batch=choose.randrange(1, 7), prefill_chunk=choose.randrange(1, 9))
    asked: list[Heard] = []
    lease = None
    for _ in range(500):
        if len(asked) < 25 and choose.random() < 0.3:
            count = choose.randrange(1, 30)
            prompt = [choose.randrange(60) for _ in range(count)]
            asked.append(ask(batcher, prompt, max_tokens=choose.randrange(1, 41 - count), ignore_eos=True))
        if asked and choose.random() < 0.03:
            choose.choice(asked).request.cancel()
        if lease is None and choose.random() < 0.2:
            lease = arena.lease(16 * choose.randrange(1, chunks))
        elif lease is not None and (arena.pressure or choose.random() < 0.2):  # KV comes first
            arena.release(lease)
            lease = None
        work = batcher.next_work()
        if work is not None:
            batcher.run(work)
    if lease is not None:
        arena.release(lease)
    finish(batcher)
    assert arena.counts().free == chunks and arena.pressure == 0 and len(asked) == 25
    for heard in asked:
        last, count = heard.request.prompt[-1], heard.request.sampling.max_tokens
        expected = [(last + 1 + i) % 100 for i in range(count)]
        broken = next((i for i, token in enumerate(expected) if (token - 1) % 100 == 66), count)
        assert len(heard.reasons) == 1 and heard.events[-1].finish_reason is not None
        assert heard.tokens == heard.request.output == expected[: len(heard.tokens)]
        if heard.reasons == ["length"]:
            assert len(heard.tokens) == count
        else:
            assert heard.request.cancelled or len(heard.tokens) == broken
    done = [heard.request for heard in asked if heard.request.admitted is not None]
    assert [request.admitted for request in done] == sorted(request.admitted for request in done)  # first come first


# -- real models ------------------------------------------------------------------------------------------------------
def real(model: Any, chunks: int = 64, tokenizer: Any = None, **kwargs: Any) -> tuple[Batcher, Adapters, Arena]:
    twin = serving_twin(model)
    arena = Arena(PagedCache.chunk_bytes(twin.config, twin.dtype, 4), chunks)
    adapters = Adapters(twin, model)
    decoder = PagedDecoder(twin, arena, page=4, graphs=kwargs.pop("graphs", None))
    settings: dict[str, Any] = {"max_context": 64, "prefill_chunk": 5} | kwargs
    return Batcher(decoder, arena, tokenizer, adapters=adapters, **settings), adapters, arena


def truth(model: Any, prompt: list[int], new: int, kind: str) -> list[int]:
    if kind == "adapter":
        return generated(model, prompt, new)
    with model.disable_adapter():
        return generated(model, prompt, new)


@pytest.mark.parametrize(("chunks", "graphs"), [(200, None), (17, None), (200, True)])
def test_a_mixed_batch_says_what_plain_generation_says(chunks: int, graphs: bool | None) -> None:
    model = with_lora(llama())
    batcher, adapters, arena = real(model, chunks, graphs=graphs, max_batch=6)
    kept = arena.counts().free
    expected: list[tuple[Heard, list[int], int | None]] = []
    gone: list[Heard] = []
    plans = prompts(10)
    for index, prompt in enumerate(plans):  # they join at different times, under three versions and the base
        kind = "base" if index % 3 == 2 else "adapter"
        new = 6 + 5 * index % 22
        heard = ask(batcher, prompt, kind, max_tokens=new)
        if index % 5 == 3:
            gone.append(heard)
        version = None if kind == "base" else index
        expected.append((heard, truth(model, prompt, new, kind), version))
        while heard.request.admitted is None:
            batcher.run(batcher.next_work())  # type: ignore[arg-type]
        for _ in range(3):
            work = batcher.next_work()
            if work is not None:
                batcher.run(work)
        if heard in gone:
            heard.request.cancel()
        if index < len(plans) - 1:  # the trainer goes on: the texts of those that run must not
            shake(model, 100 + index)
            assert adapters.publish(model) == index + 1
    finish(batcher)
    for heard, tokens, version in expected:
        assert heard.request.adapter_version == version
        if heard in gone and heard.reasons == ["cancelled"]:
            assert heard.tokens == tokens[: len(heard.tokens)]
        else:
            assert heard.tokens == tokens and heard.reasons == ["length"]
    assert any(heard.reasons == ["cancelled"] for heard in gone)
    assert (batcher.preemptions > 0) == (chunks == 17)
    assert arena.counts().free == kept and adapters.versions == [len(plans) - 1]
    # The control: another version, or the base, says something else.
    prompt = plans[0]
    assert len({tuple(truth(model, prompt, 20, kind)) for kind in ("base", "adapter")}) == 2
    assert generated(model, prompt, 6) != expected[0][1]


def test_seeded_sampling_survives_preemption_and_neighbours() -> None:
    model = with_lora(llama())
    asks = [(prompt, {"max_tokens": 16, "temperature": 1.0, "seed": seed, "presence_penalty": 0.5})
            for seed, prompt in enumerate(prompts(6))]  # fmt: skip
    texts, preempted = [], []
    for chunks, batch in ((200, 1), (17, 6)):
        batcher, _, _ = real(model, chunks, max_batch=batch)
        heard = [ask(batcher, prompt, "adapter", **settings) for prompt, settings in asks]
        finish(batcher)
        texts.append([one.tokens for one in heard])
        preempted.append(batcher.preemptions)
    assert texts[0] == texts[1]
    assert preempted[0] == 0 < preempted[1]
    assert all(len(set(text)) > 3 for text in texts[0])


def test_text_streams_and_stops(tmp_path: Any) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ygglight.modules.testing import tiny_causal_lm

    folder = tiny_causal_lm(tmp_path, initializer_range=0.2)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = with_lora(AutoModelForCausalLM.from_pretrained(folder).eval())
    batcher, _, _ = real(model, tokenizer=tokenizer)
    assert batcher.ends == {tokenizer.eos_token_id}
    prompt = tokenizer.encode("the quick brown")
    whole = ask(batcher, prompt, "adapter", max_tokens=30)
    finish(batcher)
    assert whole.text == tokenizer.decode(generated(model, prompt, 30), skip_special_tokens=True)
    stop = whole.text[8:10]
    cut = ask(batcher, prompt, "adapter", max_tokens=30, stop=(stop,))
    finish(batcher)
    assert cut.reasons == ["stop"] and cut.text == whole.text[: whole.text.index(stop)]
    assert len(cut.tokens) < 30


def test_requests_come_from_many_threads_while_one_decodes() -> None:
    model = with_lora(llama())
    batcher, _, arena = real(model, 40, max_batch=4, max_queue=100)
    plans = prompts(6)
    expected = {kind: [truth(model, prompt, 8, kind) for prompt in plans] for kind in ("base", "adapter")}
    heard: list[tuple[Heard, list[int]]] = []
    ended = threading.Event()

    def decode() -> None:
        while not (ended.is_set() and batcher.idle):
            batcher.wake.clear()
            work = batcher.next_work()
            if work is None:
                batcher.wake.wait(0.01)
            else:
                batcher.run(work)

    def client(kind: str) -> None:
        heard.extend((ask(batcher, prompt, kind), expected[kind][i]) for i, prompt in enumerate(plans))

    decoding = threading.Thread(target=decode, name="ygglight-test-decode")
    clients = [threading.Thread(target=client, args=(kind,)) for kind in ("base", "adapter", "base", "adapter")]
    for thread in (decoding, *clients):
        thread.start()
    for thread in clients:
        thread.join()
    ended.set()
    batcher.wake.set()
    decoding.join()
    assert len(heard) == 24
    for one, tokens in heard:
        assert one.tokens == tokens and one.reasons == ["length"]
    assert arena.counts().free == arena.chunks
