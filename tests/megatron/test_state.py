"""The optimizer's state of Megatron-Core's checkpoints, against the live optimizers' own."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed import checkpoint as dcp

import reshard
from tests import child
from tests.megatron import training
from tests.megatron.golden import base, checkpoint, copied, saved, weights
from tests.oracle.cache import digest_of, kept

needs_megatron = pytest.mark.skipif(
    importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed"
)
_REAL = "mcore012_llama_dp2_distopt_modelspace_bf16"
_UNNAMED = ("dp-reshardable", "dp-zero")
_NAMED = [case.name for case in training.CASES if case.name not in _UNNAMED]


@pytest.fixture(scope="module")
def runs(pytestconfig: pytest.Config) -> Path:
    """The runs of `training`; made by megatron-core, about 15 s, once."""
    assert pytestconfig.cache is not None
    sources = (
        "tests/megatron/training.py",
        "tests/megatron/mcore.py",
        "tests/megatron/models.py",
        "tests/oracle/models.py",
    )
    key = digest_of((child.ROOT / source for source in sources), ("torch", "megatron-core"))
    cache = pytestconfig.cache.mkdir("megatron-training")
    return kept(cache, key, lambda folder: child.run("tests.megatron.training", str(folder)))


def expected(run: Path, kind: str, folder: Path) -> dict[str, torch.Tensor]:
    """What the live optimizers held, by the hub's names: the way of the weights, whose names and
    shapes the logits of other tests prove."""
    truth: dict[str, dict[str, torch.Tensor]] = torch.load(run / "truth.pt")
    native = saved(folder / kind, {name: t.float() for name, t in truth[kind].items()})
    out = folder / f"{kind}-hub"
    reshard.convert(native, out, base=run / "base", dtype="float32", verify=False)
    return dict(load_file(out / "model.safetensors"))


def differing(found: Any, wanted: dict[str, torch.Tensor]) -> list[str]:
    assert found.keys() == wanted.keys()
    numbers = {name: torch.from_numpy(found[name].numpy().astype(np.float32)) for name in wanted}
    return [name for name, tensor in wanted.items() if not torch.equal(numbers[name], tensor)]


@needs_megatron
@pytest.mark.parametrize("name", _NAMED)
def test_moments_and_masters_are_the_live_optimizers(name: str, runs: Path, tmp_path: Path) -> None:
    run, out = runs / name, tmp_path / "out"
    report = reshard.convert(
        run / "run", out, base=run / "base", to="dcp", optimizer=True, dtype="keep", names="disk"
    )
    opened = reshard.open(out)
    assert opened.optimizer is not None
    for kind in ("exp_avg", "exp_avg_sq"):
        wanted = expected(run, kind, tmp_path)
        assert differing(opened.optimizer.moments[kind], wanted) == []
    assert differing(opened.tensors, expected(run, "param", tmp_path)) == []
    state = opened.catalog.training_state()
    assert state is not None
    assert {step.count for step in state.steps.values()} == {2}
    decayed = {
        name
        for group in state.groups
        for name in group.names
        if group.hyperparameters["weight_decay"] != 0
    }
    assert decayed == {n for n in opened.tensors if "norm" not in n and not n.endswith(".bias")}
    codes = [found.code for found in report.findings]
    assert "state-groups-by-rule" in codes
    assert "state-left-out" in codes
    assert "optimizer-left-out" not in codes
    assert reshard.verify(out, run / "run", base=run / "base").num_tensors


@needs_megatron
@pytest.mark.parametrize(
    ("to", "layout"), [("deepspeed", None), ("dcp", "accelerate"), ("dcp", "nested")]
)
def test_it_becomes_what_others_load(to: Any, layout: Any, runs: Path, tmp_path: Path) -> None:
    run, out = runs / "reshardable", tmp_path / "out"
    reshard.convert(
        run / "run", out, base=run / "base", to=to, optimizer=True, layout=layout, dtype="keep"
    )
    found = reshard.open(out).optimizer
    assert found is not None
    assert differing(found.moments["exp_avg"], expected(run, "exp_avg", tmp_path)) == []


@needs_megatron
@pytest.mark.parametrize("name", _UNNAMED)
def test_states_without_names_are_refused_by_their_kind(
    name: str, runs: Path, tmp_path: Path
) -> None:
    run = runs / name
    kind = {"dp-reshardable": "dp_reshardable", "dp-zero": "dp_zero_gather_scatter"}[name]
    asked: tuple[tuple[dict[str, Any], str], ...] = (
        ({"masters": True}, "Leave out --masters."),
        ({"optimizer": True, "to": "dcp"}, "Convert the weights alone"),
    )
    for options, otherwise in asked:
        with pytest.raises(reshard.UnsupportedError, match=kind) as caught:
            reshard.convert(run / "run", tmp_path / "out", base=run / "base", **options)
        assert str(caught.value.hint).startswith(otherwise)
    reshard.convert(run / "run", tmp_path / "out", base=run / "base")


def test_blocks_of_megatron_core_012(tmp_path: Path) -> None:
    """Of `fully_sharded_model_space` each dimension is cut, and the pieces are flattened."""
    model = base(_REAL, tmp_path / "base")
    out = tmp_path / "out"
    reshard.convert(checkpoint(_REAL), out, base=model, to="dcp", optimizer=True, names="disk")
    found = reshard.open(out).optimizer
    assert found is not None
    folder = weights(copied(_REAL, tmp_path / "copy"))
    reader = dcp.FileSystemReader(folder)
    stored = reader.read_metadata().state_dict_metadata
    start = "optimizer.state.exp_avg."
    raw = {n: torch.empty(m.size) for n, m in stored.items() if n.startswith(start)}
    dcp.load(raw, storage_reader=reader, no_dist=True)
    native = {}
    shapes = {n: tuple(m.size) for n, m in stored.items() if hasattr(m, "size")}
    for name, blocks in raw.items():
        own = name.removeprefix(start)
        grid = blocks.shape[:-1]
        block = [size // count for size, count in zip(shapes[own], grid, strict=True)]
        axes = [axis for at in range(len(grid)) for axis in (at, at + len(grid))]
        native[own] = blocks.reshape(*grid, *block).permute(axes).reshape(shapes[own]).contiguous()
    truth = saved(tmp_path / "truth", native)
    reshard.convert(truth, tmp_path / "hub", base=model, dtype="float32")
    assert differing(found.moments["exp_avg"], load_file(tmp_path / "hub/model.safetensors")) == []


def _edited(folder: Path, change: Any) -> Path:
    path = weights(folder) / "common.pt"
    value = torch.load(path, weights_only=False)
    change(value)
    torch.save(value, path)
    return folder


def test_groups_that_no_rule_tells_apart(tmp_path: Path) -> None:
    def double(value: dict[str, Any]) -> None:
        groups = value["optimizer"]["optimizer"]["param_groups"]
        groups.append({**groups[0], "lr_mult": 2.0})

    folder = _edited(copied(_REAL, tmp_path / "run"), double)
    with pytest.raises(reshard.UnsupportedError, match="3 parameter groups") as caught:
        reshard.convert(folder, tmp_path / "out", to="dcp", optimizer=True)
    assert "without --optimizer" in str(caught.value.hint)
    reshard.convert(folder, tmp_path / "out", to="dcp")


def test_without_groups_and_without_moments(tmp_path: Path) -> None:
    folder = _edited(copied(_REAL, tmp_path / "run"), lambda value: value.pop("optimizer"))
    with pytest.raises(reshard.UnsupportedError, match="states no parameter groups"):
        reshard.convert(folder, tmp_path / "out", to="dcp", optimizer=True)
    native = {"decoder.final_layernorm.weight": torch.ones(4)}
    state = {f"optimizer.state.param.{name}": tensor for name, tensor in native.items()}
    alone = saved(tmp_path / "alone", {**native, **state})
    with pytest.raises(reshard.UnsupportedError, match="no moments under the names"):
        reshard.convert(alone, tmp_path / "out", to="dcp", optimizer=True)
    shutil.rmtree(alone)
    bare = saved(tmp_path / "alone", native)
    with pytest.raises(reshard.PlanError, match="it holds none"):
        reshard.convert(bare, tmp_path / "out", to="dcp", optimizer=True)


def test_two_states_of_one_tensor(tmp_path: Path) -> None:
    native = {"decoder.final_layernorm.weight": torch.ones(4)}
    state = {
        f"{start}optimizer.state.exp_avg.{name}": tensor
        for start in ("", "chained_0.")
        for name, tensor in native.items()
    }
    folder = saved(tmp_path / "run", {**native, **state})
    with pytest.raises(reshard.FormatError, match="are of one tensor"):
        reshard.convert(folder, tmp_path / "out", to="dcp", optimizer=True)
