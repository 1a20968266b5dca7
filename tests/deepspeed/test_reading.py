"""Every checkpoint of the real DeepSpeed, read without it, against the truth of the running
engine."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import reshard
from tests.oracle.cache import Oracle, Saved
from tests.oracle.recipes import RECIPES

Array = np.ndarray[Any, Any]

SAVES = [
    pytest.param(recipe.name, number, id=f"{recipe.name}-{save.tag}")
    for recipe in RECIPES
    for number, save in enumerate(recipe.saves)
]


def same_bits(one: Array, other: Array) -> bool:
    """Equal in shape, type and every bit: NaN and -0.0 included."""
    return (one.shape, str(one.dtype)) == (other.shape, str(other.dtype)) and (
        one.tobytes() == other.tobytes()
    )


def check_against_truth(checkpoint: reshard.Checkpoint, saved: Saved) -> None:
    expected = saved.expected()
    if any(found.code == "masters-unnamed" for found in checkpoint.catalog.findings):
        # Without ZeRO masters have no names. Their values tell these, but not always.
        assert checkpoint.catalog.origin.details["zero_stage"] == 0
        module = saved.module()
        expected = {name: module[name] for name in expected}
    stored = {name: t for name, t in checkpoint.tensors.items() if t.kind != "tied"}
    assert stored.keys() == expected.keys()
    for name, tensor in stored.items():
        assert same_bits(tensor.numpy(), expected[name]), name


@pytest.mark.parametrize(("name", "number"), SAVES)
def test_every_tensor_is_the_live_engines(oracle: Oracle, name: str, number: int) -> None:
    saved = oracle[name].saves[number]
    checkpoint = reshard.open(saved.path)
    check_against_truth(checkpoint, saved)
    tied = {t.name: t.entry.spec.name for t in checkpoint.tensors.values() if t.kind == "tied"}
    facts = saved.facts
    there = {alias: name for alias, name in facts["tied"].items() if name in saved.expected()}
    assert tied == {alias: name for alias, name in there.items() if name not in tied}
    kinds = {kind: {t.name for t in checkpoint.tensors.values() if t.kind == kind}
             for kind in ("buffer", "frozen")}  # fmt: skip
    assert kinds["buffer"] == set(facts["buffers"])
    if oracle[name].recipe.stage and not saved.save.exclude_frozen:
        assert kinds["frozen"] == set(facts["frozen"]) - set(facts["tied"])
    assert checkpoint.format == "deepspeed"
    assert checkpoint.tag == saved.save.tag
    assert checkpoint.world_size == oracle[name].recipe.world


@pytest.mark.parametrize("name", [r.name for r in RECIPES if r.saves[-1].latest])
def test_the_folder_above_leads_to_the_latest(oracle: Oracle, name: str) -> None:
    case = oracle[name]
    checkpoint = reshard.open(case.root)
    assert checkpoint.catalog.origin.root == case.last.path
    assert checkpoint.tag == case.last.save.tag


def test_a_tag_names_an_older_save(oracle: Oracle) -> None:
    case = oracle["two-tags"]
    check_against_truth(reshard.open(case.root, tag="global_step1"), case.saves[0])
    check_against_truth(reshard.open(case.root, tag="global_step2"), case.saves[1])


def test_without_latest_the_only_tag_is_taken(oracle: Oracle) -> None:
    case = oracle["no-latest"]
    check_against_truth(reshard.open(case.root), case.last)


def test_without_latest_several_tags_are_listed(oracle: Oracle) -> None:
    with pytest.raises(reshard.NotFoundError, match="a, b") as caught:
        reshard.open(oracle["no-latest-two-tags"].root)
    assert "--tag" in str(caught.value)


@pytest.mark.parametrize("tag", ["../x", "/etc", "a//b", "."])
def test_a_tag_that_leads_elsewhere(oracle: Oracle, tag: str) -> None:
    with pytest.raises(reshard.NotFoundError, match="is not a tag, which is the name of a folder"):
        reshard.open(oracle["no-latest-two-tags"].root, tag=tag)


@pytest.mark.parametrize("name", ["export-16bit-zero2", "export-16bit-zero3"])
def test_save_16bit_model(oracle: Oracle, name: str) -> None:
    case = oracle[name]
    checkpoint = reshard.open(case.export)
    module = case.last.module()
    assert set(checkpoint.tensors) == set(module)
    for tensor in checkpoint.tensors.values():
        assert same_bits(tensor.numpy(), module[tensor.name]), tensor.name


def test_objects_of_the_user_do_not_stand_in_the_way(oracle: Oracle) -> None:
    checkpoint = reshard.open(oracle["client-state-zero2"].root)
    assert checkpoint.catalog.origin.details["unread_objects"]
    assert any("skipped" in found.message for found in checkpoint.catalog.findings)
