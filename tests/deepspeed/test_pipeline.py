"""Runs with pipeline parallelism that the real DeepSpeed saved, against the live engine's truth."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import reshard
from tests.deepspeed.pipeline_oracle import RECIPES

_LAYERS = 3


def tag(run: Path) -> Path:
    return run / "checkpoint" / "global_step2"


@pytest.fixture
def copied(pipeline_runs: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a run's tag folder."""

    def copy(name: str) -> Path:
        target = tmp_path / name / "global_step2"
        shutil.copytree(tag(pipeline_runs / name), target)
        return target

    return copy


def same(found: Path, truth: Path) -> None:
    made, wanted = load_file(found), load_file(truth)
    assert made.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(made[name].float(), tensor.float()), name


def same_moments(out: Path, run: Path) -> None:
    """What was converted holds the moments of the live engine."""
    opened = reshard.open(out).optimizer
    assert opened is not None
    for full, tensor in load_file(run / "moments.safetensors").items():
        kind, _, own = full.partition(".")
        assert torch.equal(torch.from_numpy(opened.moments[kind][own].numpy()), tensor), full


@pytest.mark.parametrize("name", RECIPES)
def test_every_tensor_is_the_live_engines_by_the_hubs_name(
    name: str, pipeline_runs: Path, tmp_path: Path
) -> None:
    run = pipeline_runs / name
    report = reshard.convert(run / "checkpoint", tmp_path / "out", base=run / "base", dtype="keep")
    same(tmp_path / "out" / "model.safetensors", run / "truth.safetensors")
    assert any("pipeline's layers" in rule for rule in report.rules)
    assert reshard.verify(tmp_path / "out", run / "checkpoint").num_tensors


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "no-zero"])
def test_the_optimizers_state_goes_along(name: str, pipeline_runs: Path, tmp_path: Path) -> None:
    run = pipeline_runs / name
    out = tmp_path / "out"
    reshard.convert(
        run / "checkpoint", out, base=run / "base", to="dcp", optimizer=True, dtype="keep"
    )
    state = reshard.open(out).catalog.training_state()
    assert state is not None
    found = {f"{kind}.{n}" for kind, table in state.moments.items() for n in table}
    assert found == load_file(run / "moments.safetensors").keys()
    same_moments(out, run)
    assert {step.count for step in state.steps.values()} == {2}
    (group,) = state.groups
    assert group.hyperparameters["lr"] == 0.01
    assert sorted(group.names) == sorted(state.moments["exp_avg"])


def test_what_the_run_keeps_beside_goes_along(copied: Callable[[str], Path]) -> None:
    folder = copied("tied")
    path = folder / "mp_rank_00_model_states.pt"
    held = torch.load(path, weights_only=False)
    torch.save({**held, "lr_scheduler": {"last_epoch": 2}, "seen": 7}, path)
    checkpoint = reshard.open(folder)
    state = checkpoint.catalog.training_state()
    assert state is not None
    assert state.counters["global_steps"] == 2
    assert state.scheduler == {"last_epoch": 2}
    assert state.client_state["seen"] == 7
    assert state.masters.keys() == state.moments["exp_avg"].keys()
    entries = checkpoint.catalog.entries
    for name, master in state.masters.items():
        assert master.fragments == entries[name].fragments, name


@pytest.mark.parametrize(
    ("to", "layout"), [("deepspeed", None), ("dcp", "accelerate"), ("dcp", "nested")]
)
def test_the_state_becomes_what_others_load(
    to: Any, layout: Any, pipeline_runs: Path, tmp_path: Path
) -> None:
    run, out = pipeline_runs / "tied", tmp_path / "out"
    reshard.convert(
        run / "checkpoint", out, base=run / "base", to=to, optimizer=True, layout=layout
    )
    same_moments(out, run)


def test_without_a_base_names_are_the_layers_numbers(pipeline_runs: Path) -> None:
    checkpoint = reshard.open(pipeline_runs / "tied" / "checkpoint")
    assert checkpoint.catalog.origin.details["pipeline_stages"] == 2
    names = list(checkpoint.tensors)
    assert names[0] == "0.weight"
    assert "4.self_attn.q_proj.weight" in names
    assert checkpoint.catalog.entries["0.weight"].aliases == ("tied_modules.embed.weight",)
    frozen = reshard.open(pipeline_runs / "tied-frozen-w4" / "checkpoint").catalog.entries
    assert {n for n, entry in frozen.items() if entry.kind == "frozen"} == {
        f"{number}.self_attn.q_proj.weight" for number in (2, 3, 4)
    }


def test_a_universal_checkpoint_of_it(pipeline_runs: Path, tmp_path: Path) -> None:
    run = pipeline_runs / "tied"
    reshard.convert(run / "universal", tmp_path / "out", base=run / "base", dtype="keep")
    same(tmp_path / "out" / "model.safetensors", run / "truth.safetensors")
    reshard.convert(
        run / "universal", tmp_path / "dcp", base=run / "base", to="dcp", optimizer=True
    )
    same_moments(tmp_path / "dcp", run)


def test_a_layer_whose_file_is_missing(copied: Callable[[str], Path]) -> None:
    folder = copied("plain")
    (folder / "layer_03-model_states.pt").unlink()
    with pytest.raises(reshard.IncompleteError, match="beginning with layer 3") as caught:
        reshard.open(folder)
    assert caught.value.hint == "Copy the files of every rank and layer."
    shutil.rmtree(folder.parent)
    assert reshard.open(copied("plain")).tensors


def test_a_tied_layer_whose_file_is_missing(copied: Callable[[str], Path]) -> None:
    folder = copied("tied")
    (folder / "layer_00-model_states.pt").unlink()
    with pytest.raises(reshard.FormatError, match=r"no layer's file .* 'tied_modules\.embed'"):
        reshard.open(folder)


def test_all_layers_files_are_missing(copied: Callable[[str], Path]) -> None:
    folder = copied("plain")
    for path in folder.glob("layer_*"):
        path.unlink()
    with pytest.raises(reshard.IncompleteError, match=r"all layer_\*-model_states\.pt"):
        reshard.open(folder)


def test_all_files_but_the_layers_are_missing(copied: Callable[[str], Path]) -> None:
    folder = copied("plain")
    for path in folder.glob("*mp_rank_*"):
        path.unlink()
    with pytest.raises(
        reshard.IncompleteError, match="all model_states files are missing"
    ) as caught:
        reshard.open(folder)
    assert caught.value.hint is not None
    assert caught.value.hint.startswith("Copy the files of every rank")


def test_a_layers_file_over_anothers(copied: Callable[[str], Path]) -> None:
    folder = copied("plain")
    shutil.copy(folder / "layer_02-model_states.pt", folder / "layer_03-model_states.pt")
    with pytest.raises(reshard.FormatError, match="written as layer_02-model_states"):
        reshard.open(folder)


def test_a_layer_of_another_save(copied: Callable[[str], Path]) -> None:
    folder = copied("plain")
    path = folder / "layer_03-model_states.pt"
    state = torch.load(path)
    state["mlp.up_proj.weight"] += 1
    torch.save(state, path)
    with pytest.raises(reshard.FormatError, match="different saves or ranks"):
        reshard.open(folder)


def test_a_stage_is_missing(copied: Callable[[str], Path]) -> None:
    folder = copied("plain")
    for path in folder.glob("*mp_rank_01*"):
        path.unlink()
    with pytest.raises(reshard.IncompleteError, match="model parallel rank 1 of 2"):
        reshard.open(folder)


def test_tensor_parallel_layers_are_refused(copied: Callable[[str], Path]) -> None:
    folder = copied("model-axis")
    shutil.copy(
        folder / "layer_03-model_00-model_states.pt", folder / "layer_03-model_01-model_states.pt"
    )
    with pytest.raises(reshard.UnsupportedError, match="tensor parallelism split the layers"):
        reshard.open(folder)


def test_two_topologies_in_one_folder(copied: Callable[[str], Path]) -> None:
    folder = copied("model-axis")
    shutil.copy(folder / "layer_03-model_00-model_states.pt", folder / "layer_03-model_states.pt")
    with pytest.raises(reshard.FormatError, match="two files belong to the same rank"):
        reshard.open(folder)


def test_files_of_layers_beside_a_module(copied: Callable[[str], Path]) -> None:
    """The tag was saved again without a pipeline: its layers' files stay."""
    folder = copied("no-zero")
    for rank in range(2):
        path = folder / f"mp_rank_0{rank}_model_states.pt"
        state = torch.load(path, weights_only=False)
        torch.save({**state, "module": {"a": torch.ones(2)}}, path)
    with pytest.raises(reshard.FormatError, match="different saves are mixed") as caught:
        reshard.open(folder)
    assert caught.value.hint == "Remove the files of the older save."
    for path in (*folder.glob("layer_*"), folder / "mp_rank_01_model_states.pt"):
        path.unlink()
    edited = folder / "mp_rank_00_model_states.pt"
    state = torch.load(edited, weights_only=False)
    torch.save({**state, "mp_world_size": 1, "checkpoint_parallel_dimensions": {}}, edited)
    assert list(reshard.open(folder).tensors) == ["a"]


def test_a_number_without_a_file_is_said(copied: Callable[[str], Path]) -> None:
    folder = copied("plain")
    (folder / "layer_01-model_states.pt").unlink()
    (found,) = reshard.inspect(folder).findings
    assert found.code == "layers-without-files"
    assert "layers 1:" in found.message


def test_without_zero_the_state_has_no_names(pipeline_runs: Path, tmp_path: Path) -> None:
    run = pipeline_runs / "no-zero"
    with pytest.raises(reshard.UnsupportedError, match="pipeline stages") as caught:
        reshard.convert(run / "checkpoint", tmp_path / "out", to="dcp", optimizer=True)
    assert "convert the weights" in str(caught.value.hint)
    reshard.convert(run / "checkpoint", tmp_path / "out", to="dcp")


def _other_base(run: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], object],
                **config: object) -> Path:  # fmt: skip
    shutil.copytree(run / "base", folder)
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    stated = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**stated, **config}), "utf-8")
    return folder


def _drop(start: str) -> Callable[[dict[str, torch.Tensor]], object]:
    def drop(state: dict[str, torch.Tensor]) -> None:
        for name in [name for name in state if name.startswith(start)]:
            del state[name]

    return drop


def test_a_base_of_other_layers(pipeline_runs: Path, tmp_path: Path) -> None:
    run = pipeline_runs / "plain"
    base = _other_base(run, tmp_path / "base", _drop("model.layers.2."), num_hidden_layers=2)
    with pytest.raises(reshard.NamesError, match="the base has 2 blocks") as caught:
        reshard.convert(run / "checkpoint", tmp_path / "out", base=base)
    assert "without --base" in str(caught.value.hint)
    reshard.convert(run / "checkpoint", tmp_path / "out")
    assert "2.mlp.up_proj.weight" in load_file(tmp_path / "out" / "model.safetensors")


def test_tensors_that_fit_several_of_the_bases(pipeline_runs: Path, tmp_path: Path) -> None:
    run = pipeline_runs / "plain"

    def add(state: dict[str, torch.Tensor]) -> None:
        state["model.other_norm.weight"] = state["model.norm.weight"].clone()

    base = _other_base(run, tmp_path / "base", add)
    with pytest.raises(reshard.NamesError, match="fit none or several") as caught:
        reshard.convert(run / "checkpoint", tmp_path / "out", base=base)
    assert "without --base" in str(caught.value.hint)
    reshard.convert(run / "checkpoint", tmp_path / "out")


def test_a_head_of_its_own_of_a_tied_base(pipeline_runs: Path, tmp_path: Path) -> None:
    run = pipeline_runs / "plain"
    base = _other_base(run, tmp_path / "base", _drop("lm_head"), tie_word_embeddings=True)
    reshard.convert(run / "checkpoint", tmp_path / "out", base=base, dtype="keep")
    same(tmp_path / "out" / "model.safetensors", run / "truth.safetensors")
    stated = json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))
    assert stated["tie_word_embeddings"] is False
