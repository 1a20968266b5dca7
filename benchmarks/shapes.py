"""The benchmark's models: Qwen2's tensors, as many as give a model of a wanted size. No torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

GB = 1_000_000_000
_VOCABULARY = 32_768
_HEAD = 64
_KEY_HEADS = 2
# Elements of random values; a longer tensor repeats them, which is quicker.
_BLOCK = 1 << 22


@dataclass(frozen=True, slots=True)
class Model:
    """Qwen2's dimensions, but for the head: untied, because DeepSpeed's zero_to_fp32 cannot write
    tied tensors to safetensors ("Some tensors share memory")."""

    hidden: int
    layers: int
    vocabulary: int = _VOCABULARY

    @property
    def intermediate(self) -> int:
        return 4 * self.hidden

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every parameter's name and shape, in the model's order."""
        hidden, inner, key = self.hidden, self.intermediate, _KEY_HEADS * _HEAD
        yield "model.embed_tokens.weight", (self.vocabulary, hidden)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            for name, rows in (("q", hidden), ("k", key), ("v", key)):
                yield f"{prefix}.self_attn.{name}_proj.weight", (rows, hidden)
                yield f"{prefix}.self_attn.{name}_proj.bias", (rows,)
            yield f"{prefix}.self_attn.o_proj.weight", (hidden, hidden)
            yield f"{prefix}.mlp.gate_proj.weight", (inner, hidden)
            yield f"{prefix}.mlp.up_proj.weight", (inner, hidden)
            yield f"{prefix}.mlp.down_proj.weight", (hidden, inner)
            yield f"{prefix}.input_layernorm.weight", (hidden,)
            yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
        yield "model.norm.weight", (hidden,)
        yield "lm_head.weight", (self.vocabulary, hidden)

    @property
    def numel(self) -> int:
        return sum(math.prod(shape) for _, shape in self.shapes())

    def config(self) -> dict[str, Any]:
        """The model's config.json."""
        return {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "dtype": "bfloat16",
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.hidden // _HEAD,
            "num_key_value_heads": _KEY_HEADS,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
        }


def model(gb: float) -> Model:
    """The model whose 16-bit weights take `gb` times 10^9 bytes, within a few per cent."""
    wanted = gb * GB / 2
    choices = [
        Model(hidden, layers)
        for hidden in range(128, 8193, 128)
        for layers in range(max(2, hidden // 80), max(4, hidden // 30))
    ]
    return min(choices, key=lambda one: abs(one.numel - wanted))


def save_base(folder: Path, made: Model, seed: int = 0) -> None:
    """The model in bfloat16 as a Hugging Face folder, of random values."""
    import ml_dtypes

    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(made.config(), indent=1) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in made.shapes():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    _write(folder / "model.safetensors", header, end, _values(seed).astype(ml_dtypes.bfloat16))


def _write(path: Path, header: Mapping[str, Any], nbytes: int, block: Any) -> None:
    raw = memoryview(block.view("u1"))
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        while nbytes:
            nbytes -= file.write(raw[: min(nbytes, len(raw))])


def _values(seed: int = 0) -> np.ndarray[Any, np.dtype[Any]]:
    import numpy as np

    drawn = np.random.default_rng(seed).standard_normal(_BLOCK, np.float32)
    drawn *= np.float32(0.02)
    return drawn


def random_values(numel: int, dtype: Any) -> Any:
    """A torch tensor of `numel` random values."""
    import torch

    block = torch.from_numpy(_values()).to(dtype)
    out = torch.empty(numel, dtype=dtype)  # no view of more: a save would copy it once more
    for start in range(0, numel, _BLOCK):
        part = out[start : start + _BLOCK]
        part.copy_(block[: len(part)])
    return out
