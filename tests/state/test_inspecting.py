"""`inspect --optimizer` and `reshard.open(..).optimizer`: metadata first, values on demand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import reshard
from reshard.cli.app import reshard as command
from reshard.cli.app import run
from reshard.errors import IncompleteError
from tests.state.cases import DEEPSPEED, FSDP, case, copied, plain


@pytest.mark.parametrize("name", [*DEEPSPEED, *FSDP])
def test_the_api_gives_every_moment(name: str) -> None:
    run = case(name)
    optimizer = reshard.open(run.folder).optimizer
    assert optimizer is not None
    for key, want in run.moments().items():
        kind, _, tensor = key.partition(".")
        held = optimizer.moments[kind][tensor]
        assert (held.dtype.safetensors, held.shape) == (want.dtype, want.shape)
        assert held.numpy().tobytes() == want.data
    assert set(optimizer.steps.values()) == {run.facts["optimizer_step"]}


def test_a_checkpoint_without_state(tmp_path: Path) -> None:
    reshard.convert(case("ds_s2_fp32").folder, tmp_path / "out")
    assert reshard.open(tmp_path / "out").optimizer is None
    inspection = reshard.inspect(tmp_path / "out", optimizer=True)
    assert "optimizer  none" in str(inspection)
    assert inspection.to_json()["optimizer"] is None


def test_files_that_changed_since_are_not_read(tmp_path: Path) -> None:
    run = copied("ds_s2_fp32", tmp_path)
    checkpoint = reshard.open(run)
    (file,) = run.glob("global_step3/zero_pp_rank_1*")
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(IncompleteError):
        _ = checkpoint.optimizer


def test_inspect_shows_the_state() -> None:
    text = str(reshard.inspect(case("ds_s2_fp32").folder, optimizer=True))
    rows = dict(line.split(maxsplit=1) for line in text.splitlines())
    assert "exp_avg (float32), exp_avg_sq (float32) of 25 parameters, step 3" in rows["optimizer"]
    assert "group 0    14 parameters; " in text
    assert "lr 0.00769" in text
    assert "last_epoch 3" in rows["scheduler"]
    assert "global_steps 3" in rows["counters"]
    assert "note hello" in rows["client"]
    without = str(reshard.inspect(case("ds_s2_fp32").folder)).splitlines()
    assert not [line for line in without if line.startswith("optimizer")]


def test_inspect_says_what_the_checkpoint_does_not_hold() -> None:
    text = str(reshard.inspect(case("ds_s2_bf16_elastic").folder, optimizer=True))
    assert "its hyperparameters are not in the checkpoint" in text


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_inspect_of_an_optimizer_that_has_no_state(
    tmp_path: Path, kind: type[torch.optim.Optimizer]
) -> None:
    """SGD without momentum never has any, Adam none before its first step."""
    model = torch.nn.Linear(3, 4)
    optimizer = kind(model.parameters(), lr=0.1)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.bin")
    text = str(reshard.inspect(tmp_path, optimizer=True))
    assert "no moments of 2 parameters, 0 B" in text
    assert "2 parameters; lr 0.1" in text


def test_inspect_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    folder = case("fsdp2_titan_fp32").folder
    assert run(command, ["inspect", str(folder), "--optimizer", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["optimizer"]
    held = sum(len(stored.data) for stored in case("fsdp2_titan_fp32").moments().values())
    assert found["nbytes"] == held
    assert found["steps"] == {"3": 25}
    assert [group["num_parameters"] for group in found["groups"]] == [14, 11]
    want = case("fsdp2_titan_fp32").facts["param_groups"]
    assert [plain(group["hyperparameters"]) for group in found["groups"]] == want
    assert found["scheduler"] == {"last_epoch": 3}


def test_inspect_says_that_names_were_told_by_order(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command, ["inspect", str(case("ds_s0_fp32").folder), "--optimizer"]) == 0
    assert "derived those of" in capsys.readouterr().err
