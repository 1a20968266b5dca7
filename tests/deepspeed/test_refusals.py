"""Damaged, mixed and incomplete checkpoints: one clear error, and nothing is left behind."""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import reshard
from tests.deepspeed.test_reading import check_against_truth
from tests.folders import edit_saved
from tests.oracle.cache import Oracle


def refused(
    workspace: Path, checkpoint: Path, base: Path | None, error: type[reshard.ReshardError]
) -> str:
    """Convert, expect the error, and check that nothing was left; returns the message."""
    before = sorted(workspace.rglob("*"))
    with pytest.raises(error) as caught:
        reshard.convert(checkpoint, workspace / "deep" / "out", base=base)
    assert sorted(workspace.rglob("*")) == before
    return str(caught.value)


def copied(oracle: Oracle, name: str, workspace: Path) -> Path:
    """A copy of a recipe's folder with `latest`, to be damaged; its tag is global_step2."""
    target = workspace / "run"
    shutil.copytree(oracle[name].root, target)
    return target


def optim(root: Path, rank: int) -> Path:
    return next((root / "global_step2").glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"))


def test_no_checkpoint_there(workspace: Path) -> None:
    message = refused(workspace, workspace / "nothing", None, reshard.NotFoundError)
    assert "no such file or folder" in message
    (workspace / "empty").mkdir()
    assert "it holds nothing" in refused(
        workspace, workspace / "empty", None, reshard.NotFoundError
    )
    (workspace / "empty" / "notes.txt").write_text("x")
    assert "notes.txt" in refused(workspace, workspace / "empty", None, reshard.NotFoundError)


def test_a_tag_that_is_not_there_lists_those_that_are(oracle: Oracle, tmp_path: Path) -> None:
    with pytest.raises(reshard.NotFoundError, match="global_step1, global_step2"):
        reshard.convert(oracle["two-tags"].root, tmp_path / "out", tag="global_step9")


def test_latest_that_names_a_missing_tag(oracle: Oracle, workspace: Path) -> None:
    root = copied(oracle, "two-tags", workspace)
    (root / "latest").write_text("global_step7")
    message = refused(workspace, root, None, reshard.NotFoundError)
    assert "`latest`" in message
    assert "global_step1, global_step2" in message


@pytest.mark.parametrize("tag", ["..", "../run", "a/../../x", "/etc", "x\0y"])
def test_latest_cannot_lead_out_of_the_folder(oracle: Oracle, workspace: Path, tag: str) -> None:
    root = copied(oracle, "two-tags", workspace)
    (root / "latest").write_text(tag)
    refused(workspace, root, None, reshard.FormatError)


@pytest.mark.parametrize("name", ["zero1-bf16-w3", "zero2-bf16-w3", "zero3-bf16-w3"])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_missing_rank_is_named(oracle: Oracle, workspace: Path, name: str, rank: int) -> None:
    root = copied(oracle, name, workspace)
    optim(root, rank).unlink()
    message = refused(workspace, root, None, reshard.IncompleteError)
    assert f"rank {rank} of 3 is missing" in message


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_missing_model_file_of_stage_3_is_named(
    oracle: Oracle, workspace: Path, rank: int
) -> None:
    root = copied(oracle, "zero3-bf16-w3", workspace)
    (root / "global_step2" / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt").unlink()
    message = refused(workspace, root, None, reshard.IncompleteError)
    assert f"rank {rank}" in message


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_all_optimizer_files_missing(oracle: Oracle, workspace: Path, stage: int) -> None:
    root = copied(oracle, f"zero{stage}-bf16-w2", workspace)
    for path in (root / "global_step2").glob("*_optim_states.pt"):
        path.unlink()
    message = refused(workspace, root, None, reshard.IncompleteError)
    assert "optim_states" in message


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_or_empty_file_is_named(
    oracle: Oracle, workspace: Path, stage: int, kept: float
) -> None:
    root = copied(oracle, f"zero{stage}-bf16-w2", workspace)
    path = optim(root, 1)
    os.truncate(path, int(path.stat().st_size * kept))
    message = refused(workspace, root, None, reshard.ReshardError)
    assert path.name in message


def test_a_flipped_bit_in_the_weights_is_found_by_the_files_own_checksum(
    oracle: Oracle, workspace: Path
) -> None:
    root = copied(oracle, "llama-zero3", workspace)
    checkpoint = reshard.open(root)
    extent = checkpoint.tensors["model.embed_tokens.weight"].entry.fragments[1].in_file
    with open(extent.file.path, "r+b") as file:
        file.seek(extent.offset + extent.nbytes // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    message = refused(workspace, root, None, reshard.FormatError)
    assert "CRC-32" in message
    assert Path(extent.file.path).name in message


def test_ranks_of_two_steps(oracle: Oracle, workspace: Path) -> None:
    root = copied(oracle, "two-tags", workspace)
    shutil.copy(optim_of(root, "global_step1", 1), optim(root, 1))
    message = refused(workspace, root, None, reshard.FormatError)
    assert "step 1" in message
    assert "step 2" in message


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_model_and_optimizer_of_two_steps(oracle: Oracle, workspace: Path, stage: int) -> None:
    """The optimizer's step is turned back as well, so only the weights or the count can tell."""
    root = copied(oracle, f"zero{stage}-bf16-w2", workspace)
    for path in (root / "global_step2").glob("*_model_states.pt"):

        def older(content: dict[str, object]) -> None:
            content["global_steps"] = 1
            module = content["module"]
            assert isinstance(module, dict)
            for value in module.values():
                if value.is_floating_point():
                    value.data.mul_(1.5).add_(0.25)

        edit_saved(path, older)
    message = refused(workspace, root, None, reshard.FormatError)
    assert "different saves" in message


def test_a_restarted_optimizer_can_be_accepted(oracle: Oracle, workspace: Path) -> None:
    root = copied(oracle, "zero3-bf16-w2", workspace)
    for path in (root / "global_step2").glob("*_model_states.pt"):
        edit_saved(path, lambda content: content.update(global_steps=7))
    message = refused(workspace, root, None, reshard.FormatError)
    assert "--allow-step-mismatch" in message
    reshard.convert(root, workspace / "out", allow_step_mismatch=True)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_one_rank_is_a_copy_of_another(oracle: Oracle, workspace: Path, stage: int) -> None:
    root = copied(oracle, f"zero{stage}-bf16-w2", workspace)
    shutil.copy(optim(root, 0), optim(root, 1))
    refused(workspace, root, None, reshard.FormatError if stage == 3 else reshard.ReshardError)


@pytest.mark.parametrize("stage", [1, 2])
def test_two_ranks_are_exchanged(oracle: Oracle, workspace: Path, stage: int) -> None:
    root = copied(oracle, f"zero{stage}-bf16-w2", workspace)
    one, other = optim(root, 0), optim(root, 1)
    one.rename(root / "aside")
    other.rename(one)
    (root / "aside").rename(other)
    refused(workspace, root, None, reshard.ReshardError)
    one.rename(root / "aside")  # each under its own name again
    other.rename(one)
    (root / "aside").rename(other)
    check_against_truth(reshard.open(root), oracle[f"zero{stage}-bf16-w2"].last)


@pytest.mark.parametrize("stage", [1, 3])
def test_files_of_two_world_sizes(oracle: Oracle, workspace: Path, stage: int) -> None:
    root = copied(oracle, f"zero{stage}-bf16-w2", workspace)
    larger = oracle[f"zero{stage}-bf16-w3"].root
    for path in (larger / "global_step2").glob("*zero_pp_rank_2*"):
        shutil.copy(path, root / "global_step2")
    message = refused(workspace, root, None, reshard.FormatError)
    assert "different" in message


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 3, [2, 3], 0, "two"])
def test_a_partition_count_that_does_not_match(
    oracle: Oracle, workspace: Path, stage: int, count: object
) -> None:
    root = copied(oracle, f"zero{stage}-bf16-w2", workspace)
    for rank in (0, 1):

        def change(content: dict[str, object]) -> None:
            state = content["optimizer_state_dict"]
            assert isinstance(state, dict)
            state["partition_count"] = count

        edit_saved(optim(root, rank), change)
    refused(workspace, root, None, reshard.ReshardError)


def test_a_partition_count_wrong_in_one_rank(oracle: Oracle, workspace: Path) -> None:
    root = copied(oracle, "zero2-bf16-w2", workspace)

    def change(content: dict[str, object]) -> None:
        state = content["optimizer_state_dict"]
        assert isinstance(state, dict)
        state["partition_count"] = [5, 5]

    edit_saved(optim(root, 1), change)
    assert "partition count" in refused(workspace, root, None, reshard.FormatError)


@pytest.mark.parametrize("step", [float("nan"), float("inf"), complex("nan")], ids=str)
def test_a_step_count_that_is_no_number(
    oracle: Oracle, workspace: Path, step: float | complex
) -> None:
    root = copied(oracle, "llama-zero2", workspace)

    def change(content: Any) -> None:
        state = content["optimizer_state_dict"]["base_optimizer_state"]["state"]
        for group in state.values():
            group["step"] = torch.tensor(step)

    edit_saved(optim(root, 0), change)
    assert "step count is" in refused(workspace, root, None, reshard.FormatError)


@pytest.mark.parametrize("section", ["param_shapes", "buffer_names"])
@pytest.mark.parametrize("value", [5, "x", torch.ones(2), argparse.Namespace(a=1)], ids=type)
def test_a_section_that_is_no_list(
    oracle: Oracle, workspace: Path, section: str, value: object
) -> None:
    root = copied(oracle, "llama-zero2", workspace)
    model = root / "global_step2" / "mp_rank_00_model_states.pt"
    edit_saved(model, lambda content: content.update({section: value}))
    message = refused(workspace, root, None, reshard.FormatError)
    assert f"its {section} is a" in message


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_a_buffer_of_a_kind_that_is_not_handled_is_not_left_out(
    oracle: Oracle, workspace: Path, stage: str
) -> None:
    root = copied(oracle, f"llama-{stage}", workspace)

    def change(content: Any) -> None:
        content["module"]["mask"] = torch.eye(2).to_sparse()
        content["buffer_names"] = [*(content["buffer_names"] or ()), "mask"]

    for path in (root / "global_step2").glob("*model_states.pt"):
        edit_saved(path, change)
    message = refused(workspace, root, None, reshard.UnsupportedError)
    assert "tensor 'mask': it is a sparse tensor, which is not supported" in message


def test_a_weight_of_a_kind_that_is_not_handled_but_has_a_master(
    oracle: Oracle, workspace: Path
) -> None:
    root = copied(oracle, "llama-zero2", workspace)
    name = "model.norm.weight"

    def change(content: Any) -> None:
        content["module"][name] = content["module"][name].to_sparse()

    edit_saved(root / "global_step2" / "mp_rank_00_model_states.pt", change)
    assert name in reshard.open(root).tensors


def test_a_shape_of_endless_dimensions(oracle: Oracle, workspace: Path) -> None:
    root = copied(oracle, "llama-zero2", workspace)
    model = root / "global_step2" / "mp_rank_00_model_states.pt"
    edit_saved(
        model, lambda content: content.update({"param_shapes": [{"a": [1 << 61] * 100_000}]})
    )
    assert "the shape of 'a' is" in refused(workspace, root, None, reshard.FormatError)


def test_ranks_0_and_9_of_2(oracle: Oracle, workspace: Path) -> None:
    root = copied(oracle, "zero2-bf16-w2", workspace)
    path = optim(root, 1)
    path.rename(path.with_name(path.name.replace("rank_1", "rank_9")))
    message = refused(workspace, root, None, reshard.IncompleteError)
    assert "rank 1 of 2 is missing; a file of rank 9 is there, of another save" in message


def test_two_files_of_one_rank(oracle: Oracle, workspace: Path) -> None:
    root = copied(oracle, "zero2-bf16-w2", workspace)
    path = optim(root, 1)
    shutil.copy(path, path.with_name(path.name.removeprefix("bf16_")))
    assert "same rank" in refused(workspace, root, None, reshard.FormatError)


@pytest.mark.parametrize(("older", "newer"), itertools.permutations(range(4), 2))
@pytest.mark.parametrize("dtypes", [("bf16", "bf16"), ("fp32", "bf16")])
def test_a_tag_that_was_saved_again_in_another_stage(
    oracle: Oracle, workspace: Path, older: int, newer: int, dtypes: tuple[str, str]
) -> None:
    """DeepSpeed writes into the folder as it is: the older save's other files stay."""
    root = copied(oracle, f"zero{older}-{dtypes[0]}-w2", workspace) / "global_step2"
    saved = oracle[f"zero{newer}-{dtypes[1]}-w2"].last
    shutil.copytree(saved.path, root, dirs_exist_ok=True)
    left = {path.name for path in root.iterdir()} - {path.name for path in saved.path.iterdir()}
    if left:
        message = refused(workspace, root, None, reshard.FormatError)
        assert "different saves" in message
    for name in left:
        (root / name).unlink()
    check_against_truth(reshard.open(root), saved)


def test_a_file_that_was_renamed_to_another_ranks(oracle: Oracle, workspace: Path) -> None:
    """Stage 3 has the fp32 weights once: but for its name, a rank's file looks like any other's."""
    root = copied(oracle, "zero3-bf16-w3", workspace)
    one, other = optim(root, 1), optim(root, 2)
    one.rename(root / "aside")
    other.rename(one)
    (root / "aside").rename(other)
    message = refused(workspace, root, None, reshard.FormatError)
    assert "it was written as" in message


def test_a_number_of_ranks_that_no_machine_has(oracle: Oracle, workspace: Path) -> None:
    root = copied(oracle, "zero3-bf16-w2", workspace)
    for rank in (0, 1):

        def change(content: dict[str, object]) -> None:
            state = content["optimizer_state_dict"]
            assert isinstance(state, dict)
            state["partition_count"] = 1 << 60

        edit_saved(optim(root, rank), change)
    assert str(1 << 60) in refused(workspace, root, None, reshard.FormatError)


def optim_of(root: Path, tag: str, rank: int) -> Path:
    return next((root / tag).glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"))
