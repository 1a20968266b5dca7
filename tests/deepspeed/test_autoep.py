"""Experts that AutoEP split: universal checkpoints of real runs, against the live engine."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import reshard
from tests import child
from tests.deepspeed.autoep_runs import STAGES
from tests.folders import edit_saved

EXPERTS = "model.layers.1.mlp.experts.w2"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("autoep")
    child.run("tests.deepspeed.autoep_runs", str(folder))
    return folder


def copied(runs: Path, stage: int, folder: Path) -> Path:
    return Path(shutil.copytree(runs / f"zero{stage}" / "universal", folder / "universal"))


@pytest.mark.parametrize("stage", STAGES)
def test_every_tensor_is_the_live_engines(runs: Path, stage: int, tmp_path: Path) -> None:
    run = runs / f"zero{stage}"
    truth = load_file(run / "truth.safetensors")
    checkpoint = reshard.open(run / "universal")
    assert checkpoint.catalog.entries.keys() == truth.keys()
    for name, value in truth.items():
        found = checkpoint.tensors[name].numpy()
        assert found.dtype == np.float32
        assert np.array_equal(found.view(np.uint32), value.view(np.uint32)), name
    assert checkpoint.tensors[EXPERTS].shape == (4, 8, 6)
    # The router is known by two names and is one tensor.
    router = checkpoint.catalog.entries["model.layers.0.mlp.router.gate.weight"]
    assert router.aliases == ("model.layers.0.mlp.gate.gate.weight",)
    assert not checkpoint.catalog.findings
    reshard.convert(run / "universal", tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == truth.keys()
    assert all(np.array_equal(written[name], truth[name]) for name in truth)
    reshard.verify(tmp_path / "out", run / "universal")


@pytest.mark.parametrize("stage", STAGES)
def test_the_checkpoint_itself_leads_to_the_universal_one(runs: Path, stage: int) -> None:
    with pytest.raises(reshard.UnsupportedError, match=r"AutoEP.*ds_to_universal"):
        reshard.open(runs / f"zero{stage}" / "checkpoint")


@pytest.mark.parametrize("stated", [{"ep_num_experts": 3}, {"is_expert_param": False}])
def test_another_number_of_experts(runs: Path, stated: dict[str, Any], tmp_path: Path) -> None:
    folder = copied(runs, 2, tmp_path)

    def change(content: Any) -> None:
        content.update(stated)

    edit_saved(folder / "zero" / EXPERTS / "fp32.pt", change)
    with pytest.raises(reshard.FormatError, match="experts, and the model file 4") as caught:
        reshard.open(folder)
    assert caught.value.tensor == EXPERTS


def test_fewer_experts_than_are_stated(runs: Path, tmp_path: Path) -> None:
    folder = copied(runs, 2, tmp_path)
    path = folder / "zero" / EXPERTS / "fp32.pt"
    content = torch.load(path, weights_only=False)
    torch.save({**content, "param": content["param"][:2].clone()}, path)
    with pytest.raises(reshard.FormatError, match="different saves"):
        reshard.open(folder)


@pytest.mark.parametrize(
    "change", [{"num_experts": 0}, {"module_path": 5}, {"expert_key_prefix": "other"}]
)
def test_layers_that_are_not_sound(runs: Path, change: dict[str, Any], tmp_path: Path) -> None:
    folder = copied(runs, 2, tmp_path)

    def damage(content: Any) -> None:
        content["ds_autoep_layers"][0].update(change)

    edit_saved(folder / "mp_rank_00_model_states.pt", damage)
    with pytest.raises(reshard.FormatError, match="ds_autoep_layers"):
        reshard.open(folder)


def test_experts_that_were_frozen(runs: Path, tmp_path: Path) -> None:
    folder = copied(runs, 2, tmp_path)

    def freeze(content: Any) -> None:
        for group in content["param_shapes"]:
            group.pop(EXPERTS, None)

    edit_saved(folder / "mp_rank_00_model_states.pt", freeze)
    with pytest.raises(reshard.UnsupportedError, match="frozen") as caught:
        reshard.open(folder)
    assert caught.value.tensor == EXPERTS
