"""A tiny language model made on the spot, for tests and smoke runs that must not need real weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

__all__ = ["tiny_causal_lm"]

_TEXT = [
    "Question: how many eggs are in two boxes of six?\nAnswer: 2 * 6 = 12 eggs.",
    "the quick brown fox jumps over the lazy dog and sleeps under the old tree",
    "to be, or not to be, that is the question: whether it is nobler in the mind to suffer",
]
_CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_causal_lm(directory: Path | str, seed: int = 0, chat: bool = False, **config: Any) -> Path:
    """Write a random Llama of some 60,000 weights and a byte-level tokenizer as a Hugging Face directory.

    Args:
        directory: A folder, made if it is not there.
        seed: Of the weights.
        chat: Give the tokenizer a chat template.
        **config: Fields of ``LlamaConfig``.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    directory = Path(directory)
    rules = Tokenizer(models.BPE())
    rules.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rules.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    rules.train_from_iterator(_TEXT, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=rules, eos_token="<eos>", bos_token=None, unk_token=None)
    if chat:
        tokenizer.chat_template = _CHAT
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": None,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**shape | config))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
