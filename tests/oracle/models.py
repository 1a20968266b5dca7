"""The tiny models that the oracle trains: all that a checkpoint's layout can depend on.

Each takes token ids `[batch, length]` and gives the loss. Every parameter belongs to a module that
uses it in its own forward: ZeRO-3 gathers parameters by module.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

VOCAB = 37


class Scale(nn.Module):  # type: ignore[misc]  # torch is untyped here
    """Multiplies by one number: a parameter smaller than any world size but one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.75]))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Rich(nn.Module):  # type: ignore[misc]
    """Odd shapes, a tensor over several partitions, tied, frozen, tiny, and buffers of each kind.

    `embed.weight` (37, 7) is larger than a third of all trainable elements, so with three ranks it
    spans partitions; `head.weight` is tied to it. `frozen` is a Linear that is not trained.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 7)
        self.frozen = nn.Linear(7, 7)
        self.up = nn.Linear(7, 5)
        self.norm = nn.LayerNorm(5)
        self.scale = Scale()
        self.down = nn.Linear(5, 7, bias=False)
        self.head = nn.Linear(7, VOCAB, bias=False)
        self.head.weight = self.embed.weight
        self.frozen.requires_grad_(False)
        self.register_buffer("mean", torch.tensor([0.1, 0.2, 0.3]))
        self.register_buffer("count", torch.tensor(2**53 + 1))  # not representable in a float
        self.register_buffer("mask", torch.tensor([[True, False, True]]))
        self.register_buffer("nothing", torch.zeros(0, 4))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.frozen(self.embed(ids))
        x = self.down(self.scale(torch.tanh(self.norm(self.up(x)))))
        return next_token_loss(self.head(x), ids)


class Void(nn.Module):  # type: ignore[misc]
    """Adds the sum of nothing: a parameter without elements."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(0, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight.sum()


class Empty(nn.Module):  # type: ignore[misc]
    """A trainable parameter without elements, between two that have some."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 3)
        self.void = Void()
        self.head = nn.Linear(3, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        return next_token_loss(self.head(self.void(self.embed(ids))), ids)


class Many(nn.Module):  # type: ignore[misc]
    """Enough parameters of different sizes that a wrong order of them cannot go unseen."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 6)
        widths = (6, 5, 4, 7, 3, 6)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return next_token_loss(self.head(self.norm(x)), ids)


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Cross entropy of each next token; `logits` is `[batch, length, vocab]`."""
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def llama(tied: bool) -> nn.Module:
    """A random LlamaForCausalLM of transformers with odd sizes, as LightRFT gives to DeepSpeed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=22,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def lora(tied: bool) -> nn.Module:
    """The same Llama with PEFT's adapters on two projections: all else is frozen."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"])
    return get_peft_model(llama(tied), config)


def build(name: str) -> nn.Module:
    """The model that a recipe calls `name`."""
    if name.startswith("llama"):
        return llama(tied=name == "llama-tied")
    if name.startswith("lora"):
        return lora(tied=name == "lora-tied")
    return {"rich": Rich, "empty": Empty, "many": Many}[name]()
