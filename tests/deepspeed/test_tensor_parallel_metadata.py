"""AutoTP's metadata that contradicts the files, or states what is not handled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import reshard
from tests.deepspeed.conftest import ParallelRuns
from tests.deepspeed.test_tensor_parallel import check_against_truth, edit_info

Q_PROJ = r"^model\.layers\.0\.self_attn\.q_proj\.weight$"


def _unsupported(info: dict[str, Any]) -> None:
    info["autotp_unsupported_parameter_patterns"] = {Q_PROJ: "it is interleaved by head"}


def _expression(info: dict[str, Any]) -> None:
    info["parameter_with_row_parallelism_patterns"].append(r".*dense_4h_to_h\.weight")


def _averaged(info: dict[str, Any]) -> None:
    info["parameter_to_average_patterns"] = [Q_PROJ]


def _megatron(info: dict[str, Any]) -> None:
    info["parameter_with_2_sub_params_cat_dim_0"] = [Q_PROJ]


def _newer(info: dict[str, Any]) -> None:
    info["universal_checkpoint_version"] = 0.5


def _endless(info: dict[str, Any]) -> None:
    value: list[object] = []
    for _ in range(100):
        value = [value, value]
    info["universal_checkpoint_version"] = value


def _newer_map(info: dict[str, Any]) -> None:
    info["affine_map"]["version"] = 2


def _scaled(info: dict[str, Any]) -> None:
    for rank in info["affine_map"]["params"][Q_PROJ]["ranks"].values():
        rank["pieces"][0]["scale"] = 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_unsupported, "interleaved by head"),
        (_expression, "not one parameter's name"),
        (_averaged, "averaged over the ranks"),
        (_megatron, "as Megatron splits them"),
        (_newer, r"version 0\.5"),
        (_newer_map, "maps of version 2"),
        (_scaled, r"multiplied by 0\.5"),
        (_endless, "repeats its parts over and over"),
    ],
)
def test_what_is_not_handled_is_refused_by_name(
    parallel_runs: ParallelRuns,
    tmp_path: Path,
    change: Callable[[dict[str, Any]], None],
    message: str,
) -> None:
    tag = parallel_runs["tp-zero1"].copy(tmp_path)
    edit_info(tag, change)
    with pytest.raises(reshard.UnsupportedError, match=message):
        reshard.open(tag)


def test_metadata_of_an_older_autotp(parallel_runs: ParallelRuns, tmp_path: Path) -> None:
    tag = parallel_runs["tp-zero1"].copy(tmp_path)
    edit_info(tag, lambda info: info.update(universal_checkpoint_version=0.1))
    with pytest.raises(reshard.UnsupportedError, match=r"version 0\.1.*does not say") as caught:
        reshard.open(tag)
    assert caught.value.hint == "Load and save it once with AutoTP of DeepSpeed 0.19.8."
    # What that release saves is the run itself.
    check_against_truth(reshard.open(parallel_runs["tp-zero1"].root), parallel_runs, "tp-zero1")


def _overlapping(entry: dict[str, Any]) -> None:
    entry["ranks"][1]["pieces"][0]["source"][0] = 0


def _with_a_hole(entry: dict[str, Any]) -> None:
    entry["ranks"][1]["pieces"] = []


def _outside(entry: dict[str, Any]) -> None:
    entry["ranks"][1]["pieces"][0]["source"][0] = 1 << 40


def _negative(entry: dict[str, Any]) -> None:
    entry["ranks"][1]["pieces"][0]["dest"][0] = -4


def _no_block(entry: dict[str, Any]) -> None:
    entry["ranks"][1]["pieces"][0]["source"][1] = [1, 16]


def _of_three(entry: dict[str, Any]) -> None:
    entry["ranks"][2] = entry["ranks"][1]


def _no_ranks(entry: dict[str, Any]) -> None:
    entry["ranks"] = "two"


@pytest.mark.parametrize(
    "change", [_overlapping, _with_a_hole, _outside, _negative, _no_block, _of_three, _no_ranks]
)
def test_a_map_that_does_not_fit(
    parallel_runs: ParallelRuns, tmp_path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    tag = parallel_runs["tp-zero1"].copy(tmp_path)
    edit_info(tag, lambda info: change(info["affine_map"]["params"][Q_PROJ]))
    with pytest.raises(reshard.ReshardError) as caught:
        reshard.open(tag)
    assert caught.value.tensor == "model.layers.0.self_attn.q_proj.weight"


def test_a_list_that_does_not_fit(parallel_runs: ParallelRuns, tmp_path: Path) -> None:
    """A parameter that is split along rows is said to be the same on every rank."""
    tag = parallel_runs["tp-three-zero2"].copy(tmp_path)

    def change(info: dict[str, Any]) -> None:
        del info["affine_map"]
        info["tp_replicated_parameter_patterns"].append(Q_PROJ)

    edit_info(tag, change)
    with pytest.raises(reshard.FormatError, match="the same on every rank"):
        reshard.open(tag)
