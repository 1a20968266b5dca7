"""The rows of architectures are what transformers' classes save, and every loss is seen."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from reshard.core.tensors import Shape
from reshard.naming import fields, sisters, structure
from reshard.naming.architectures import DECODERS
from tests.naming import tables

TABLES = [(version, name) for version in tables.VERSIONS for name in tables.names(version)]
# `norm_type` says which norm it is, and one of them has no bias; and heads are doctor's own matter.
UNSEEN = ("lm_head.weight", "layernorm_before.bias", "layernorm_after.bias")


def config_of(version: str, name: str) -> dict[str, Any]:
    raw = json.loads((tables.LAYOUTS / version / f"{name}.json").read_text("utf-8"))
    return {**tables.table(version, name).config, "architectures": [raw["class"]]}


def examined(shapes: Mapping[str, Shape], config: Mapping[str, Any]) -> structure.Structure:
    assert structure.regions_of(config) is not None
    return structure.examine(shapes, config)


@pytest.mark.parametrize(("version", "name"), TABLES)
def test_files_and_loaded_models_are_sound(version: str, name: str) -> None:
    table, config = tables.table(version, name), config_of(version, name)
    for shapes in (table.disk_shapes(), table.memory):
        found = examined(shapes, config)
        assert found.sound, found


@pytest.mark.heavy
@pytest.mark.parametrize("name", tables.names("4.57"))
def test_each_tensor_is_missed_and_each_stranger_seen(name: str) -> None:
    shapes, config = tables.table("4.57", name).disk_shapes(), config_of("4.57", name)
    for lost in shapes:
        rest = {key: shape for key, shape in shapes.items() if key != lost}
        assert examined(rest, config).sound == lost.endswith(UNSEEN), lost
        stranger = f"{lost.rpartition('.')[0]}.own.weight".removeprefix(".")
        found = examined({**shapes, stranger: (3,)}, config)
        assert found.strange or found.heads, lost


@pytest.mark.parametrize("name", ["llama", "qwen2", "mixtral", "qwen3_moe", "deepseek_v3", "llava"])
def test_other_sizes_are_seen(name: str) -> None:
    shapes, config = tables.table("4.57", name).disk_shapes(), config_of("4.57", name)
    level = config.get("text_config", config)
    found = examined(shapes, {**config, "text_config": {**level, "hidden_size": 48}}
                     if level is not config else {**config, "hidden_size": 48})  # fmt: skip
    assert any(key.endswith("norm.weight") for key in found.other)
    assert not found.absent


@pytest.mark.parametrize(
    ("name", "key"), [("qwen2_moe", "qkv_bias"), ("gpt_oss", "attention_bias")]
)
def test_biases_that_the_config_rules_out_are_not_missed(name: str, key: str) -> None:
    shapes, config = tables.table("4.57", name).disk_shapes(), config_of("4.57", name)
    plain = {
        tensor: shape
        for tensor, shape in shapes.items()
        if not tensor.endswith("_proj.bias") or "self_attn" not in tensor
    }
    assert len(plain) < len(shapes)
    assert examined(plain, {**config, key: False}).sound
    assert examined(plain, config).absent
    assert examined(shapes, {**config, key: False}).strange


SMALL = {
    "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64, "moe_intermediate_size": 16,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4, "v_head_dim": 8, "shared_expert_intermediate_size": 16, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "pad_token_id": 0,
}  # fmt: skip
DECODER_TYPES = [
    decoder.model_types[0] for decoder in DECODERS if decoder.stem != "Qwen3VLMoe"
]  # whose text model is no class of its own


@pytest.mark.parametrize("kind", DECODER_TYPES)
def test_loaded_models_are_sound_with_every_switch_either_way(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    stated = transformers.AutoConfig.for_model(kind)
    known = {*stated.to_dict(), *type(stated).attribute_map}
    small = {key: value for key, value in SMALL.items() if key in known}
    switches = [
        key
        for key, value in stated.to_dict().items()
        if isinstance(value, bool) and not key.startswith(("output_", "return_", "is_"))
    ]
    assert switches
    for switch in switches:
        for value in (True, False):
            config = transformers.AutoConfig.for_model(kind, **{**small, switch: value})
            with torch.device("meta"):
                model = transformers.AutoModelForCausalLM.from_config(config)
            shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
            found = examined(shapes, {**config.to_dict(), "architectures": [type(model).__name__]})
            assert found.sound, (switch, value, found)


def test_fields_of_a_class_of_its_own_code_are_not_guessed() -> None:
    config = {
        "model_type": "deepseek_v3",
        "architectures": ["DeepseekV3ForCausalLM"],
        "rope_parameters": {"rope_theta": 5e5},
        "auto_map": {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"},
    }
    found = {field.name for field in fields.missing(config)}
    assert found == {"topk_method", "scoring_func", "rope_theta"}
    assert fields.missing({**config, "architectures": ["OwnForCausalLM"]}) == ()
    assert fields.missing({**config, "model_type": "own"}) == ()


def test_layers_that_the_config_does_not_count() -> None:
    shapes, config = tables.table("4.57", "llama").disk_shapes(), config_of("4.57", "llama")
    (found,) = examined(shapes, {**config, "num_hidden_layers": 5}).layers
    assert (found.prefix, found.have, found.stated) == ("model.layers.", 2, 5)


# Layers of models that no table knows, of several kinds each.
HYBRID = {
    f"model.layers.{i}.{name}": (2, 2)
    for i in range(6)
    for name in (
        ("norm.weight", "attn.q.weight", "attn.k.weight")
        if i % 2
        else ("norm.weight", "mixer.a.weight", "mixer.b.weight")
    )
}


def test_layers_of_several_kinds_are_sound() -> None:
    assert sisters.absent(HYBRID, {}) == ()
    t5 = {f"encoder.block.{i}.layer.0.SelfAttention.q.weight": (2, 2) for i in range(6)}
    t5["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (2, 2)
    assert sisters.absent(t5, {}) == ()


def test_what_one_layer_lacks_and_its_sisters_have() -> None:
    names = {f"h.{i}.attn.{part}.weight" for i in range(4) for part in "qkvo"}
    assert sisters.absent(names - {"h.2.attn.q.weight"}, {}) == ("h.2.attn.q.weight",)
    assert sisters.uncounted(names, {"n_layer": 4}) is None
    assert sisters.uncounted(names, {"n_layer": 5}) == ("h.", 4, 5, "n_layer")


def test_keys_and_values_that_layers_share_are_not_missed() -> None:
    names = {f"h.{i}.attn.{part}.weight" for i in range(4) for part in "qkvo"} - {
        "h.3.attn.k.weight"
    }
    assert sisters.absent(names, {"num_kv_shared_layers": 1}) == ()
