"""Every kind of DCP checkpoint, read and compared bit for bit with what the running ranks held."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint._extension import ZStandard

import reshard
from reshard import formats
from reshard.core.catalog import Catalog
from reshard.core.tiling import check_tiling
from reshard.errors import NamesError, NotFoundError
from reshard.formats import Selection, huggingface
from reshard.storage.local import Sources
from tests.fsdp.conftest import Oracle, OracleCase
from tests.fsdp.elements import elements
from tests.fsdp.oracle.cases import CASES

# Files of ranks, which `tests/ranks` reads.
_NOT_DCP = {"fsdp1-local", "fsdp1-flat"}
# Overwritten by "stale"; its folder is read as that case.
_OVERWRITTEN = {"stale-w4"}
_READABLE = [case.name for case in CASES if case.name not in _NOT_DCP | _OVERWRITTEN]


def read(path: Path, prefix: str | None = None) -> Catalog:
    with Sources() as sources:
        return formats.read(path, sources, Selection(prefix=prefix))


def assert_true(catalog: Catalog, made: OracleCase, prefix: str = "") -> None:
    """The catalog has exactly the truth's tensors, each with its dtype, shape and bytes."""
    with Sources() as sources:
        truth = huggingface.read(made.truth, sources, Selection()).entries
    assert set(catalog.entries) == {prefix + name for name in truth}
    for name, expected in truth.items():
        found = catalog.entries[prefix + name]
        check_tiling(found)
        assert found.spec.dtype == expected.spec.dtype, name
        assert found.spec.shape == expected.spec.shape, name
        assert elements(found) == elements(expected), name


@pytest.mark.parametrize("name", _READABLE)
def test_bytes_are_those_of_the_live_ranks(oracle: Oracle, name: str) -> None:
    made = oracle[name]
    catalog = read(made.checkpoint)
    assert_true(catalog, made, prefix="model." if made.case.layout == "lightning" else "")
    if catalog.format == "dcp":
        assert catalog.origin.world_size == made.case.world
        assert catalog.origin.version == (None if "hf-" in name else "1.0.0")


@pytest.mark.parametrize(
    ("name", "prefix", "left_out"),
    [
        ("lightrft", "", 0),
        ("accelerate", "model", 0),
        ("titan", "", 82),
        ("nested", "model", 81),
        ("app", "app.model", 81),
        ("lightning", "state_dict", 81),
        ("extras", "model", 1),
    ],
)
def test_the_models_part_is_found(oracle: Oracle, name: str, prefix: str, left_out: int) -> None:
    details = read(oracle[name].checkpoint).origin.details
    assert details["prefix"] == prefix
    assert details["tensors_left_out"] == left_out


def test_a_prefix_names_the_part(oracle: Oracle) -> None:
    made = oracle["app"]
    assert_true(read(made.checkpoint, "app.model"), made)
    moments = read(made.checkpoint, "app.optim.state")
    assert "lm_head.weight.exp_avg" in moments.entries
    backbone = read(oracle["fsdp2-w2"].checkpoint, "model.layers.0")
    assert "mlp.up_proj.weight" in backbone.entries


def test_an_unknown_prefix_is_an_error(oracle: Oracle) -> None:
    with pytest.raises(NotFoundError, match=r"no tensor lies under the prefix 'ema'.*app"):
        read(oracle["app"].checkpoint, "ema")


def test_objects_that_are_no_tensors_are_listed(oracle: Oracle) -> None:
    for name in ("extras", "safetensors-extras"):
        assert read(oracle[name].checkpoint).origin.details["non_tensors"] == [
            "extra.config",
            "extra.epoch",
            "extra.history.1.loss",
            "extra.tags",
        ]


def test_an_optimizer_alone_is_no_model(oracle: Oracle) -> None:
    with pytest.raises(NotFoundError, match="the state of an optimizer, but no model"):
        read(oracle["lightrft"].checkpoint / "optim_states")
    with pytest.raises(NotFoundError, match="the state of an optimizer, but no model"):
        read(oracle["accelerate"].root / "accelerate" / "checkpoint" / "optimizer_0")


def test_the_folder_above_accelerates_is_understood(oracle: Oracle) -> None:
    made = oracle["accelerate"]
    assert_true(read(made.checkpoint.parent), made)


def test_megatrons_folders_are_left_to_their_own_reader(oracle: Oracle, tmp_path: Path) -> None:
    folder = oracle.copy("fsdp2-w2", tmp_path)
    (folder / "common.pt").touch()
    assert list(formats.claims(folder)) == ["megatron"]


def test_reading_imports_no_torch(oracle: Oracle) -> None:
    code = (
        "import sys\nimport reshard\n"
        "for path in sys.argv[1:]:\n"
        "    reshard.open(path)\n"
        "assert not {'torch', 'safetensors', 'transformers'} & set(sys.modules)\n"
    )
    names = ("fsdp-tp", "titan", "zstd", "safetensors", "hf-sharded", "no-collectives")
    paths = [str(oracle[name].checkpoint) for name in names]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code, *paths], check=True, env=environment)


def test_two_models_in_one_are_asked_about() -> None:
    from reshard.formats.dcp import parts

    tensors = {
        "actor.w": ("actor", "w"),
        "critic.w": ("critic", "w"),
        "critic.b": ("critic", "b"),
    }
    with pytest.raises(NamesError, match=r"'actor' \(1 tensors\), 'critic' \(2 tensors\)"):
        parts.find(tensors, None, "x")
    assert parts.find(tensors, "critic", "x").names == {"critic.w": "w", "critic.b": "b"}


def test_a_models_own_nesting_is_joined() -> None:
    from reshard.formats.dcp import parts

    tensors = {"model.w": ("model", "w"), "model.head.w": ("model", "head", "w")}
    assert parts.find(tensors, None, "x").names == {"model.w": "w", "model.head.w": "head.w"}


def test_more_frames_than_files_may_be_open(tmp_path: Path) -> None:
    state = {f"t{number}": torch.full((10,), number) for number in range(300)}
    writer = dcp.FileSystemWriter(tmp_path / "zstd", _extensions=[ZStandard()])
    dcp.save(state, storage_writer=writer, no_dist=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, hard))
    try:
        report = reshard.convert(tmp_path / "zstd", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert report.verified
    assert report.records_checked == 300
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in state.items())


def test_two_runs_saved_by_different_numbers_of_ranks_are_compared(oracle: Oracle) -> None:
    """On both sides a tensor is many fragments; the models differ, their layouts are the point."""
    same = oracle["odd-w3"].checkpoint
    assert reshard.diff(same, same).same
    found = reshard.diff(same, oracle["odd-w2"].checkpoint)
    assert {difference.kind for difference in found.differences} <= {"values"}
    names = {difference.name for difference in found.differences}
    truths = [load_file(oracle[name].truth) for name in ("odd-w3", "odd-w2")]
    assert names == {n for n, value in truths[0].items() if not torch.equal(value, truths[1][n])}
