"""What of a training state cannot be known, or is not of one save, is refused in words."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import reshard
from reshard.errors import FormatError, IncompleteError, ReshardError, UnsupportedError
from tests.state.cases import case, opened

Edit = Callable[[dict[str, Any]], None]
RANK1 = "global_step3/zero_pp_rank_1_mp_rank_00_optim_states.pt"
MODEL = "global_step3/mp_rank_00_model_states.pt"


def edited(name: str, tmp_path: Path, file: str, edit: Edit) -> Path:
    """A golden run of which one file was changed."""
    run = tmp_path / "run"
    shutil.copytree(case(name).folder, run)
    content = torch.load(run / file, weights_only=False)
    edit(content)
    torch.save(content, run / file)
    return run


def refused(run: Path, kind: type[ReshardError]) -> ReshardError:
    with pytest.raises(kind) as caught, opened(run):
        pass
    return caught.value


def weights_alone(run: Path, tmp_path: Path) -> None:
    """What the hints offer: the weights convert."""
    assert reshard.convert(run, tmp_path / "weights", to="dcp").verified


def base_state(content: dict[str, Any]) -> dict[int, dict[str, Any]]:
    state: dict[int, dict[str, Any]] = content["optimizer_state_dict"]["base_optimizer_state"][
        "state"
    ]
    return state


def test_eight_bit_moments(tmp_path: Path) -> None:
    def quantise(content: dict[str, Any]) -> None:
        for state in base_state(content).values():
            state["state1"] = torch.zeros(state.pop("exp_avg").numel(), dtype=torch.uint8)

    run = edited("ds_s2_fp32", tmp_path, RANK1, quantise)
    error = refused(run, UnsupportedError)
    assert "8-bit" in str(error)
    assert "without --optimizer" in str(error)
    weights_alone(run, tmp_path)


def test_ranks_of_different_steps(tmp_path: Path) -> None:
    def later(content: dict[str, Any]) -> None:
        base_state(content)[1]["step"] += 1

    error = refused(edited("ds_s2_fp32", tmp_path, RANK1, later), FormatError)
    assert "[3, 4] and [3, 3]" in str(error)
    assert str(error.path).endswith("zero_pp_rank_1_mp_rank_00_optim_states.pt")


def test_a_step_that_is_no_number_of_steps(tmp_path: Path) -> None:
    def half(content: dict[str, Any]) -> None:
        base_state(content)[1]["step"] += 0.5

    assert "3.5" in str(refused(edited("ds_s2_fp32", tmp_path, RANK1, half), FormatError))


def test_groups_that_do_not_cover_the_parameters(tmp_path: Path) -> None:
    def fewer(content: dict[str, Any]) -> None:
        content["optimizer_state_dict"]["base_optimizer_state"]["param_groups"].pop()

    run = edited("ds_s2_fp32", tmp_path, RANK1, fewer)
    assert "cover the flat tensors [0], and it has 2" in str(refused(run, FormatError))
    weights_alone(run, tmp_path)
    with opened(case("ds_s2_fp32").folder) as found:  # the file as it was saved
        assert found.state.names


def test_a_rank_without_one_kind_of_moments(tmp_path: Path) -> None:
    def without(content: dict[str, Any]) -> None:
        del base_state(content)[0]["exp_avg_sq"]

    run = edited("ds_s2_fp32", tmp_path, RANK1, without)
    assert "kinds of moments are not those of" in str(refused(run, FormatError))


def test_moments_of_another_length(tmp_path: Path) -> None:
    def cut(content: dict[str, Any]) -> None:
        base_state(content)[0]["exp_avg"] = base_state(content)[0]["exp_avg"][:-5].clone()

    run = edited("ds_s2_fp32", tmp_path, RANK1, cut)
    assert "2997" in str(refused(run, IncompleteError))


def test_a_universal_folder_that_lost_files(tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(case("uc_s2_fp32").folder, run)
    lost = run / "global_step3_universal/zero/model.norm.weight/exp_avg_sq.pt"
    lost.rename(tmp_path / "kept.pt")
    error = refused(run, IncompleteError)
    assert error.path == str(lost)
    (tmp_path / "kept.pt").rename(lost)
    with opened(run):
        pass
    (run / "global_step3_universal/zero/optimizer_state.pt").unlink()
    assert "hyperparameters" in str(refused(run, IncompleteError))


def test_without_zero_groups_in_no_order_of_the_model(tmp_path: Path) -> None:
    def reverse(content: dict[str, Any]) -> None:
        group = content["optimizer"]["param_groups"][0]
        group["params"] = group["params"][::-1]

    run = edited("ds_s0_fp32", tmp_path, MODEL, reverse)
    error = refused(run, UnsupportedError)
    assert "without names" in str(error)
    assert "ZeRO stage 1" in str(error)
    weights_alone(run, tmp_path)
    with opened(case("ds_s1_bf16").folder) as found:
        assert found.state.names


def test_masters_tell_their_names_in_any_order(tmp_path: Path) -> None:
    def reverse(content: dict[str, Any]) -> None:
        optimizer = content["optimizer"]
        optimizer["optimizer_state_dict"]["param_groups"][0]["params"].reverse()
        optimizer["fp32_groups"][0].reverse()

    run = edited("ds_s0_bf16", tmp_path, MODEL, reverse)
    with opened(run) as found:
        got = {key: found.stored(entry) for key, entry in found.state.entries()}
    want = case("ds_s0_bf16").truth()
    assert got == {key: value for key, value in want.items() if not key.startswith("param.")}


def test_masters_that_round_to_nothing_in_the_module(tmp_path: Path) -> None:
    def other(content: dict[str, Any]) -> None:
        content["optimizer"]["fp32_groups"][0][1].data.add_(1.0)

    run = edited("ds_s0_bf16", tmp_path, MODEL, other)
    assert "the order and the values" in str(refused(run, UnsupportedError))
    checkpoint = reshard.open(run)
    assert [found.code for found in checkpoint.catalog.findings] == ["masters-unnamed"]
    assert {t.dtype.name for t in checkpoint.tensors.values()} == {"bfloat16"}
