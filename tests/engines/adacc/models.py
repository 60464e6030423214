"""Tiny models of many kinds, each a module whose ``loss(batch)`` is a scalar. None of them knows of Adacc."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """A pre-norm transformer block with separate q, k, v and dropout."""

    def __init__(self, d: int = 32, heads: int = 4, p: float = 0.1) -> None:
        super().__init__()
        self.heads = heads
        self.ln1, self.ln2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.q, self.k, self.v, self.o = (nn.Linear(d, d) for _ in range(4))
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)
        self.drop = nn.Dropout(p)

    def attend(self, y: Tensor) -> Tensor:
        b, t, d = y.shape
        q, k, v = (f(y).view(b, t, self.heads, d // self.heads).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, d))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attend(self.ln1(x)))
        return x + self.drop(self.down(F.gelu(self.up(self.ln2(x)))))


class FusedBlock(Block):
    """Fused qkv taken apart by views, attention spelt out, softmax with dropout on the scores."""

    def __init__(self, d: int = 32, heads: int = 4, p: float = 0.1) -> None:
        super().__init__(d, heads, p)
        self.qkv = nn.Linear(d, 3 * d)

    def attend(self, y: Tensor) -> Tensor:
        _, t, d = y.shape
        q, k, v = self.qkv(y).chunk(3, dim=-1)
        q, k, v = (z.unflatten(-1, (self.heads, -1)).transpose(1, 2) for z in (q, k, v))
        scores = (q @ k.transpose(-1, -2)) * (d // self.heads) ** -0.5
        mask = torch.ones(t, t, dtype=torch.bool, device=y.device).tril()
        scores = scores.masked_fill(~mask, float("-inf"))
        out = self.drop(scores.softmax(-1)) @ v
        return self.o(out.transpose(1, 2).flatten(2))


class InplaceBlock(nn.Module):
    """In-place operators wherever autograd allows them: relu_, add_, mul_, masked_fill_, a slice written."""

    def __init__(self, d: int = 32) -> None:
        super().__init__()
        self.ln, self.up, self.down = nn.LayerNorm(d), nn.Linear(d, 2 * d), nn.Linear(2 * d, d)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.up(self.ln(x)))
        y = self.down(h)
        y.mul_(0.5).add_(x)
        z = y * 1.0
        z[..., :4] += 1.0
        z.masked_fill_(z > 2.5, 2.5)
        return z.tanh_()


class GPT(nn.Module):
    """Embeddings, blocks, a norm and a head."""

    def __init__(
        self,
        layers: int = 3,
        d: int = 32,
        vocab: int = 61,
        context: int = 64,
        p: float = 0.1,
        block: Callable[..., nn.Module] = Block,
    ) -> None:
        super().__init__()
        self.emb, self.pos = nn.Embedding(vocab, d), nn.Embedding(context, d)
        self.blocks = nn.ModuleList(block(d) if block is InplaceBlock else block(d, p=p) for _ in range(layers))
        self.ln, self.head = nn.LayerNorm(d), nn.Linear(d, vocab, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.emb(ids) + self.pos(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.ln(x))

    def loss(self, ids: Tensor) -> Tensor:
        return F.cross_entropy(self(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


class Mlp(nn.Module):
    """No block repeats: one region holds it all. Dropout, and a leaf repeated inside a Sequential."""

    def __init__(self, d: int = 24) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(d, 3 * d), nn.GELU(), nn.Dropout(0.2), nn.Linear(3 * d, d), nn.SiLU(), nn.Linear(d, 5)
        )

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)


class Squash(torch.autograd.Function):
    """Saves input and output, and reads ``saved_tensors`` twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: float) -> Tensor:
        y = torch.tanh(x * slope)
        ctx.save_for_backward(x, y)
        ctx.slope = slope
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        x, _ = ctx.saved_tensors
        _, y = ctx.saved_tensors
        return gradient * (1 - y * y) * ctx.slope + 0 * x, None


class FunctionBlock(nn.Module):
    """A user's own autograd.Function between two Linears."""

    def __init__(self, d: int = 32, p: float = 0.0) -> None:
        super().__init__()
        self.ln, self.up, self.down = nn.LayerNorm(d), nn.Linear(d, 2 * d), nn.Linear(2 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(Squash.apply(self.up(self.ln(x)), 0.7))


class Encoder(nn.Module):
    """torch's own TransformerEncoder (nn.MultiheadAttention inside), with a padding mask."""

    def __init__(self, d: int = 32) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(d, 4, 2 * d, dropout=0.1, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(d, 3)

    def loss(self, batch: Tensor) -> Tensor:
        padding = torch.zeros(batch.shape[:2], dtype=torch.bool)
        padding[:, -2:] = True
        return self.head(self.encoder(batch, src_key_padding_mask=padding)).square().mean()


class ConvBlock(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c)
        self.conv2, self.bn2 = nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x
        return self.relu(y)


class ConvNet(nn.Module):
    """A small residual network: batch norm, in-place relu and add, max pooling."""

    def __init__(self, c: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, c, 3, padding=1)
        self.blocks = nn.Sequential(*(ConvBlock(c) for _ in range(3)))
        self.pool, self.head = nn.MaxPool2d(2), nn.Linear(c, 4)

    def loss(self, batch: Tensor) -> Tensor:
        return self.head(self.pool(self.blocks(self.stem(batch))).mean((-1, -2))).square().sum()


class _HuggingFace(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def loss(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, labels=ids, use_cache=False).loss


def llama(attention: str = "sdpa", layers: int = 2, **more: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=61, max_position_embeddings=64, attention_dropout=0.1, attn_implementation=attention, **more,
    )  # fmt: skip
    return _HuggingFace(LlamaForCausalLM(config))


def qwen2() -> nn.Module:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=61, max_position_embeddings=64, attention_dropout=0.0, tie_word_embeddings=True,
    )  # fmt: skip
    return _HuggingFace(Qwen2ForCausalLM(config))


def neox() -> nn.Module:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=61,
        max_position_embeddings=64, hidden_dropout=0.1, attention_dropout=0.0,
    )  # fmt: skip
    return _HuggingFace(GPTNeoXForCausalLM(config))


class _ViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        from transformers import ViTConfig, ViTModel

        config = ViTConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=16,
            patch_size=4, hidden_dropout_prob=0.1,
        )  # fmt: skip
        self.model, self.head = ViTModel(config, add_pooling_layer=False), nn.Linear(32, 3)

    def loss(self, images: Tensor) -> Tensor:
        return self.head(self.model(pixel_values=images).last_hidden_state[:, 0]).square().sum()


def lora() -> nn.Module:
    """LoRA by peft on a frozen Llama, with LoRA dropout."""
    from peft import LoraConfig, get_peft_model

    base = llama(layers=2)
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["q_proj", "v_proj", "down_proj"])
    base.model = get_peft_model(base.model, config)
    for name, parameter in base.named_parameters():  # B starts at zero: then A would get no gradient
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return base


@dataclass(frozen=True)
class Family:
    """How to build one model and its batch. ``blocks``: how many repeated blocks there are to be found."""

    build: Callable[[], nn.Module]
    batch: Callable[[], Any]
    blocks: int


def tokens(batch: int = 2, length: int = 17, vocab: int = 61) -> Tensor:
    return torch.randint(0, vocab, (batch, length))


FAMILIES: dict[str, Family] = {
    "gpt": Family(GPT, tokens, 3),
    "fused_qkv": Family(lambda: GPT(block=FusedBlock), tokens, 3),
    "inplace": Family(lambda: GPT(block=InplaceBlock), tokens, 3),
    "function": Family(lambda: GPT(block=FunctionBlock), tokens, 3),
    "mlp": Family(Mlp, lambda: (torch.randn(6, 24), torch.randint(0, 5, (6,))), 0),
    "encoder": Family(Encoder, lambda: torch.randn(2, 9, 32), 3),
    "conv": Family(ConvNet, lambda: torch.randn(2, 3, 8, 8), 3),
    "llama": Family(llama, tokens, 2),
    "llama_eager": Family(lambda: llama("eager"), tokens, 2),
    "qwen2": Family(qwen2, tokens, 2),
    "neox": Family(neox, tokens, 2),
    "vit": Family(_ViT, lambda: torch.randn(2, 3, 16, 16), 2),
    "lora": Family(lora, tokens, 2),
}
