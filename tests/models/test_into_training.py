"""`--names memory`: what a running model of a transformers version asks for is there, and right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import reshard
from reshard.cli.lightrft import hf2fsdp
from tests import child
from tests.models import released
from tests.naming import tables

RUNNING = (
    "llama_tied", "qwen2_5_vl", "llava", "gemma3", "qwen2_audio", "mixtral", "qwen3_moe",
    "qwen3_vl_moe", "gpt_oss",
)  # fmt: skip


def base_of(folder: Path, name: str) -> Path:
    return released.write(folder / "base", name, released.values(name, seed=0))


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every model of `RUNNING` after `dcp.load` into FSDP2 modules of one rank and of two."""
    folder = tmp_path_factory.mktemp("running")
    for name in RUNNING:
        base = base_of(folder / name, name)
        reshard.convert(base, folder / name / "dcp", to="dcp", names="memory")
    child.run("tests.models.running", str(folder), *RUNNING)
    return folder


@pytest.mark.parametrize("name", RUNNING)
def test_a_running_fsdp2_model_finds_every_key(running: Path, name: str) -> None:
    folder = running / name
    asked = json.loads((folder / "keys.json").read_text())
    assert set(asked) == set(reshard.open(folder / "dcp").tensors)
    # The oracle: what transformers itself makes of the same files.
    truth = released.load(folder / "base", released.class_of(name)).state_dict()
    for world in (1, 2):
        found = load_file(folder / f"running-{world}.safetensors")
        assert found.keys() == truth.keys()
        for key, value in truth.items():
            assert torch.equal(found[key], value), key
    if name == "llama_tied":
        assert torch.equal(truth["lm_head.weight"], truth["model.embed_tokens.weight"])


@pytest.mark.parametrize("version", tables.VERSIONS)
@pytest.mark.parametrize("name", ["llama_tied", "qwen2_5_vl", "llava", "mixtral", "qwen3_vl_moe"])
def test_names_and_shapes_are_those_of_the_named_version(
    version: str, name: str, tmp_path: Path
) -> None:
    base, out = base_of(tmp_path, name), tmp_path / "dcp"
    arguments = ["--hf_checkpoint", base, "--output", out, "--names", "memory",
                 "--transformers-version", version]  # fmt: skip
    done = CliRunner().invoke(hf2fsdp.command, list(map(str, arguments)))
    if name not in tables.names(version):
        assert isinstance(done.exception, reshard.UnsupportedError)
        assert f"transformers {version} has no model of type" in str(done.exception)
        return
    assert done.exit_code == 0, done.exception
    found = {key: value.shape for key, value in reshard.open(out).tensors.items()}
    assert found == tables.table(version, name).memory
    stated = json.loads((out / "reshard.json").read_text())
    assert stated["options"]["names"] == "memory"
    assert stated["names"]["transformers_version"] == version


@pytest.mark.parametrize("name", ["llama_tied", "qwen2_5_vl", "mixtral", "qwen3_vl_moe"])
@pytest.mark.parametrize("version", ["4.57", "5.23"])
def test_there_and_back(name: str, version: str, tmp_path: Path) -> None:
    base = base_of(tmp_path, name)
    reshard.convert(base, tmp_path / "dcp", to="dcp", names="memory", transformers_version=version)
    with pytest.raises(reshard.VerificationError, match="nothing was trained"):
        reshard.convert(tmp_path / "dcp", tmp_path / "back", base=base)
    reshard.convert(tmp_path / "dcp", tmp_path / "back", base=base, allow_unchanged=True)
    back, first = (load_file(f / "model.safetensors") for f in (tmp_path / "back", base))
    assert back.keys() == first.keys()
    for key, value in first.items():
        assert torch.equal(back[key], value), key


def test_from_one_versions_run_into_anothers(tmp_path: Path) -> None:
    """A run of transformers 4.51 goes on under 5: no Hugging Face folder in between."""
    name = "qwen2_5_vl"
    base, trained = base_of(tmp_path, name), released.values(name, seed=1)
    torch.save(released.in_memory("4.51", name, trained), tmp_path / "old.pt")
    out = tmp_path / "dcp"
    report = reshard.convert(tmp_path / "old.pt", out, base=base, to="dcp", names="memory")
    assert any("loaded model of transformers 5.23" in warning for warning in report.warnings)
    truth = released.load(
        released.write(tmp_path / "truth", name, trained), released.class_of(name)
    )
    opened = reshard.open(out).tensors
    assert set(opened) == set(truth.state_dict())
    for key, value in truth.state_dict().items():
        assert (opened[key].numpy() == value.numpy()).all(), key


def test_without_the_models_config(tmp_path: Path) -> None:
    torch.save(released.values("llama", seed=1), tmp_path / "model.pt")
    with pytest.raises(reshard.PlanError, match=r"needs the model's config. Pass --base"):
        reshard.convert(tmp_path / "model.pt", tmp_path / "out", to="dcp", names="memory")
