"""The order in which flat parameters hold their tensors: that of the loaded classes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from reshard.core.dtypes import FLOAT32
from reshard.core.tensors import TensorSpec
from reshard.naming.flat import ORDERED, _ordered
from reshard.naming.schema import Schema

_SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 12,  # layer 10 comes after layer 9
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
_HEADS = {"ForCausalLM": {}, "ForTokenClassification": {"num_labels": 1}}


@pytest.mark.parametrize("head", _HEADS)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("model_type", "config", "more"),
    [
        ("llama", "LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
        ("llama", "LlamaConfig", {}),
        ("mistral", "MistralConfig", {}),
        ("qwen2", "Qwen2Config", {}),
        ("qwen3", "Qwen3Config", {"attention_bias": True, "head_dim": 4}),
    ],
)
def test_it_is_that_of_the_live_classes(
    model_type: str, config: str, more: dict[str, Any], tied: bool, head: str
) -> None:
    assert model_type in ORDERED
    settings = getattr(transformers, config)(
        **_SIZES, **more, **_HEADS[head], tie_word_embeddings=tied
    )
    name = config.removesuffix("Config") + head
    with torch.device("meta"):
        model = getattr(transformers, name)(settings)
    loaded = {n: tuple(p.shape) for n, p in model.named_parameters()}
    # As a base's files list them: by name.
    specs = {n: TensorSpec(n, FLOAT32, shape) for n, shape in sorted(loaded.items())}
    tying = tied and head == "ForCausalLM"
    found = _ordered(Schema(specs, {"model_type": model_type, "tie_word_embeddings": tying}))
    assert [spec.name for spec in found] == list(loaded)


def test_every_family_is_compared() -> None:
    assert set(ORDERED) == {"llama", "mistral", "qwen2", "qwen3"}
