"""Any tensor, cut in any way that tiles it, is read as it was; any damage is a stated error."""

from __future__ import annotations

import io
import itertools
import pickle
import random
import tempfile
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

import reshard
from reshard.errors import ReshardError
from tests.fsdp.conftest import Oracle
from tests.fsdp.elements import elements

_DTYPES = (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool)
Cuts = list[list[tuple[int, int]]]


@st.composite
def _cut_tensors(draw: st.DrawFn) -> tuple[torch.Tensor, Cuts]:
    """A tensor, and for each dimension the ranges it is cut into, some of them empty."""
    shape = draw(st.lists(st.integers(0, 5), max_size=4))
    dtype = draw(st.sampled_from(_DTYPES))
    count = torch.Size(shape).numel()
    tensor = (torch.arange(count) % 2 if dtype == torch.bool else torch.arange(count)).to(dtype)
    cuts = []
    for size in shape:
        inner = draw(st.lists(st.integers(0, size), max_size=3))
        cuts.append(list(itertools.pairwise(sorted([0, size, *inner]))))
    return tensor.reshape(shape), cuts


@given(st.lists(_cut_tensors(), min_size=1, max_size=4), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_cut_is_read_as_it_was(
    tensors: list[tuple[torch.Tensor, Cuts]], chance: random.Random
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _save(folder, tensors, chance)
        found = reshard.open(folder).catalog.entries
        for number, (tensor, _) in enumerate(tensors):
            entry = found[f"t{number}"]
            assert entry.spec.shape == tuple(tensor.shape)
            assert elements(entry) == bytes(tensor.reshape(-1).view(torch.uint8).tolist())


def _save(folder: Path, tensors: list[tuple[torch.Tensor, Cuts]], chance: random.Random) -> None:
    """Write the chunks in any order over three files, with torch's own classes."""
    described: dict[str, TensorStorageMetadata] = {}
    items = []
    for number, (tensor, cuts) in enumerate(tensors):
        boxes = list(itertools.product(*cuts))
        chance.shuffle(boxes)
        chunks = []
        for box in boxes:
            offsets = torch.Size([start for start, _ in box])
            part = tensor[tuple(slice(start, stop) for start, stop in box)].clone()
            chunks.append(ChunkStorageMetadata(offsets, part.size()))
            items.append((MetadataIndex(f"t{number}", offsets), part))
        properties = TensorProperties(dtype=tensor.dtype)
        described[f"t{number}"] = TensorStorageMetadata(properties, tensor.size(), chunks)
    chance.shuffle(items)
    files: dict[str, bytes] = {}
    stored = {}
    for index, part in items:
        # torch writes the empty chunks too; of those with one offset, the last stands.
        file = f"__{chance.randrange(3)}_0.distcp"
        stream = io.BytesIO()
        torch.save(part, stream)
        start = len(files.setdefault(file, b""))
        if part.numel() or index not in stored:
            stored[index] = _StorageInfo(file, start, len(stream.getvalue()))
        files[file] += stream.getvalue()
    for file, data in files.items():
        (folder / file).write_bytes(data)
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata(described, storage_data=stored)))


@pytest.mark.parametrize("name", ["fsdp2-w2", "zstd", "safetensors-extras", "hf-sharded"])
def test_any_damage_is_a_stated_error(oracle: Oracle, tmp_path: Path, name: str) -> None:
    folder = oracle.copy(name, tmp_path)
    files = {file: file.read_bytes() for file in sorted(folder.iterdir())}
    chance = random.Random(name)
    refusals: list[ReshardError] = []
    for _ in range(100):
        file = chance.choice(list(files))
        data = bytearray(files[file])
        place = chance.randrange(len(data))
        if chance.random() < 0.7:
            data[place] = chance.randrange(256)
        else:
            del data[place : place + chance.randrange(1, 99)]
        file.write_bytes(data)
        try:
            reshard.open(folder)
        except ReshardError as error:
            refusals.append(error)
        file.write_bytes(files[file])
    assert refusals
    assert all(error.path is not None for error in refusals)
