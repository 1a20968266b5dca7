"""Universal checkpoints that reshard writes: every source, read by torch and by our own reader.

What DeepSpeed makes of them, test_curves proves.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import load_file
from torch.distributed import checkpoint as dcp

import reshard
from reshard.core.findings import Finding
from reshard.core.packed import pieces
from reshard.core.state import Step
from reshard.errors import OptionError, PlanError, VerificationError
from reshard.formats.deepspeed import layout, universal_findings
from tests.state.cases import DEEPSPEED, FSDP, case, opened, plain
from tests.state.conftest import Ranks
from tests.state.jobs import Job, Place
from tests.state.test_writing import loaded, parts
from tests.tensors import raw

ELASTIC = "ds_s2_bf16_elastic"
KNOWN = tuple(name for name in (*DEEPSPEED, *FSDP) if name != ELASTIC)
MODEL = "mp_rank_00_model_states.pt"


def written(folder: Path, tmp_path: Path, **options: Any) -> tuple[Path, reshard.Report]:
    """The output of a save, and the report."""
    report = reshard.convert(folder, tmp_path / "out", to="deepspeed", **options)
    assert report.verified
    return tmp_path / "out", report


def tag(out: Path) -> Path:
    """The folder that `latest_universal` names."""
    return out / (out / "latest_universal").read_text("utf-8")


def wide(data: bytes, dtype: str) -> bytes:
    """The bytes of a truth's tensor in float32."""
    return (
        data
        if dtype == "F32"
        else raw(torch.frombuffer(bytearray(data), dtype=torch.bfloat16).float())
    )


@pytest.mark.heavy
@pytest.mark.parametrize("name", KNOWN)
def test_every_source_becomes_what_deepspeed_loads(name: str, tmp_path: Path) -> None:
    run = case(name)
    out, _ = written(run.folder, tmp_path)
    truth = run.truth()
    trained = sorted({key.partition(".")[2] for key in run.moments()})
    assert sorted(path.name for path in (tag(out) / "zero").iterdir() if path.is_dir()) == trained
    for parameter in trained:
        folder = tag(out) / "zero" / parameter
        master = truth.get(f"master.{parameter}") or truth[f"param.{parameter}"]
        for kind, want in {
            "fp32": master,
            "exp_avg": truth[f"exp_avg.{parameter}"],
            "exp_avg_sq": truth[f"exp_avg_sq.{parameter}"],
        }.items():
            found = torch.load(folder / f"{kind}.pt")
            assert found["cat_dim"] == 0
            assert (found["param"].dtype, tuple(found["param"].shape)) == (
                torch.float32,
                want.shape,
            )
            assert raw(found["param"]) == wide(want.data, want.dtype)
        step = torch.load(folder / "step.pt")
        assert (step.dtype, step.shape, step) == (torch.float32, (), run.facts["optimizer_step"])
    state = torch.load(tag(out) / "zero" / "optimizer_state.pt")
    settings = [{k: v for k, v in g.items() if k != "params"} for g in state["param_groups"]]
    assert plain(settings) == run.facts["param_groups"]
    for model in (MODEL, f"zero_pp_rank_0_{MODEL}"):
        head = torch.load(tag(out) / model)
        assert head["global_steps"] in (3, run.facts["optimizer_step"])
        assert head["shared_params"] == run.facts["tied"]
        assert sorted(head.get("module", run.facts["frozen"])) == run.facts["frozen"]


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["ds_s2_fp32", "ds_s3_fp32_subgroups", "fsdp2_accelerate_bf16"])
def test_what_was_written_is_read_again(name: str, tmp_path: Path) -> None:
    out, _ = written(case(name).folder, tmp_path)
    with opened(case(name).folder) as before, opened(out) as after:
        counts = [{n: s.count for n, s in of.state.steps.items()} for of in (before, after)]
        assert counts[0] == counts[1]
        assert [g.names for g in before.state.groups] == [g.names for g in after.state.groups]
        assert before.state.scheduler == after.state.scheduler
        assert before.state.client_state.items() <= after.state.client_state.items()
    again, _ = written(out, tmp_path / "again")
    files = {p.relative_to(out): p.read_bytes() for p in out.rglob("*.pt")}
    assert files == {p.relative_to(again): p.read_bytes() for p in again.rglob("*.pt")}


def test_a_damaged_moment_is_found(tmp_path: Path) -> None:
    out, _ = written(case("ds_s2_fp32").folder, tmp_path)
    path = tag(out) / "zero" / "model.norm.weight" / "exp_avg.pt"
    content = torch.load(path)
    content["param"][0] += 1
    torch.save(content, path)
    with pytest.raises(VerificationError, match="exp_avg") as caught:
        reshard.verify(out)
    assert caught.value.tensor == "exp_avg.model.norm.weight"


def test_hyperparameters_that_no_file_holds_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="does not hold the lr"):
        written(case(ELASTIC).folder, tmp_path)
    assert not (tmp_path / "out").exists()
    group = {"lr": 0.1, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}
    file = tmp_path / "groups.json"
    file.write_text(json.dumps([group, {**group, "weight_decay": 0.0}]))
    out, _ = written(case(ELASTIC).folder, tmp_path, hyperparameters=file)
    state = torch.load(tag(out) / "zero" / "optimizer_state.pt")
    assert [g["weight_decay"] for g in state["param_groups"]] == [0.1, 0.0]
    for key, want in case(ELASTIC).moments().items():
        kind, _, name = key.partition(".")
        assert raw(torch.load(tag(out) / "zero" / name / f"{kind}.pt")["param"]) == want.data


def test_what_deepspeed_does_with_it_is_said(tmp_path: Path) -> None:
    _, report = written(case("ds_s2_fp32").folder, tmp_path / "a")
    codes = {found.code for found in report.findings}
    assert codes >= {"universal-unrestored", "universal-groups", "universal-stage3"}
    assert "universal-no-schedule" not in codes
    _, report = written(case("fsdp2_nested_fp32").folder, tmp_path / "b")
    assert "universal-no-schedule" in {found.code for found in report.findings}


def said(name: str, **changes: Any) -> set[str]:
    """The codes of the findings on a golden state that was changed."""
    with opened(case(name).folder) as run:
        state = replace(run.state, **changes)
        shapes = {name: run.catalog.entries[name].spec.shape for name in state.names}
        found: tuple[Finding, ...] = universal_findings.of(state, state.groups, shapes, [])
    return {finding.code for finding in found}


def test_stage_3_is_right_where_there_is_one_group_of_adam() -> None:
    with opened(case("ds_s2_fp32").folder) as run:
        first = run.state.groups[0]
        momentum = {"momentum_buffer": run.state.moments["exp_avg"]}
    assert said("ds_s2_fp32", groups=(first,)) == set()
    assert said("ds_s2_fp32", groups=(first,), moments=momentum) == {"universal-stage3"}
    assert said("ds_s2_fp32", groups=(first, first)) == {"universal-groups", "universal-stage3"}


def test_a_loss_scale_that_stays_behind_is_said() -> None:
    scaler = {"cur_scale": 256.0, "dynamic": True}
    assert "universal-loss-scale" in said("ds_s2_fp32", scaler=scaler)


def test_integers_count_for_optimizers_that_count_with_integers(tmp_path: Path) -> None:
    """DeepSpeedCPUAdam and FusedAdam: stage 3 would let all groups count one tensor."""
    with opened(case("ds_s2_fp32").folder) as run:
        steps = {name: Step(3, "int") for name in run.state.steps}
        state = replace(run.state, steps=steps)
        weights = [(e.spec, e, None) for e in run.catalog.entries.values()]
        laid = layout.lay_out_state(weights, state, 1, None)
    texts = dict(laid.texts)
    path = tmp_path / "state.pt"
    text = next(text for name, text in texts.items() if "optimizer_state" in name)
    path.write_bytes(b"".join(pieces(text)))
    assert torch.load(path)["optimizer_state_dict"]["state"][0]["step"] == 3


def dcp_save(folder: Path, steps: dict[str, float]) -> Path:
    """A save of two parameters that were updated so many times."""
    weights = {name: torch.ones(2, 2) * (at + 1) for at, name in enumerate(steps)}
    state = {
        name: {
            "step": torch.tensor(step),
            "exp_avg": torch.ones(2, 2),
            "exp_avg_sq": torch.ones(2, 2),
        }
        for name, step in steps.items()
    }
    group = torch.optim.AdamW(weights.values(), lr=0.1).state_dict()["param_groups"][0]
    whole = {"state": state, "param_groups": [{**group, "params": list(steps)}]}
    dcp.save(weights, checkpoint_id=folder, no_dist=True)
    dcp.save(whole, checkpoint_id=folder / "optim_states", no_dist=True)
    return folder


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_group_of_different_steps(tmp_path: Path) -> None:
    folder = dcp_save(tmp_path / "save", {"a.weight": 3.0, "b.weight": 4.0})
    with pytest.raises(PlanError, match="a different number of times") as caught:
        written(folder, tmp_path)
    assert caught.value.hint == "Write it with --to dcp, which has a step for each parameter."
    assert reshard.convert(folder, tmp_path / "out", to="dcp", optimizer=True).verified


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_groups_that_cover_frozen_parameters(tmp_path: Path) -> None:
    """As of `AdamW(model.parameters())`: DCP keeps the names, DeepSpeed's groups lack them."""
    folder = dcp_save(tmp_path / "save", {"a.weight": 3.0, "b.weight": 3.0})
    state = loaded(folder / "optim_states")
    kept = dict(state["state"])
    del state["state"]["b.weight"]
    shutil.rmtree(folder / "optim_states")
    dcp.save(state, checkpoint_id=folder / "optim_states", no_dist=True)
    out, report = written(folder, tmp_path)
    (told,) = [f for f in report.findings if f.code == "state-never-updated"]
    assert "cover 1 parameters that it holds no moments of" in told.message
    assert told.message.endswith("b.weight.")
    assert [path.name for path in (tag(out) / "zero").iterdir() if path.is_dir()] == ["a.weight"]
    model = torch.load(tag(out) / MODEL)
    assert list(model["module"]) == ["b.weight"]
    assert model["frozen_param_shapes"].keys() == {"b.weight"}
    for name in ("lightrft", "torchtitan"):
        again = tmp_path / name
        reshard.convert(folder, again, to="dcp", optimizer=True, layout=name)
        model_part, optimizer = parts(again, name)
        assert optimizer["state"].keys() == {"a.weight"}
        assert sorted(optimizer["param_groups"][0]["params"]) == ["a.weight", "b.weight"]
        assert torch.equal(optimizer["state"]["a.weight"]["exp_avg"], kept["a.weight"]["exp_avg"])
        assert model_part.keys() == {"a.weight", "b.weight"}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_weights_without_a_state(tmp_path: Path) -> None:
    folder = dcp_save(tmp_path / "save", {"a.weight": 3.0})
    shutil.rmtree(folder / "optim_states")
    with pytest.raises(PlanError, match="only together with an optimizer's state") as caught:
        written(folder, tmp_path)
    assert "--to hf" in str(caught.value.hint)
    assert reshard.convert(folder, tmp_path / "out", to="hf").verified
    assert raw(load_file(tmp_path / "out" / "model.safetensors")["a.weight"]) == raw(
        torch.ones(2, 2)
    )


@pytest.mark.parametrize(
    ("option", "value"), [("max_shard_size", "1GB"), ("dtype", "bfloat16"), ("layout", "nested")]
)
def test_options_that_have_no_place(option: str, value: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError) as caught:
        written(case("ds_s2_fp32").folder, tmp_path, **{option: value})
    assert caught.value.option == option
    assert f"Leave out --{option.replace('_', '-')}." == caught.value.hint
    written(case("ds_s2_fp32").folder, tmp_path)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_tied_head_that_dcp_stored_twice(tmp_path: Path) -> None:
    """It is one parameter of the loaded model, and no frozen one."""
    out, report = written(case("fsdp2_lightrft_fp32").folder, tmp_path)
    assert report.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    (found,) = [f for f in report.findings if f.code == "universal-unrestored"]
    assert "lm_head" not in found.message
    assert "lm_head.weight" not in torch.load(tag(out) / MODEL)["module"]


@pytest.mark.slow
def test_a_script_with_a_schedule_and_a_folder_without(ranks: Ranks, tmp_path: Path) -> None:
    """DeepSpeed fails, and with load_lr_scheduler_states=False it goes on."""
    saved = Place(str(tmp_path / "saved"), "nested")
    first = Job("fsdp2", 1, str(tmp_path / "before"), (1, 3), save=saved, kind="llama")
    ranks.run(first)
    (tmp_path / "saved" / "scheduler.pt").unlink()
    reshard.convert(tmp_path / "saved", tmp_path / "out", to="deepspeed")
    place = Place(str(tmp_path / "out"), "universal")
    job = Job("zero2", 1, str(tmp_path / "after"), (3, 4), load=place, kind="llama")
    with pytest.raises(AssertionError, match="AttributeError"):
        ranks.run(job)
    ranks.run(replace(job, schedule=False))
