"""Every family, in every layout of a training run, onto the released layout, by `reshard.convert`.

The oracle is transformers: what it computes from the weights that were saved, it must compute from
the converted folder, without a tensor missing, left over or of another shape.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed import checkpoint as dcp

import reshard
from reshard.core.tensors import Shape
from tests import budget
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
def test_a_loaded_model_of_the_installed_transformers(name: str, tmp_path: Path) -> None:
    base = released.write(tmp_path / "base", name, released.values(name, seed=0))
    model = released.loaded(base, released.class_of(name))
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
    state = released.loaded(base, released.class_of(name)).state_dict()
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
    model = released.loaded(base, released.class_of(name))
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
    model = released.loaded(base, "MixtralForCausalLM")
    torch.save(model.state_dict(), tmp_path / "model.pt")
    report = reshard.convert(
        tmp_path / "model.pt", tmp_path / "out", base=base, max_shard_size="20KB"
    )
    assert len(report.files) > 3
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(report.files)
    loaded = released.load(tmp_path / "out", "MixtralForCausalLM")
    released.assert_same(loaded, model, "mixtral")


def test_a_square_projection_is_turned_as_its_neighbour_is(tmp_path: Path) -> None:
    """With 2 I = H the shape of gate_up cannot tell its orientation, that of down can."""
    name, inner = "qwen3_vl_moe", 16
    config = released.config(name)
    config["text_config"]["moe_intermediate_size"] = inner
    sizes = {"gate_up_proj": (3, 32, 32), "down_proj": (3, inner, 32)}
    values = {
        key: torch.zeros(sizes.get(key.split(".")[-1], tuple(value.shape)))
        for key, value in released.values(name, seed=0).items()
    }
    base = released.write(tmp_path / "base", name, values)
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    state = released.loaded(base, released.class_of(name)).state_dict()
    torch.save(state, tmp_path / "model.pt")
    reshard.convert(tmp_path / "model.pt", tmp_path / "out", base=base)
    for key, value in load_file(tmp_path / "out" / "model.safetensors").items():
        turned = key.split(".")[-1] in sizes
        assert torch.equal(value, state[key].transpose(1, 2) if turned else state[key]), key


# Sizes of experts, in memory and on disk: 150 MB of them in two layers.
_INNER, _WIDTH = 2048, 1024
_MEMORY: dict[str, Shape] = {
    "gate_up_proj": (3, 2 * _INNER, _WIDTH),
    "down_proj": (3, _WIDTH, _INNER),
}
_DISK: dict[str, dict[str, Shape]] = {
    "mixtral": {"w1.weight": (_INNER, _WIDTH), "w3.weight": (_INNER, _WIDTH),
                "w2.weight": (_WIDTH, _INNER)},
    "qwen3_vl_moe": {"gate_up_proj": (3, _WIDTH, 2 * _INNER), "down_proj": (3, _INNER, _WIDTH)},
}  # fmt: skip
_CODE = """
import reshard
start = peak()
reshard.convert(sys.argv[1], sys.argv[2], base=sys.argv[3], threads=2)
"""


@budget.needs_proc
@pytest.mark.parametrize("name", _DISK)
def test_experts_are_taken_apart_in_bounded_memory(name: str, tmp_path: Path) -> None:
    def sized(shapes: Mapping[str, Shape], sizes: Mapping[str, Shape]) -> released.State:
        """The family's tensors with larger experts."""
        found = {}
        for key, shape in shapes.items():
            part = next((part for part in sizes if "experts" in key and key.endswith(part)), None)
            found[key] = torch.full(sizes[part] if part else shape, 0.5)
        return found

    state = sized(tables.table(released.INSTALLED, name).memory, _MEMORY)
    torch.save({key: value + 1 for key, value in state.items()}, tmp_path / "model.pt")
    disk = sized(tables.table("4.57", name).disk_shapes(), _DISK[name])
    base = released.write(tmp_path / "base", name, {k: v.bfloat16() for k, v in disk.items()})
    taken = budget.peak(_CODE, tmp_path / "model.pt", tmp_path / "out", base)
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > 70 << 20
    assert taken < 100 << 20, f"{taken >> 20} MiB"
