"""A base that transformers 5 saved, and `--names hub`: the layout that releases have."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import reshard
from reshard.core.findings import Finding
from tests.doctor import models as doctor_models
from tests.folders import edit_config, edit_weights
from tests.models import released
from tests.naming import tables

# Families whose loaded models, or saves from a config, are in a layout that no release has.
MOVED = ("gemma3", "llava", "llava_next", "qwen3_vl_moe", "qwen3_moe", "mixtral", "qwen2_audio",
         "qwen2_5_vl", "mistral3", "internvl_moe", "phimoe")  # fmt: skip
AS_RELEASED = ("llama", "qwen2", "gpt_oss", "qwen3_vl", "gemma2")


def saved(folder: Path, name: str, seed: int) -> Path:
    """A folder with the names and shapes that transformers 5.23 has in memory."""
    shapes = tables.table("5.23", name).memory
    arrays = tables.random_arrays(shapes, seed)
    values = {key: torch.from_numpy(value) for key, value in arrays.items()}
    heads = [key for key in values if key.endswith("lm_head.weight")]
    if heads and "lm_head.weight" not in str(tables.table("5.23", name).disk):
        del values[heads[0]]  # tied
    path = released.write(folder, name, values)
    edit_config(path, architectures=[released.class_of(name)])
    return path


def layout(report: reshard.Report) -> list[Finding]:
    return [found for found in report.findings if found.code == "base-layout"]


@pytest.mark.parametrize("name", MOVED)
def test_a_base_in_another_layout(name: str, tmp_path: Path) -> None:
    base, run = saved(tmp_path / "base", name, 1), saved(tmp_path / "run", name, 2)
    torch.save(load_file(run / "model.safetensors"), tmp_path / "model.pt")

    kept = reshard.convert(tmp_path / "model.pt", tmp_path / "kept", base=base)
    (finding,) = layout(kept)
    assert "--names hub" in finding.to_json()["fix"]
    done = reshard.convert(tmp_path / "model.pt", tmp_path / "out", base=base, names="hub")

    assert done.verified
    assert done.compared == done.changed == done.num_tensors
    assert not layout(done)
    written = load_file(tmp_path / "out" / "model.safetensors")
    shapes = {key: tuple(value.shape) for key, value in written.items()}
    assert shapes == tables.table("4.57", name).disk_shapes()
    assert reshard.verify(tmp_path / "out", against=tmp_path / "model.pt").num_tensors
    # transformers loads both, with every tensor in its place, into one model.
    class_name = released.class_of(name)
    models = [released.load(tmp_path / folder, class_name) for folder in ("kept", "out")]
    released.assert_same(models[1], models[0], name)


@pytest.mark.parametrize("name", AS_RELEASED)
def test_a_base_in_the_layout_of_the_release(name: str, tmp_path: Path) -> None:
    base = saved(tmp_path / "base", name, 1)
    torch.save(load_file(saved(tmp_path / "run", name, 2) / "model.safetensors"), tmp_path / "r.pt")
    kept = reshard.convert(tmp_path / "r.pt", tmp_path / "kept", base=base)
    assert not layout(kept)
    reshard.convert(tmp_path / "r.pt", tmp_path / "out", base=base, names="hub")
    for file in ("model.safetensors", "config.json"):
        one, other = (tmp_path / folder / file for folder in ("kept", "out"))
        assert one.read_bytes() == other.read_bytes()


def test_a_folder_by_itself(tmp_path: Path) -> None:
    """Without a base: what some export wrote, in the layout of the release."""
    folder = saved(tmp_path / "folder", "mixtral", 1)
    done = reshard.convert(folder, tmp_path / "out", names="hub")
    assert done.verified
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == tables.table("4.57", "mixtral").disk_shapes().keys()


def untold(folder: Path, version: str | None, *, turned: bool = False) -> Path:
    """A model whose config states no width, so that shapes tell no orientation of its experts."""
    values = released.values("qwen3_vl_moe", 1)
    if turned:
        values = {
            key: value.transpose(1, 2).contiguous() if "experts" in key else value
            for key, value in values.items()
        }
    path = released.write(folder, "qwen3_vl_moe", values)
    text = released.config("qwen3_vl_moe")["text_config"]
    del text["hidden_size"]
    edit_config(path, transformers_version=version, text_config=text,
                architectures=["Qwen3VLMoeForConditionalGeneration"])  # fmt: skip
    return path


@pytest.mark.parametrize(("version", "turned"), [("4.57.1", False), ("5.6.0", True)])
def test_an_orientation_by_the_version_that_saved_it(
    version: str, turned: bool, tmp_path: Path
) -> None:
    folder = untold(tmp_path / "folder", version, turned=turned)
    done = reshard.convert(folder, tmp_path / "out", names="hub")
    assert done.verified
    one, other = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "out"))
    for key, value in one.items():
        expected = value.transpose(1, 2) if turned and "experts" in key else value
        assert torch.equal(other[key], expected), key
    # The output is itself in the layout of the release, and says so.
    again = reshard.convert(tmp_path / "out", tmp_path / "again", names="hub")
    assert again.verified
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == other.keys()
    for key, value in load_file(tmp_path / "again" / "model.safetensors").items():
        assert torch.equal(value, other[key]), key


def test_an_orientation_that_nothing_tells(tmp_path: Path) -> None:
    folder = untold(tmp_path / "folder", None, turned=True)
    with pytest.raises(reshard.PlanError, match="orientation") as failed:
        reshard.convert(folder, tmp_path / "out", names="hub")
    assert (
        failed.value.hint
        == "Write the version into the base's config.json, as transformers_version."
    )
    assert not (tmp_path / "out").exists()
    (finding,) = layout(reshard.convert(folder, tmp_path / "kept"))
    assert finding.fix == failed.value.hint
    edit_config(folder, transformers_version="5.6.0")
    assert reshard.convert(folder, tmp_path / "out", names="hub").verified


def test_what_the_architecture_lacks_is_said(tmp_path: Path) -> None:
    folder = released.write(tmp_path / "folder", "qwen2", released.values("qwen2", seed=1))
    edit_weights(folder, lambda held: held.pop("model.layers.1.self_attn.q_proj.bias"))
    report = reshard.convert(folder, tmp_path / "out")
    (found,) = (f for f in report.findings if f.code == "output-unlike-architecture")
    assert "model.layers.1.self_attn.q_proj.bias" in found.message


def test_fields_that_the_base_lacks_are_said(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    doctor_models.write(folder, "qwen3_moe", 1)
    written = {**tables.table("5.23", "qwen3_moe").config, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(written))
    report = reshard.convert(folder, tmp_path / "out")
    (found,) = (f for f in report.findings if f.code == "base-config-fields")
    assert "rope_theta" in found.message
    assert "num_experts" in found.message
    assert found.to_json()["fix"] == "To write them: reshard doctor OUT --repair REPAIRED."
    assert reshard.doctor(tmp_path / "out", repair=tmp_path / "repaired").repaired
    assert json.loads((tmp_path / "repaired" / "config.json").read_text())["num_experts"] == 3


def test_dcp_has_no_released_layout(tmp_path: Path) -> None:
    folder = saved(tmp_path / "folder", "mixtral", 1)
    with pytest.raises(reshard.OptionError, match="needs --to hf, not --to dcp") as failed:
        reshard.convert(folder, tmp_path / "dcp", to="dcp", names="hub")
    assert failed.value.hint == "Pass --to hf, or leave out --names."
    assert reshard.convert(folder, tmp_path / "hf", names="hub").verified
    assert reshard.convert(folder, tmp_path / "dcp", to="dcp").verified
