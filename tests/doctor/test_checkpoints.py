"""Training checkpoints of every format: healthy, damaged, with weights that cannot be right."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed import checkpoint as dcp

import reshard
from reshard.cli.app import reshard as command
from reshard.cli.app import run
from tests.doctor.conftest import evidence, names
from tests.hints import tiny
from tests.megatron import golden as megatron
from tests.ranks import test_golden as ranks

GOLDEN = Path(__file__).parents[1] / "golden"
MEGATRON = ("bridge_llama_tp2_bf16", "mlm_qwen3moe_singleton_fp32",
            "nemo2_qwen2_tp2_bf16", "mcore012_llama_dp2_distopt_modelspace_bf16",
            "verl_megatron_v2_qwen2_pp2_bf16")  # fmt: skip
CHECKPOINTS = {
    **{name: GOLDEN / name / "checkpoint" for name in ("dcp", "zero2", "zero3", "legacy")},
    **{name: GOLDEN / "ranks" / name / "checkpoint" for name in ranks.CASES},
    **{name: megatron.checkpoint(name) for name in MEGATRON},
}


def found(diagnosis: reshard.Diagnosis) -> list[str]:
    """What is wrong; not what every checkpoint is told of."""
    return [one.code for one in diagnosis.findings if one.severity != "info"]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_format_is_examined(name: str) -> None:
    diagnosis = reshard.doctor(CHECKPOINTS[name])
    inspected = reshard.inspect(CHECKPOINTS[name])
    assert (diagnosis.num_tensors, diagnosis.total_bytes) == (
        inspected.num_tensors,
        inspected.total_bytes,
    )
    assert found(diagnosis) == []
    assert names(diagnosis)[0] == "model-files-unchecked"
    assert not diagnosis.errors
    assert diagnosis.repairable == ()


@pytest.mark.parametrize("name", ranks.CASES)
def test_ranks_files_fit_onto_their_base(name: str, tmp_path: Path) -> None:
    base = ranks.base_of(name, tmp_path / "base")
    diagnosis = reshard.doctor(CHECKPOINTS[name], base=base)
    assert set(found(diagnosis)) <= {"flat-parameters-cut"}


@pytest.mark.parametrize("name", MEGATRON)
def test_megatrons_fit_onto_their_base(name: str, tmp_path: Path) -> None:
    base = megatron.base(name, tmp_path / "base")
    assert found(reshard.doctor(CHECKPOINTS[name], base=base)) == []


@pytest.mark.parametrize("name", [name for name in CHECKPOINTS if name != "legacy"])
def test_a_damaged_byte(name: str, tmp_path: Path) -> None:
    """The files' own checksums show it, in whatever format that has some."""
    copy = Path(shutil.copytree(CHECKPOINTS[name], tmp_path / "copy"))
    catalog = reshard.open(copy).catalog
    entry = max(catalog.entries.values(), key=lambda one: one.spec.nbytes)
    extent = entry.fragments[0].in_file
    data = bytearray(Path(extent.file.path).read_bytes())
    data[extent.offset + 1] ^= 1
    Path(extent.file.path).write_bytes(data)
    diagnosis = reshard.doctor(copy)
    assert names(diagnosis)[0] == "checkpoint-damaged"
    assert "CRC-32" in evidence(diagnosis, "checkpoint-damaged")
    assert diagnosis.errors


def test_a_rank_that_is_not_there(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(CHECKPOINTS["no-mesh"], tmp_path / "copy"))
    lost = next(copy.rglob("model_world_size_*_rank_1.pt"))
    lost.unlink()
    diagnosis = reshard.doctor(copy)
    assert names(diagnosis) == ["checkpoint-damaged"]
    assert "rank" in evidence(diagnosis, "checkpoint-damaged")
    assert (diagnosis.num_tensors, [one.code for one in diagnosis.errors]) == (
        0, ["checkpoint-damaged"],
    )  # fmt: skip


def dcp_of(folder: Path, state: dict[str, torch.Tensor]) -> Path:
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


def file_of(folder: Path, state: dict[str, torch.Tensor]) -> Path:
    return tiny.saved(folder / "model.pt", {"model": state})


WRITERS: dict[str, Callable[[Path, dict[str, torch.Tensor]], Path]] = {
    "dcp": dcp_of,
    "deepspeed": tiny.zero,
    "torch": file_of,
}


@pytest.mark.parametrize("format_", WRITERS)
def test_weights_that_cannot_be_right(format_: str, tmp_path: Path) -> None:
    q, k = (f"model.layers.1.self_attn.{part}_proj.weight" for part in "qk")
    up, gate = (f"model.layers.0.mlp.{part}_proj.weight" for part in ("up", "gate"))

    def nan(state: dict[str, torch.Tensor]) -> None:
        state[q][0, 1] = torch.nan

    def zero(state: dict[str, torch.Tensor]) -> None:
        state[q].zero_()

    def constant(state: dict[str, torch.Tensor]) -> None:
        state[q].fill_(0.5)

    def repeated(state: dict[str, torch.Tensor]) -> None:
        state[up].copy_(state[gate])

    def large(state: dict[str, torch.Tensor]) -> None:
        state[q].mul_(1e5)

    assert found(reshard.doctor(WRITERS[format_](tmp_path / "whole", tiny.state()))) == []
    findings = {}
    for number, (change, name) in enumerate(
        ((nan, q), (zero, q), (constant, q), (repeated, up), (large, q))
    ):
        state = {name: tensor.float().clone() for name, tensor in tiny.state().items()}
        change(state)
        diagnosis = reshard.doctor(WRITERS[format_](tmp_path / str(number), state))
        (one,) = (one for one in diagnosis.findings if one.severity != "info")
        assert name in one.message
        assert k not in one.message
        findings[one.code] = one.severity
    assert findings["weights-not-finite"] == findings["weights-all-zero"] == "error"
    assert findings["weights-constant"] == "error"
    assert findings["weights-repeated"] == findings["weights-large"] == "warning"


def test_megatrons_layers_go_by_the_hubs_names(tmp_path: Path) -> None:
    name = "bridge_llama_tp2_bf16"
    base = megatron.base(name, tmp_path / "base")
    reshard.convert(megatron.checkpoint(name), tmp_path / "native")
    state = load_file(tmp_path / "native" / "model.safetensors")
    qkv = state["decoder.layers.self_attention.linear_qkv.weight"]
    qkv[1, 0, 0] = torch.inf
    folder = megatron.saved(tmp_path / "iter_0000001", state)
    told = evidence(reshard.doctor(folder), "weights-not-finite")
    assert "1 of 9 tensors: decoder.layers.self_attention.linear_qkv.weight (0 NaN" in told
    told = evidence(reshard.doctor(folder, base=base), "weights-not-finite")
    assert "model.layers.1.self_attn.q_proj.weight (0 NaN, 1 infinite" in told


def test_what_its_base_says(tmp_path: Path) -> None:
    """The base's own values; another model's base."""
    base = tiny.model(tmp_path / "base", 2)
    run_ = dcp_of(tmp_path / "run", tiny.state())
    diagnosis = reshard.doctor(run_, base=base)
    assert found(diagnosis) == ["identical-to-base"]
    assert [one.code for one in diagnosis.errors] == ["identical-to-base"]
    other = tiny.model(tmp_path / "other", name="qwen2_5_vl")
    assert found(reshard.doctor(run_, base=other)) == ["names-do-not-fit"]


def test_updates_that_are_not_trained_yet(tmp_path: Path) -> None:
    """lora_B is zero then, which is right; what is under it is examined as it is."""
    state = {n: torch.zeros_like(t) if "lora_B" in n else t for n, t in tiny.tuned().items()}
    run_ = dcp_of(tmp_path / "run", state)
    assert found(reshard.doctor(run_)) == []
    base = tiny.model(tmp_path / "base", 3)
    assert found(reshard.doctor(run_, base=base)) == []


def test_tied_tensors_are_not_repeated(tmp_path: Path) -> None:
    state = {**tiny.state(), tiny.HEAD: tiny.state()[tiny.EMBEDDING].clone()}
    assert found(reshard.doctor(dcp_of(tmp_path / "run", state))) == []


def test_one_save_of_a_run_is_selected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step, value in ((1, torch.nan), (2, 1.0)):
        state = {name: tensor.clone() for name, tensor in tiny.state().items()}
        state["model.norm.weight"][0] = value
        dcp_of(tmp_path / "run" / f"step_{step}", state)
    assert run(command, ["doctor", str(tmp_path / "run"), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    codes = [one["code"] for one in shown["findings"]]
    assert codes == ["model-files-unchecked", "checkpoint-taken"]
    assert run(command, ["doctor", str(tmp_path / "run"), "--tag", "1"]) == 1
    assert "model.norm.weight (1 NaN" in capsys.readouterr().out


def test_roles_and_parts(tmp_path: Path) -> None:
    for role in ("actor", "critic"):
        step = tmp_path / "run" / "global_step_5" / role / "dist_ckpt"
        megatron.saved(step, {"decoder.final_layernorm.weight": torch.ones(2)})
    with pytest.raises(reshard.NotFoundError, match="--role"):
        reshard.doctor(tmp_path / "run")
    assert reshard.doctor(tmp_path / "run", role="critic").num_tensors == 1
    path = tiny.saved(tmp_path / "two.pt", {"actor": {"model": tiny.state()}, "epoch": 1})
    assert reshard.doctor(path, prefix="actor.model").num_tensors == len(tiny.state())


@pytest.mark.parametrize("option", ["repair", "engine"])
def test_what_is_asked_of_models_alone(option: str, tmp_path: Path) -> None:
    """The hint is followed."""
    base, run_ = tiny.model(tmp_path / "base"), tiny.zero(tmp_path / "run")
    values: dict[str, Any] = {"repair": tmp_path / "out", "engine": "vllm"}
    with pytest.raises(reshard.OptionError, match=r"not a folder with a model.*reshard convert"):
        reshard.doctor(run_, **{option: values[option]})
    assert not (tmp_path / "out").exists()
    reshard.convert(run_, tmp_path / "converted", base=base)
    assert not reshard.doctor(tmp_path / "converted", base=base, **{option: values[option]}).errors


def test_an_adapter_alone(tmp_path: Path) -> None:
    folder = tiny.adapter(tmp_path / "adapter")
    diagnosis = reshard.doctor(folder)
    assert names(diagnosis) == ["model-files-unchecked"]
    base = tiny.model(tmp_path / "base")
    assert found(reshard.doctor(folder, base=base)) == []


def test_a_model_below_the_folder_is_to_be_named(tmp_path: Path) -> None:
    """The hint is followed: all of the model is examined then."""
    model = tiny.model(tmp_path / "runs" / "exported")
    (one, *_) = reshard.doctor(tmp_path / "runs").findings
    assert one.code == "model-files-unchecked"
    assert one.fix == f"To have all of it examined: reshard doctor {model}."
    assert "tokenizer-missing" in names(reshard.doctor(model))
