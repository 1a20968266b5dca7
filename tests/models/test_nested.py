"""State dicts in larger dicts, as scripts save them, and DCP saves that keep them whole."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.fsdp import fully_shard

import reshard
from tests.fsdp.oracle import ranks
from tests.models import released
from tests.tensors import assert_same

STATE = released.values("llama", 1)
OTHER = released.values("llama", 2)
OPTIMIZER = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"params": [0]}]}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return released.write(tmp_path_factory.mktemp("b"), "llama", released.values("llama", 0))


# What a script saves, and the --prefix that names the model in it too.
NESTED: dict[str, tuple[dict[str, Any], str]] = {
    "tutorial": ({"epoch": 1, "model_state_dict": STATE, "optimizer_state_dict": OPTIMIZER},
                 "model_state_dict"),
    "two levels": ({"app": {"model": STATE, "optimizer": OPTIMIZER}}, "app.model"),
    "a name of one's own": ({"net": STATE, "optimizer": OPTIMIZER, "step": torch.tensor(3)},
                            "net"),
    "wrapped": ({"model_state_dict": {f"module.{k}": v for k, v in STATE.items()}},
                "model_state_dict.module"),
    "known beside another": ({"model": STATE, "teacher": OTHER}, "model"),
    "scheduler and scaler": ({"state_dict": STATE, "lr_schedulers": [], "loops": {"a": 1}},
                             "state_dict"),
}  # fmt: skip


@pytest.mark.parametrize("named", [False, True], ids=["found", "named"])
@pytest.mark.parametrize("kind", NESTED)
def test_a_state_dict_in_a_larger_dict(kind: str, named: bool, base: Path, tmp_path: Path) -> None:
    saved, prefix = NESTED[kind]
    torch.save(saved, tmp_path / "run.pt")
    out = tmp_path / "out"
    reshard.convert(tmp_path / "run.pt", out, base=base, prefix=prefix if named else None)
    assert_same(load_file(out / "model.safetensors"), STATE)
    reshard.verify(out, tmp_path / "run.pt")


def test_several_parts_are_named(base: Path, tmp_path: Path) -> None:
    torch.save({"generator": STATE, "discriminator": OTHER}, tmp_path / "run.pt")
    with pytest.raises(reshard.NamesError, match=r"'generator', 'discriminator'.*--prefix"):
        reshard.convert(tmp_path / "run.pt", tmp_path / "out", base=base)
    for name, state in (("generator", STATE), ("discriminator", OTHER)):
        reshard.convert(tmp_path / "run.pt", tmp_path / name, base=base, prefix=name)
        assert_same(load_file(tmp_path / name / "model.safetensors"), state)


def whole() -> Any:
    return DefaultSavePlanner(flatten_state_dict=False)


@pytest.mark.parametrize("nest", [lambda s: s, lambda s: {"model": s, "step": 3},
                                  lambda s: {"app": {"model": s, "optimizer": OPTIMIZER}},
                                  lambda s: {"model": s, "clock": torch.tensor(3)}])  # fmt: skip
def test_a_dcp_save_that_does_not_flatten(
    nest: Callable[[Any], Any], base: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    dcp.save(nest(STATE), checkpoint_id=run, no_dist=True, planner=whole())
    reshard.convert(run, tmp_path / "out", base=base)
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), STATE)
    reshard.verify(tmp_path / "out", run)
    assert reshard.open(run).tensors["lm_head.weight"].shape == STATE["lm_head.weight"].shape


def test_tied_names_of_such_a_save_are_one_tensor(tmp_path: Path) -> None:
    value = torch.rand(4, 4)
    saved = {"model": {"a.weight": value, "b.weight": value}}
    dcp.save(saved, checkpoint_id=tmp_path / "run", no_dist=True, planner=whole())
    report = reshard.convert(tmp_path / "run", tmp_path / "out")
    assert report.tied == {"b.weight": "a.weight"}


def test_damage_in_such_a_save(base: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    dcp.save({"model": STATE}, checkpoint_id=run, no_dist=True, planner=whole())
    (file,) = run.glob("*.distcp")
    data = bytearray(file.read_bytes())
    data[data.index(STATE["lm_head.weight"].numpy().tobytes()) + 7] ^= 1
    file.write_bytes(data)
    with pytest.raises(reshard.FormatError, match="CRC-32"):
        reshard.convert(run, tmp_path / "out", base=base)
    file.unlink()
    with pytest.raises(reshard.IncompleteError, match="it is missing"):
        reshard.convert(run, tmp_path / "out", base=base)


def _save_sharded(folder: Path) -> None:
    model = torch.nn.Linear(8, 8)
    fully_shard(model)
    dcp.save({"model": model.state_dict()}, checkpoint_id=folder, planner=whole())
    distributed.barrier()


def test_one_ranks_shards_are_refused(tmp_path: Path) -> None:
    ranks.run(2, functools.partial(_save_sharded, tmp_path / "run"))
    with pytest.raises(
        reshard.UnsupportedError, match=r"one rank's shard.*flatten_state_dict=True"
    ):
        reshard.convert(tmp_path / "run", tmp_path / "out")


@pytest.mark.parametrize("key", [5, b"w", ("a", "b")])
def test_a_tensor_whose_key_is_not_a_name_is_refused(
    key: object, base: Path, tmp_path: Path
) -> None:
    state: dict[Any, torch.Tensor] = dict(STATE)
    state[key] = torch.ones(3)
    for content in (state, {"model": state}):
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(reshard.UnsupportedError, match=f"its key is a {type(key).__name__}"):
            reshard.convert(tmp_path / "x.pt", tmp_path / "out", base=base)


LISTS: dict[str, Any] = {
    **STATE,
    "memory": [torch.ones(2), torch.ones(3)],
    "deep": {"of": ({"x": torch.ones(2)},)},
    "losses": [torch.tensor(1.0)],
    "optimizer": {"param_groups": [torch.ones(2)]},
}


@pytest.mark.parametrize("kind", ["torch", "dcp"])
def test_lists_of_tensors_are_named_in_a_finding(kind: str, tmp_path: Path) -> None:
    if kind == "torch":
        source = tmp_path / "run.pt"
        torch.save(LISTS, source)
    else:
        source = tmp_path / "run"
        lists = {key: value for key, value in LISTS.items() if key != "optimizer"}
        dcp.save({"model": lists}, checkpoint_id=source, no_dist=True, planner=whole())
    report = reshard.convert(source, tmp_path / "out")
    (found,) = (one for one in report.findings if one.code == "lists-left-out")
    before = "model." if kind == "dcp" else ""
    assert found.message.endswith(f"were not read: {before}memory, {before}deep.of.")
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), STATE)
