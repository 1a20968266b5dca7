"""A state that is not finished, damaged, or another's, is told from one that is not there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

import reshard
from reshard.errors import (
    FormatError,
    IncompleteError,
    OptionError,
    PlanError,
    ReshardError,
    UnsupportedError,
    VerificationError,
)
from tests.state.cases import case, copied, opened
from tests.state.test_refusals import resave
from tests.state.test_writing import loaded

STEP = "_actor/global_step3"
ZERO = "global_step3_universal/zero"


def refused(run: Path, kind: type[ReshardError]) -> ReshardError:
    with pytest.raises(kind) as caught:
        reshard.convert(run, run.parent / "out", to="dcp", optimizer=True)
    assert not (run.parent / "out").exists()
    return caught.value


def _only(keep: str) -> Callable[[Path], None]:
    def remove(folder: Path) -> None:
        for path in folder.iterdir():
            if not path.name.endswith(keep):
                path.unlink()

    return remove


def _begun(folder: Path) -> None:
    (folder / ".metadata").rename(folder / ".metadata.tmp")


@pytest.mark.parametrize("change", [_only(".distcp"), _only("nothing"), _only(".tmp"), _begun])
@pytest.mark.parametrize(
    ("name", "folder"),
    [("fsdp2_lightrft_fp32", f"{STEP}/optim_states"), ("fsdp1_accelerate_fp32",
      "checkpoint-3/optimizer_0")],
)  # fmt: skip
def test_an_optimizer_whose_save_did_not_finish(
    name: str, folder: str, change: Callable[[Path], None], tmp_path: Path
) -> None:
    run = copied(name, tmp_path)
    change(run / folder)
    error = refused(run, IncompleteError)
    assert "the save did not finish" in str(error)
    assert error.path == str(run / folder)
    assert reshard.convert(run, tmp_path / "weights", to="dcp").verified


def test_two_optimizers_beside_one_model(tmp_path: Path) -> None:
    run = copied("fsdp2_lightrft_fp32", tmp_path)
    shutil.copytree(run / STEP / "optim_states", run / STEP / "optimizer_old")
    error = refused(run, UnsupportedError)
    assert "several optimizers (optim_states, optimizer_old)" in str(error)


def test_an_optimizer_in_one_file_beside_a_sharded_model(tmp_path: Path) -> None:
    run = copied("fsdp1_accelerate_fp32", tmp_path)
    folder = run / "checkpoint-3/optimizer_0"
    torch.save(loaded(folder)["optimizer"], run / "checkpoint-3/optimizer.bin")
    shutil.rmtree(folder)
    truth = case("fsdp1_accelerate_fp32").moments()
    with opened(run) as found:
        held = {entry.spec.name: found.stored(entry) for entry in found.state.entries()}
    assert held == truth
    assert len(held) == 50


def test_a_universal_checkpoint_without_its_folder(tmp_path: Path) -> None:
    run = copied("uc_s2_fp32", tmp_path)
    shutil.rmtree(run / ZERO)
    assert "its folder zero/" in str(refused(run, IncompleteError))


def test_one_parameter_of_another_step(tmp_path: Path) -> None:
    run = copied("uc_s2_fp32", tmp_path)
    path = run / ZERO / "model.norm.weight" / "step.pt"
    torch.save(torch.load(path) + 1, path)
    error = refused(run, FormatError)
    assert error.tensor is not None
    assert "4" in str(error)
    assert "3: files of different saves are mixed" in str(error)


def test_parameters_of_different_steps_are_a_finding(tmp_path: Path) -> None:
    """Torch's optimizers count for each parameter; one without a gradient falls behind."""

    def one_less(content: dict[str, Any]) -> None:
        content["state"]["model.norm.weight"]["step"] -= 1

    run = copied("fsdp2_lightrft_fp32", tmp_path)
    resave(run / STEP / "optim_states", one_less)
    report = reshard.convert(run, tmp_path / "out", to="dcp", optimizer=True)
    (told,) = [f.message for f in report.findings if f.code == "state-steps-differ"]
    assert "1 parameters 2, 24 parameters 3 (model.norm.weight)" in told


def _values(report: reshard.Report) -> list[str]:
    return [found.code for found in report.findings]


def test_squares_below_zero(tmp_path: Path) -> None:
    run = copied("uc_s2_fp32", tmp_path)
    path = run / ZERO / "model.norm.weight" / "exp_avg_sq.pt"
    content = torch.load(path)
    content["param"][3:5] = torch.tensor([-1e-9, -0.0])
    torch.save(content, path)
    with pytest.raises(VerificationError, match="1 of its values are negative") as caught:
        reshard.convert(run, tmp_path / "out", to="dcp", optimizer=True)
    assert caught.value.tensor == "optimizer: exp_avg_sq.model.norm.weight"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("one", "other"), [("exp_avg", "exp_avg_sq"), ("exp_avg_sq", "exp_avg")])
@pytest.mark.parametrize("to", ["dcp", "deepspeed"])
def test_one_moment_copied_over_the_other(one: str, other: str, to: Any, tmp_path: Path) -> None:
    run = copied("uc_s2_fp32", tmp_path)
    folder = run / ZERO / "model.norm.weight"
    shutil.copy(folder / f"{one}.pt", folder / f"{other}.pt")
    with pytest.raises(VerificationError, match=r"negative|bit for bit"):
        reshard.convert(run, tmp_path / "out", to=to, optimizer=True)


def test_moments_of_zeros_are_alike_and_right(tmp_path: Path) -> None:
    run = copied("uc_s2_fp32", tmp_path)
    for parameter in ("model.norm.weight", "model.layers.0.input_layernorm.weight"):
        for kind in ("exp_avg", "exp_avg_sq"):
            path = run / ZERO / parameter / f"{kind}.pt"
            content = torch.load(path)
            torch.save({**content, "param": torch.zeros_like(content["param"])}, path)
    assert "state-alike" not in _values(
        reshard.convert(run, tmp_path / "out", to="dcp", optimizer=True)
    )


GIVEN = {"lr": 1e-3, "betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 0.1}


@pytest.mark.parametrize(
    ("more", "want"),
    [
        ({"amsgrad": 1}, "the amsgrad of group 0 is 1"),
        ({"amsgrad": True}, "amsgrad is true, and the checkpoint holds no max_exp_avg_sq"),
        ({"foreach": "yes"}, "the foreach of group 0 is 'yes'"),
        ({"initial_lr": -1}, "the initial_lr of group 0 is -1"),
        ({"lr": True}, "the lr of group 0 is True"),
        ({"params": [0]}, "lists params"),
    ],
)
def test_hyperparameters_that_adamw_refuses(
    more: dict[str, Any], want: str, tmp_path: Path
) -> None:
    file = tmp_path / "given.json"
    file.write_text(json.dumps([{**GIVEN, **more}, GIVEN]))
    with pytest.raises(OptionError, match=want):
        reshard.convert(
            case("ds_s2_bf16_elastic").folder, tmp_path / "out", to="dcp", optimizer=True,
            hyperparameters=file,
        )  # fmt: skip


def test_hyperparameters_that_adamw_ignores_are_a_finding(tmp_path: Path) -> None:
    file = tmp_path / "given.json"
    more = {"amsgrad": False, "foreach": None, "initial_lr": 1, "weight_decai": 3}
    file.write_text(json.dumps([{**GIVEN, **more}, GIVEN]))
    report = reshard.convert(
        case("ds_s2_bf16_elastic").folder, tmp_path / "out", to="dcp", optimizer=True,
        hyperparameters=file,
    )  # fmt: skip
    (found,) = [found for found in report.findings if found.code == "hyperparameters-unknown"]
    assert "'weight_decai' (is weight_decay meant?)" in found.message
    with opened(tmp_path / "out") as written:
        assert written.state.groups[0].hyperparameters["initial_lr"] == 1


@pytest.mark.parametrize(
    "name", ["fsdp2_lightrft_fp32", "fsdp1_accelerate_fp32", "fsdp2_nested_flat_fp32"]
)
def test_files_of_two_ranks_exchanged(name: str, tmp_path: Path) -> None:
    run = copied(name, tmp_path)
    folders = {path.parent for path in run.rglob("*.distcp")}
    for folder in folders:
        first, second = sorted(folder.glob("*.distcp"))
        first.rename(tmp_path / "kept")
        second.rename(first)
        (tmp_path / "kept").rename(second)
        error = refused(run, ReshardError)
        assert "the file of another rank" in str(error)
        assert error.hint == "Copy the whole folder again; each rank wrote files of its own."
        first.rename(tmp_path / "kept")
        second.rename(first)
        (tmp_path / "kept").rename(second)
    assert reshard.convert(run, tmp_path / "out", to="dcp", optimizer=True).verified


LAYER = "model.layers.0."
PREFIXED = "ds_s2_fp32", "uc_s2_fp32", "ds_s3_fp32_subgroups"


@pytest.mark.parametrize("name", PREFIXED)
def test_a_part_with_its_state(name: str, tmp_path: Path) -> None:
    """What lies under a prefix goes with its moments, and says what of the state stays behind."""
    run = case(name)
    report = reshard.convert(
        run.folder, tmp_path / "out", to="dcp", optimizer=True, prefix="model.layers.0"
    )
    assert any("parameters outside" in found.message for found in report.findings)
    with opened(tmp_path / "out") as found:
        assert found.state.names
        truth = run.truth()
        for kind, table in found.state.moments.items():
            for parameter, entry in table.items():
                want = truth[f"{kind}.model.layers.0.{parameter}"]
                assert found.stored(entry).data == want.data
        frozen = set(found.catalog.entries) - set(found.state.names)
        assert frozen == {n.removeprefix(LAYER) for n in run.facts["frozen"] if n.startswith(LAYER)}
    assert reshard.verify(
        tmp_path / "out", run.folder, prefix="model.layers.0"
    ).num_tensors >= 2 * len(found.state.names)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("at", ["actor", "model.actor"])
@pytest.mark.parametrize("nested", [True, False])
def test_one_optimizer_of_an_actor_and_a_critic(at: str, nested: bool, tmp_path: Path) -> None:
    """Its state goes with the part that is named, and what is left out is said."""
    weights = {f"{part}.a.weight": torch.randn(3, 4) for part in ("actor", "critic")}
    first = torch.randn(3, 4)
    state = {
        name: {"step": torch.tensor(3.0), "exp_avg": first, "exp_avg_sq": torch.rand(3, 4)}
        for name in weights
    }
    group = {**GIVEN, "betas": (0.9, 0.99), "params": list(weights)}
    both: dict[str, Any] = dict(weights)
    if nested:
        both = {name.partition(".")[0]: {"a.weight": one} for name, one in weights.items()}
    both = {"model": both} if at.startswith("model") else both
    optimizer = {"state": state, "param_groups": [group]}
    dcp.save({**both, "optimizer": optimizer}, checkpoint_id=str(tmp_path / "c"), no_dist=True)
    report = reshard.convert(tmp_path / "c", tmp_path / "out", to="dcp", optimizer=True, prefix=at)
    assert any("1 parameters outside (critic.a.weight)" in f.message for f in report.findings)
    with opened(tmp_path / "out") as found:
        assert found.state.names == ("a.weight",)
        assert np.array_equal(found.array(found.state.moments["exp_avg"]["a.weight"]), first)


def test_a_setting_that_one_group_lacks_is_asked_for_and_taken(tmp_path: Path) -> None:
    """What the file states must be what the checkpoint states, where it states something."""

    run = copied("ds_s2_fp32", tmp_path)
    for file in run.rglob("*optim_states.pt"):
        content = torch.load(file, weights_only=False)
        groups = content["optimizer_state_dict"]["base_optimizer_state"]["param_groups"]
        del groups[1]["weight_decay"]
        torch.save(content, file)
    with opened(case("ds_s2_fp32").folder) as whole:
        stated = [dict(group.hyperparameters) for group in whole.state.groups]
    keys = ("lr", "betas", "eps", "weight_decay")
    given = [{key: group[key] for key in keys} for group in stated]
    given_file = tmp_path / "groups.json"
    options: dict[str, Any] = {"to": "dcp", "optimizer": True}
    with pytest.raises(PlanError, match="weight_decay of parameter group 1") as caught:
        reshard.convert(run, tmp_path / "out", **options)
    assert "--hyperparameters" in str(caught.value)
    given_file.write_text(json.dumps([{**given[0], "lr": 5}, given[1]]), encoding="utf-8")
    with pytest.raises(OptionError, match="the lr of group 0 is 5, the checkpoint's"):
        reshard.convert(run, tmp_path / "out", hyperparameters=given_file, **options)
    given_file.write_text(json.dumps(given), encoding="utf-8")
    reshard.convert(run, tmp_path / "out", hyperparameters=given_file, **options)
    with opened(tmp_path / "out") as written:
        assert [group.hyperparameters["weight_decay"] for group in written.state.groups] == [
            group["weight_decay"] for group in stated
        ]
