"""Random models of every family: by Megatron-Core's names and back, each byte where it was.

No file is written: a tensor is an entry of a file of its own name, and after both ways each of its
parts must lie at the offset that its box says.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reshard.core.dtypes import BFLOAT16
from reshard.core.tensors import Entry, Extent, FileRef, Fragment, Shape, TensorSpec, whole
from reshard.naming import apply
from reshard.naming.megatron import arrangements
from reshard.naming.megatron_families import FAMILIES
from reshard.naming.megatron_into import into
from reshard.naming.schema import Schema

_SIZES = st.integers(1, 5)
_GEMMAS = ("gemma", "gemma2", "gemma3_text")
_QK_NORMS = ("qwen3", "qwen3_moe", "glm4_moe", "gemma3_text")
_MIXTURES = ("qwen2_moe", "qwen3_moe", "mixtral")
#: Families whose first layers are dense, and whose others have experts.
_DENSE_FIRST = ("glm4_moe", "deepseek_v2", "deepseek_v3")
_SCORED = ("glm4_moe", "deepseek_v3")


@st.composite
def configs(draw: st.DrawFn, kind: str) -> dict[str, Any]:
    """A config of a family: sizes, heads, layers, experts, ties and biases of every kind."""
    groups, queries = draw(_SIZES), draw(st.integers(1, 3))
    config: dict[str, Any] = {
        "model_type": kind,
        "hidden_size": draw(_SIZES),
        "intermediate_size": draw(_SIZES),
        "num_hidden_layers": draw(_SIZES),
        "num_attention_heads": groups * queries,
        "num_key_value_heads": groups,
        "head_dim": draw(_SIZES),
        "vocab_size": draw(st.integers(2, 9)),
        "tie_word_embeddings": draw(st.booleans()),
        "biases": draw(st.booleans()),
        "out_bias": draw(st.booleans()),
    }
    if kind in (*_MIXTURES, *_DENSE_FIRST):
        key = {"mixtral": "num_local_experts"}.get(
            kind, "n_routed_experts" if kind in _DENSE_FIRST else "num_experts"
        )
        config |= {key: draw(_SIZES), "moe_intermediate_size": draw(_SIZES)}
    if kind in _DENSE_FIRST:
        config["first_k_dense_replace"] = draw(st.integers(0, config["num_hidden_layers"]))
        config["num_nextn_predict_layers"] = draw(st.integers(0, 2)) if kind in _SCORED else 0
    if FAMILIES[kind].latent:
        config |= {"q_lora_rank": draw(st.none() | _SIZES), "kv_lora_rank": draw(_SIZES)}
    return config


def tensors(config: dict[str, Any]) -> Iterator[tuple[str, Shape]]:
    """The model's tensors by the hub's names, as its class in transformers has them."""
    width, rows = config["hidden_size"], config["vocab_size"]
    layers, more = config["num_hidden_layers"], config.get("num_nextn_predict_layers", 0)
    yield "model.embed_tokens.weight", (rows, width)
    yield "model.norm.weight", (width,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (rows, width)
    for index in range(layers + more):
        layer = f"model.layers.{index}."
        if index >= layers:
            for name in ("enorm", "hnorm", "shared_head.norm"):
                yield f"{layer}{name}.weight", (width,)
            yield f"{layer}eh_proj.weight", (width, 2 * width)
        for name, shape in (*_attention(config), *_feed_forward(config, index)):
            yield layer + name, shape
        yield f"{layer}input_layernorm.weight", (width,)
        yield f"{layer}post_attention_layernorm.weight", (width,)
        if config["model_type"] in _GEMMAS[1:]:
            yield f"{layer}pre_feedforward_layernorm.weight", (width,)
            yield f"{layer}post_feedforward_layernorm.weight", (width,)


def _attention(config: dict[str, Any]) -> Iterator[tuple[str, Shape]]:
    width, size = config["hidden_size"], config["head_dim"]
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    yield "self_attn.o_proj.weight", (width, heads * size)
    if config["out_bias"]:
        yield "self_attn.o_proj.bias", (width,)
    if "kv_lora_rank" in config:
        rank, turned = config["kv_lora_rank"], 2
        if config["q_lora_rank"] is None:
            yield "self_attn.q_proj.weight", (heads * size, width)
        else:
            yield "self_attn.q_a_proj.weight", (config["q_lora_rank"], width)
            yield "self_attn.q_a_layernorm.weight", (config["q_lora_rank"],)
            yield "self_attn.q_b_proj.weight", (heads * size, config["q_lora_rank"])
        yield "self_attn.kv_a_proj_with_mqa.weight", (rank + turned, width)
        yield "self_attn.kv_a_layernorm.weight", (rank,)
        yield "self_attn.kv_b_proj.weight", (heads * 2 * size, rank)
        return
    for name, count in (("q_proj", heads), ("k_proj", groups), ("v_proj", groups)):
        yield f"self_attn.{name}.weight", (count * size, width)
        if config["biases"]:
            yield f"self_attn.{name}.bias", (count * size,)
    if config["model_type"] in _QK_NORMS:
        yield "self_attn.q_norm.weight", (size,)
        yield "self_attn.k_norm.weight", (size,)


def _feed_forward(config: dict[str, Any], index: int) -> Iterator[tuple[str, Shape]]:
    kind, width = config["model_type"], config["hidden_size"]
    mixed = kind in _MIXTURES or (kind in _DENSE_FIRST and index >= config["first_k_dense_replace"])
    if not mixed:
        yield from _mlp("mlp", width, config["intermediate_size"])
        return
    part = FAMILIES[kind].moe
    inner = config["moe_intermediate_size"]
    keys = ("num_local_experts", "num_experts", "n_routed_experts")
    count = next(config[key] for key in keys if key in config)
    yield f"{part}.gate.weight", (count, width)
    if kind in _SCORED:
        yield f"{part}.gate.e_score_correction_bias", (count,)
    for expert in range(count):
        yield from _mlp(f"{part}.experts.{expert}", width, inner, FAMILIES[kind].expert)
    if FAMILIES[kind].shared:
        yield from _mlp(FAMILIES[kind].shared, width, inner)
    if kind == "qwen2_moe":
        yield "mlp.shared_expert_gate.weight", (1, width)


def _mlp(
    part: str,
    width: int,
    inner: int,
    names: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj"),
) -> Iterator[tuple[str, Shape]]:
    gate, up, down = names
    yield f"{part}.{gate}.weight", (inner, width)
    yield f"{part}.{up}.weight", (inner, width)
    yield f"{part}.{down}.weight", (width, inner)


def _entry(spec: TensorSpec) -> Entry:
    extent = Extent(FileRef(spec.name), 0, spec.nbytes)
    return Entry(spec, (Fragment(whole(spec.shape), extent, spec.dtype),))


@pytest.mark.heavy
@pytest.mark.parametrize("kind", FAMILIES)
def test_there_and_back_is_the_identity(kind: str) -> None:
    @settings(max_examples=40, deadline=None)
    @given(configs(kind))
    def check(config: dict[str, Any]) -> None:
        specs = {name: TensorSpec(name, BFLOAT16, shape) for name, shape in tensors(config)}
        table = {name: _entry(spec) for name, spec in specs.items()}
        there = apply(into(specs, config).outputs, table)
        assert sum(entry.spec.numel for entry in there.values()) == sum(
            spec.numel for spec in specs.values()
        )
        assert all(name.split(".")[0] in ("embedding", "decoder", "output_layer", "mtp")
                   for name in there)  # fmt: skip
        shapes = {name: entry.spec.shape for name, entry in there.items()}
        named = arrangements(shapes, Schema(specs, config))
        assert not named.padding
        assert not named.left_out
        back = apply(named.outputs, there)
        assert back.keys() == specs.keys()
        for name, spec in specs.items():
            assert back[name].spec == spec
            assert sum(fragment.box.numel for fragment in back[name].fragments) == spec.numel
            for fragment in back[name].fragments:
                assert fragment.in_file.file.path == name
                place = 0
                for index, size in zip(fragment.box.offsets, spec.shape, strict=True):
                    place = place * size + index
                assert fragment.in_file.offset == place * BFLOAT16.itemsize

    check()
