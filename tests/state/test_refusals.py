"""What of a training state cannot be known, or is not of one save, is refused in words."""

from __future__ import annotations

import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

import reshard
from reshard.errors import FormatError, IncompleteError, ReshardError, UnsupportedError
from tests.state.cases import case, copied, opened
from tests.state.test_writing import loaded

Edit = Callable[[dict[str, Any]], None]
RANK1 = "global_step3/zero_pp_rank_1_mp_rank_00_optim_states.pt"
MODEL = "global_step3/mp_rank_00_model_states.pt"


def edited(name: str, tmp_path: Path, file: str, edit: Edit) -> Path:
    """A golden run of which one file was changed."""
    run = copied(name, tmp_path)
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
    run = copied("uc_s2_fp32", tmp_path)
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
        got = {e.spec.name: found.stored(e) for e in found.state.entries()}
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


def dcp_run(tmp_path: Path) -> tuple[Path, Path]:
    """LightRFT's run, and its optimizer's folder."""
    run = copied("fsdp2_lightrft_fp32", tmp_path)
    return run, run / "_actor/global_step3/optim_states"


def resave(folder: Path, edit: Edit) -> None:
    """Save an optimizer's folder again with one thing changed."""
    content = loaded(folder)
    edit(content)
    shutil.rmtree(folder)
    dcp.save(content, checkpoint_id=str(folder), no_dist=True)


def test_the_optimizer_of_another_model(tmp_path: Path) -> None:
    def rename(content: dict[str, Any]) -> None:
        content["state"] = {f"critic.{name}": value for name, value in content["state"].items()}

    run, folder = dcp_run(tmp_path)
    resave(folder, rename)
    error = refused(run, FormatError)
    assert "25 parameters that the model does not have: critic.model" in str(error)
    weights_alone(run, tmp_path)


def test_the_optimizer_of_a_wider_model(tmp_path: Path) -> None:
    def widen(content: dict[str, Any]) -> None:
        content["state"]["model.norm.weight"]["exp_avg"] = torch.zeros(18)

    run, folder = dcp_run(tmp_path)
    resave(folder, widen)
    error = refused(run, FormatError)
    assert error.tensor == "model.norm.weight"
    assert "(18,)" in str(error)
    assert "(17,)" in str(error)


@pytest.mark.parametrize("twice", [True, False])
def test_groups_that_do_not_cover_each_parameter_once(tmp_path: Path, twice: bool) -> None:
    def change(content: dict[str, Any]) -> None:
        first, second = (group["params"] for group in content["param_groups"])
        if twice:
            first.append(second[0])
        else:
            first.remove("model.embed_tokens.weight")

    run, folder = dcp_run(tmp_path)
    resave(folder, change)
    want = "input_layernorm.weight is in several|bias is in several" if twice else "is in none"
    assert re.search(want, str(refused(run, FormatError)))


def test_numbers_for_names(tmp_path: Path) -> None:
    def number(content: dict[str, Any]) -> None:
        for group in content["param_groups"]:
            group["params"] = list(range(len(group["params"])))

    run, folder = dcp_run(tmp_path)
    resave(folder, number)
    assert "numbers instead of names" in str(refused(run, UnsupportedError))
    weights_alone(run, tmp_path)


def test_one_optimizer_file_a_rank(tmp_path: Path) -> None:
    run, folder = dcp_run(tmp_path)
    shutil.rmtree(folder)
    folder.mkdir()
    torch.save({"base_optim_states": {}}, folder / "_rank0")
    assert "each rank saved its own optimizer state" in str(refused(run, UnsupportedError))
    weights_alone(run, tmp_path)


def test_several_optimizers_of_one_model(tmp_path: Path) -> None:
    run, folder = dcp_run(tmp_path)
    content = loaded(folder)
    both = {"model": {"w": torch.zeros(3)}, "optim_a": content, "optim_b": content}
    shutil.rmtree(run)
    dcp.save(both, checkpoint_id=str(run), no_dist=True)
    assert "several optimizers (optim_a, optim_b)" in str(refused(run, UnsupportedError))
    weights_alone(run, tmp_path)


def test_verl_without_the_optimizer_of_one_rank(tmp_path: Path) -> None:
    run = copied("fsdp2_verl_fp32", tmp_path)
    (lost,) = run.glob("*/actor/optim_world_size_2_rank_1.pt")
    kept = lost.rename(tmp_path / "kept.pt")
    assert "file of rank 1 is missing" in str(refused(run, IncompleteError))
    kept.rename(lost)
    with opened(run) as found:
        assert found.state.names


def test_verl_with_ranks_of_different_steps(tmp_path: Path) -> None:
    run = copied("fsdp2_verl_fp32", tmp_path)
    (file,) = run.glob("*/actor/optim_world_size_2_rank_1.pt")
    change(file, b"\x00\x00\x40\x40", b"\x00\x00\x80\x40")
    assert "groups or steps are not those" in str(refused(run, FormatError))


def change(file: Path, old: bytes, new: bytes) -> None:
    """Replace four bytes of each tensor of one element, and put its checksum right."""
    with zipfile.ZipFile(file) as archive:
        held = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, data in held.items():
            archive.writestr(name, new if data == old else data)
