"""The options of a conversion with training state, and values that it cannot take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import reshard
from reshard.errors import OptionError, PlanError
from tests.state.cases import case
from tests.state.test_writing import ADAMW, ELASTIC, base_model, converted, loaded


def test_the_samples_that_a_run_consumed_can_be_given(tmp_path: Path) -> None:
    source = case("fsdp2_nested_fp32").folder
    report = reshard.convert(source, tmp_path / "a", to="dcp", optimizer=True)
    (found,) = [f for f in report.findings if f.code == "consumed-samples-unknown"]
    assert "--consumed-samples" in found.to_json()["fix"]
    given = reshard.convert(source, tmp_path / "b", to="dcp", optimizer=True, consumed_samples=12)
    assert not [f for f in given.findings if f.code == "consumed-samples-unknown"]
    assert torch.load(tmp_path / "b/client_state.pt") == {"consumed_samples": 12}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_hyperparameters_that_no_file_holds_are_asked_for(tmp_path: Path) -> None:
    source = case(ELASTIC).folder
    with pytest.raises(PlanError, match="does not hold the lr, betas, eps, weight_decay") as caught:
        reshard.convert(source, tmp_path / "out", to="dcp", optimizer=True)
    assert not (tmp_path / "out").exists()
    assert "--hyperparameters" in str(caught.value)
    groups = [
        {"lr": 0.0076, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1},
        {"lr": 0.0038, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.0},
    ]
    file = tmp_path / "groups.json"
    file.write_text(json.dumps(groups))
    out = converted(ELASTIC, tmp_path, hyperparameters=file)
    optimizer = loaded(out / "optim_states")
    for group, want in zip(optimizer["param_groups"], groups, strict=True):
        assert group["lr"] == want["lr"]
        assert group["betas"] == (0.9, 0.95)
        assert group.keys() >= ADAMW
    # The scheduler states what its rates start from.
    assert [group["initial_lr"] for group in optimizer["param_groups"]] == [0.01, 0.005]


GROUP = {"lr": 0.1, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"lr": 1}, "not a list of objects"),
        ([{"lr": 1}], "of 1 parameter groups, the checkpoint has 2"),
        ([{"lr": "x"}, {}], "the lr of group 0 is 'x'"),
        ([{"lr": 1, "betas": [0.9]}, {}], "the betas of group 0"),
        ([{"lr": float("nan")}, {}], "the lr of group 0 is nan"),
        ([{"lr": -1}, {}], "the lr of group 0 is -1"),
        ([{"lr": 10**400}, {}], "the lr of group 0 is 1"),
        ([{"lr": 1, "betas": [0.9, 1.5]}, {}], "the betas of group 0"),
        ([{**GROUP, "params": [0]}, GROUP], "group 0 lists params"),
    ],
)
def test_hyperparameters_that_are_none(value: object, message: str, tmp_path: Path) -> None:
    file = tmp_path / "groups.json"
    file.write_text(json.dumps(value))
    with pytest.raises(OptionError, match=message) as caught:
        converted(ELASTIC, tmp_path, hyperparameters=file)
    assert '"weight_decay": 0.1' in str(caught.value)
    # The list of the hint, with an object for each of the two groups.
    offered = json.loads(str(caught.value.hint).partition(": ")[2].removesuffix("."))
    file.write_text(json.dumps(offered * 2))
    optimizer = loaded(converted(ELASTIC, tmp_path, hyperparameters=file) / "optim_states")
    for group in optimizer["param_groups"]:
        assert {key: group[key] for key in offered[0] if key != "betas"} == {
            key: value for key, value in offered[0].items() if key != "betas"
        }
        assert group["betas"] == tuple(offered[0]["betas"])


def test_hyperparameters_that_the_checkpoint_states(tmp_path: Path) -> None:
    file = tmp_path / "groups.json"
    file.write_text("[]")
    with pytest.raises(OptionError, match="already holds them"):
        converted("ds_s2_fp32", tmp_path, hyperparameters=file)
    assert converted("ds_s2_fp32", tmp_path).is_dir()


def test_a_source_without_state(tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    reshard.convert(case("ds_s2_fp32").folder, weights, to="dcp")
    with pytest.raises(PlanError, match="it holds none") as caught:
        reshard.convert(weights, tmp_path / "out", to="dcp", optimizer=True)
    assert "without --optimizer" in str(caught.value)
    assert reshard.convert(weights, tmp_path / "out", to="dcp").verified


DCP: dict[str, Any] = {"to": "dcp", "optimizer": True}


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("options", "hint", "mends"),
    [
        ({"to": "hf", "optimizer": True},
         "Pass --to dcp, --to deepspeed, or leave out --optimizer.",
         [DCP, {"to": "deepspeed", "optimizer": True}, {"to": "hf"}]),
        ({"to": "dcp", "layout": "nested"}, "Pass --optimizer, or leave out --layout.",
         [{**DCP, "layout": "nested"}, {"to": "dcp"}]),
        ({"to": "hf", "layout": "nested"}, "Pass --to dcp --optimizer, or leave out --layout.",
         [{**DCP, "layout": "nested"}, {"to": "hf"}]),
        ({"to": "deepspeed", "layout": "nested", "optimizer": True}, "Leave out --layout.",
         [{"to": "deepspeed", "optimizer": True}]),
        ({**DCP, "names": "all"}, "Pass --names memory, or leave out --names.",
         [{**DCP, "names": "memory"}, DCP]),
        ({**DCP, "names": "hub"}, "Leave out --names.", [DCP]),
        ({"to": "deepspeed", "names": "hub"}, "Leave out --names.", [{"to": "deepspeed"}]),
        ({"to": "deepspeed", "names": "all"}, "Leave out --names.", [{"to": "deepspeed"}]),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together(
    options: dict[str, Any], hint: str, mends: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Each way that the hint offers is taken: none of them leads to another refusal."""
    source, base = case("ds_s2_fp32").folder, base_model(tmp_path)
    given: dict[str, Any] = {"base": base, "allow_unchanged": True}
    with pytest.raises(OptionError) as caught:
        reshard.convert(source, tmp_path / "out", **given, **options)
    assert caught.value.hint == hint
    if options["to"] == "deepspeed" and "names" in options:
        assert "--to deepspeed" in str(caught.value)
    for at, mend in enumerate(mends):
        report = reshard.convert(source, tmp_path / f"out{at}", **given, **mend)
        assert report.verified
        assert bool(report.state) == (mend["to"] == "deepspeed" or "optimizer" in mend)
