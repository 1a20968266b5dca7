"""The models that the oracle trains and saves: tiny, with awkward shapes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional

from tests.fsdp.oracle import ranks

VOCAB = 33
HIDDEN = 12
FFN = 22
LAYERS = 2


class Attention(nn.Module):  # type: ignore[misc]
    """Like grouped heads: the key and value side is narrower than the query side."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(hidden, hidden)
        self.k_proj = nn.Linear(hidden, hidden // 2)
        self.v_proj = nn.Linear(hidden, hidden // 2)
        self.o_proj = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Nothing here mixes channels, so each rank of a tensor-parallel group works on its own.
        key = functional.silu(self.k_proj(x)).repeat_interleave(2, -1)
        value = self.v_proj(x).repeat_interleave(2, -1)
        out: torch.Tensor = self.o_proj(self.q_proj(x) * key + value)
        return out


class Mlp(nn.Module):  # type: ignore[misc]
    def __init__(self, hidden: int, ffn: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, ffn, bias=False)
        self.up_proj = nn.Linear(hidden, ffn, bias=False)
        self.down_proj = nn.Linear(ffn, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Norm(nn.Module):  # type: ignore[misc]
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * functional.rms_norm(x, x.shape[-1:])


class Layer(nn.Module):  # type: ignore[misc]
    def __init__(self, hidden: int, ffn: int) -> None:
        super().__init__()
        self.self_attn = Attention(hidden)
        self.mlp = Mlp(hidden, ffn)
        self.input_layernorm = Norm(hidden)
        self.post_attention_layernorm = Norm(hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        out: torch.Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Backbone(nn.Module):  # type: ignore[misc]
    def __init__(self, vocab: int, hidden: int, ffn: int, layers: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab, hidden)
        self.layers = nn.ModuleList(Layer(hidden, ffn) for _ in range(layers))
        self.norm = Norm(hidden)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x)
        out: torch.Tensor = self.norm(x)
        return out


class Decoder(nn.Module):  # type: ignore[misc]
    """A decoder with the names and shapes of Qwen2, so that it has a Hugging Face base."""

    def __init__(
        self,
        vocab: int = VOCAB,
        hidden: int = HIDDEN,
        ffn: int = FFN,
        layers: int = LAYERS,
        tied: bool = False,
    ) -> None:
        super().__init__()
        self.model = Backbone(vocab, hidden, ffn, layers)
        self.lm_head = nn.Linear(hidden, vocab, bias=False)
        if tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.lm_head(self.model(ids))
        return out

    def blocks(self) -> Iterator[nn.Module]:
        """The modules that FSDP wraps one by one, before the root."""
        yield from self.model.layers


class Odd(nn.Module):  # type: ignore[misc]
    """Parameters that some ranks hold nothing of, 0-d and empty buffers, integers and flags."""

    def __init__(self) -> None:
        super().__init__()
        self.one_row = nn.Parameter(torch.randn(1, 32))
        self.two_rows = nn.Parameter(torch.randn(2, 3, 5))
        self.seven = nn.Parameter(torch.randn(7))
        self.long = nn.Parameter(torch.randn(263, 3))
        self.register_buffer("step", torch.tensor(17))
        self.register_buffer("scale", torch.tensor(0.3, dtype=torch.bfloat16))
        self.register_buffer("empty", torch.empty(0, 4))
        self.register_buffer("positions", torch.arange(11))
        self.register_buffer("mask", torch.tensor([[True, False, True]]))

    def blocks(self) -> Iterator[nn.Module]:
        yield from ()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    """One real step, on the data that `seed` stands for."""
    generator = torch.Generator().manual_seed(100 + seed)
    ids = torch.randint(VOCAB, (2, 6), generator=generator)
    model(ids.to(ranks.DEVICE)).float().square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


_DTYPES = (
    "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2",
    "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2", "complex64",
    "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8",
)  # fmt: skip


def every_dtype() -> dict[str, torch.Tensor]:
    """A tensor of random bytes for each dtype that torch and safetensors share, by dtype name."""
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for name in _DTYPES:
        dtype = getattr(torch, name)
        data = torch.randint(256, (7, 3 * dtype.itemsize), dtype=torch.uint8, generator=generator)
        tensors[name] = data.view(dtype)
    tensors["bool"] = torch.randint(2, (7, 3), generator=generator).bool()
    return tensors
