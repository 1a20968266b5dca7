"""Universal checkpoints that the real ds_to_universal made, against the running engine's truth."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import reshard
from tests.deepspeed.conftest import ParallelRuns
from tests.deepspeed.test_reading import check_against_truth, same_bits
from tests.folders import edit_saved
from tests.oracle.cache import Case, Oracle


@pytest.fixture(params=[2, 3])
def case(oracle: Oracle, request: pytest.FixtureRequest) -> Case:
    return oracle[f"universal-zero{request.param}"]


def copied(case: Case, folder: Path) -> Path:
    target = folder / "universal"
    shutil.copytree(case.universal, target)
    return target


def test_every_tensor_is_the_live_engines(case: Case) -> None:
    checkpoint = reshard.open(case.universal)
    check_against_truth(checkpoint, case.last)
    assert set(checkpoint.tensors) == set(case.last.module())
    assert checkpoint.catalog.origin.details["universal"]
    assert checkpoint.catalog.origin.details["zero_stage"] == case.recipe.stage


def test_an_integer_that_a_float_cannot_hold(case: Case) -> None:
    """DeepSpeed writes it a second time, as float32; the model file has it exactly."""
    count = reshard.open(case.universal).tensors["count"]
    assert str(count.dtype) == "int64"
    assert int(count.numpy()) == 2**53 + 1


def test_the_folder_above_leads_to_it(case: Case, tmp_path: Path) -> None:
    copied(case, tmp_path)
    shutil.copy(case.folder / "latest_universal", tmp_path)
    checkpoint = reshard.open(tmp_path)
    assert checkpoint.tag == "universal"
    check_against_truth(checkpoint, case.last)


def test_latest_goes_before_latest_universal(case: Case, tmp_path: Path) -> None:
    shutil.copytree(case.root, tmp_path, dirs_exist_ok=True)
    copied(case, tmp_path)
    shutil.copy(case.folder / "latest_universal", tmp_path)
    assert "universal" not in reshard.open(tmp_path).catalog.origin.details


def test_it_converts_to_what_its_source_converts_to(case: Case, tmp_path: Path) -> None:
    reshard.convert(case.root, tmp_path / "one")
    reshard.convert(case.universal, tmp_path / "other")
    one, other = (tmp_path / name / "model.safetensors" for name in ("one", "other"))
    assert one.read_bytes() == other.read_bytes()


def test_a_missing_master_is_named(case: Case, tmp_path: Path) -> None:
    folder = copied(case, tmp_path)
    shutil.rmtree(folder / "zero" / "up.bias")
    with pytest.raises(reshard.IncompleteError, match=r"up\.bias") as caught:
        reshard.open(folder)
    assert caught.value.tensor == "up.bias"
    assert reshard.open(copied(case, tmp_path / "again")).tensors


def test_a_master_of_another_shape(case: Case, tmp_path: Path) -> None:
    folder = copied(case, tmp_path)
    shutil.copy(folder / "zero/down.weight/fp32.pt", folder / "zero/up.bias/fp32.pt")
    with pytest.raises(reshard.FormatError, match="different saves"):
        reshard.open(folder)


def test_masters_of_another_save(oracle: Oracle, tmp_path: Path) -> None:
    """Round-robin gradients, too: ds_to_universal puts their masters under each other's names."""
    folder = copied(oracle["universal-zero2"], tmp_path)
    path = folder / "zero" / "up.weight" / "fp32.pt"
    edit_saved(path, lambda content: content.update(param=content["param"].detach() + 1))
    with pytest.raises(reshard.FormatError, match="different saves") as caught:
        reshard.open(folder)
    assert caught.value.tensor == "up.weight"
    assert reshard.open(copied(oracle["universal-zero2"], tmp_path / "again")).tensors


def test_a_file_that_holds_no_master(case: Case, tmp_path: Path) -> None:
    folder = copied(case, tmp_path)
    torch.save({"other": torch.zeros(3)}, folder / "zero" / "up.bias" / "fp32.pt")
    with pytest.raises(reshard.FormatError, match="no master"):
        reshard.open(folder)


def test_a_missing_rank_is_named(oracle: Oracle, tmp_path: Path) -> None:
    folder = copied(oracle["universal-zero3"], tmp_path)
    (folder / "zero_pp_rank_1_mp_rank_00_model_states.pt").unlink()
    with pytest.raises(reshard.IncompleteError, match="rank 1 of 2 is missing"):
        reshard.open(folder)


def test_a_name_cannot_lead_out_of_the_folder(oracle: Oracle, tmp_path: Path) -> None:
    folder = copied(oracle["universal-zero2"], tmp_path)

    def mislead(content: dict[str, object]) -> None:
        groups = content["param_shapes"]
        assert isinstance(groups, list)
        groups[0]["../../secret"] = groups[0].pop("up.weight")

    edit_saved(folder / "mp_rank_00_model_states.pt", mislead)
    with pytest.raises(reshard.FormatError, match="not a plain file name"):
        reshard.open(folder)


@pytest.mark.parametrize(
    ("name", "what"), [("tp-zero1", "tensor parallel"), ("experts-zero1", "experts")]
)
def test_made_from_other_parallelism_it_is_refused(
    parallel_runs: ParallelRuns, tmp_path: Path, name: str, what: str
) -> None:
    """As ds_to_universal lays it out: `zero/` beside the model files, no optimizer files."""
    folder = parallel_runs[name].copy(tmp_path)
    (folder / "zero").mkdir()
    for path in [*folder.glob("*_optim_states.pt"), *folder.glob("*_expert_*")]:
        path.unlink()
    with pytest.raises(reshard.UnsupportedError, match="universal checkpoint.*" + what):
        reshard.open(folder)
    assert reshard.open(parallel_runs[name].root).tensors  # what it was made from


def test_its_buffers_are_bit_for_bit_the_modules(case: Case) -> None:
    tensors = reshard.open(case.universal).tensors
    module = case.last.module()
    for name in case.last.facts["buffers"]:
        assert same_bits(tensors[name].numpy(), module[name])
