"""Other optimizers than torch's AdamW: each keeps what it keeps, and nothing is made up.

The states are those of the golden ZeRO-2 run, put as each optimizer of DeepSpeed puts its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import reshard
from reshard.core.dtypes import FLOAT32
from reshard.core.hyperparameters import completed
from reshard.core.state import Group, Step, TrainingState
from reshard.core.tensors import Entry, TensorSpec
from reshard.errors import PlanError
from reshard.formats.deepspeed.layout import as_written
from tests.state.cases import case, copied, opened
from tests.state.test_writing import ADAMW, loaded
from tests.tensors import raw

Base = dict[str, Any]


def run_of(tmp_path: Path, edit: Callable[[Base], None]) -> Path:
    """The golden run with every rank's wrapped optimizer changed."""
    run = copied("ds_s2_fp32", tmp_path)
    for file in run.glob("global_step3/*optim_states.pt"):
        content = torch.load(file, weights_only=False)
        edit(content["optimizer_state_dict"]["base_optimizer_state"])
        torch.save(content, file)
    return run


def keep(base: Base, *keys: str) -> None:
    """Leave in each group only these settings."""
    for group in base["param_groups"]:
        for key in group.keys() - {*keys, "params"}:
            del group[key]


def cpu_adam(base: Base) -> None:
    keep(base, "lr", "betas", "eps", "weight_decay", "amsgrad")
    for group in base["param_groups"]:
        group["bias_correction"] = True
    for state in base["state"].values():
        state["step"] = int(state["step"])


def fused_adam(base: Base) -> None:
    cpu_adam(base)
    for group in base["param_groups"]:
        group["step"] = 3
    for state in base["state"].values():
        del state["step"]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("edit", [cpu_adam, fused_adam])
def test_adams_that_keep_fewer_settings(edit: Callable[[Base], None], tmp_path: Path) -> None:
    run = run_of(tmp_path, edit)
    with opened(run) as found:
        assert set(found.state.steps.values()) == {Step(3, "int")}
        assert found.state.moments.keys() == {"exp_avg", "exp_avg_sq"}
    reshard.convert(run, tmp_path / "out", to="dcp", optimizer=True)
    optimizer = loaded(tmp_path / "out/optim_states")
    assert {type(s["step"]) for s in optimizer["state"].values()} == {torch.Tensor}
    assert {float(s["step"]) for s in optimizer["state"].values()} == {3.0}
    for group, want in zip(
        optimizer["param_groups"], case("ds_s2_fp32").facts["param_groups"], strict=True
    ):
        assert group.keys() == ADAMW | {"bias_correction"}
        for key in ADAMW - {"params", "betas"}:
            assert group[key] == want[key], key  # initial_lr is the scheduler's


def lion(base: Base) -> None:
    keep(base, "lr", "betas", "weight_decay")
    for state in base["state"].values():
        del state["exp_avg_sq"], state["step"]


def cpu_lion(base: Base) -> None:
    """DeepSpeedCPULion 0.19.8 has Adam's moments, of which it uses one; its steps are integers."""
    keep(base, "lr", "betas", "weight_decay")
    for state in base["state"].values():
        state["exp_avg_sq"].zero_()
        state["step"] = int(state["step"])


def amsgrad(base: Base) -> None:
    """While the mean of squares rises it is its own maximum."""
    for group in base["param_groups"]:
        group["amsgrad"] = True
    for state in base["state"].values():
        state["max_exp_avg_sq"] = state["exp_avg_sq"].clone()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(
    ("edit", "kinds", "settings"),
    [
        (cpu_lion, {"step", "exp_avg", "exp_avg_sq"}, {"lr", "betas", "weight_decay"}),
        (amsgrad, {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}, ADAMW - {"params"}),
    ],
)
def test_more_moments_than_are_used(
    edit: Callable[[Base], None], kinds: set[str], settings: set[str], tmp_path: Path
) -> None:
    run = run_of(tmp_path, edit)
    assert reshard.convert(run, tmp_path / "universal", to="deepspeed").verified
    reshard.convert(run, tmp_path / "out", to="dcp", optimizer=True)
    optimizer = loaded(tmp_path / "out/optim_states")
    truth = case("ds_s2_fp32").truth()
    for name, state in optimizer["state"].items():
        assert state.keys() == kinds
        assert raw(state["exp_avg"]) == truth[f"exp_avg.{name}"].data
        if "max_exp_avg_sq" in kinds:
            assert raw(state["max_exp_avg_sq"]) == truth[f"exp_avg_sq.{name}"].data
    for group in optimizer["param_groups"]:
        assert group.keys() == settings | {"params", "initial_lr"}
    reshard.verify(tmp_path / "out", against=run)


def sgd(base: Base) -> None:
    keep(base, "lr", "weight_decay")
    for group in base["param_groups"]:
        group |= {"momentum": 0.9, "dampening": 0, "nesterov": False}
    for at, state in base["state"].items():
        base["state"][at] = {"momentum_buffer": state["exp_avg"]}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(("edit", "kind"), [(lion, "exp_avg"), (sgd, "momentum_buffer")])
def test_one_moment_and_no_step(edit: Callable[[Base], None], kind: str, tmp_path: Path) -> None:
    run = run_of(tmp_path, edit)
    want = case("ds_s2_fp32").truth()
    with opened(run) as found:
        assert list(found.state.moments) == [kind]
        for name, entry in found.state.moments[kind].items():
            assert found.stored(entry) == want[f"exp_avg.{name}"]
        assert found.state.steps == {}
    reshard.convert(run, tmp_path / "out", to="dcp", optimizer=True)
    optimizer = loaded(tmp_path / "out/optim_states")
    assert {tuple(state) for state in optimizer["state"].values()} == {(kind,)}
    assert "eps" not in optimizer["param_groups"][0]
    assert optimizer["param_groups"][0]["weight_decay"] == 0.1
    reshard.verify(tmp_path / "out", against=run)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_muon_beside_adam(tmp_path: Path) -> None:
    def muon(base: Base) -> None:
        base["state"][0] = {"momentum_buffer": base["state"][0]["exp_avg"]}
        for key in ("betas", "eps"):
            del base["param_groups"][0][key]
        base["param_groups"][0]["use_muon"] = True

    run = run_of(tmp_path, muon)
    want = case("ds_s2_fp32").truth()
    matrices, vectors = case("ds_s2_fp32").facts["group_names"]
    with opened(run) as found:
        state = found.state
        assert set(state.moments["momentum_buffer"]) == set(matrices)
        assert set(state.moments["exp_avg"]) == set(state.moments["exp_avg_sq"]) == set(vectors)
        for kind, table in state.moments.items():
            truth = "exp_avg" if kind == "momentum_buffer" else kind
            for name, entry in table.items():
                assert found.stored(entry) == want[f"{truth}.{name}"]
        assert set(state.steps) == set(vectors)
    reshard.convert(run, tmp_path / "out", to="dcp", optimizer=True)
    groups = loaded(tmp_path / "out/optim_states")["param_groups"]
    assert groups[0]["use_muon"] is True
    assert "betas" not in groups[0]
    assert groups[1].keys() == ADAMW


def test_adam_without_a_step_does_not_go_on(tmp_path: Path) -> None:
    def forget(base: Base) -> None:
        for state in base["state"].values():
            del state["step"]

    run = run_of(tmp_path, forget)
    with pytest.raises(PlanError, match="does not state the step counts of 25 parameters"):
        reshard.convert(run, tmp_path / "out", to="dcp", optimizer=True)
    assert reshard.convert(run, tmp_path / "out", to="dcp").verified


def test_an_optimizer_that_has_made_no_step(tmp_path: Path) -> None:
    def begin(base: Base) -> None:
        base["state"] = {}

    run = run_of(tmp_path, begin)
    with pytest.raises(PlanError, match="has not made a step"):
        reshard.convert(run, tmp_path / "out", to="dcp", optimizer=True)
    assert reshard.convert(run, tmp_path / "out", to="dcp").verified


def test_moments_are_not_listed_again_for_each_parameter() -> None:
    """With 70,000 parameters that would take minutes."""

    class Table(dict[str, Entry]):
        listed = 0

        def __iter__(self) -> Iterator[str]:
            Table.listed += 1
            return super().__iter__()

    names = tuple(f"w{number}" for number in range(50))
    table = Table({name: Entry(TensorSpec(name, FLOAT32, (1,)), ()) for name in names})
    adamw = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    groups = (Group(names[:20], adamw), Group((*names[20:], "frozen"), adamw))
    steps = dict.fromkeys(names, Step(3))
    state = TrainingState({"exp_avg": table, "exp_avg_sq": table}, steps=steps, groups=groups)
    written = as_written(completed(state))
    assert [group.names for group in written.groups] == [names[:20], names[20:]]
    assert 0 < Table.listed < 10
