"""Adapters, with PEFT as the oracle: what it wraps, merges and loads we find, merge and write."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import save_file

from reshard.core.arithmetic import LowRank
from reshard.core.tensors import Entry, Portion
from reshard.errors import (
    FormatError,
    IncompleteError,
    NamesError,
    PlanError,
    ReshardError,
    UnsupportedError,
)
from reshard.naming import FitOptions, Schema, apply, fit
from reshard.naming.lora.config import AdapterConfig, parse_adapter_config
from reshard.naming.lora.find import separate
from reshard.naming.lora.folder import Named, adapter_folder
from reshard.naming.lora.output import updates
from tests.naming import tables
from tests.naming.make_layouts import FAMILIES, build

peft = pytest.importorskip("peft")

ALPHA = 8
LINEAR = ["q_proj", "v_proj", "down_proj"]


class Run:
    """A tiny model with adapters, its state dict as entries, and the base it started from."""

    def __init__(self, family: str = "llama", prefix: str = "", **settings: Any) -> None:
        self.base_model = build(*FAMILIES[family])
        self.base = {k: v.numpy().copy() for k, v in self.base_model.state_dict().items()}
        settings.setdefault("target_modules", LINEAR)
        config = peft.LoraConfig(r=4, lora_alpha=ALPHA, **settings)
        self.model = peft.get_peft_model(self.base_model, config)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if "lora_" in name or "modules_to_save" in name:
                    parameter.copy_(torch.rand_like(parameter) + 0.1)
        state = {prefix + k: v.numpy().copy() for k, v in self.model.state_dict().items()}
        self.content = tables.files(state)
        self.entries = {name: tables.entry(name, array.shape) for name, array in state.items()}
        self.schema = Schema(
            tables.schema({k: v.shape for k, v in self.base.items()}).specs,
            json.loads(self.base_model.config.to_json_string()),
        )
        self.settings = self.model.peft_config["default"].to_dict()

    def base_entries(self) -> dict[str, Entry]:
        self.content.update(tables.files(self.base, "base/"))
        return {
            name: tables.entry(f"base/{name}", array.shape) for name, array in self.base.items()
        }

    def equal(self, one: Entry, other: Entry) -> bool:
        return np.array_equal(tables.values(one, self.content), tables.values(other, self.content))

    def merged_by_peft(self) -> dict[str, tables.Array]:
        return {k: v.numpy() for k, v in self.model.merge_and_unload().state_dict().items()}

    def merged_by_us(self, **options: Any) -> dict[str, tables.Array]:
        separated = separate(self.entries)
        found = fit(separated.entries, self.schema, equal=self.equal, options=FitOptions(**options))
        config = parse_adapter_config(self.settings)
        changed = updates(separated, found, config, self.base_entries()).by_output
        assert changed
        merged = {name: merge(update, self.content) for name, update in changed.items()}
        for name, entry in apply(found.outputs, separated.entries).items():
            if name not in merged:
                merged[name] = tables.values(entry, self.content)
        return {**{name: self.base[name] for name in found.matching.filled}, **merged}


def merge(merged_entry: Entry, content: Mapping[str, bytes]) -> tables.Array:
    """What the engine does in a stream, here with whole arrays."""
    (fragment,) = merged_entry.fragments
    assert isinstance(fragment.extent, Portion)
    update = fragment.extent.source
    assert isinstance(update, LowRank)
    left, right = tables.values(update.left, content), tables.values(update.right, content)
    merged: tables.Array = tables.values(update.base, content) + (left @ right) * np.float32(
        update.scaling
    )
    if update.magnitude is not None:
        norm = np.linalg.norm(merged, axis=1, keepdims=True)
        merged = merged * (tables.values(update.magnitude, content)[:, None] / norm)
    return merged


VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "ranks": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.self_attn.v_proj": 3}},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"target_modules": ["lm_head"]},
    "saved": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "everything": {"target_modules": "all-linear"},
}


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("variant", VARIANTS)
def test_merged_weights_are_those_of_peft(variant: str, prefix: str) -> None:
    run = Run(prefix=prefix, **VARIANTS[variant])
    ours, theirs = run.merged_by_us(), run.merged_by_peft()
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_allclose(ours[name], array, rtol=2e-6, atol=2e-6, err_msg=name)
    assert any(not np.array_equal(ours[name], run.base[name]) for name in ours)


@pytest.mark.parametrize("variant", ["lora", "ranks", "dora"])
def test_adapters_alone_merge_into_the_base(variant: str) -> None:
    run = Run(**VARIANTS[variant])
    theirs = run.merged_by_peft()
    run.entries = {name: entry for name, entry in run.entries.items() if "lora_" in name}
    ours = run.merged_by_us(fill_from_base=True)
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_allclose(ours[name], array, rtol=2e-6, atol=2e-6, err_msg=name)


def test_names_of_a_family_and_adapters_together() -> None:
    run = Run("qwen2_5_vl", target_modules=["q_proj", "v_proj"])
    separated = separate(run.entries)
    found = fit(separated.entries, tables.table("4.57", "qwen2_5_vl").schema())
    changed = updates(separated, found, AdapterConfig(ALPHA), {}).by_output
    assert sorted(changed) == sorted(
        f"model.layers.{layer}.self_attn.{name}.weight"
        for layer in range(2)
        for name in ("q_proj", "v_proj")
    )


def test_layers_injected_in_place() -> None:
    """LightRFT's scalar reward models: PEFT's layers without PEFT's prefix."""
    model = build(*FAMILIES["qwen2_5_vl_backbone"])
    config = peft.LoraConfig(r=4, lora_alpha=ALPHA, target_modules=["q_proj"])
    state = peft.inject_adapter_in_model(config, model).state_dict()
    entries = tables.entries({name: tuple(v.shape) for name, v in state.items()}, "model.")
    separated = separate(entries)
    assert sorted(separated.adapters) == [
        f"model.language_model.layers.{layer}.self_attn.q_proj" for layer in range(2)
    ]
    base = tables.table("4.57", "qwen2_5_vl").schema()
    found = fit(separated.entries, base, options=FitOptions(headless=True))
    assert found.matching.missing == ("lm_head.weight",)
    assert len(updates(separated, found, AdapterConfig(ALPHA), {}).by_output) == 2


def test_modules_that_keep_their_weight_transposed() -> None:
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=8)
    model = transformers.GPT2LMHeadModel(config)
    settings = peft.LoraConfig(r=2, lora_alpha=ALPHA, target_modules=["c_attn", "mlp.c_proj"])
    wrapped = peft.get_peft_model(model, settings)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    state = {name: value.numpy().copy() for name, value in wrapped.state_dict().items()}
    content = tables.files(state)
    separated = separate(tables.entries({name: value.shape for name, value in state.items()}))
    theirs = {k: v.numpy() for k, v in wrapped.merge_and_unload().state_dict().items()}
    shapes = {name: value.shape for name, value in theirs.items() if name != "lm_head.weight"}
    found = fit(separated.entries, tables.schema(shapes))
    changed = updates(separated, found, AdapterConfig(ALPHA), {}).by_output
    assert len(changed) == 2
    for name, update in changed.items():
        np.testing.assert_allclose(merge(update, content), theirs[name], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "everything"])
def test_peft_loads_the_adapter_folder(variant: str, tmp_path: Path) -> None:
    run = Run(**VARIANTS[variant])
    separated = separate(run.entries)
    found = fit(separated.entries, run.schema, equal=run.equal)
    folder = adapter_folder(
        separated, found.prefix, parse_adapter_config(run.settings), Named("base")
    )
    assert folder.config["target_modules"] == sorted(run.settings["target_modules"])
    arrays = {n: tables.values(e, run.content) for n, e in folder.tensors.items()}
    save_file(arrays, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(folder.config))

    fresh = build(*FAMILIES["llama"])
    fresh.load_state_dict({name: torch.from_numpy(array) for name, array in run.base.items()})
    loaded = peft.PeftModel.from_pretrained(fresh, str(tmp_path)).eval()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, run.model.eval()(ids).logits)


def test_full_names_where_short_ones_would_select_too_much() -> None:
    run = Run(target_modules=["layers.0.self_attn.q_proj"])
    separated = separate(run.entries)
    config = adapter_folder(separated, "base_model.model.", AdapterConfig(ALPHA)).config
    assert config["target_modules"] == ["model.layers.0.self_attn.q_proj"]


def test_without_adapters_nothing_changes() -> None:
    entries = tables.entries(tables.table("5.23", "llama").memory)
    separated = separate(entries)
    assert separated.entries == entries
    found = fit(entries, tables.table("5.23", "llama").schema())
    assert updates(separated, found, AdapterConfig(ALPHA), {}).by_output == {}


def test_one_of_several_adapters_must_be_named() -> None:
    run = Run()
    run.model.add_adapter("reference", peft.LoraConfig(r=2, target_modules=["k_proj"]))
    entries = tables.entries({k: tuple(v.shape) for k, v in run.model.state_dict().items()})
    with pytest.raises(PlanError, match="2 adapters: default, reference"):
        separate(entries)
    assert len(separate(entries, "default").adapters) == 6
    assert len(separate(entries, "reference").adapters) == 2
    with pytest.raises(PlanError, match="no adapter 'other'; there are default, reference"):
        separate(entries, "other")


def shapes(*names: str) -> dict[str, Entry]:
    return tables.entries(dict.fromkeys(names, (4, 4)))


@pytest.mark.parametrize(
    ("names", "error", "words"),
    [
        (["m.ia3_l.default", "m.base_layer.weight"], UnsupportedError, "IA3"),
        (["m.lora_E.default", "m.lora_A.default"], UnsupportedError, "AdaLoRA"),
        (["m.lora_diag.default"], UnsupportedError, "KaSA"),
        (["m.lora_new.default"], UnsupportedError, r"unknown parts \('lora_new'\)"),
        (["m.token_adapter.trainable_tokens_delta.default", "m.original_module.weight"],
         UnsupportedError, "trainable tokens"),
        (["prompt_embeddings"], UnsupportedError, "prompt tuning"),
        (["m.base_layer.in_proj_weight"], UnsupportedError, "MultiheadAttention"),
        (["m.base_layer.out_proj.lora_A.default.weight"], UnsupportedError, "MultiheadAttention"),
        (["m.experts.base_layer.gate_up_proj"], UnsupportedError, "target_parameters"),
        (["m.base_layer.base_layer.weight"], UnsupportedError, "target_parameters"),
        (["m.lora_B.default.bias"], UnsupportedError, "bias of their own"),
        (["m.lora_A.default.weight"], IncompleteError, "lora_B"),
        (["m.lora_B.bias"], UnsupportedError, "bias of their own"),
    ],
)  # fmt: skip
def test_what_is_refused_by_name(names: list[str], error: type[ReshardError], words: str) -> None:
    with pytest.raises(error, match=words):
        separate(shapes(*names))


def test_convolutions_and_ranks_that_differ() -> None:
    a, b = "m.lora_A.default.weight", "m.lora_B.default.weight"
    with pytest.raises(UnsupportedError, match="convolutions"):
        separate(tables.entries({a: (4, 3, 2, 2), b: (8, 4, 1, 1)}))
    with pytest.raises(NamesError, match="their ranks differ"):
        separate(tables.entries({a: (4, 8), b: (8, 2)}))


def test_an_adapter_of_another_size() -> None:
    run = Run()
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    run.entries[name] = tables.entry(name, (4, 31))
    separated = separate(run.entries)
    with pytest.raises(NamesError, match=r"\(32, 32\), but its adapter makes \(32, 31\)"):
        updates(separated, fit(separated.entries, run.schema), AdapterConfig(ALPHA), {})


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"peft_type": "IA3"}, UnsupportedError, "IA3"),
        ({"lora_alpha": 8, "layer_replication": [[0, 2]]}, UnsupportedError, "layer_replication"),
        ({}, FormatError, "lora_alpha None"),
        ({"lora_alpha": "8"}, FormatError, "not numbers"),
        ({"lora_alpha": float("nan")}, FormatError, "not numbers"),
        ({"lora_alpha": float("inf")}, FormatError, "not numbers"),
        ({"lora_alpha": 1 << 2000}, FormatError, "not numbers"),
        ({"lora_alpha": 8, "alpha_pattern": {"(a+)+": 2}}, UnsupportedError, "is too complex"),
    ],
)
def test_configs_that_are_refused(
    settings: dict[str, Any], error: type[ReshardError], words: str
) -> None:
    with pytest.raises(error, match=words):
        parse_adapter_config(settings)
