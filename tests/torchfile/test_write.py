"""Archives laid out here are what torch, torch's DCP, Python's zipfile and reshard itself read."""

from __future__ import annotations

import io
import math
import zipfile
import zlib
from pathlib import Path

import pytest
import torch

from reshard.containers.torch import TensorRef, read
from reshard.containers.torch.write import lay_out_tensor
from reshard.core import dtypes
from reshard.core.dtypes import BFLOAT16, FLOAT32, DType
from reshard.core.tensors import whole
from reshard.storage.local import Sources
from tests.torchfile.support import raw_bytes, read_bytes, same_tensor
from tests.torchfile.test_values import random

SHAPES = [(), (0,), (3,), (2, 3, 4), (5, 0, 2), (1, 1), (300,)]


def build(weights: torch.Tensor, dtype: DType) -> bytes:
    archive = lay_out_tensor(dtype, tuple(weights.shape))
    data = raw_bytes(weights)
    assert len(data) == archive.data_nbytes
    content = archive.before + data + archive.after(zlib.crc32(data))
    assert len(content) == archive.nbytes
    return content


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", dtypes.ALL, ids=str)
def test_torch_reads_it(tmp_path: Path, dtype: DType, shape: tuple[int, ...]) -> None:
    weights = random(dtype, *shape)
    content = build(weights, dtype)
    loaded = torch.load(io.BytesIO(content), weights_only=True)
    assert same_tensor(loaded, weights)
    assert loaded.is_contiguous()
    assert not loaded.requires_grad
    assert zipfile.ZipFile(io.BytesIO(content)).testzip() is None
    file = read_bytes(tmp_path / "x.pt", content)
    assert isinstance(file.value, TensorRef)
    assert file.value.fragment().box == whole(shape)
    assert len(file.records) == (1 if weights.numel() else 0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", dtypes.ALL, ids=str)
def test_the_data_is_aligned_as_torch_aligns_it(dtype: DType, shape: tuple[int, ...]) -> None:
    archive = lay_out_tensor(dtype, shape)
    assert len(archive.before) % 64 == 0
    assert archive.data_nbytes == math.prod(shape) * dtype.itemsize


def test_it_has_the_entries_that_torch_writes() -> None:
    weights = torch.arange(6.0)
    stream = io.BytesIO()
    torch.save(weights, stream)
    theirs = zipfile.ZipFile(stream).infolist()
    ours = zipfile.ZipFile(io.BytesIO(build(weights, FLOAT32))).infolist()
    assert [entry.filename for entry in ours] == [
        entry.filename for entry in theirs if "serialization_id" not in entry.filename
    ]
    for mine in ours:
        other = next(entry for entry in theirs if entry.filename == mine.filename)
        assert mine.flag_bits == other.flag_bits
        if not mine.filename.endswith("data.pkl"):
            assert (mine.CRC, mine.file_size) == (other.CRC, other.file_size)


def test_the_same_input_gives_the_same_bytes() -> None:
    assert lay_out_tensor(BFLOAT16, (3, 5)) == lay_out_tensor(BFLOAT16, (3, 5))


@pytest.mark.parametrize("numel", [(1 << 30) - 1, 1 << 30, (1 << 31) + 1], ids=str)
def test_tensors_of_4_gib_and_more(tmp_path: Path, numel: int) -> None:
    archive = lay_out_tensor(FLOAT32, (numel,))
    path = tmp_path / "x.pt"
    with path.open("wb") as file:
        file.write(archive.before)
        # A hole: takes no space. The last element is 1.
        file.seek(archive.data_nbytes - 4, 1)
        file.write(torch.ones(1).numpy().tobytes())
        file.write(archive.after(7))
    loaded = torch.load(path, mmap=True, weights_only=True)
    assert loaded.shape == (numel,)
    assert (loaded[0], loaded[-1]) == (0, 1)
    with zipfile.ZipFile(path) as zipped:
        assert zipped.getinfo("archive/data/0").file_size == 4 * numel
        # Behind the data: it is found although the data descriptor has 64-bit sizes.
        assert zipped.read("archive/version") == b"3\n"
    with Sources() as sources:
        value = read(sources.open(path)).value
    assert isinstance(value, TensorRef)
    assert value.extent.offset == len(archive.before)
