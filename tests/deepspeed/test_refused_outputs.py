"""Refusals for reasons other than the source: the base, the space, the output."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

import reshard
from tests.deepspeed.test_refusals import copied, optim, refused
from tests.oracle.cache import Oracle


def test_names_the_base_does_not_have_are_listed_with_the_nearest(
    oracle: Oracle, workspace: Path
) -> None:
    case = oracle["llama-zero2"]
    base = workspace / "base"
    shutil.copytree(case.base, base)
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.mlp.down_projection.weight"] = tensors.pop(
        "model.layers.0.mlp.down_proj.weight"
    )
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    before = sorted(workspace.rglob("*"))
    with pytest.raises(reshard.NamesError) as caught:
        reshard.convert(case.root, workspace / "out", base=base)
    assert sorted(workspace.rglob("*")) == before
    assert caught.value.missing == ("model.layers.0.mlp.down_projection.weight",)
    assert caught.value.unexpected == ("model.layers.0.mlp.down_proj.weight",)
    assert "model.layers.0.mlp.down_proj.weight" in str(caught.value)


def test_a_shape_the_base_does_not_have(oracle: Oracle, workspace: Path) -> None:
    case = oracle["llama-zero2"]
    base = workspace / "base"
    shutil.copytree(case.base, base)
    tensors = load_file(base / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name] = tensors[name][:-1].copy()
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    message = refused(workspace, case.root, base, reshard.NamesError)
    assert name in message


def test_a_base_without_config_weights_or_folder(oracle: Oracle, workspace: Path) -> None:
    case = oracle["llama-zero2"]
    message = refused(workspace, case.root, workspace / "nothing", reshard.NotFoundError)
    assert "no such folder" in message
    base = workspace / "base"
    shutil.copytree(case.base, base)
    (base / "config.json").rename(workspace / "config.json")
    assert "no config.json" in refused(workspace, case.root, base, reshard.NotFoundError)
    (workspace / "config.json").rename(base / "config.json")
    (base / "model.safetensors").unlink()
    assert "no weights" in refused(workspace, case.root, base, reshard.NotFoundError)


def test_a_base_whose_shard_is_cut_off(oracle: Oracle, workspace: Path) -> None:
    case = oracle["llama-zero2"]
    base = workspace / "base"
    shutil.copytree(case.base, base)
    path = base / "model.safetensors"
    os.truncate(path, path.stat().st_size - 10)
    message = refused(workspace, case.root, base, reshard.IncompleteError)
    assert "model.safetensors" in message


def test_not_enough_space_is_known_before_writing(
    oracle: Oracle, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(workspace)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    message = refused(workspace, oracle["llama-zero2"].root, None, reshard.WriteError)
    assert "1,000 are free" in message


def test_an_output_that_exists_is_refused_and_replaced_with_overwrite(
    oracle: Oracle, workspace: Path
) -> None:
    case = oracle["llama-zero2"]
    out = workspace / "out"
    reshard.convert(case.root, out)
    with pytest.raises(reshard.WriteError, match="exists") as caught:
        reshard.convert(case.root, out, base=case.base)
    assert "--overwrite" in str(caught.value)
    assert sorted(path.name for path in out.iterdir()) == ["model.safetensors", "reshard.json"]
    report = reshard.convert(case.root, out, base=case.base, overwrite=True)
    assert report.replaced is not None
    assert report.replaced.num_files == 2
    assert (out / "config.json").is_file()
    assert [path.name for path in workspace.iterdir()] == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_that_is_or_holds_an_input(
    oracle: Oracle, workspace: Path, overwrite: bool
) -> None:
    root = copied(oracle, "llama-zero2", workspace)
    for target in (root, root / "global_step2", workspace):
        with pytest.raises(reshard.WriteError, match="is, or contains,"):
            reshard.convert(root / "global_step2", target, overwrite=overwrite)


@pytest.mark.parametrize("kind", ["optim_states", "model_states"])
@pytest.mark.parametrize("name", ["legacy-zero3", "odd-tag"])
def test_a_copied_rank_is_found_by_its_values(
    oracle: Oracle, workspace: Path, name: str, kind: str
) -> None:
    """Where torch wrote no name into the file: legacy containers, and paths beyond ASCII."""
    shutil.copytree(oracle[name].last.path, workspace / "tag")
    one, other = sorted((workspace / "tag").glob(f"*_{kind}.pt"))
    shutil.copy(one, other)
    with pytest.raises(reshard.FormatError, match="it is a copy of another rank's file"):
        reshard.convert(workspace / "tag", workspace / "out")


@pytest.mark.parametrize("name", ["llama-zero3", "llama-zero2"])
def test_one_file_of_a_checkpoint_is_taken_only_where_it_is_the_whole_model(
    oracle: Oracle, workspace: Path, name: str
) -> None:
    saved = oracle[name].last
    paths = sorted(saved.path.glob("*.pt"))
    for path in paths:
        if name == "llama-zero2" and "model_states" in path.name:
            checkpoint = reshard.open(path)
            assert {tensor.name for tensor in checkpoint.tensors.values()} == set(saved.module())
        else:
            with pytest.raises(reshard.UnsupportedError) as caught:
                reshard.convert(path, workspace / "out")
            assert "model_states" not in path.name or "Name the folder" in str(caught.value)
    assert len(paths) == (4 if name == "llama-zero3" else 3)
    assert not (workspace / "out").exists()


def test_an_output_that_is_the_checkpoint_found_below_the_source(
    oracle: Oracle, workspace: Path
) -> None:
    """The source may be named from above; what is read is what must not be replaced."""
    root = copied(oracle, "llama-zero2", workspace)
    before = sorted((path, path.stat().st_size) for path in root.rglob("*"))
    for source, target in ((workspace, root), (root, root / "global_step2")):
        for dry_run in (True, False):
            with pytest.raises(reshard.WriteError, match="is a DeepSpeed checkpoint"):
                reshard.convert(source, target, overwrite=True, dry_run=dry_run)
    assert sorted((path, path.stat().st_size) for path in root.rglob("*")) == before
    with pytest.raises(reshard.WriteError, match="lies inside the source"):
        reshard.convert(workspace, root / "global_step2" / "converted")
    reshard.convert(root, workspace / "models" / "out")
    for dry_run in (True, False):
        with pytest.raises(reshard.WriteError, match="lies inside the source"):
            reshard.convert(
                workspace / "models", workspace / "models" / "out", overwrite=True, dry_run=dry_run
            )


def test_a_failed_overwrite_keeps_the_old_output(oracle: Oracle, workspace: Path) -> None:
    root = copied(oracle, "llama-zero3", workspace)
    reshard.convert(root, workspace / "out")
    before = (workspace / "out" / "reshard.json").read_bytes()
    path = optim(root, 1)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(reshard.ReshardError):
        reshard.convert(root, workspace / "out", overwrite=True)
    assert (workspace / "out" / "reshard.json").read_bytes() == before
    assert sorted(p.name for p in workspace.iterdir()) == ["out", "run"]


def test_verification_finds_a_changed_byte(oracle: Oracle, tmp_path: Path) -> None:
    reshard.convert(oracle["llama-zero2"].root, tmp_path / "out")
    assert reshard.verify(tmp_path / "out").num_tensors > 0
    path = tmp_path / "out" / "model.safetensors"
    with path.open("r+b") as file:
        file.seek(-5, os.SEEK_END)
        file.write(b"\x55")
    with pytest.raises(reshard.VerificationError, match="digest"):
        reshard.verify(tmp_path / "out")
    stated = json.loads((tmp_path / "out" / "reshard.json").read_text())
    del stated["tensors"]["model.norm.weight"]
    (tmp_path / "out" / "reshard.json").write_text(json.dumps(stated))
    with pytest.raises(reshard.VerificationError, match="is not listed in reshard"):
        reshard.verify(tmp_path / "out")
