"""Every family, in every layout of a training run, onto the released layout, by `reshard.convert`.

The oracle is transformers: what it computes from the weights that were saved, it must compute from
the converted folder, without a tensor missing, left over or of another shape.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed import checkpoint as dcp

import reshard
from tests.models import released
from tests.naming import tables

OLDER = [
    (version, name)
    for version in tables.VERSIONS
    if version != released.INSTALLED
    for name in released.MODELS
    if name in tables.names(version)
]


def test_the_families_are_those_that_are_promised() -> None:
    promised = {
        "llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "qwen2_vl", "qwen2_5_vl",
        "qwen3_vl", "llava", "llava_next", "gemma3", "internvl", "qwen2_audio", "mixtral",
        "qwen2_moe", "qwen3_moe", "qwen3_vl_moe", "gpt_oss",
    }  # fmt: skip
    assert promised <= set(released.MODELS)
    assert {version for version, _ in OLDER} == {"4.51", "4.57"}


@pytest.mark.parametrize(("version", "name"), OLDER)
def test_a_run_of_an_older_transformers(version: str, name: str, tmp_path: Path) -> None:
    trained = released.values(name, seed=1)
    base = released.write(tmp_path / "base", name, released.values(name, seed=0))
    truth = released.write(tmp_path / "truth", name, trained)
    torch.save(released.in_memory(version, name, trained), tmp_path / "model.pt")

    report = reshard.convert(tmp_path / "model.pt", tmp_path / "out", base=base)

    assert report.verified
    assert (report.changed, report.compared) == (len(trained), len(trained))
    assert not report.missing
    assert not report.unexpected
    assert not report.filled
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == trained.keys()
    for key, value in trained.items():
        assert torch.equal(written[key], value), key
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    saved = released.load(truth, released.class_of(name))
    released.assert_same(released.load(tmp_path / "out", released.class_of(name)), saved, name)


@pytest.mark.parametrize("name", released.MODELS)
def test_a_live_module_of_the_installed_transformers(name: str, tmp_path: Path) -> None:
    base = released.write(tmp_path / "base", name, released.values(name, seed=0))
    model = released.live(base, released.class_of(name))
    torch.save(model.state_dict(), tmp_path / "model.pt")

    report = reshard.convert(tmp_path / "model.pt", tmp_path / "out", base=base)

    assert report.changed == report.compared == report.num_tensors
    shapes = {
        key: tuple(value.shape)
        for key, value in load_file(tmp_path / "out" / "model.safetensors").items()
    }
    assert shapes == tables.table("4.57", name).disk_shapes()
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    released.assert_same(released.load(tmp_path / "out", released.class_of(name)), model, name)


@pytest.mark.parametrize("name", ["llama_tied", "qwen2_5_vl", "mixtral", "qwen3_vl_moe", "gpt_oss"])
def test_a_dcp_save_gives_the_same_folder(name: str, tmp_path: Path) -> None:
    base = released.write(tmp_path / "base", name, released.values(name, seed=0))
    state = released.live(base, released.class_of(name)).state_dict()
    torch.save(state, tmp_path / "model.pt")
    dcp.save(dict(state), checkpoint_id=tmp_path / "dcp", no_dist=True)
    reshard.convert(tmp_path / "model.pt", tmp_path / "torch", base=base)
    reshard.convert(tmp_path / "dcp", tmp_path / "out", base=base)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "torch" / file).read_bytes()


@pytest.mark.parametrize("name", ["llama_tied", "qwen2_5_vl", "llava", "mixtral", "qwen3_vl_moe"])
def test_masters_are_rounded_to_the_bases_dtypes(name: str, tmp_path: Path) -> None:
    """Norms of the base are float32, all else is bfloat16: each tensor has a dtype of its own."""
    kinds = {
        key: torch.float32 if "norm" in key else torch.bfloat16
        for key in released.values(name, seed=0)
    }
    mixed = {key: v.to(kinds[key]) for key, v in released.values(name, seed=0).items()}
    base = released.write(tmp_path / "base", name, mixed)
    model = released.live(base, released.class_of(name))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    reshard.convert(tmp_path / "model.pt", tmp_path / "out", base=base)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {key: value.dtype for key, value in written.items()} == kinds
    loaded = released.load(tmp_path / "out", released.class_of(name), torch.bfloat16)
    rounded = model.to(torch.bfloat16)
    for key, value in rounded.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


def test_shards_of_a_model_with_experts(tmp_path: Path) -> None:
    base = released.write(tmp_path / "base", "mixtral", released.values("mixtral", seed=0))
    model = released.live(base, "MixtralForCausalLM")
    torch.save(model.state_dict(), tmp_path / "model.pt")
    report = reshard.convert(
        tmp_path / "model.pt", tmp_path / "out", base=base, max_shard_size="20KB"
    )
    assert len(report.files) > 3
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(report.files)
    loaded = released.load(tmp_path / "out", "MixtralForCausalLM")
    released.assert_same(loaded, model, "mixtral")
