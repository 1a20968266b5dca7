"""Checkpoints saved with flatten_state_dict=False, and what lies beside the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

import reshard
from reshard.errors import UnsupportedError


def state(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    embedding = torch.randn(8, 4)
    return {
        "model.embed_tokens.weight": embedding,
        "model.norm.weight": torch.randn(4).bfloat16(),
        "lm_head.weight": embedding,
    }


def saved(folder: Path, content: dict[str, Any], *, flatten: bool) -> Path:
    planner = DefaultSavePlanner(flatten_state_dict=flatten)
    dcp.save(content, checkpoint_id=folder, planner=planner, no_dist=True)
    return folder


def holds(folder: Path, expected: dict[str, torch.Tensor], out: Path, **options: Any) -> None:
    opened = reshard.open(folder, **options).tensors
    assert opened.keys() == expected.keys()
    assert reshard.convert(folder, out, **options).verified
    written = load_file(out / "model.safetensors")
    assert written.keys() <= expected.keys()
    for name, value in written.items():
        assert torch.equal(value, expected[name]), name


def test_a_model_that_was_saved_whole(tmp_path: Path) -> None:
    optimizer = {"state": {0: {"exp_avg": torch.ones(4)}}, "param_groups": [{"lr": 0.1}]}
    content = {"model": state(), "optimizer": optimizer, "step": 5}
    folder = saved(tmp_path / "dcp", content, flatten=False)
    holds(folder, state(), tmp_path / "out")
    # In one stream, a shared storage says that two names are one tensor.
    head = reshard.open(folder).tensors["lm_head.weight"]
    assert (head.kind, head.entry.spec.name) == ("tied", "model.embed_tokens.weight")
    assert not reshard.open(folder).catalog.findings
    found = reshard.inspect(folder).to_json()
    assert (found["prefix"], found["non_tensors"]) == ("model", ["step"])


def test_a_flipped_bit_in_a_model_that_was_saved_whole(tmp_path: Path) -> None:
    folder = saved(tmp_path / "dcp", {"model": state()}, flatten=False)
    extent = reshard.open(folder).tensors["model.norm.weight"].entry.fragments[0].in_file
    data = bytearray(Path(extent.file.path).read_bytes())
    data[extent.offset] ^= 1
    Path(extent.file.path).write_bytes(data)
    with pytest.raises(reshard.FormatError, match="CRC"):
        reshard.convert(folder, tmp_path / "out")


@pytest.mark.parametrize("flatten", [True, False])
@pytest.mark.parametrize("nested", [True, False])
def test_another_model_beside_it_is_a_finding(tmp_path: Path, flatten: bool, nested: bool) -> None:
    model, average = state(1), state(2)
    content = {"model": model, "ema": average} if nested else {**model, "ema": average}
    content["optimizer"] = {"state": {"model.norm.weight": {"exp_avg": torch.ones(4)}}}
    folder = saved(tmp_path / "dcp", content, flatten=flatten)
    (finding,) = reshard.open(folder).catalog.findings
    assert (finding.code, finding.subject) == ("part-left-out", "ema")
    assert "(tensors: 3)" in finding.message
    holds(folder, model, tmp_path / "model")
    # The fix that it offers.
    assert "--prefix ema" in finding.fix
    holds(folder, average, tmp_path / "average", prefix="ema")


def test_what_a_run_needs_to_go_on_is_no_finding(tmp_path: Path) -> None:
    content = {
        "app": {"model": state(), "optim": {"state": {"a": {"exp_avg": torch.ones(2)}}}},
        "lr_scheduler": {"last": torch.ones(1)},
        "reference": {"a": torch.ones(3), "b": torch.ones(3)},
    }
    folder = saved(tmp_path / "dcp", content, flatten=True)
    with pytest.raises(reshard.NamesError, match=r"'app' \(4 tensors\), 'reference' \(2 tensors\)"):
        reshard.open(folder)
    content["app"]["reference"] = content.pop("reference")
    folder = saved(tmp_path / "two", content, flatten=True)
    findings = reshard.open(folder).catalog.findings
    assert [finding.subject for finding in findings] == ["app.reference"]


def test_sharded_tensors_that_were_saved_whole(tmp_path: Path) -> None:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = DeviceMesh("cpu", [0])
        sharded = {
            name: DTensor.from_local(value, mesh, [Replicate()]) for name, value in state().items()
        }
        saved(tmp_path / "dcp", {"model": sharded}, flatten=False)
    finally:
        distributed.destroy_process_group()
    with pytest.raises(
        UnsupportedError, match=r"DTensor.*one rank's shard.*flatten_state_dict=True"
    ):
        reshard.open(tmp_path / "dcp")
