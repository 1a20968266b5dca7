"""DCP checkpoints that reshard wrote: torch loads them, and they convert back to the same bytes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

import reshard
from reshard.formats import Selection, huggingface
from reshard.storage.local import Sources
from tests.fsdp.conftest import run_oracle
from tests.fsdp.elements import elements
from tests.fsdp.oracle import models
from tests.tensors import raw


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    """Every dtype in shapes plain and odd, and a few tensors that are cut into rows."""
    found: dict[str, torch.Tensor] = {}
    for name, value in models.every_dtype().items():
        found |= {f"{name}.plain": value, f"{name}.none": value[:0], f"{name}.cube": value[None]}
        if name != "float4_e2m1fn_x2":  # safetensors counts its halves: none is 0-d
            found[f"{name}.scalar"] = value[0, 0].clone()
    torch.manual_seed(1)
    found["long.rows"] = torch.randn(1013, 7)
    found["long.vector"] = torch.randn(5000).bfloat16()
    found["wide.row"] = torch.randn(1, 9000)
    found["no.columns"] = torch.empty(3, 0)
    found["модель.с точками и пробелом"] = torch.arange(5)
    return found


@pytest.fixture(scope="module")
def folder(tensors: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder, and beside it `dcp`, its conversion into files of 16 KB."""
    root = tmp_path_factory.mktemp("write")
    (root / "hf").mkdir()
    names = sorted(tensors)
    # In two shards, so that more than one file is read.
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = root / "hf" / f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name].clone() for name in part}, file, {"format": "pt"})
    report = reshard.convert(root / "hf", root / "dcp", to="dcp", max_shard_size="16KB")
    assert report.verified
    assert report.num_tensors == len(tensors)
    return root


def test_torch_loads_every_dtype_and_shape(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    loaded = {name: torch.empty_like(value) for name, value in tensors.items()}
    dcp.load(loaded, checkpoint_id=folder / "dcp", no_dist=True)
    for name, value in tensors.items():
        assert raw(loaded[name]) == raw(value), name


def test_files_are_bounded(folder: Path) -> None:
    files = sorted((folder / "dcp").glob("*.distcp"))
    assert len(files) > 5
    # One row of 36,000 bytes cannot be cut.
    assert sorted(file.stat().st_size > 16_000 for file in files).count(True) == 1


def test_metadata_says_what_torchs_own_says(
    tensors: dict[str, torch.Tensor], folder: Path, tmp_path: Path
) -> None:
    dcp.save(dict(tensors), checkpoint_id=tmp_path / "torch", no_dist=True)
    expected = dcp.FileSystemReader(tmp_path / "torch").read_metadata()
    found = dcp.FileSystemReader(folder / "dcp").read_metadata()
    assert isinstance(found, Metadata)
    assert found.planner_data == expected.planner_data
    assert found.version == expected.version
    assert found.state_dict_metadata.keys() == expected.state_dict_metadata.keys()
    for name, mine in found.state_dict_metadata.items():
        theirs = expected.state_dict_metadata[name]
        assert isinstance(mine, TensorStorageMetadata)
        assert (mine.properties, mine.size) == (theirs.properties, theirs.size), name
        if len(mine.chunks) == 1:
            assert mine.chunks == theirs.chunks, name
    cut = found.state_dict_metadata["long.rows"].chunks
    assert [tuple(chunk.sizes) for chunk in cut] == [(254, 7), (254, 7), (254, 7), (251, 7)]


def test_there_and_back_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    report = reshard.convert(folder / "dcp", tmp_path / "hf", max_shard_size="16KB")
    assert report.verified
    with Sources() as sources:
        before = huggingface.read(folder / "hf", sources, Selection()).entries
        after = huggingface.read(tmp_path / "hf", sources, Selection()).entries
    assert before.keys() == after.keys()
    for name, entry in before.items():
        assert after[name].spec == entry.spec
        assert elements(after[name]) == elements(entry), name


def test_the_same_input_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    for threads in (1, 3):
        reshard.convert(
            folder / "hf", tmp_path / "dcp", to="dcp", max_shard_size="16KB", threads=threads,
            overwrite=True,
        )  # fmt: skip
        for file in (folder / "dcp").iterdir():
            assert (tmp_path / "dcp" / file.name).read_bytes() == file.read_bytes(), file.name


def test_fsdp_models_load_it_at_every_world_size(tmp_path: Path) -> None:
    """FSDP2 on 1, 2 and 4 ranks and FSDP1 on 2: each gathers what the safetensors file holds."""
    assert_loaded(tmp_path, ("fsdp2-1", "fsdp2-2", "fsdp2-4", "fsdp1-2"))


def assert_loaded(folder: Path, kinds: Iterable[str], device: str = "cpu") -> None:
    """A `Decoder` made into DCP under `folder` is what each kind of loaded model gathers from
    it."""
    torch.manual_seed(2)
    hf = folder / "hf"
    hf.mkdir()
    save_file(models.Decoder().state_dict(), hf / "model.safetensors", {"format": "pt"})
    reshard.convert(hf, folder / "dcp", to="dcp", max_shard_size="4KB")
    run_oracle("load", str(folder / "dcp"), str(folder), device=device)
    expected = load_file(hf / "model.safetensors")
    for kind in kinds:
        found = load_file(folder / f"{kind}.safetensors")
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert raw(found[name]) == raw(value), (kind, name)
