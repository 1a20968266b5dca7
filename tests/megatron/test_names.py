"""The table of names: each family there and back, and what does not fit."""

from __future__ import annotations

import json
from typing import Any

import pytest

from reshard.core.arrangement import inverse
from reshard.core.dtypes import FLOAT32
from reshard.core.tensors import Entry, Extent, FileRef, Fragment, TensorSpec, whole
from reshard.errors import NamesError, UnsupportedError
from reshard.naming import Schema, families, megatron_args
from reshard.naming.megatron import arrangements, is_megatron
from reshard.naming.megatron_families import FAMILIES, family_of
from reshard.naming.name_map import apply
from tests.megatron.golden import GOLDEN, HERE, checkpoint, truth

_L, _H, _G, _D, _W, _I, _V, _E = 3, 4, 2, 8, 24, 10, 32, 4
_CONFIG = {
    "num_hidden_layers": _L,
    "num_attention_heads": _H,
    "num_key_value_heads": _G,
    "head_dim": _D,
    "hidden_size": _W,
    "vocab_size": _V,
}


def _shapes(*, stacked: bool, single: bool, gated: bool, experts: bool) -> dict[str, Any]:
    """Shapes of a model by Megatron's names; `gated`: gate and up are two tensors."""
    layer: dict[str, tuple[int, ...]] = {
        "self_attention.linear_qkv.weight": ((_H + 2 * _G) * _D, _W),
        "self_attention.linear_qkv.bias": ((_H + 2 * _G) * _D,),
        "self_attention.linear_qkv.layer_norm_weight": (_W,),
        "self_attention.linear_proj.weight": (_W, _H * _D),
        "pre_mlp_layernorm.weight": (_W,),
    }
    if experts:
        layer["mlp.router.weight"] = (_E, _W)
        for e in range(_E) if single else ():
            inner = f"mlp.experts.experts.{e}"
            for side in ("_w", "_v") if gated else ("",):
                layer[f"{inner}.linear_fc1.weight{side}"] = (_I if gated else 2 * _I, _W)
            layer[f"{inner}.linear_fc2.weight"] = (_W, _I)
        if not single:
            layer["mlp.experts.experts.linear_fc1.weight"] = (_E, 2 * _I, _W)
            layer["mlp.experts.experts.linear_fc2.weight"] = (_E, _W, _I)
    else:
        for side in ("_w", "_v") if gated else ("",):
            layer[f"mlp.linear_fc1.weight{side}"] = (_I if gated else 2 * _I, _W)
        layer["mlp.linear_fc2.weight"] = (_W, _I)
    shapes: dict[str, tuple[int, ...]] = {"embedding.word_embeddings.weight": (_V, _W)}
    for name, shape in layer.items():
        if stacked:
            shapes[f"decoder.layers.{name}"] = (_L, *shape)
        else:
            shapes |= {f"decoder.layers.{i}.{name}": shape for i in range(_L)}
    return {**shapes, "decoder.final_layernorm.weight": (_W,), "output_layer.weight": (_V, _W)}


def _schema(kind: str, **more: object) -> Schema:
    return Schema({}, {"model_type": kind, **_CONFIG, **more})


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_there_and_back(kind: str, stacked: bool, gated: bool, single: bool) -> None:
    experts = kind not in ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")
    shapes = _shapes(stacked=stacked, single=single, gated=gated, experts=experts)
    if FAMILIES[kind].latent:
        shapes = {n: s for n, s in shapes.items() if ".linear_qkv." not in n}
    named = arrangements(shapes, _schema(kind))
    specs = {name: TensorSpec(name, FLOAT32, shape) for name, shape in shapes.items()}
    table = {
        name: Entry(spec, (Fragment(whole(s), Extent(FileRef(name), 0, spec.nbytes), FLOAT32),))
        for (name, s), spec in zip(shapes.items(), specs.values(), strict=True)
    }
    made = apply(named.outputs, table)
    again = apply(inverse(named.outputs, specs), made)
    for name, entry in table.items():
        found = again[name]
        assert found.spec == entry.spec
        held = {f.in_file.offset: f.in_file for f in found.fragments}
        assert {extent.file.path for extent in held.values()} == {name}
        # Each fragment lies where its box says: the whole is what it was, in parts.
        assert sum(f.box.numel for f in found.fragments) == entry.spec.numel
        for fragment in found.fragments:
            assert fragment.in_file.offset == _offset(fragment.box.offsets, entry.spec.shape)


def _offset(at: tuple[int, ...], shape: tuple[int, ...]) -> int:
    place = 0
    for index, size in zip(at, shape, strict=True):
        place = place * size + index
    return place * FLOAT32.itemsize


def test_rows_of_a_group_are_its_queries_its_key_its_value() -> None:
    shapes = _shapes(stacked=False, single=False, gated=False, experts=False)
    named = arrangements(shapes, _schema("llama"))
    name = "decoder.layers.0.self_attention.linear_qkv.weight"
    spec = TensorSpec(name, FLOAT32, shapes[name])
    entry = Entry(spec, (Fragment(whole(spec.shape), Extent(FileRef(name), 0, spec.nbytes),
                                  FLOAT32),))  # fmt: skip
    starts = {}
    for part in ("q_proj", "k_proj", "v_proj"):
        key = f"model.layers.0.self_attn.{part}.weight"
        made = apply({key: named.outputs[key]}, {name: entry})[key]
        starts[part] = [f.in_file.offset // (_W * 4) for f in made.fragments]
    assert starts == {"q_proj": [0, 4 * _D], "k_proj": [2 * _D, 6 * _D], "v_proj": [3 * _D, 7 * _D]}


def test_both_names_of_a_norm_at_once_are_refused() -> None:
    shapes = _shapes(stacked=False, single=False, gated=False, experts=False)
    shapes["decoder.layers.1.input_layernorm.weight"] = (_W,)
    with pytest.raises(NamesError, match="both"):
        arrangements(shapes, _schema("llama"))


def test_another_number_of_layers_is_refused() -> None:
    for stacked, words in ((True, "holds 3 layers"), (False, "layer 2")):
        shapes = _shapes(stacked=stacked, single=False, gated=False, experts=False)
        with pytest.raises(NamesError, match=words):
            arrangements(shapes, _schema("llama", num_hidden_layers=2))


def test_other_heads_and_a_smaller_vocabulary_are_refused() -> None:
    shapes = _shapes(stacked=True, single=False, gated=False, experts=False)
    with pytest.raises(NamesError, match="key heads"):
        arrangements(shapes, _schema("llama", head_dim=16))
    with pytest.raises(NamesError, match="vocabulary has 33"):
        arrangements(shapes, _schema("llama", vocab_size=33))


def test_a_critics_head_is_no_vocabulary() -> None:
    shapes = _shapes(stacked=True, single=False, gated=False, experts=False)
    shapes["output_layer.weight"] = (1, _W)
    named = arrangements(shapes, _schema("llama"))
    assert "score.weight" in named.outputs
    assert "lm_head.weight" not in named.outputs


@pytest.mark.parametrize(
    "kind", ["gpt_oss", "qwen3_next", "qwen2_vl", "qwen2_5_vl", "gemma3", None]
)
def test_other_families_are_refused_by_name(kind: str | None) -> None:
    shapes = _shapes(stacked=True, single=False, gated=False, experts=False)
    with pytest.raises(UnsupportedError, match=repr(kind)):
        arrangements(shapes, Schema({}, {"model_type": kind, **_CONFIG}))


def test_unpaired_rotary_rows_are_refused() -> None:
    shapes = {"embedding.word_embeddings.weight": (_V, _W)}
    with pytest.raises(UnsupportedError, match="rope_interleave"):
        arrangements(shapes, _schema("deepseek_v3", rope_interleave=False))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_layers": 4}, "num_layers 4"),
        ({"num_query_groups": 4}, "num_query_groups 4"),
        ({"kv_channels": 16}, "kv_channels 16"),
        ({"vocab_size": 40}, "vocabulary of 40"),
    ],
)
def test_settings_of_another_model_are_refused(settings: dict[str, int], words: str) -> None:
    with pytest.raises(NamesError, match=words):
        megatron_args.check(settings, _schema("llama").config, rows=_V)


@pytest.mark.parametrize("name", sorted(megatron_args.REFUSED))
def test_layouts_that_are_not_read_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedError, match=name):
        megatron_args.check({name: True}, _schema("llama").config, rows=_V)


@pytest.mark.parametrize("name", megatron_args.LESS_ONE)
@pytest.mark.parametrize("less_one", [False, True])
def test_norms_are_stored_as_the_hubs(name: str, less_one: bool) -> None:
    config = _schema("gemma" if less_one else "llama").config
    megatron_args.check({name: less_one}, config, rows=_V, less_one=less_one)
    with pytest.raises(UnsupportedError, match=f"{name} {not less_one}"):
        megatron_args.check({name: not less_one}, config, rows=_V, less_one=less_one)


def test_settings_that_agree_or_are_silent_pass() -> None:
    config = _schema("llama").config
    same = {"num_layers": _L, "num_query_groups": _G, "hidden_size": _W, "vocab_size": _V}
    for settings in ({}, same, {"num_query_groups": 1}, {"kv_channels": None}):
        megatron_args.check(settings, config, rows=_V)


def test_the_hubs_own_models_are_left_alone() -> None:
    for name in GOLDEN:
        assert not is_megatron(truth(name), Schema({}, {}))
        assert checkpoint(name).is_dir()
        json.loads((HERE / name / "config.json").read_text(encoding="utf-8"))


def test_every_family_that_is_not_in_the_table_is_refused_by_name() -> None:
    """Each of `naming/families.py`: its names there are not proven by a run."""
    known = [kind for family in families.FAMILIES for kind in family.model_types]
    known += [kind for _, kinds in families.BACKBONES for kind in kinds]
    others = {*known, *families.UNSUPPORTED} - FAMILIES.keys()
    assert len(others) > 150
    for kind in others:
        config = {**_CONFIG, "model_type": kind}
        shapes = _shapes(stacked=True, single=False, gated=False, experts=False)
        with pytest.raises(UnsupportedError, match="names of Megatron-Core") as caught:
            arrangements(shapes, Schema({}, config))
        assert repr(kind) in caught.value.message
        with pytest.raises(UnsupportedError, match="Megatron-Core's names are known of"):
            family_of(config, writing=True)
