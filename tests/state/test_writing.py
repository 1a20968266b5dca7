"""Training state written as DCP holds every moment bit for bit, and every key that torch asks for.

torch itself reads the outputs; no reader of ours stands between.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

import reshard
from reshard.conversion.training import _through
from reshard.core.arrangement import Stack, Whole
from reshard.core.state import Step, TrainingState
from reshard.errors import PlanError, VerificationError
from reshard.naming import translation
from tests.state.cases import DEEPSPEED, FSDP, case, opened, plain
from tests.tensors import raw

ELASTIC = "ds_s2_bf16_elastic"


KNOWN = tuple(name for name in (*DEEPSPEED, *FSDP) if name != ELASTIC)


# torch 2.13, torch.optim.AdamW(..).state_dict()["param_groups"][0], with a scheduler.
ADAMW = {
    "lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "foreach", "capturable",
    "differentiable", "fused", "decoupled_weight_decay", "initial_lr", "params",
}  # fmt: skip


def loaded(folder: Path) -> dict[str, Any]:
    """A save as torch gives it back without being told what it holds."""
    found: dict[str, Any] = {}
    _load_state_dict(
        found,
        storage_reader=FileSystemReader(str(folder)),
        planner=_EmptyStateDictLoadPlanner(),
        no_dist=True,
    )
    return found


def parts(folder: Path, layout: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The model and the optimizer of an output."""
    if layout == "lightrft":
        return loaded(folder), loaded(folder / "optim_states")
    if layout == "torchtitan":
        return torchtitan(folder)
    if layout == "accelerate":
        model, state = folder / "pytorch_model_fsdp_0", folder / "optimizer_0"
        return loaded(model)["model"], loaded(state)["optimizer"]
    both = loaded(folder)
    return both["model"], both["optimizer"]


def torchtitan(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Flattened, every parameter has its group's settings: those with equal ones are a group."""
    model = loaded(folder)
    state: dict[str, dict[str, Any]] = {}
    settings: dict[str, dict[str, Any]] = {}
    for key, value in model.pop("optimizer").items():
        what, _, rest = key.partition(".")
        name, _, kind = rest.rpartition(".")
        (state if what == "state" else settings).setdefault(name, {})[kind] = value
    assert model.pop("lr_scheduler", {"last_epoch": 3}) == {"last_epoch": 3}
    assert int(model.pop("train_state", {"step": 3})["step"]) == 3
    groups: dict[str, dict[str, Any]] = {}
    for name, own in settings.items():
        groups.setdefault(repr(own), {**own, "params": []})["params"].append(name)
    return model, {"state": state, "param_groups": list(groups.values())}


def converted(name: str, tmp_path: Path, **options: Any) -> Path:
    """The output of a golden run."""
    out = tmp_path / "out"
    report = reshard.convert(case(name).folder, out, to="dcp", optimizer=True, **options)
    assert report.verified
    assert report.state is not None
    return out


def check(name: str, model: dict[str, Any], optimizer: dict[str, Any]) -> None:
    """An output's two parts against what the running engine held."""
    run = case(name)
    truth = run.truth()
    trained = {key.partition(".")[2] for key in run.moments()}
    assert optimizer["state"].keys() == trained
    for tensor, state in optimizer["state"].items():
        assert state.keys() == {"step", "exp_avg", "exp_avg_sq"}
        for kind in ("exp_avg", "exp_avg_sq"):
            assert raw(state[kind]) == truth[f"{kind}.{tensor}"].data
            assert tuple(state[kind].shape) == truth[f"{kind}.{tensor}"].shape
        want = torch.tensor(float(run.facts["optimizer_step"]))
        assert (state["step"].dtype, state["step"].shape) == (torch.float32, ())
        assert torch.equal(state["step"], want)
        weight = truth.get(f"master.{tensor}") or truth[f"param.{tensor}"]
        assert raw(model[tensor]) == weight.data
    for alias, owner in run.facts["tied"].items():
        assert torch.equal(model[alias], model[owner])
    for frozen in run.facts["frozen"]:
        assert frozen in model
    groups = optimizer["param_groups"]
    assert {name for group in groups for name in group["params"]} == trained
    assert all(group.keys() >= ADAMW for group in groups)
    settings = [{k: v for k, v in group.items() if k != "params"} for group in groups]
    assert plain(settings) == run.facts["param_groups"]
    assert all(type(group["betas"]) is tuple for group in groups)


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("name", KNOWN)
def test_every_source_becomes_what_lightrft_loads(name: str, tmp_path: Path) -> None:
    check(name, *parts(converted(name, tmp_path), "lightrft"))


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("layout", ["accelerate", "nested", "torchtitan"])
@pytest.mark.parametrize("name", KNOWN)
def test_the_other_layouts(name: str, layout: str, tmp_path: Path) -> None:
    check(name, *parts(converted(name, tmp_path, layout=layout), layout))


@pytest.mark.heavy
@pytest.mark.parametrize("layout", ["lightrft", "accelerate", "nested", "torchtitan"])
def test_what_was_written_is_read_again(layout: str, tmp_path: Path) -> None:
    out = converted("ds_s2_fp32", tmp_path, layout=layout)
    with opened(case("ds_s2_fp32").folder) as before, opened(out) as after:
        assert before.state.steps == after.state.steps
        assert [g.names for g in before.state.groups] == [g.names for g in after.state.groups]
        for kind, table in before.state.moments.items():
            for name, entry in table.items():
                assert before.stored(entry) == after.stored(after.state.moments[kind][name])
        schedule = case("ds_s2_fp32").facts["lr_scheduler"]
        if layout == "torchtitan":
            schedule = {"last_epoch": schedule["last_epoch"]}
        assert plain(after.state.scheduler) == schedule
    again = tmp_path / "again"
    assert reshard.convert(out, again, to="dcp", optimizer=True, layout="lightrft").verified
    assert reshard.verify(again).num_tensors == 26 + 50


def test_lightrfts_small_files(tmp_path: Path) -> None:
    out = converted("ds_s2_fp32", tmp_path)
    client = torch.load(out / "client_state.pt", weights_only=True)
    assert client == {"consumed_samples": 12, "note": "hello"}
    schedule = torch.load(out / "scheduler_state.pt", weights_only=True)
    assert schedule == case("ds_s2_fp32").facts["lr_scheduler"]


def test_masters_that_are_rounded_are_a_finding(tmp_path: Path) -> None:
    report = reshard.convert(
        case("ds_s2_fp32").folder, tmp_path / "a", to="dcp", optimizer=True, dtype="bfloat16"
    )
    assert "state-masters-rounded" in [found.code for found in report.findings]
    report = reshard.convert(case("ds_s2_fp32").folder, tmp_path / "b", to="dcp", optimizer=True)
    assert "state-masters-rounded" not in [found.code for found in report.findings]


def test_a_moment_that_changed_is_found(tmp_path: Path) -> None:
    out = converted("ds_s2_fp32", tmp_path)
    reshard.verify(out)
    with opened(out) as found:
        place = found.state.moments["exp_avg"]["model.norm.weight"].fragments[0].in_file
    file = Path(place.file.path)
    content = bytearray(file.read_bytes())
    content[place.offset + 5] ^= 1
    file.write_bytes(content)
    with pytest.raises(VerificationError, match=r"exp_avg\.model\.norm\.weight.*has changed"):
        reshard.verify(out)


def test_steps_and_groups_are_compared_too(tmp_path: Path) -> None:
    out = converted("ds_s2_fp32", tmp_path)
    manifest = json.loads((out / "reshard.json").read_text())
    manifest["run"]["steps"]["model.norm.weight"] = 4
    (out / "reshard.json").write_text(json.dumps(manifest))
    with pytest.raises(VerificationError, match="steps of its optimizer"):
        reshard.verify(out)


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    first = converted("uc_s2_fp32", tmp_path / "1", threads=1)
    second = converted("uc_s2_fp32", tmp_path / "2", threads=4)
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert len(files) == 7
    for file in files:
        assert (first / file).read_bytes() == (second / file).read_bytes()


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    report = reshard.convert(
        case("ds_s2_fp32").folder, tmp_path / "out", to="dcp", optimizer=True, dry_run=True
    )
    assert not (tmp_path / "out").exists()
    assert report.state is not None
    assert report.state.steps == (3,)
    assert "exp_avg, exp_avg_sq of 25 parameters in 2 groups, step 3" in str(report)


def base_model(tmp_path: Path) -> Path:
    """The Hugging Face model that the golden runs are of."""
    base = tmp_path / "base"
    reshard.convert(case("ds_s2_fp32").folder, base, dtype="bfloat16")
    config = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 98,
        "hidden_size": 17, "head_dim": 10, "intermediate_size": 27, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }  # fmt: skip
    (base / "config.json").write_text(json.dumps(config))
    return base


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_with_a_base_the_masters_stay_and_names_are_the_loaded_models(tmp_path: Path) -> None:
    base = base_model(tmp_path)
    out = converted("ds_s2_fp32", tmp_path, base=base, allow_unchanged=True)
    check("ds_s2_fp32", *parts(out, "lightrft"))


def test_a_base_whose_names_the_moments_do_not_fit(tmp_path: Path) -> None:
    base = base_model(tmp_path)
    weights = load_file(base / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(PlanError, match="moments of 1 parameters cannot be carried") as caught:
        converted("ds_s2_fp32", tmp_path, base=base, allow=["model.norm.weight"])
    assert "Leave out --base" in str(caught.value)
    assert converted("ds_s2_fp32", tmp_path).is_dir()


def test_moments_follow_their_weights_through_a_map() -> None:
    with opened(case("ds_s2_fp32").folder) as found:
        names = ["model.layers.0.self_attn.q_proj.bias", "model.layers.1.self_attn.q_proj.bias"]
        state = only(found.state, names)
        carried = _through(state, translation({"both": Stack(tuple(map(Whole, names)))}))
        assert carried.names == ("both",)
        assert [group.names for group in carried.groups] == [(), ("both",)]
        for kind, table in carried.moments.items():
            want = [found.array(state.moments[kind][name]) for name in names]
            assert np.array_equal(found.array(table["both"]), np.stack(want))


def test_parameters_of_two_groups_are_not_joined() -> None:
    with opened(case("ds_s2_fp32").folder) as found:
        names = ["model.norm.weight", "model.layers.1.input_layernorm.weight"]
        state = only(found.state, names)
        groups = tuple(replace(found.state.groups[0], names=(name,)) for name in names)
        joined = translation({"both": Stack(tuple(map(Whole, names)))})
        with pytest.raises(PlanError, match="different parameter groups"):
            _through(replace(state, groups=groups), joined)
        steps = dict(zip(names, (Step(3), Step(4)), strict=True))
        with pytest.raises(PlanError, match="different steps"):
            _through(replace(state, steps=steps), joined)


def only(state: TrainingState, names: list[str]) -> TrainingState:
    """The state of a few parameters."""
    return replace(
        state,
        moments={k: {n: table[n] for n in names} for k, table in state.moments.items()},
        masters={},
        steps={name: state.steps[name] for name in names},
        groups=tuple(
            replace(group, names=tuple(n for n in group.names if n in names))
            for group in state.groups
        ),
    )
