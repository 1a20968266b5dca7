"""The tables of what PEFT can train, held against the installed PEFT: what is new fails here."""

from __future__ import annotations

import pytest

pytest.importorskip("peft")

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora.layer import LoraLayer
from peft.utils.peft_types import PeftType
from transformers.pytorch_utils import Conv1D

from reshard.errors import FormatError, UnsupportedError
from reshard.naming.lora import methods
from reshard.naming.lora.config import AdapterConfig, parse_adapter_config, read_near
from reshard.naming.lora.patterns import check, key_of


def test_every_method_of_peft_is_known() -> None:
    assert methods.METHODS.keys() == {kind.value for kind in PeftType} - {"LORA"}
    for kind, prefix in PEFT_TYPE_TO_PREFIX_MAPPING.items():
        if kind.value not in ("LORA", "ADALORA"):
            assert prefix.startswith(methods.METHODS[kind.value].prefix), kind
    assert methods.refused_part("lora_E") == ("AdaLoRA", True)


def test_what_peft_cannot_merge_is_not_offered_to_it() -> None:
    """Prompt learning has no weights to merge; other tuners say so in their merge."""
    for kind, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items():
        if kind.value == "LORA":
            continue
        merges = hasattr(
            tuner, "merge_and_unload"
        ) and "NotImplementedError" not in inspect.getsource(tuner.merge_and_unload)
        if not merges:
            assert not methods.METHODS[kind.value].merges, kind
    assert not any(
        methods.METHODS[name].merges for name in ("PROMPT_TUNING", "PREFIX_TUNING", "CPT", "XLORA")
    )


@pytest.mark.parametrize("name", sorted(methods.METHODS))
def test_every_method_is_refused_by_its_name(name: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": name}))
    title = methods.METHODS[name].title
    with pytest.raises(UnsupportedError, match=f"method {title} .*peft_type {name}") as caught:
        read_near(tmp_path, None, None)
    assert str(tmp_path) in str(caught.value)


def test_a_method_of_tomorrow_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="type 'NEWLORA' are not supported"):
        parse_adapter_config({"peft_type": "NEWLORA"})


def test_every_setting_of_lora_is_judged() -> None:
    """A setting is used, does nothing once training is over, or is refused: one of the three."""
    tables = (methods.USED_SETTINGS, methods.IDLE_SETTINGS, {*methods.REFUSED_SETTINGS})
    settings = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert settings == frozenset().union(*tables)
    assert sum(map(len, tables)) == len(settings)


def test_every_variant_of_lora_is_judged() -> None:
    """PEFT marks the settings that make a variant of LoRA: three of them merge as it does."""
    variants = {
        field.name
        for field in dataclasses.fields(peft.LoraConfig)
        if field.metadata.get("is_lora_variant")
    }
    assert variants - {*methods.REFUSED_SETTINGS} == {
        "use_dora", "velora_config", "monteclora_config",
    }  # fmt: skip
    assert {*LoraLayer.adapter_layer_names} == {*methods.TENSORS}


@pytest.mark.parametrize("name", sorted(methods.REFUSED_SETTINGS))
def test_every_refused_setting_is_refused_by_its_name(name: str) -> None:
    raw: dict[str, Any] = {"peft_type": "LORA", "r": 8, "lora_alpha": 8}
    value: object
    for value in (True, [0], {"a": 1}):
        with pytest.raises(UnsupportedError, match=name):
            parse_adapter_config({**raw, name: value})
    for value in (None, False, [], {}):
        assert parse_adapter_config({**raw, name: value}) == AdapterConfig(8.0, rank=8)


def test_the_config_that_peft_saves_by_default_has_nothing_unknown(tmp_path: Path) -> None:
    peft.LoraConfig(r=4, lora_alpha=6, target_modules=["a"]).save_pretrained(tmp_path)
    found = read_near(tmp_path / "model.pt", None, None)
    assert found is not None
    assert found.config == AdapterConfig(6.0, rank=4)
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    assert parse_adapter_config({**raw, "new": 1, "old": None}).unknown == ("new",)


@pytest.mark.parametrize(
    ("init", "changes"),
    [
        ("pissa", True),
        ("pissa_niter_4", True),
        ("olora", True),
        ("gaussian", False),
        ("orthogonal", False),
        ("mica", False),
        ("eva", False),
        (True, False),
        (False, False),
    ],
)
def test_initialisations_that_change_the_base(init: bool | str, changes: bool) -> None:
    """As PEFT does it, on one linear layer; CorDA, LoftQ and LoRA-GA need data or more packages."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    before = model[0].weight.clone()
    config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=init)
    wrapped = peft.inject_adapter_in_model(config, model)
    changed = not torch.equal(wrapped[0].base_layer.weight, before)
    assert changed == changes == methods.base_changing(init)


def test_initialisations_that_need_data_change_the_base_in_their_source() -> None:
    for name in ("corda", "loftq", "lora_ga"):
        source = inspect.getsource(getattr(LoraLayer, f"{name}_init"))
        assert "get_base_layer().weight.data =" in source
        assert methods.base_changing(name)
    inits = {n for n, _ in inspect.getmembers(LoraLayer) if n.endswith("_init")}
    assert inits == {f"{name}_init" for name in (
        "pissa", "olora", "corda", "loftq", "lora_ga", "mica", "orthogonal")}  # fmt: skip


MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 16, "n_positions": 8,
             "add_cross_attention": True},
    "openai-gpt": {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 16, "n_positions": 8},
    "imagegpt": {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 16, "n_positions": 8,
                 "add_cross_attention": True},
    "decision_transformer": {"hidden_size": 8, "n_layer": 1, "n_head": 2, "n_positions": 8,
                             "add_cross_attention": True},
    "llama": {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
              "num_key_value_heads": 2, "intermediate_size": 8, "vocab_size": 16},
}  # fmt: skip


@pytest.mark.parametrize("kind", MODELS)
def test_modules_that_keep_their_weight_turned(kind: str) -> None:
    config = transformers.AutoConfig.for_model(kind, **MODELS[kind])
    model = transformers.AutoModel.from_config(config)
    turned = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, Conv1D)}
    plain = {n.rpartition(".")[2] for n, m in model.named_modules()
             if isinstance(m, torch.nn.Linear)}  # fmt: skip
    known = {*methods.turned_modules(kind)}
    assert known - turned <= {"q_attn"}
    assert turned <= known
    assert turned.isdisjoint(plain)


@pytest.mark.parametrize(
    "pattern",
    [
        "q_proj", "layers.1.self_attn.v_proj", r"^model\.layers\.[01]\..*_proj$",
        "q_proj|v_proj", "(q|v)_proj", r"layers\.\d+\.mlp", "(?:a|b)?q_proj", ".*?down_proj",
        r"model\.decoder\.layers\.0\..*",
    ],
)  # fmt: skip
def test_plain_patterns_match_as_in_peft(pattern: str) -> None:
    from peft.utils.other import get_pattern_key

    check([pattern], "alpha_pattern")
    for name in (
        "q_proj", "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj",
        "model.layers.11.self_attn.v_proj", "aq_proj", "model.layers.3.mlp", "x.mlp.down_proj",
        "model.decoder.layers.0.fc1",
    ):  # fmt: skip
        theirs = get_pattern_key([pattern], name)
        assert key_of([pattern], name) == (pattern if theirs == pattern else None)


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+", "(a|b)*", "a**", ".*.*.*", "(", "a{3}", r"(?P<x>a)", "(?=a)", r"\1", "a" * 501, "*a"],
)
def test_patterns_that_might_run_for_years_are_refused(pattern: str) -> None:
    with pytest.raises(UnsupportedError, match=r"rank_pattern .*is too complex.*one entry each"):
        check(["q_proj", pattern], "rank_pattern")
    raw = {"lora_alpha": 8, "rank_pattern": {pattern: 2}}
    with pytest.raises(UnsupportedError, match="is too complex"):
        parse_adapter_config(raw)


def test_names_in_place_of_a_pattern_scale_as_it_did() -> None:
    """The hint of a refused pattern: the modules' names, one entry each."""
    names = ["model.layers.0.q_proj", "model.layers.1.q_proj"]
    config = parse_adapter_config({"lora_alpha": 8, "alpha_pattern": dict.fromkeys(names, 2)})
    assert [config.scaling(name, 4) for name in names] == [0.5, 0.5]
    assert config.scaling("model.layers.2.q_proj", 4) == 2


def test_patterns_of_wrong_values_are_refused() -> None:
    with pytest.raises(FormatError, match="not of ranks"):
        parse_adapter_config({"lora_alpha": 8, "rank_pattern": {"a": "b"}})
    with pytest.raises(UnsupportedError, match="too long"):
        key_of(["a"], "a" * 301)
