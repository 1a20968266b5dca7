"""`verify --against` and `diff --optimizer`: moments, steps and groups are compared too."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

import reshard
from reshard.conversion.options import Layout
from reshard.errors import PlanError, VerificationError
from tests.state.cases import DEEPSPEED, FSDP, case, opened
from tests.state.test_refusals import base_state, edited
from tests.state.test_writing import base_model, loaded

RANK1 = "global_step3/zero_pp_rank_1_mp_rank_00_optim_states.pt"
RANK0 = "global_step3/zero_pp_rank_0_mp_rank_00_optim_states.pt"
KNOWN = [name for name in (*DEEPSPEED, *FSDP) if "elastic" not in name]


@pytest.mark.heavy
@pytest.mark.parametrize("name", KNOWN)
def test_an_output_is_what_its_source_holds(name: str, tmp_path: Path) -> None:
    source, out = case(name).folder, tmp_path / "out"
    report = reshard.convert(source, out, to="dcp", optimizer=True)
    found = reshard.verify(out, against=source)
    assert report.state is not None
    assert found.num_tensors >= report.num_tensors + 2 * report.state.num_parameters


def test_with_a_base_names_are_carried_again(tmp_path: Path) -> None:
    base, source, out = base_model(tmp_path), case("ds_s2_fp32").folder, tmp_path / "out"
    reshard.convert(source, out, to="dcp", optimizer=True, base=base, allow_unchanged=True)
    assert reshard.verify(out, against=source, base=base).num_tensors >= 26 + 50


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("to", ["deepspeed", "dcp"])
def test_hyperparameters_that_were_given_are_not_asked_for_again(to: Any, tmp_path: Path) -> None:
    """verify has no --hyperparameters, and needs none, also where names were changed."""
    both = loaded(case("fsdp2_nested_fp32").folder)
    state, groups = both["optimizer"]["state"], both["optimizer"]["param_groups"]
    for group in groups:
        del group["weight_decay"]
        group["params"] = [f"policy.{name}" for name in group["params"]]
    optimizer = {"state": {f"policy.{n}": s for n, s in state.items()}, "param_groups": groups}
    model = {f"policy.{name}": tensor for name, tensor in both["model"].items()}
    source, base = tmp_path / "source", base_model(tmp_path)
    dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=source, no_dist=True)
    given = [
        {"lr": g["lr"], "betas": g["betas"], "eps": g["eps"], "weight_decay": 0.3} for g in groups
    ]
    file = tmp_path / "groups.json"
    file.write_text(json.dumps(given))
    options: dict[str, Any] = {"to": to, "optimizer": True, "base": base, "allow_unchanged": True}
    with pytest.raises(PlanError, match="does not hold the weight_decay"):
        reshard.convert(source, tmp_path / "out", **options)
    reshard.convert(source, tmp_path / "out", hyperparameters=file, **options)
    assert reshard.verify(tmp_path / "out", against=source, base=base).num_tensors >= 75


def changed(tmp_path: Path, edit: Callable[[dict[str, Any]], None], file: str = RANK1) -> Path:
    (tmp_path / "other").mkdir()
    return edited("ds_s2_fp32", tmp_path / "other", file, edit)


def bump(content: dict[str, Any]) -> None:
    # The last parameter of the matrices on rank 1: layer 1's down_proj, behind it the padding.
    base_state(content)[0]["exp_avg"][2990] += 0.25


@pytest.mark.parametrize("layout", ["lightrft", "accelerate", "nested"])
def test_another_moment_is_found(layout: Layout, tmp_path: Path) -> None:
    out = tmp_path / "out"
    reshard.convert(case("ds_s2_fp32").folder, out, to="dcp", optimizer=True, layout=layout)
    with pytest.raises(VerificationError, match=r"1 of 459 elements differ, by 0\.25") as caught:
        reshard.verify(out, against=changed(tmp_path, bump))
    assert caught.value.tensor == "exp_avg: model.layers.1.mlp.down_proj.weight"


@pytest.mark.heavy
@pytest.mark.parametrize("damage", ["edited", "removed"])
@pytest.mark.parametrize("layout", ["lightrft", "accelerate"])
def test_a_schedule_that_changed_is_found(layout: Layout, damage: str, tmp_path: Path) -> None:
    source, out = case("ds_s2_fp32").folder, tmp_path / "out"
    reshard.convert(source, out, to="dcp", optimizer=True, layout=layout)
    files = sorted(out.rglob("*.pt"))
    assert any(file.name.startswith("scheduler") for file in files)
    for file in files:
        before = file.read_bytes()
        if damage == "removed":
            file.unlink()
        else:
            torch.save({"last_epoch": 77}, file)
        for against in (None, source):
            with pytest.raises(VerificationError, match=file.name):
                reshard.verify(out, against=against)
        file.write_bytes(before)
    reshard.verify(out, against=source)


def test_diff_shows_the_moments_by_layer(tmp_path: Path) -> None:
    one, other = case("ds_s2_fp32").folder, changed(tmp_path, bump)
    assert reshard.diff(one, other).same
    found = reshard.diff(one, other, optimizer=True)
    assert [d.name for d in found.differences] == ["exp_avg: model.layers.1.mlp.down_proj.weight"]
    layers = {row.name: row for row in found.layers()}
    assert layers["exp_avg: model.layers.1"].largest == pytest.approx(0.25)
    assert layers["exp_avg_sq: model.layers.1"].largest == 0
    assert layers["model.layers.1"].largest == 0
    assert reshard.diff(one, one, optimizer=True).same


def test_steps_and_hyperparameters_are_differences(tmp_path: Path) -> None:
    def later(content: dict[str, Any]) -> None:
        for state in base_state(content).values():
            state["step"] += 1
        group = content["optimizer_state_dict"]["base_optimizer_state"]["param_groups"][1]
        group["weight_decay"] = 0.5

    run = changed(tmp_path, later)
    content = torch.load(run / RANK0, weights_only=False)
    later(content)
    torch.save(content, run / RANK0)
    found = reshard.diff(case("ds_s2_fp32").folder, run, optimizer=True)
    texts = {one.name: str(one) for one in found.differences}
    assert texts["step: model.norm.weight"] == "setting: 3 and 4"
    (decay,) = [text for name, text in texts.items() if name.endswith(": weight_decay")]
    assert decay == "setting: 0.0 and 0.5"
    assert len(texts) == 25 + 1
    assert "26 of" in str(found)
    out = tmp_path / "out"
    reshard.convert(case("ds_s2_fp32").folder, out, to="dcp", optimizer=True)
    with pytest.raises(VerificationError, match="setting: 4 and 3"):
        reshard.verify(out, against=run)


def test_formats_are_compared_by_their_names() -> None:
    found = reshard.diff(case("ds_s2_fp32").folder, case("uc_s2_fp32").folder, optimizer=True)
    assert found.same
    found = reshard.diff(
        case("fsdp2_nested_fp32").folder, case("fsdp2_titan_fp32").folder, optimizer=True
    )
    assert not [one for one in found.differences if one.name.startswith("exp_avg")]


def test_a_side_without_state(tmp_path: Path) -> None:
    out = tmp_path / "out"
    reshard.convert(case("ds_s2_fp32").folder, out, to="dcp")
    with pytest.raises(PlanError, match="it holds no training state") as caught:
        reshard.diff(case("ds_s2_fp32").folder, out, optimizer=True)
    assert "Leave out --optimizer" in str(caught.value)
    assert reshard.diff(case("ds_s2_fp32").folder, out).same


@pytest.mark.parametrize("layout", ["lightrft", "torchtitan"])
def test_settings_that_are_equal_but_written_otherwise(layout: Layout, tmp_path: Path) -> None:
    """`0` and `0.0`: flattened, groups with the same settings are one, and these differ."""
    model = torch.nn.ModuleDict({name: torch.nn.Linear(3, 3) for name in ("a", "b", "c")})
    groups = [
        {"params": list(model[name].named_parameters(prefix=name)), "weight_decay": decay}
        for name, decay in (("a", 0.0), ("b", 0), ("c", 0.0))
    ]
    optimizer = torch.optim.AdamW(groups)
    model["c"](model["b"](model["a"](torch.randn(2, 3)))).sum().backward()
    optimizer.step()
    source, out = tmp_path / "run.pt", tmp_path / "out"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, source)
    assert reshard.convert(source, out, to="dcp", optimizer=True, layout=layout).verified
    assert reshard.verify(out, against=source).num_tensors == 18
    with opened(out) as found:
        decays = [(group.names[0], group.hyperparameters["weight_decay"]) for group in
                  found.state.groups]  # fmt: skip
    apart = [("a.weight", 0.0), ("b.weight", 0), ("c.weight", 0.0)]
    assert repr(decays) == repr(apart if layout == "lightrft" else apart[:2])
