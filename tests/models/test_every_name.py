"""`--names all`: one DCP folder that running models of every transformers version load."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from torch.distributed import checkpoint as dcp

import reshard
from reshard.cli.lightrft import hf2fsdp
from tests import child
from tests.models import released
from tests.naming import tables

MODELS = ("llama_tied", "qwen2_5_vl", "qwen2_5_vl_tied", "qwen2_audio", "internvl", "llava")
# Whose files are taken apart or turned by a loaded model of transformers 5.
STACKED = ("mixtral", "qwen3_moe", "qwen3_vl_moe")


def truth(version: str, name: str, base: Path) -> released.State:
    """What a loaded model of that version holds: by transformers itself for the installed one."""
    if version == released.INSTALLED:
        return dict(released.load(base, released.class_of(name)).state_dict())
    return released.in_memory(version, name, released.values(name, seed=0))


def versions(name: str) -> list[str]:
    return [version for version in tables.VERSIONS if name in tables.names(version)]


def written(folder: Path, name: str) -> Path:
    """FOLDER/base, and FOLDER/dcp by the command that a user types."""
    base = released.write(folder / "base", name, released.values(name, seed=0))
    arguments = ["--hf_checkpoint", str(base), "--output", str(folder / "dcp")]
    done = CliRunner().invoke(hf2fsdp.command, arguments)
    assert done.exit_code == 0, done.exception
    return folder / "dcp"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every model's folder, loaded into FSDP1 and FSDP2 modules of every version's names."""
    root = tmp_path_factory.mktemp("names")
    for name in MODELS:
        written(root / name, name)
        for version in versions(name):
            shapes = tables.table(version, name).memory
            (root / name / f"{version}.json").write_text(json.dumps(shapes))
    child.run("tests.models.versions", str(root))
    return root


@pytest.mark.parametrize("kind", ["fsdp1", "fsdp2"])
@pytest.mark.parametrize("name", MODELS)
def test_sharded_modules_of_every_version_load_it(folders: Path, name: str, kind: str) -> None:
    for version in versions(name):
        expected = truth(version, name, folders / name / "base")
        found = load_file(folders / name / f"{version}-{kind}.safetensors")
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(found[key], value), (version, key)


@pytest.mark.parametrize("name", MODELS)
def test_plain_tensors_of_every_version_load_it(folders: Path, name: str) -> None:
    for version in versions(name):
        expected = truth(version, name, folders / name / "base")
        found = {key: torch.full_like(value, -1) for key, value in expected.items()}
        dcp.load(found, checkpoint_id=folders / name / "dcp", no_dist=True)
        for key, value in expected.items():
            assert torch.equal(found[key], value), (version, key)


@pytest.mark.parametrize("name", MODELS)
def test_no_byte_is_written_twice_and_each_tensor_is_read_once(folders: Path, name: str) -> None:
    folder, values = folders / name / "dcp", released.values(name, seed=0)
    opened = reshard.open(folder)
    assert opened.catalog.entries.keys() == values.keys()
    every = {key for version in versions(name) for key in tables.table(version, name).memory}
    assert set(opened.tensors) >= every | values.keys()
    for alias in opened.tensors.keys() - values.keys():
        assert opened.tensors[alias].kind == "tied"
        own = opened.tensors[alias].entry.spec.name
        assert (opened.tensors[alias].numpy() == values[own].numpy()).all()
    inspection = reshard.inspect(folder)
    assert inspection.num_tensors == len(values)
    assert inspection.num_parameters == sum(value.numel() for value in values.values())
    disk = folders / name / "disk"
    reshard.convert(folders / name / "base", disk, to="dcp", names="disk", overwrite=True)
    for file in disk.glob("*.distcp"):
        assert file.read_bytes() == (folder / file.name).read_bytes()
    assert set(reshard.open(disk).tensors) == values.keys()


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back(folders: Path, name: str, tmp_path: Path) -> None:
    base, folder = folders / name / "base", folders / name / "dcp"
    assert reshard.verify(folder).num_tensors == len(released.values(name, seed=0))
    assert reshard.verify(folder, base).num_tensors == len(released.values(name, seed=0))
    assert reshard.diff(folder, base).same
    assert reshard.diff(base, folder).same
    report = reshard.convert(folder, tmp_path / "back", base=base, allow_unchanged=True)
    assert set(report.tied) <= {"lm_head.weight", "language_model.lm_head.weight"}
    assert report.unexpected == ()
    for source in (tmp_path / "back", tmp_path / "plain"):
        if source.name == "plain":  # without a base: the names on disk
            reshard.convert(folder, source)
        first = (base / "model.safetensors").read_bytes()
        assert (source / "model.safetensors").read_bytes() == first


def test_names_of_one_kind(tmp_path: Path) -> None:
    name = "qwen2_5_vl_tied"
    base = released.write(tmp_path / "base", name, released.values(name, seed=0))
    for version in versions(name):
        out = tmp_path / version
        reshard.convert(base, out, to="dcp", names="memory", transformers_version=version)
        opened = reshard.open(out)
        assert set(opened.tensors) == tables.table(version, name).memory.keys()
        # The tied head has no bytes of its own.
        assert len(opened.catalog.entries) == len(released.values(name, seed=0))
        back = reshard.convert(out, tmp_path / f"{version}-back", base=base, allow_unchanged=True)
        assert back.tied == {"lm_head.weight": "model.embed_tokens.weight"}


def test_the_installed_transformers_changes_no_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "qwen2_5_vl"
    base = released.write(tmp_path / "base", name, released.values(name, seed=0))
    reshard.convert(base, tmp_path / "one", to="dcp")
    monkeypatch.setattr("importlib.metadata.version", lambda _: "4.51.0")
    reshard.convert(base, tmp_path / "two", to="dcp")
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


@pytest.mark.parametrize("name", STACKED)
def test_a_layout_that_stacks_is_a_finding_whose_fix_works(name: str, tmp_path: Path) -> None:
    base = released.write(tmp_path / "base", name, released.values(name, seed=0))
    report = reshard.convert(base, tmp_path / "all", to="dcp")
    (finding,) = [f for f in report.findings if f.code == "memory-layout-apart"]
    assert "transformers 5.0 and later" in finding.message
    assert "--names memory --transformers-version 5.0" in finding.fix
    asked = tables.table("5.23", name).memory
    reshard.convert(base, tmp_path / "memory", to="dcp", names="memory", transformers_version="5.0")
    opened = reshard.open(tmp_path / "memory").tensors
    assert {key: value.shape for key, value in opened.items()} == asked
    with pytest.raises(reshard.PlanError, match="does not find them in this folder") as caught:
        reshard.convert(base, tmp_path / "no", to="dcp", transformers_version="5.23")
    assert "--names memory" in str(caught.value)


def test_all_names_need_a_config_and_a_target_that_can_hold_them(tmp_path: Path) -> None:
    state = {"model.norm.weight": torch.ones(2)}
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(reshard.PlanError, match=r"--names all needs the model's config"):
        reshard.convert(tmp_path / "model.pt", tmp_path / "out", to="dcp", names="all")
    with pytest.raises(reshard.OptionError, match=r"'all' gives each tensor several names"):
        reshard.convert(tmp_path / "model.pt", tmp_path / "out", names="all")
    # By default there is then one name.
    reshard.convert(tmp_path / "model.pt", tmp_path / "out", to="dcp")
    assert list(reshard.open(tmp_path / "out").tensors) == ["model.norm.weight"]


def test_a_training_checkpoint_with_its_base(tmp_path: Path) -> None:
    """A run of transformers 4.51 goes on in any version."""
    name = "qwen2_5_vl_tied"
    base = released.write(tmp_path / "base", name, released.values(name, seed=0))
    trained = released.values(name, seed=1)
    torch.save(released.in_memory("4.51", name, trained), tmp_path / "old.pt")
    reshard.convert(tmp_path / "old.pt", tmp_path / "dcp", base=base, to="dcp")
    opened = reshard.open(tmp_path / "dcp").tensors
    for version in versions(name):
        for key, value in released.in_memory(version, name, trained).items():
            assert (opened[key].numpy() == value.numpy()).all(), (version, key)
