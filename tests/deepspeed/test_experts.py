"""DeepSpeed's mixtures of experts: masters under global numbers, proven by the experts' files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import reshard
from tests.deepspeed.conftest import ParallelRuns
from tests.deepspeed.parallel_oracle import EXPERTS
from tests.deepspeed.test_reading import same_bits
from tests.folders import edit_saved

NAMES = [recipe.name for recipe in EXPERTS]


def optim(tag: Path, rank: int) -> Path:
    return next(tag.glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"))


def expert(tag: Path, layer: int, number: int) -> Path:
    return tag / f"layer_{layer}_expert_{number}_mp_rank_00_model_states.pt"


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_is_the_live_engines(parallel_runs: ParallelRuns, name: str) -> None:
    run = parallel_runs[name]
    checkpoint = reshard.open(run.root)
    # Without ZeRO the masters are stored without names: the module's values are read.
    expected = run.module() if name == "experts-zero0" else run.expected()
    assert set(checkpoint.tensors) == set(expected)
    assert sum("deepspeed_experts" in tensor for tensor in expected) == 2 * (4 + 2)
    for tensor in checkpoint.tensors.values():
        assert same_bits(tensor.numpy(), expected[tensor.name]), tensor.name
        assert tensor.kind == "parameter"


@pytest.mark.parametrize("name", [recipe.name for recipe in EXPERTS if recipe.stage])
def test_every_moment_is_the_live_optimizers(parallel_runs: ParallelRuns, name: str) -> None:
    parallel_runs[name].check_moments()


def test_the_masters_are_not_the_files_of_the_experts(parallel_runs: ParallelRuns) -> None:
    """A reader that took the bf16 weights for the masters must fail above."""
    run = parallel_runs["experts-zero2-w4"]
    expected, module = run.expected(), run.module()
    finer = [
        name
        for name, master in expected.items()
        if "experts" in name and (master != module[name].astype(master.dtype)).any()
    ]
    assert len(finer) > 6


def test_the_order_of_ranks_is_the_configurations(
    parallel_runs: ParallelRuns, tmp_path: Path
) -> None:
    """With the wrong one every master would be another expert's; the samples show it."""
    tag = parallel_runs["experts-data-first"].copy(tmp_path)

    def forget(content: Any) -> None:
        del content["ds_config"]["use_data_before_expert_parallelism"]

    edit_saved(tag / "mp_rank_00_model_states.pt", forget)
    with pytest.raises(reshard.ReshardError, match=r"different saves|different runs"):
        reshard.open(tag)


def test_a_missing_expert_is_named(parallel_runs: ParallelRuns, tmp_path: Path) -> None:
    tag = parallel_runs["experts-zero1"].copy(tmp_path)
    expert(tag, 0, 2).unlink()
    with pytest.raises(reshard.IncompleteError, match=r"1 of 4 experts of layer 0.*expert 2"):
        reshard.open(tag)
    shutil.copy(expert(parallel_runs["experts-zero1"].copy(tmp_path / "whole"), 0, 2), tag)
    assert reshard.open(tag).tensors


def test_all_experts_missing(parallel_runs: ParallelRuns, tmp_path: Path) -> None:
    tag = parallel_runs["experts-zero1"].copy(tmp_path)
    for path in tag.glob("layer_*"):
        path.unlink()
    with pytest.raises(reshard.IncompleteError, match="layer_\\*_expert"):
        reshard.open(tag)


def test_an_expert_too_many(parallel_runs: ParallelRuns, tmp_path: Path) -> None:
    tag = parallel_runs["experts-zero1"].copy(tmp_path)
    torch.save({}, expert(tag, 2, 0))
    with pytest.raises(reshard.FormatError, match=r"7 experts, but .* states 6"):
        reshard.open(tag)


def test_two_experts_exchanged(parallel_runs: ParallelRuns, tmp_path: Path) -> None:
    tag = parallel_runs["experts-zero1"].copy(tmp_path)
    one, other = expert(tag, 0, 0), expert(tag, 0, 1)
    one.rename(tmp_path / "aside")
    other.rename(one)
    (tmp_path / "aside").rename(other)
    with pytest.raises(reshard.FormatError, match="it was written as"):
        reshard.open(tag)


def test_an_expert_of_another_save(parallel_runs: ParallelRuns, tmp_path: Path) -> None:
    tag = parallel_runs["experts-zero1"].copy(tmp_path)

    def older(content: Any) -> None:
        for value in content.values():
            value.mul_(1.5).add_(0.25)

    edit_saved(expert(tag, 0, 3), older)
    with pytest.raises(reshard.FormatError, match="different saves") as caught:
        reshard.open(tag)
    assert "experts.3." in str(caught.value.tensor)


def test_an_expert_without_one_of_its_tensors(parallel_runs: ParallelRuns, tmp_path: Path) -> None:
    tag = parallel_runs["experts-zero1"].copy(tmp_path)

    def drop_one(content: dict[str, object]) -> None:
        content.popitem()

    edit_saved(expert(tag, 0, 2), drop_one)
    with pytest.raises(reshard.IncompleteError, match="no expert's file holds it"):
        reshard.open(tag)


@pytest.mark.parametrize("count", [3, 0, 7])
def test_ranks_that_do_not_divide(parallel_runs: ParallelRuns, tmp_path: Path, count: int) -> None:
    tag = parallel_runs["experts-zero2-w4"].copy(tmp_path)
    for rank in range(4):

        def change(content: Any) -> None:
            content["optimizer_state_dict"]["partition_count"][1] = count

        edit_saved(optim(tag, rank), change)
    with pytest.raises(reshard.ReshardError):
        reshard.open(tag)


def _autoep(tag: Path) -> None:
    _state_autoep(tag, "ds_autoep_layers")


def _autoep_by_its_old_key(tag: Path) -> None:
    _state_autoep(tag, "autoep_layers")


def _state_autoep(tag: Path, key: str) -> None:
    layer = {"module_path": "first", "num_experts": 4, "expert_key_prefix": "first.experts"}
    path = tag / "mp_rank_00_model_states.pt"
    edit_saved(path, lambda content: content.update({key: [layer]}))


def _folded(tag: Path) -> None:
    edit_saved(expert(tag, 0, 0), lambda content: content.update(folding={"tp_size": 2}))


def _oldest(tag: Path) -> None:
    expert(tag, 0, 0).rename(tag / "expert_0_mp_rank_00_model_states.pt")


def _under_tensor_parallelism(tag: Path) -> None:
    expert(tag, 0, 0).rename(tag / "layer_0_expert_0_mp_rank_01_model_states.pt")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (_autoep, "AutoEP"),
        (_autoep_by_its_old_key, "AutoEP"),
        (_folded, "AutoEP with tensor parallelism"),
        (_oldest, "expert_0_mp_rank_00"),
        (_under_tensor_parallelism, "experts under tensor parallelism"),
    ],
)
def test_other_experts_are_refused_by_name(
    parallel_runs: ParallelRuns, tmp_path: Path, change: Any, what: str
) -> None:
    tag = parallel_runs["experts-zero1"].copy(tmp_path)
    change(tag)
    with pytest.raises(reshard.UnsupportedError, match=what):
        reshard.open(tag)
