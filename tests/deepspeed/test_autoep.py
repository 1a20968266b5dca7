"""Experts that AutoEP split: universal checkpoints of real runs, against the running engine."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch

import reshard
from tests import child
from tests.deepspeed import autoep_runs
from tests.deepspeed.autoep_runs import RUNS, STAGES
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
def test_every_moment_is_the_live_optimizers(runs: Path, stage: int, tmp_path: Path) -> None:
    run = runs / f"zero{stage}"
    truth = load_file(run / "moments.safetensors")
    assert len(truth) > 30
    reshard.convert(run / "universal", tmp_path / "out", to="dcp", optimizer=True)
    for folder in (run / "universal", tmp_path / "out"):
        state = reshard.open(folder).optimizer
        assert state is not None
        held = {f"{kind}.{n}": t for kind, table in state.moments.items() for n, t in table.items()}
        assert held.keys() == truth.keys()
        assert [name for name in truth if not np.array_equal(held[name].numpy(), truth[name])] == []


def _by_hub_names(run: str, truth: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The masters by the names in released files, as DeepSpeed's presets say what they were."""
    gate, up, down = ("w1", "w3", "w2") if "zero" in run else ("gate_proj", "up_proj", "down_proj")
    block = "block_sparse_moe" if "zero" in run else "mlp"
    names = {"w1": gate, "w3": up, "w2": down}
    shared = "shared_expert" if run == "qwen2_moe" else "shared_experts"
    found = {}
    for name, value in truth.items():
        name = name.replace(".shared_experts_gate.", ".shared_expert_gate.")
        name = name.replace(".shared_experts.", f".{shared}.").replace(".router.gate.", ".gate.")
        before, experts, which = name.replace(".mlp.gate.", f".{block}.gate.").partition(
            ".experts."
        )
        if not experts:
            found[before] = value
            continue
        layer = before.removesuffix(".mlp")
        for number, expert in enumerate(value):
            found[f"{layer}.{block}.experts.{number}.{names[which]}.weight"] = expert
    return found


@pytest.mark.parametrize("run", RUNS)
def test_onto_a_base_it_is_the_model_that_the_engine_runs(
    runs: Path, run: str, tmp_path: Path
) -> None:
    folder, out = runs / run, tmp_path / "out"
    report = reshard.convert(folder / "universal", out, base=folder / "base", dtype="float32")
    assert report.verified
    assert not report.missing
    assert not report.unexpected
    truth = _by_hub_names(run, load_file(folder / "truth.safetensors"))
    written = load_file(out / "model.safetensors")
    # DeepSeek-V3's correction is a buffer, no parameter.
    buffers = {name for name in written if name.endswith("e_score_correction_bias")}
    assert written.keys() - buffers == truth.keys()
    assert bool(buffers) == (run == "deepseek_v3")
    assert all(np.array_equal(written[name], truth[name]) for name in truth)
    assert not reshard.doctor(out, base=folder / "base").errors
    reshard.verify(out, against=folder / "universal", base=folder / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.bfloat16, experts_implementation="eager"
    )
    logits = model(input_ids=autoep_runs.IDS).logits
    loaded = load_torch(folder / "logits.safetensors")["logits"]
    assert torch.allclose(logits, loaded, atol=2e-2)
    assert (loaded.abs() > 0.1).any()


def test_a_matrix_of_the_experts_is_missing(runs: Path, tmp_path: Path) -> None:
    lacking = {
        name: value
        for name, value in load_torch(runs / "zero2" / "truth.safetensors").items()
        if name != EXPERTS
    }
    torch.save(lacking, tmp_path / "x.pt")
    with pytest.raises(reshard.IncompleteError) as caught:
        reshard.convert(tmp_path / "x.pt", tmp_path / "out", base=runs / "zero2" / "base")
    assert caught.value.tensor == EXPERTS


@pytest.mark.parametrize("stage", STAGES)
def test_the_checkpoint_itself_leads_to_the_universal_one(
    runs: Path, stage: int, tmp_path: Path
) -> None:
    with pytest.raises(reshard.UnsupportedError, match=r"AutoEP.*ds_to_universal"):
        reshard.open(runs / f"zero{stage}" / "checkpoint")
    shutil.copytree(runs / f"zero{stage}" / "universal", tmp_path / "made")
    assert reshard.convert(tmp_path / "made", tmp_path / "out").verified


@pytest.mark.parametrize("stated", [{"ep_num_experts": 3}, {"is_expert_param": False}])
def test_another_number_of_experts(runs: Path, stated: dict[str, Any], tmp_path: Path) -> None:
    folder = copied(runs, 2, tmp_path)

    def change(content: Any) -> None:
        content.update(stated)

    edit_saved(folder / "zero" / EXPERTS / "fp32.pt", change)
    with pytest.raises(reshard.FormatError, match="experts, but the model file states 4") as caught:
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
