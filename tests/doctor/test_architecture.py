"""Faults that names and shapes tell by themselves, without a base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import reshard
from tests.doctor import models
from tests.doctor.conftest import Pairs, evidence, names, refused, repaired
from tests.folders import edit_config

Change = Callable[[models.Tensors], object]


def damaged(pair: models.Pair, folder: Path, change: Change) -> Path:
    ill = pair.copy(folder)
    tensors = models.load(ill)
    change(tensors)
    models.save(ill, tensors)
    return ill


def without(part: str) -> Change:
    def change(tensors: models.Tensors) -> None:
        for name in [name for name in tensors if part in name]:
            del tensors[name]

    return change


@pytest.mark.parametrize(
    "part",
    ["layers.1.self_attn.q_proj.weight", "layers.0.mlp.down_proj", "_proj.bias", "model.norm"],
)
def test_tensors_that_the_architecture_has(pairs: Pairs, part: str, tmp_path: Path) -> None:
    ill = damaged(pairs("qwen2"), tmp_path / "ill", without(part))
    diagnosis = refused(ill, None, tmp_path / "out", "tensors-missing")
    assert part.strip("_") in evidence(diagnosis, "tensors-missing")
    assert names(reshard.doctor(ill, base=pairs("qwen2").base)) == ["names-do-not-fit"]


@pytest.mark.parametrize(("name", "part"), [("qwen2_5_vl", "visual."), ("llava", "vision_tower.")])
def test_a_whole_tower(pairs: Pairs, name: str, part: str, tmp_path: Path) -> None:
    ill = damaged(pairs(name), tmp_path / "ill", without(part))
    refused(ill, None, tmp_path / "out", "part-missing")


def test_layers_unlike_the_configs_number(pairs: Pairs, tmp_path: Path) -> None:
    ill = damaged(pairs("llama"), tmp_path / "ill", without("layers.1."))
    assert names(reshard.doctor(ill)) == ["layer-count"]
    whole = pairs("llama").copy(tmp_path / "whole")
    edit_config(whole, num_hidden_layers=1)
    refused(whole, None, tmp_path / "out", "layer-count")


@pytest.mark.parametrize(
    "name", ["model.layers.0.extra.weight", "model.layers.0.self_attn.o_proj.bias"]
)
def test_names_that_no_class_has(pairs: Pairs, name: str, tmp_path: Path) -> None:
    ill = damaged(pairs("qwen2"), tmp_path / "ill", lambda t: t.update({name: torch.ones(3)}))
    assert names(reshard.doctor(ill)) == ["names-unknown"]
    assert name in evidence(reshard.doctor(ill), "names-unknown")


def test_a_head_that_the_class_does_not_have(pairs: Pairs, tmp_path: Path) -> None:
    head = {"value_head.weight": torch.ones(1, 32)}
    ill = damaged(pairs("llama"), tmp_path / "ill", lambda t: t.update(head))
    assert names(reshard.doctor(ill)) == ["stray-head"]


def test_shapes_of_another_config(pairs: Pairs, tmp_path: Path) -> None:
    ill = pairs("llama").copy(tmp_path / "ill")
    edit_config(ill, intermediate_size=44)
    refused(ill, None, tmp_path / "out", "shapes-differ")


def test_names_of_the_backbone(pairs: Pairs, tmp_path: Path) -> None:
    def change(tensors: models.Tensors) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    pair = pairs("llama")
    ill = damaged(pair, tmp_path / "ill", change)
    repaired(ill, None, tmp_path / "out", "backbone-names")
    models.assert_same_weights(tmp_path / "out", pair.healthy)


def test_a_class_that_no_table_knows(pairs: Pairs, tmp_path: Path) -> None:
    """Its layers are held against each other alone."""
    ill = damaged(pairs("llama"), tmp_path / "ill", without("layers.1.self_attn.q_proj"))
    edit_config(ill, model_type="own", architectures=["OwnForCausalLM"])
    assert names(reshard.doctor(ill)) == []  # of two layers, either may be right
    three = models.load(pairs("llama").healthy)
    for name in [name for name in three if ".layers.1." in name]:
        for number in (2, 3):
            three[name.replace(".1.", f".{number}.")] = three[name]
    del three["model.layers.2.self_attn.q_proj.weight"]
    models.save(ill, three)
    edit_config(ill, num_hidden_layers=4)
    assert names(reshard.doctor(ill)) == ["tensors-missing"]
